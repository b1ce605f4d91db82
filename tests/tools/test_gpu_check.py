"""tools/gpu_check.py without a GPU: what cannot run says why, the rest goes on."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import click
import numpy as np
import onnx
import pytest
from click.testing import CliRunner

from reptrt.cli import main as reptrt_main
from reptrt.core import choices
from reptrt.trt import driver
from reptrt.trt.driver import Gpu
from tests.support.helpers import TOOLS, load_tool
from tests.support.onnx_nets import plain_chain

TOOL = TOOLS / "gpu_check.py"
BENCH_ROW = {"batch": 8, "median_ms": 0.5, "throughput_ips": 16000.0, "ratio": 0.4}

gpu_check = load_tool("gpu_check")


def in_this_process(command: Sequence[str]) -> tuple[int, str]:
    """Run what would be a process of its own, without its imports."""
    if command[1:3] == ["-m", "reptrt"]:
        done = CliRunner().invoke(reptrt_main, list(command[3:]))
    else:
        done = CliRunner().invoke(gpu_check.main, list(command[2:]))
    return done.exit_code, done.stderr


@pytest.fixture
def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(driver, "find_gpu", lambda: "no NVIDIA driver on this machine")
    onnx.save(plain_chain(), str(tmp_path / "m.onnx"))
    pixels = np.random.default_rng(0).integers(0, 256, (32, 3, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", x=pixels)
    (tmp_path / "out").mkdir()
    return gpu_check.Check(
        tmp_path / "m.onnx", tmp_path / "images.npz", tmp_path / "out", in_this_process
    )


def states(steps: Sequence[Any]) -> dict[str, str]:
    return {step.name: step.state for step in steps}


NETS, RECIPES = ["fp32", "int8-nosplit-fp16"], ["fast"]


@pytest.mark.slow
def test_without_a_gpu_all_that_can_run_runs(check: Any) -> None:
    pytest.importorskip("tensorrt_rtx")
    steps = gpu_check.check_all(check, NETS, RECIPES, [1, 4], 16)
    found = states(steps)
    done = ["environment", "calibrate fast cpu", "calibrate without splits"]
    done += [f"fp16 rest {net}" for net in ("fp16", "int8-fp16", "int8-nosplit-fp16")]
    done += [f"tensorrt-rtx build {net}" for net in NETS]
    done += ["tensorrt-rtx audit int8-nosplit-fp16", "simulation cpu"]
    assert {name: found[name] for name in done} == dict.fromkeys(done, "done")
    result = {step.name: step.result for step in steps}
    rests = {net: result[f"tensorrt-rtx build {net}"]["rest"]["state"] for net in NETS}
    assert rests == {"fp32": "fp32", "int8-nosplit-fp16": "was fp16"}
    why = {step.name: step.why for step in steps}
    assert "using an engine needs an NVIDIA GPU" in why["tensorrt-rtx parity int8-nosplit-fp16"]
    assert "using an engine needs an NVIDIA GPU" in why["tensorrt-rtx bench"]
    assert "using an engine needs an NVIDIA GPU" in why["tensorrt-rtx bench, no host copies"]
    written = json.loads((check.out / "gpu_check.json").read_text())
    assert [step["name"] for step in written["steps"]] == list(found)
    assert written["steps"][0]["result"]["no_gpu"] == "no NVIDIA driver on this machine"
    text = "\n".join(gpu_check.table(steps))
    assert "tensorrt-rtx bench: failed: " in text
    assert "simulation cpu: head: the same bits as onnxruntime" in text
    assert "simulation cuda: failed: --device cuda: torch finds no CUDA device" in text
    assert not (check.out / "answer.json").exists()
    assert {path for path in check.out.iterdir()} <= {*check.made(), check.out / "gpu_check.json"}


def test_every_recipe_is_calibrated_on_both_devices(check: Any, monkeypatch: Any) -> None:
    commands: list[list[str]] = []

    def refusing(command: Sequence[str]) -> tuple[int, str]:
        commands.append([Path(word).name for word in command])
        return 1, "error: no"

    monkeypatch.setattr(gpu_check, "DEFAULT_RECIPE", "balanced")
    recorded = gpu_check.Check(check.model, check.data, check.out, refusing)
    gpu_check.calibrations(recorded, ["fast", "balanced"], 16)
    asked = [c for c in commands if "--device" in c]
    assert [(c[c.index("--recipe") + 1], c[c.index("--device") + 1]) for c in asked] == [
        ("fast", "cpu"),
        ("fast", "cuda"),
        ("balanced", "cpu"),
        ("balanced", "cuda"),
    ]
    outputs = [c[c.index("-o") + 1] for c in asked]
    assert outputs == ["int8-fast.onnx", "int8-fast-cuda.onnx", "int8.onnx", "int8-cuda.onnx"]
    found = {step.name: (step.state, step.why) for step in recorded.steps}
    assert found["calibrate balanced cuda"] == ("failed", "no")
    both = ("skipped", "needs calibration on the CPU and with CUDA")
    assert found["calibrate balanced cpu against cuda"] == both
    assert found["fp16 rest int8-fp16"] == ("skipped", "int8.onnx was not made")


def test_recipes_are_those_of_the_library() -> None:
    assert get_args(choices.Effort) == gpu_check.RECIPES
    assert gpu_check.DEFAULT_RECIPE in gpu_check.RECIPES


def test_a_crash_is_named_and_what_needs_its_file_is_skipped(check: Any) -> None:
    pytest.importorskip("tensorrt_rtx")

    def crashing(command: Sequence[str]) -> tuple[int, str]:
        return (-11, "") if "build-engine" in command else in_this_process(command)

    broken = gpu_check.Check(check.model, check.data, check.out, crashing)
    (check.out / "fp32.tensorrt-rtx.engine").write_bytes(b"of an earlier check")
    steps = gpu_check.check_all(broken, ["fp32"], RECIPES, [1], 16)
    why = {step.name: (step.state, step.why) for step in steps}
    assert why["tensorrt-rtx build fp32"] == ("failed", "crashed: SIGSEGV")
    missing = ("skipped", "fp32.tensorrt-rtx.engine was not made")
    assert why["tensorrt-rtx parity fp32"] == missing
    assert why["tensorrt-rtx bench"] == ("skipped", "no engine was built")


def test_an_engine_that_does_not_run_is_not_timed(check: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(gpu_check, "_load", lambda name: None)
    timed: list[list[str]] = []

    def process(command: Sequence[str]) -> tuple[int, str]:
        if "bench" in command:
            timed.append([Path(word).name for word in command if word.endswith(".engine")])
        if "build-engine" in command:
            Path(command[command.index("-o") + 1]).touch()
        if "parity" in command and "/fp32." in command[3]:
            return 1, "error: refused"
        Path(command[command.index("--json") + 1]).write_text('{"outputs": {}}')
        return 0, ""

    (check.out / "fp16.onnx").touch()
    running = gpu_check.Check(check.model, check.data, check.out, process)
    gpu_check.engines(running, "tensorrt", ["fp32", "fp16"], [1], 16)
    fp16 = "fp16.tensorrt.engine"
    assert timed == [[fp16, fp16]] * 2  # twice: it is the baseline too


@pytest.mark.parametrize("current", [True, False])
def test_rtx_builds_for_the_gpu_that_is_there_or_portably(
    check: Any, monkeypatch: pytest.MonkeyPatch, current: bool
) -> None:
    monkeypatch.setattr(driver, "find_gpu", lambda: Gpu("NVIDIA H100", "sm90", (13, 0)))
    monkeypatch.setattr(gpu_check, "_load", lambda name: None)
    commands: list[Sequence[str]] = []

    def building(command: Sequence[str]) -> tuple[int, str]:
        commands.append(command)
        if "build-engine" not in command or ("current" in command and not current):
            return 1, "error: sm90 is not known"
        Path(command[command.index("--json") + 1]).write_text('{"targets": []}')
        return 0, ""

    built = gpu_check.Check(check.model, check.data, check.out, building)
    gpu_check.engines(built, "tensorrt-rtx", ["fp32"], [1], 16)
    step = built.steps[0]
    assert (step.name, step.state) == ("tensorrt-rtx build fp32", "done")
    portable = {} if current else {"not_for_the_current_gpu": "sm90 is not known"}
    assert step.result == {"targets": [], **portable}
    builds = [c for c in commands if "build-engine" in c]
    assert ["current" in c for c in builds] == ([True] if current else [True, False])
    line = "tensorrt-rtx build fp32: portable engine: sm90 is not known"
    assert (line in gpu_check.table(built.steps)) != current


def test_what_is_lacking_is_said_before_anything_is_imported(tmp_path: Path) -> None:
    assert gpu_check.lacking(["json", "no_such_thing", "no_such.thing", "json.nothing"]) == [
        "no_such_thing",
        "no_such.thing",
        "json.nothing",
    ]
    hidden = "import sys, runpy; sys.modules['click'] = None; runpy.run_path(sys.argv[1])"
    done = gpu_check.run_process([sys.executable, "-c", hidden, str(TOOL)])
    assert done == (1, "error: cannot be imported: click; install them first\n")


def test_no_tensorrt_at_all(check: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "_load", lambda name: f"{name} is not installed")
    gpu_check.engines(check, "tensorrt", ["int8"], [1], 16)
    (step,) = check.steps
    assert (step.state, step.why) == ("skipped", "tensorrt is not installed")


def test_the_model_is_not_replaced(check: Any) -> None:
    own = gpu_check.Check(check.out / "fp16.onnx", check.data, check.out, in_this_process)
    with pytest.raises(click.UsageError, match=r"fp16\.onnx in .* would be replaced"):
        gpu_check.check_all(own, ["fp16"], RECIPES, [1], 16)


@pytest.mark.parametrize(
    ("status", "said", "expected"),
    [
        (1, "noise\nerror: the reason\nlast words\n", "the reason"),
        (1, "Traceback\nValueError: bug\n", "ValueError: bug"),
        (-6, "", "crashed: SIGABRT"),
        (-250, "", "crashed: signal 250"),
        (2, "", "exit status 2"),
    ],
    ids=["stated", "bug", "abort", "unknown signal", "silent"],
)
def test_reasons(status: int, said: str, expected: str) -> None:
    assert gpu_check.reason(status, said) == expected


def test_a_process_is_run() -> None:
    code = "import sys; print('error: no', file=sys.stderr); sys.exit(3)"
    assert gpu_check.run_process([sys.executable, "-c", code]) == (3, "error: no\n")
    code = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    assert gpu_check.run_process([sys.executable, "-c", code])[0] == -9


def test_calibrations_are_compared() -> None:
    def report(seconds: float, **scales: float) -> dict[str, Any]:
        tensors = [{"tensor": name, "scale": scale} for name, scale in scales.items()]
        return {"seconds": {"collect": seconds, "write": 1.0}, "tensors": tensors}

    found = gpu_check.compare_calibrations(report(9, a=0.5, b=2.0), report(2, a=0.5, b=1.9))
    assert (found["cpu_seconds"], found["cuda_seconds"]) == (10, 3)
    assert found["worst_tensor"] == "b"
    assert found["max_relative_difference"] == pytest.approx(0.05)
    with pytest.raises(gpu_check.StepError, match="different tensors"):
        gpu_check.compare_calibrations(report(9, a=0.5), report(2, b=1.9))


def test_outputs_are_compared_one_by_one() -> None:
    logits = [np.eye(4, dtype=np.float32), np.eye(4, dtype=np.float32)]
    features = [np.ones((4, 2, 3, 3), np.float32)] * 2
    reference = {"logits": logits, "features": features}
    found = {"features": [f + 0.1 for f in features], "logits": [x[::-1] for x in logits]}
    outputs = gpu_check.compare_outputs(reference, found)["outputs"]
    assert outputs["logits"]["agreement"] == 0.0
    assert outputs["features"]["sqnr_db"] == pytest.approx(20.0, abs=1e-4)
    assert outputs["features"]["max_difference"] == pytest.approx(0.1)
    same = gpu_check.compare_outputs(reference, reference)["outputs"]
    assert same["logits"]["sqnr_db"] == 999.0
    with pytest.raises(gpu_check.StepError, match="lacks the outputs features"):
        gpu_check.compare_outputs(reference, {"logits": logits})


def test_parity_of_two_files_that_run_here(tmp_path: Path, check: Any) -> None:
    """With the ONNX file in the engine's place."""
    answer = tmp_path / "answer.json"
    command = ["x", "y", "parity", str(check.model), str(check.model), "--data", str(check.data)]
    status, said = in_this_process([*command, "--images", "32", "--json", str(answer)])
    assert (status, said) == (0, "")
    assert json.loads(answer.read_text())["outputs"]["head"]["agreement"] == 1.0


def test_the_table_has_a_row_per_engine_and_batch() -> None:
    def done(name: str, **result: Any) -> Any:
        return gpu_check.Step(name, "done", "", 1.0, result)

    file = "/out/int8-fp16.tensorrt.engine"
    parity = {"logits": {"sqnr_db": 40.04}, "features": {"sqnr_db": 55.0}}
    said = {"file": file, "batch": 8, "lines": ["hardly faster", "because"]}
    steps = [
        done(
            "tensorrt bench",
            results=[BENCH_ROW | {"file": file}],
            remarks=["the GPU was held back: power cap"],
            explanations=[said],
        ),
        done(
            "tensorrt bench, no host copies", results=[BENCH_ROW | {"file": file, "median_ms": 0.3}]
        ),
        done("tensorrt parity int8-fp16", outputs=parity),
        done("simulation cuda", outputs={"logits": {"max_difference": 0.25}}),
        done("tensorrt audit int8-fp16", built=22, planned=["a"] * 23),
        done(
            "calibrate fast cpu against cuda",
            cpu_seconds=10.0,
            cuda_seconds=3.0,
            max_relative_difference=1e-6,
        ),
        gpu_check.Step("calibrate cuda", "failed", "no CUDA"),
    ]
    lines = gpu_check.table(steps)
    assert lines[2] == "| tensorrt int8-fp16 | 8 | 0.500 | 0.300 | 16000 | 0.40 | 40.0 | 22 of 23 |"
    assert lines[3:] == [
        "tensorrt bench: the GPU was held back: power cap",
        "int8-fp16.tensorrt.engine, batch 8: hardly faster",
        "int8-fp16.tensorrt.engine, batch 8: because",
        "simulation cuda: logits: differs from onnxruntime by 2.5e-01 at most",
        "calibrate fast cpu against cuda: CPU 10.0 s, CUDA 3.0 s, scales differ by 1.0e-06 at most",
        "calibrate cuda: failed: no CUDA",
    ]
