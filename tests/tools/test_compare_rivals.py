"""tools/compare_rivals.py without a rival: fake runners write a file, fail, or take too long."""

import importlib.util
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

from reptrt.judge.evaluate import evaluate
from reptrt.judge.options import EvaluateOptions
from reptrt.pipeline import CalibrateOptions, calibrate
from tests.support.coco_sets import constant_detector, outputs_for, write_set
from tests.support.helpers import TOOLS, load_tool
from tests.support.onnx_nets import Builder, plain_chain

RUNNERS = {  # how a rival can behave
    "copies": "shutil.copy(job.options['file'], job.output)",
    "counts": "(job.output.parent / 'counted').open('a').write('x'); "
    "shutil.copy(job.options['file'], job.output)",
    "fails": "print('a word'); raise RuntimeError('no such thing | as this')",
    "writes_nothing": "pass",
    "sleeps": "time.sleep(60)",
    "uses_memory": "np.ones(int(job.options['mib']) << 17); "
    "shutil.copy(job.options['file'], job.output)",
}

tool = load_tool("compare_rivals")
measure, environments = tool.measure, tool.environments
Row, Result = tool.Row, tool.Result
Environment = sys.modules["rivals.rows"].Environment
table_module = sys.modules["rivals.table"]
FAKE = Environment("fake", ("a-package==1",))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a float net, an INT8 file of it, labelled images and fake runners."""
    tmp_path = tmp_path_factory.mktemp("made")
    onnx.save(plain_chain(), tmp_path / "net.onnx")
    pixels = np.random.default_rng(0).integers(0, 256, (24, 3, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", x=pixels, y=np.arange(24) % 5)
    options = CalibrateOptions(images=24, split="none")
    calibrate(tmp_path / "net.onnx", tmp_path / "images.npz", tmp_path / "ready.int8.onnx", options)
    sources = tmp_path / "runners"
    sources.mkdir()
    for name in ("job", "reptrt_calibrate"):
        shutil.copy(TOOLS / "rivals" / f"{name}.py", sources)
    for name, body in RUNNERS.items():
        (sources / f"{name}.py").write_text(
            "import shutil, time\nimport numpy as np\nfrom job import run\n"
            f"def quantize(job):\n    {body}\nrun(quantize)\n"
        )
    return tmp_path


@pytest.fixture
def files(made: Path, tmp_path: Path) -> Path:
    """The same in a folder of the test's own."""
    return Path(shutil.copytree(made, tmp_path / "files"))


@pytest.fixture
def at(files: Path) -> Any:
    (files / "out").mkdir()
    bench = measure.Bench(
        files / "net.onnx", files / "out", files / "environments", 60.0, 0.0, files / "runners"
    )
    measure.write_images(bench, files / "images.npz", 16)
    return bench


@pytest.fixture(autouse=True)
def no_installing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environments, "make", lambda environment, folder: Path(sys.executable))
    monkeypatch.setattr(environments, "versions", lambda environment, folder: {"a-package": "1"})


def row(runner: str, files: Path, **options: object) -> Any:
    given = {"file": str(files / "ready.int8.onnx"), **options}
    return Row(runner, f"the one that {runner}", runner, FAKE, given)


def test_images_are_those_of_the_float_net(files: Path, at: Any) -> None:
    images = np.load(at.images)
    pixels = np.load(files / "images.npz")["x"]
    assert images.dtype == np.float32
    assert images.shape == (16, 3, 8, 8)
    for image in images:  # no metadata: x / 255
        distances = np.abs(pixels / 255 - image).reshape(24, -1).max(axis=1)
        assert distances.min() < 1e-6


def test_a_rival_is_measured_and_judged(files: Path, at: Any) -> None:
    [result] = measure.judge(
        at, [tool.one_row(at, row("copies", files))], measure.Test(files / "images.npz")
    )
    assert result.why is None
    assert 0 < result.seconds < 10
    assert result.peak_rss_mib > 10
    assert (result.layers, result.int8_layers, result.lint_errors) == (3, 3, 0)
    [expected] = evaluate(
        [files / "ready.int8.onnx"],
        files / "images.npz",
        EvaluateOptions(reference=files / "net.onnx"),
    ).results
    found = (result.top1, result.agreement, result.sqnr_db)
    assert found == (expected.top1, expected.agreement, expected.sqnr_db)
    assert result.top1_change == expected.measures["top1_change"] is not None
    nodes = onnx.load(files / "ready.int8.onnx").graph.node
    assert result.nodes == len(nodes)


def test_a_detector_is_judged_by_its_boxes(tmp_path: Path, files: Path) -> None:
    """The "rival" returns the float net's file: the same mAP, and no top-1 in the table."""
    boxes = outputs_for(write_set(tmp_path / "val"))[0]
    onnx.save(constant_detector(boxes), files / "net.onnx")
    (files / "out").mkdir()
    sources = files / "runners"
    bench = measure.Bench(files / "net.onnx", files / "out", files, 60.0, 0.0, sources)
    measure.write_images(bench, tmp_path / "val", 12)
    test = measure.Test(tmp_path / "val", task="detect")
    copied = tool.one_row(bench, row("copies", files, file=str(files / "net.onnx")))
    [result] = measure.judge(bench, [copied], test)
    [expected] = evaluate(
        [files / "net.onnx"], tmp_path / "val", EvaluateOptions(task="detect")
    ).results
    assert result.map == expected.measures["map"] > 0
    assert tool.float_row(bench, test)["accuracy"] == result.map
    heading = table_module.table([result], (1,))[0]
    assert "| mAP | " in heading
    assert "top-1" not in heading


def test_top1_has_its_standard_error_and_the_paired_interval() -> None:
    change = {"value": -0.013, "low": -0.0211, "high": -0.005}
    result = Result("a", "A", True, "", images=10_000, top1=0.5, top1_change=change)
    header, _, line, *_ = table_module.table([result], (1,))
    assert header.startswith("| | top-1 | change (95 %) |")
    assert line.startswith("| A | 50.00 ± 0.50 % | -1.30 (-2.11 to -0.50) |")


@pytest.mark.slow
def test_peak_memory_is_the_rivals_own(files: Path, at: Any) -> None:
    small = measure.quantize(at, row("uses_memory", files, mib=1)).peak_rss_mib
    large = measure.quantize(at, row("uses_memory", files, mib=200)).peak_rss_mib
    assert 180 < large - small < 230


@pytest.mark.slow
@pytest.mark.parametrize(
    ("runner", "why"),
    [
        ("fails", r"RuntimeError: no such thing / as this"),
        ("writes_nothing", "exit status 0, but no file and no message"),
    ],
)
def test_a_failure_is_a_row_with_its_reason(files: Path, at: Any, runner: str, why: str) -> None:
    result = tool.one_row(at, row(runner, files))
    assert result.why == why
    timed, _ = measure.time_all(at, [result], (1,))
    lines = table_module.table(timed, (1,))
    assert lines[-1] == f"(1) failed: {why}."
    assert lines[2].count("|") == lines[0].count("|")


def test_a_file_that_cannot_be_judged_is_a_row_with_its_reason(files: Path, at: Any) -> None:
    b = Builder()
    onnx.save(b.model(b.head("x", classes=4)), files / "broken.onnx")
    good = tool.one_row(at, row("copies", files))
    bad = tool.one_row(at, row("counts", files, file=str(files / "broken.onnx")))
    judged = measure.judge(at, [good, bad], measure.Test(files / "images.npz"))
    assert judged[0].why is None
    assert judged[0].agreement > 0.5
    assert "they cannot be compared" in judged[1].why


@pytest.mark.slow
def test_a_rival_that_takes_too_long_is_stopped(files: Path, at: Any) -> None:
    impatient = replace(at, timeout=1.0)
    assert tool.one_row(impatient, row("sleeps", files)).why == "took more than 1 s"


def test_an_environment_that_cannot_be_made_is_a_row(
    files: Path, at: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(environment: Any, folder: Path) -> Path:
        raise environments.NotInstalledError("no matching distribution")

    monkeypatch.setattr(environments, "make", refuses)
    assert tool.one_row(at, row("copies", files)).why == "no matching distribution"


def test_nothing_is_done_twice(files: Path, at: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def times() -> int:
        return len((at.folder / "counted").read_text())

    first = tool.one_row(at, row("counts", files))
    assert tool.one_row(at, row("counts", files)) == first
    assert times() == 1
    tool.one_row(at, row("counts", files, other=1))
    assert times() == 2
    monkeypatch.setattr(environments, "versions", lambda environment, folder: {"a-package": "2"})
    tool.one_row(at, row("counts", files, other=1))
    assert times() == 3
    (at.folder / "counts.onnx").unlink()
    tool.one_row(at, row("counts", files, other=1))
    assert times() == 4


def test_a_failure_is_tried_again(files: Path, at: Any) -> None:
    asked = row("copies", files, file=str(files / "later.onnx"))
    assert "later.onnx" in tool.one_row(at, asked).why
    shutil.copy(files / "ready.int8.onnx", files / "later.onnx")
    assert tool.one_row(at, asked).why is None


def test_preprocessing_goes_into_the_rivals_file(files: Path, at: Any) -> None:
    stored = json.dumps({"channels": 3, "height": 8, "width": 8, "mean": [0.5] * 3, "std": [1] * 3})
    for name, value in (("net.onnx", stored), ("ready.int8.onnx", None)):
        model = onnx.load(files / name)
        onnx.helper.set_model_props(model, {"reptrt.preprocess": value} if value else {})
        onnx.save(model, files / name)
    measure.quantize(at, row("copies", files))
    props = {p.key: p.value for p in onnx.load(at.folder / "copies.onnx").metadata_props}
    assert props == {"reptrt.preprocess": stored}


@pytest.mark.slow
def test_the_whole_comparison(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = Row("reptrt-fast-0", "reptrt fast", "reptrt_calibrate", options={"max_overhead": 0.0})
    chosen = (ours, row("copies", files), row("fails", files))
    monkeypatch.setattr(tool, "rows", lambda iterations: chosen)
    monkeypatch.setattr(
        tool, "Bench", lambda *args: measure.Bench(*args, sources=files / "runners")
    )
    arguments = [str(files / "net.onnx"), "--calib", str(files / "images.npz"), "-n", "16"]
    arguments += ["--test", str(files / "images.npz"), "--batch", "1,2", "-o", str(files / "o")]
    arguments += ["--bench-seconds", "0"]
    done = CliRunner().invoke(tool.main, arguments)
    assert done.exit_code == 0, done.output
    written = json.loads((files / "o/rivals.json").read_text())
    [net] = written["nets"]
    states = [(r["name"], r["why"] is None) for r in net["rows"]]
    assert states == [("reptrt-fast-0", True), ("copies", True), ("fails", False)]
    assert set(net["rows"][0]["ratios"]) == {"1", "2"}
    assert net["rows"][2]["ratios"] is None
    assert written["environments"] == {"fake": {"a-package": "1"}}
    text = (files / "o/rivals.md").read_text()
    assert text in done.output
    assert "(1) failed: RuntimeError" in text
    same = calibrated_here(files)
    assert (files / "o/net/reptrt-fast-0.onnx").read_bytes() == same


def calibrated_here(files: Path) -> bytes:
    """What `reptrt calibrate` makes of the same images; they say nothing of where they lay."""
    out = files / "again.onnx"
    calibrate(
        files / "net.onnx",
        files / "o/net/images.npy",
        out,
        CalibrateOptions(images=16, max_overhead=0.0),
    )
    return out.read_bytes()


def result(name: str, rival: bool = True, **values: Any) -> Any:
    given = {"lint_errors": 0, "ratios": {"1": (values.pop("ratio", 0.5), 0.4, 0.6)}, **values}
    return Result(name, name, rival, "", **given)


def leads(results: Sequence[Any]) -> dict[str, bool]:
    return {f["column"]: f["rival_is_first"] for f in table_module.firsts(results, (1,))}


def test_who_is_first() -> None:
    ours = result("ours", rival=False, sqnr_db=30.0, seconds=2.0, ratio=0.50)
    rival = result("rival", sqnr_db=20.0, seconds=1.0, ratio=0.49)
    found = leads([ours, rival])
    assert found == {"SQNR dB": False, "seconds": True, "latency, batch 1": False}
    assert leads([ours, result("rival", ratio=0.40)])["latency, batch 1"] is True
    assert leads([ours, result("rival", sqnr_db=30.1)])["SQNR dB"] is True


def test_what_tensorrt_refuses_is_not_first() -> None:
    ours = result("ours", rival=False, sqnr_db=30.0)
    refused = result("refused", sqnr_db=40.0, lint_errors=1)
    taken = result("taken", sqnr_db=20.0)
    [first] = [
        f for f in table_module.firsts([ours, refused, taken], (1,)) if "SQNR" in f["column"]
    ]
    assert first["rival"] == ["taken", "20.00"]
    assert first["rival_is_first"] is False


def test_rows_have_runners_and_names_of_their_own() -> None:
    rows = tool.rows(123)
    assert len({r.name for r in rows}) == len({r.title for r in rows}) == len(rows)
    for one in rows:
        assert (TOOLS / "rivals" / f"{one.runner}.py").exists()
    assert {r.environment.name for r in rows if r.environment} == {
        *("aimet", "inc", "modelopt", "nncf", "ort")
    }
    assert [r.options["adaround"] for r in rows if "adaround" in r.options] == [123]
    assert {r.options["method"] for r in rows if r.runner == "ort"} == {
        *("MinMax", "Entropy", "Percentile")
    }


class Pip:
    """Stands in for the commands that make an environment; counts installs."""

    def __init__(self) -> None:
        self.installed: list[list[str]] = []

    def __call__(self, command: list[str]) -> str:
        if "venv" in command:
            python = Path(command[-1]) / "bin" / "python"
            python.parent.mkdir(parents=True)
            python.touch()
        if "install" in command:
            self.installed.append(command[command.index("--disable-pip-version-check") + 1 :])
        return json.dumps([{"name": "A-Package", "version": "1"}]) if "list" in command else ""


def real_environments() -> ModuleType:
    """The module as it is, without what `no_installing` put in."""
    spec = importlib.util.spec_from_file_location(
        "real_environments", TOOLS / "rivals" / "environments.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_an_environment_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, pip = real_environments(), Pip()
    monkeypatch.setattr(real, "_run", pip)
    asked = replace(FAKE, without_dependencies=("b==2",))
    python = real.make(asked, tmp_path)
    assert python == tmp_path / "fake" / "bin" / "python"
    assert pip.installed == [["a-package==1"], ["--no-deps", "b==2"]]
    assert real.versions(asked, tmp_path) == {"a-package": "1"}
    real.make(asked, tmp_path)
    assert len(pip.installed) == 2
    real.make(FAKE, tmp_path)
    assert pip.installed[2:] == [["a-package==1"]]


def test_an_environment_half_made_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, pip = real_environments(), Pip()

    def stopped(command: list[str]) -> str:
        if "install" in command:
            raise real.NotInstalledError("stopped")
        return pip(command)

    monkeypatch.setattr(real, "_run", stopped)
    with pytest.raises(real.NotInstalledError, match="stopped"):
        real.make(FAKE, tmp_path)
    monkeypatch.setattr(real, "_run", pip)
    real.make(FAKE, tmp_path)
    assert pip.installed == [["a-package==1"]]


def test_what_pip_says_last_is_the_reason() -> None:
    command = [sys.executable, "-c", "import sys; sys.exit('a\\nERROR: No matching distribution')"]
    with pytest.raises(environments.NotInstalledError, match=r"ERROR: No matching distribution$"):
        environments._run(command)


def test_no_row_of_that_name(files: Path) -> None:
    arguments = [str(files / "net.onnx"), "--calib", str(files), "--rows", "nothing"]
    done = CliRunner().invoke(tool.main, arguments)
    assert done.exit_code == 2
    assert "no row has such a name" in done.output
