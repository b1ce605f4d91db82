"""Why INT8 is no faster: hand-made cases, then real files."""

import importlib.util
import json
import re
from pathlib import Path

import onnx
import pytest
from click.testing import CliRunner

from reptrt.cli import main
from reptrt.core.errors import ArtifactError
from reptrt.core.grid import Grid
from reptrt.graph.layer_costs import LayerCost
from reptrt.graph.net import model_from_net, net_from_model
from reptrt.graph.placement import place
from reptrt.graph.plan import plan_from_placement
from reptrt.graph.qdq import insert_qdq, quantize_weights
from reptrt.judge import explain as explain_module
from reptrt.judge.bench_report import BenchReport, Timing
from reptrt.judge.explain import Evidence, evidence, explain, explain_all
from reptrt.judge.options import BenchOptions
from reptrt.rewrite.split_coarse_fine import split_coarse_fine
from reptrt.trt.build import build_engine
from reptrt.trt.machine import Conditions
from reptrt.trt.options import BuildOptions
from tests.support import lint_graphs as graphs
from tests.support.onnx_nets import plain_chain
from tests.support.qdq_graphs import qdq_model, save

needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed"
)
DENSE = LayerCost("dense", 10**9, 10**6, True)  # 1000 a byte
DEPTHWISE = LayerCost("depthwise", 9 * 10**6, 2 * 10**6, True)  # 4.5 a byte
INT8 = Evidence(planned=10, calls=12, costs=(DENSE,))


def timing(
    ratio: tuple[float, float, float] | None = None,
    *,
    device: str = "cpu",
    median_ms: float = 10.0,
    file: str = "int8.onnx",
) -> Timing:
    """Return a timing with a ratio and its interval."""
    runner = "onnxruntime" if device == "cpu" else "tensorrt"
    twelve = [median_ms] * 12
    middle, low, high = ratio or (None, None, None)
    return Timing(file, runner, device, 1, None, 1, 100, *twelve, 100.0, middle, low, high)


BASE = timing((1.0, 1.0, 1.0), file="float.onnx")
SLOWER, SAME = (1.3, 1.2, 1.4), (0.99, 0.95, 1.03)


# --- the verdict ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "expected"),
    [
        (SAME, "no difference measurable (ratio 0.990 to float.onnx, 95 % interval 0.950 to 1.030"),
        ((1.0, 1.0, 1.0), "no difference measurable"),
        ((0.8, 0.5, 1.1), "no difference measurable"),
        (SLOWER, "slower (ratio 1.300 to float.onnx, 95 % interval 1.200 to 1.400)"),
        ((0.95, 0.94, 0.96), "hardly faster (ratio 0.950"),
    ],
    ids=["includes 1", "exactly 1", "wide", "slower", "hardly"],
)
def test_verdicts(ratio: tuple[float, float, float], expected: str) -> None:
    lines = explain(BASE, timing(ratio), INT8)
    assert lines[0].startswith(expected)
    assert len(lines) == 2  # and that nothing was found


@pytest.mark.parametrize("ratio", [None, (0.5, 0.49, 0.51), (0.89, 0.8, 0.99)])
def test_what_is_faster_or_has_no_ratio_needs_no_words(
    ratio: tuple[float, float, float] | None,
) -> None:
    assert explain(BASE, timing(ratio), INT8) == ()


def test_the_baseline_itself_is_not_explained() -> None:
    assert explain(BASE, BASE, INT8) == ()


def test_a_float_file_gets_a_verdict_only_where_the_table_is_not_enough() -> None:
    (line,) = explain(BASE, timing(SAME), Evidence())
    assert line.startswith("no difference measurable")
    assert explain(BASE, timing(SLOWER), Evidence()) == ()


# --- reasons -------------------------------------------------------------------------------------


def reasons(found: Evidence, **options: object) -> tuple[str, ...]:
    return explain(BASE, timing(SLOWER, **options), found)[1:]  # type: ignore[arg-type]


def test_nothing_found_is_said() -> None:
    assert reasons(INT8) == ("the file shows no reason: the INT8 kernels are no faster here",)


def test_layers_that_run_in_float_are_named() -> None:
    found = Evidence(planned=10, misses=("a", "b: FP16, it is narrow", "c", "d", "e"))
    expected = "5 of 10 layers planned INT8 run in float: a; b: FP16, it is narrow; c; 2 more"
    assert reasons(found) == (expected,)


def test_split_layers_count_where_they_cost() -> None:
    found = Evidence(planned=10, split_layers=3, misses=("a",))
    assert reasons(found)[1] == (
        "3 layers are split into two summands, which onnxruntime adds in float: compare with "
        "a file that is calibrated with split none"
    )
    passes = Evidence(planned=10, split_layers=3, passes=("3 Q/DQ passes",))
    assert reasons(passes, device="A10")[0].startswith("3 layers are split into two summands")
    single = Evidence(planned=10, split_layers=1, misses=("a",))
    assert reasons(single)[1].startswith("1 layer is split into two summands")
    fused = Evidence(planned=10, split_layers=3)
    assert not any("split" in line for line in reasons(fused, device="A10"))


def test_islands_and_passes() -> None:
    found = Evidence(
        planned=10, islands=("softmax (QDQ203 float-island)",), passes=("12 reformats",)
    )
    assert reasons(found, device="A10") == (
        "float layers between INT8 layers: softmax (QDQ203 float-island)",
        "launches that only move or convert data: 12 reformats",
    )


def test_an_fp32_rest_matters_on_a_gpu_only() -> None:
    found = Evidence(planned=10, fp32_rest=True, costs=(DENSE,))
    assert "high precision fp16" in reasons(found, device="A10")[0]
    assert "FP32" not in reasons(found)[0]


def test_layers_that_wait_for_memory() -> None:
    """2e6 bytes at 4.5 a byte wait; 1e9 at 17 a byte take 5.9e7: 3 % of the time on a CPU."""
    few = Evidence(planned=10, costs=(DENSE, DEPTHWISE))
    assert "shows no reason" in reasons(few)[0]
    many = Evidence(planned=10, costs=(DENSE, *[DEPTHWISE] * 50))
    assert reasons(many) == (
        "50 of 51 layers wait for memory (fewer than 17 multiply-accumulates per byte; 63 % of the "
        "time by this estimate): depthwise 4.5; depthwise 4.5; depthwise 4.5; 47 more; faster "
        "arithmetic does not help them, moving fewer bytes does",
    )
    on_gpu = reasons(few, device="A10")[0]  # 1e9 at 200 a byte take 5e6
    assert on_gpu.startswith("1 of 2 layers wait for memory (fewer than 200 ")
    assert "29 % of the time" in on_gpu


def test_calls_that_cost_more_than_what_they_compute() -> None:
    found = Evidence(planned=10, calls=50, costs=(DENSE,))
    assert reasons(found, median_ms=0.2) == (
        "50 operators take 4.0 us each, little more than the cost of a call: larger batches "
        "help, INT8 does not",
    )
    assert reasons(found, median_ms=0.25, device="A10")[0].startswith(
        "50 launches take 5.0 us each"
    )
    assert "shows no reason" in reasons(found, median_ms=0.5, device="A10")[0]
    assert "shows no reason" in reasons(found, median_ms=0.25)[0]


def test_what_could_not_be_looked_at_comes_last() -> None:
    found = Evidence(planned=10, misses=("a",), unknown=("no audit: no GPU",))
    assert reasons(found)[-1] == "no audit: no GPU"


# --- real files ----------------------------------------------------------------------------------


def quantized(model: onnx.ModelProto, split: tuple[str, ...] = ()) -> onnx.ModelProto:
    net = net_from_model(model)
    if split:
        split_coarse_fine(net, split, grid=Grid.weight(8))
    placement = place(net)
    scales = {a.tensor: 0.01 * (1 + a.group) for a in placement.activations}
    weights = quantize_weights(net, placement, Grid.weight(8))
    insert_qdq(net, plan_from_placement(placement, scales, weights, Grid.activation(8)))
    return model_from_net(net)


def test_a_float_file_has_no_plan(tmp_path: Path) -> None:
    assert evidence(save(plain_chain(), tmp_path / "m.onnx"), 1, on_gpu=False) == Evidence()


def test_a_graph_that_runs_in_int8_has_no_misses(tmp_path: Path) -> None:
    found = evidence(save(quantized(plain_chain()), tmp_path / "m.onnx"), 8, on_gpu=False)
    assert (found.misses, found.split_layers, found.islands, found.unknown) == ((), 0, (), ())
    assert found.planned == len(found.costs) > 2
    assert found.calls >= found.planned


def test_split_layers_run_in_float_on_a_cpu(tmp_path: Path) -> None:
    layers = tuple(n.name for n in plain_chain().graph.node if n.op_type == "Conv")[1:2]
    path = save(quantized(plain_chain(), layers), tmp_path / "m.onnx")
    found = evidence(path, 1, on_gpu=False)
    assert found.split_layers == 1
    assert found.misses == tuple(f"{layers[0]}.{part}" for part in ("coarse", "fine"))
    on_gpu = evidence(path, 1, on_gpu=True)
    assert (on_gpu.misses, on_gpu.calls, on_gpu.fp32_rest) == ((), 0, True)


def test_islands_are_found_by_the_linter(tmp_path: Path) -> None:
    path = save(graphs.island("Softmax"), tmp_path / "m.onnx")
    (island,) = evidence(path, 1, on_gpu=True).islands
    assert re.fullmatch(r"softmax\d+ \(QDQ203 float-island\)", island)


@needs_rtx
def test_engines_are_audited_and_their_onnx_is_found_beside_them(tmp_path: Path) -> None:
    source, engine = save(qdq_model(), tmp_path / "m.onnx"), tmp_path / "m.engine"
    build_engine(source, engine, BuildOptions("tensorrt-rtx", high_precision="fp32"))
    found = evidence(engine, 4, on_gpu=True)
    assert (found.planned, len(found.costs), found.fp32_rest, found.unknown) == (2, 2, True, ())
    assert found.calls > 2
    build_engine(source, engine, BuildOptions("tensorrt-rtx"))
    assert not evidence(engine, 4, on_gpu=True).fp32_rest
    save(qdq_model(channels=8), source)  # another net now
    found = evidence(engine, 4, on_gpu=True)
    assert (found.planned, found.costs) == (2, ())
    assert found.unknown == ("the ONNX file that the engine was built from is not beside it",)


@needs_rtx
def test_an_engine_that_cannot_be_audited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, engine = save(qdq_model(), tmp_path / "m.onnx"), tmp_path / "m.engine"
    build_engine(source, engine, BuildOptions("tensorrt-rtx"))

    def refuse(path: Path) -> None:
        raise ArtifactError(f"{path}: no")

    monkeypatch.setattr(explain_module, "audit", refuse)
    assert evidence(engine, 1, on_gpu=True).unknown == (f"no audit: {engine}: no",)
    (tmp_path / "m.engine.json").unlink()
    (unknown,) = evidence(engine, 1, on_gpu=True).unknown
    assert "no sidecar" in unknown


def test_a_whole_report(tmp_path: Path) -> None:
    """Each batch size against the baseline at that batch size; files that help are left out."""
    path = save(quantized(plain_chain()), tmp_path / "int8.onnx")
    rows = [
        timing((1.0, 1.0, 1.0), file="float.onnx"),
        timing(SLOWER, file=str(path)),
        timing((0.5, 0.4, 0.6), file="missing.onnx"),
    ]
    nothing = Conditions(None, None, None)
    options = ("float.onnx", "cpu", None, 0, 0.0, 0.0, nothing, nothing, ())
    (explanation,) = explain_all(BenchReport(tuple(rows), *options))
    assert (explanation.file, explanation.batch) == (str(path), 1)
    assert explanation.to_lines()[0] == f"{path}, batch 1: {explanation.lines[0]}"
    without = BenchReport(tuple(rows), None, *options[1:])
    assert explain_all(without) == ()


def test_the_command_says_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = (BASE, timing(SAME, file=str(save(quantized(plain_chain()), tmp_path / "q.onnx"))))
    asked = []

    def measured(files: list[Path], options: BenchOptions) -> BenchReport:
        asked.append(options.host_copies)
        nothing = Conditions(None, None, None)
        return BenchReport(rows, BASE.file, "cpu", None, 0, 0.0, 0.0, nothing, nothing, ())

    monkeypatch.setattr("reptrt.judge.bench.bench", measured)
    command = ["bench", "q.onnx", "--no-host-copies", "--json", str(tmp_path / "j")]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0
    assert f"{rows[1].file}, batch 1: no difference measurable (ratio 0.990" in result.stdout
    assert asked == [False]
    (explanation,) = json.loads((tmp_path / "j").read_text())["explanations"]
    assert explanation["file"] == rows[1].file
    assert explanation["lines"][0].startswith("no difference measurable")
