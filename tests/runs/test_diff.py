"""Two runs or files side by side: exactly what was changed is reported."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from reptrt.core.artifacts import sha256_of
from reptrt.graph.net import net_from_model
from reptrt.graph.quantized import activation_scales, layer_weights
from reptrt.runs.compare import changes, compare_nets
from tests.support.qdq_graphs import model_of, qdq_model, save
from tests.support.qdq_nets import images, quantized, residual_net
from tests.support.small_run import make_run, refused, reptrt, write_data, write_factory

pytestmark = pytest.mark.slow


def found(*arguments: object) -> dict[str, Any]:
    result = reptrt("diff", *arguments, "--json", "-")
    assert result.exit_code == 0, result.output
    return dict(json.loads(result.stdout))


def changed(model: onnx.ModelProto, name: str, change: Callable[[np.ndarray], Any]) -> None:
    """Change one initializer in place."""
    (tensor,) = (t for t in model.graph.initializer if t.name == name)
    values = numpy_helper.to_array(tensor).copy()
    result = change(values)
    tensor.CopyFrom(numpy_helper.from_array(values if result is None else result, name))


@pytest.fixture
def pair(tmp_path: Path) -> tuple[onnx.ModelProto, onnx.ModelProto, Path, Path]:
    x = images(8)
    return (
        quantized(residual_net(), x),
        quantized(residual_net(), x),
        *(tmp_path / f"{name}.onnx" for name in "ab"),
    )


# Two files ---------------------------------------------------------------------------------------


def test_a_file_is_the_same_as_itself(tmp_path: Path) -> None:
    path = save(qdq_model(), tmp_path / "m.onnx")
    report = found(path, path)
    for part in ("options", "inputs", "versions", "hashes", "results"):
        assert report[part] == []
    (net,) = report["models"]
    assert (net["scales"], net["weights"], net["splits"]) == ([], [], [])
    assert (net["num_tensors"], net["num_layers"]) == (2, 2)
    assert reptrt("diff", path, path).stdout.splitlines()[-1].endswith("the same")


def test_what_was_changed_by_hand_is_found(
    pair: tuple[onnx.ModelProto, onnx.ModelProto, Path, Path],
) -> None:
    a, b, path_a, path_b = pair

    def three_codes(codes: np.ndarray) -> None:
        codes.flat[[1, 5, 7]] = np.where(codes.flat[[1, 5, 7]] > 0, -100, 100)

    changed(b, "a1.weight.q", three_codes)
    changed(b, "left.weight.scale", lambda s: s * np.float32(2) ** np.arange(len(s)) / 4)
    changed(b, "x.scale", lambda s: s * np.float32(1.5))
    changed(b, "add1.relu.scale", lambda s: s / np.float32(4))
    report = found(save(a, path_a), save(b, path_b))
    (net,) = report["models"]
    scales = [(s["tensor"], pytest.approx(s["ratio"])) for s in net["scales"]]
    assert scales == [("add1.relu", 4), ("x", 1.5)]
    values = {t.name: numpy_helper.to_array(t) for t in a.graph.initializer}
    assert net["scales"][1]["a"] == values["x.scale"]
    assert net["scales"][1]["b"] == pytest.approx(1.5 * values["x.scale"])
    weights = {w["layer"]: w for w in net["weights"]}
    assert weights.keys() == {"a1", "left"}
    assert (weights["a1"]["differing"], weights["a1"]["total"]) == (3, values["a1.weight.q"].size)
    assert weights["a1"]["scale_ratio"] == 1
    assert weights["left"]["differing"] == 0
    assert weights["left"]["scale_ratio"] == pytest.approx(32)  # channels: 1/4 ... 2^7 / 4
    codes, scale = values["left.weight.q"].astype(float), values["left.weight.scale"]
    factors = 2.0 ** np.arange(len(scale)) / 4
    expected = np.abs(codes * ((factors - 1) * scale)[:, None, None, None]).max()
    assert weights["left"]["max_difference"] == pytest.approx(expected)
    assert weights["left"]["bias_difference"] == 0
    assert net["tensors_only_a"] == net["layers_only_b"] == []
    text = reptrt("diff", path_a, path_b).stdout
    assert "2 of " in text
    assert "by a factor of up to 4\n" in text
    assert "2 of 12 layers differ, in 3 of " in text
    assert text.splitlines()[-1].endswith("different")


def test_biases_and_float_weights_are_compared(tmp_path: Path) -> None:
    a, b = residual_net(), residual_net()
    changed(b, "stem.bias", lambda bias: bias + np.float32(0.25))
    changed(b, "s1.weight", lambda weight: weight.__setitem__((0, 0), weight[0, 0] + np.float32(3)))
    (net,) = found(save(a, tmp_path / "a.onnx"), save(b, tmp_path / "b.onnx"))["models"]
    weights = {w["layer"]: w for w in net["weights"]}
    assert weights.keys() == {"stem", "s1"}
    assert weights["stem"]["bias_difference"] == pytest.approx(0.25, rel=1e-5)
    assert weights["s1"]["differing"] == 1
    assert weights["s1"]["max_difference"] == pytest.approx(3, rel=1e-5)
    assert weights["s1"]["scale_ratio"] is None


def test_layers_and_tensors_of_one_side_and_other_forms(tmp_path: Path) -> None:
    a, b = qdq_model(num_convs=2), qdq_model(num_convs=1, channels=8)
    net = compare_nets(net_from_model(a), net_from_model(b), "net")
    assert (net.tensors_only_a, net.tensors_only_b) == (("r0",), ())
    assert (net.layers_only_a, net.layers_only_b) == (("conv1",), ())
    (weight,) = net.weights
    assert (weight.form_a, weight.form_b) == ("int8 16x3x3x3", "int8 8x3x3x3")
    assert (weight.differing, weight.max_difference, weight.scale_ratio) == (None, None, None)
    assert "net  1 layers only in A: conv1" in net.to_lines()
    text = reptrt("diff", save(a, tmp_path / "a.onnx"), save(b, tmp_path / "b.onnx")).stdout
    assert "int8 16x3x3x3 | int8 8x3x3x3" in text


def test_pairs_around_float_weights_are_read() -> None:
    """What other tools write: the weight in float, with a Q and a DQ behind it."""
    scale = np.array([0.1, 0.2], dtype=np.float32)
    weight = np.random.default_rng(0).normal(size=(2, 3, 1, 1)).astype(np.float32)
    constants = {"w": weight, "s": scale, "z": np.zeros(2, np.int8), "xs": np.float32(0.5)}
    constants["xz"] = np.int8(0)
    nodes = [
        helper.make_node("Cast", ["input"], ["half"], to=TensorProto.FLOAT16),
        helper.make_node("Cast", ["half"], ["full"], to=TensorProto.FLOAT),
        helper.make_node("QuantizeLinear", ["full", "xs", "xz"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "xs", "xz"], ["xd"]),
        helper.make_node("QuantizeLinear", ["w", "s", "z"], ["wq"], axis=0),
        helper.make_node("DequantizeLinear", ["wq", "s", "z"], ["wd"], axis=0),
        helper.make_node("Conv", ["xd", "wd"], ["y"], name="conv"),
    ]
    net = net_from_model(model_of(nodes, ["N", 3, 4, 4], ["N", 2, 4, 4], constants))
    assert activation_scales(net) == {"input": 0.5}
    found = layer_weights(net)["conv"]
    np.testing.assert_array_equal(found.values, weight)
    np.testing.assert_allclose(found.scale, scale)
    np.testing.assert_array_equal(found.dequantized(), weight)


def test_a_simulation_of_fewer_bits_has_the_same_tensors() -> None:
    x = images(8)
    nets = [net_from_model(quantized(residual_net(), x, bits)) for bits in (8, 6)]
    compared = compare_nets(*nets, "net")
    assert compared.tensors_only_a == compared.tensors_only_b == ()
    # scale = amax / 127 and amax / 31
    assert {round(s.ratio or 0, 4) for s in compared.scales} == {round(127 / 31, 4)}


def test_codes_are_read_along_their_axis() -> None:
    net = net_from_model(quantized(residual_net(), images(8)))
    model = quantized(residual_net(), images(8))
    values = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    for layer, weight in layer_weights(net).items():
        codes, scale = values[f"{layer}.weight.q"], values[f"{layer}.weight.scale"]
        node = next(n for n in model.graph.node if n.name == f"{layer}.weight.dequantize")
        axis = next(a.i for a in node.attribute if a.name == "axis")
        expected = np.moveaxis(np.moveaxis(codes, axis, -1) * scale.astype(float), -1, axis)
        np.testing.assert_allclose(weight.dequantized(), expected)


def test_codes_of_a_matrix_have_their_channels_last() -> None:
    codes = np.arange(15, dtype=np.int8).reshape(3, 5)
    scale = np.arange(1, 6, dtype=np.float32)
    constants = {"q": codes, "s": scale, "z": np.zeros(5, np.int8)}
    nodes = [
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["w"], axis=1),
        helper.make_node("MatMul", ["input", "w"], ["y"], name="matrix"),
    ]
    net = net_from_model(model_of(nodes, ["N", 3], ["N", 5], constants))
    np.testing.assert_array_equal(layer_weights(net)["matrix"].dequantized(), codes * scale)


def test_sidecars_are_compared(tmp_path: Path) -> None:
    source = write_factory(tmp_path)
    for name, opset in (("a", 19), ("b", 17)):
        done = reptrt(
            "export",
            source,
            "--input-size",
            "1x8x8",
            "--opset",
            opset,
            "-o",
            tmp_path / f"{name}.onnx",
        )
        assert done.exit_code == 0, done.output
    report = found(tmp_path / "a.onnx", tmp_path / "b.onnx")
    assert report["options"] == [{"name": "opset", "a": 19, "b": 17}]
    (tmp_path / "b.onnx").write_bytes(b"changed")
    line = refused("diff", tmp_path / "a.onnx", tmp_path / "b.onnx")
    assert "the file was changed after it was written" in line


# Two runs ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("runs")
    source, data = write_factory(folder), write_data(folder / "data.npz")
    one = make_run(source, data, folder / "one")
    more = write_data(folder / "more.npz", number=41)
    other = make_run(
        source, data, folder / "other", "--split", "identity", "--threshold", "max",
        "--eval-data", more,
    )  # fmt: skip
    return one, other


@pytest.mark.slow
def test_two_runs(runs: tuple[Path, Path]) -> None:
    one, other = runs
    report = found(one, other)
    assert report["options"] == [
        {"name": "calibrate.split", "a": None, "b": "identity"},
        {"name": "calibrate.threshold.rule", "a": None, "b": "max"},
    ]
    assert [change["name"] for change in report["inputs"]] == ["eval data"]
    assert report["versions"] == []
    hashes = {change["name"]: (change["a"], change["b"]) for change in report["hashes"]}
    assert "float.onnx" not in hashes
    files = (sha256_of(one / "int8.onnx"), sha256_of(other / "int8.onnx"))
    assert hashes["int8.onnx"] == files
    float_net, int8_net = report["models"]
    assert (float_net["file"], float_net["weights"]) == ("float.onnx", [])
    splits = {change["name"]: (change["a"], change["b"]) for change in int8_net["splits"]}
    for layer, (_, form) in splits.items():
        assert form == "identity", layer
    assert len(splits) == 2
    results = {(r["file"], r["metric"]): (r["a"], r["b"]) for r in report["results"]}
    for index, run in enumerate(runs):
        judged = json.loads((run / "eval.json").read_text())["results"]
        timed = json.loads((run / "bench.json").read_text())["results"]
        for number, name in enumerate(("float.onnx", "int8.onnx")):
            assert results[name, "top1"][index] == judged[number]["top1"]
            assert results[name, "median ms, batch 1"][index] == timed[number]["median_ms"]
        assert results["int8.onnx", "sqnr_db"][index] == judged[1]["sqnr_db"]
    assert ("float.onnx", "sqnr_db") not in results


def test_two_runs_for_people(runs: tuple[Path, Path]) -> None:
    text = reptrt("diff", *runs).stdout
    for line in ("calibrate.threshold.rule", "int8.onnx: splits", "results", "int8.onnx sqnr_db"):
        assert line in text
    assert "versions" not in text
    assert text.splitlines()[-1] == f"diff  {runs[0]}  {runs[1]}  different"


def test_runs_that_cannot_be_compared(runs: tuple[Path, Path], tmp_path: Path) -> None:
    one, _ = runs
    assert f"{one} is a folder, {one / 'int8.onnx'} a file" in refused(
        "diff", one / "int8.onnx", one
    )
    assert "nowhere: does not exist" in refused("diff", one, tmp_path / "nowhere")
    copied = shutil.copytree(one, tmp_path / "copied")
    (copied / "eval.json").write_text("{}")
    got, expected = sha256_of(copied / "eval.json"), sha256_of(one / "eval.json")
    line = refused("diff", one, copied)
    assert f"eval.json: was changed after the run: sha256 is {got}, expected {expected}" in line
    (copied / "eval.json").unlink()
    assert "eval.json: does not exist any more" in refused("diff", one, copied)
    record = json.loads((copied / "run.json").read_text())
    (copied / "run.json").write_text(json.dumps(record | {"finished": False}))
    assert "was stopped" in refused("diff", copied, one)
    (tmp_path / "text.onnx").write_text("no net")
    assert "not a readable ONNX file" in refused("diff", tmp_path / "text.onnx", one / "int8.onnx")


# Mappings ----------------------------------------------------------------------------------------


def test_changes_of_nested_mappings() -> None:
    a = {"same": 1, "gone": {"x": 1}, "deep": {"er": {"v": [1, 2]}}, "empty": {}}
    b = {"same": 1, "new": None, "deep": {"er": {"v": [1, 3]}}, "empty": {"y": 0}}
    assert {str(change) for change in changes(a, b)} == {
        "gone.x: 1 -> none",
        "deep.er.v: [1, 2] -> [1, 3]",
        "empty: {} -> none",
        "empty.y: none -> 0",
    }


def test_scales_that_are_no_scales() -> None:
    a, b = qdq_model(), qdq_model()
    changed(b, "scale", lambda s: -s)
    net = compare_nets(net_from_model(a), net_from_model(b), "net")
    assert [scale.ratio for scale in net.scales] == [None, None]
