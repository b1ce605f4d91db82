"""Diagnosis: the numbers against numpy and onnxruntime, the claims against nets made to fit."""

import json
from dataclasses import replace
from io import StringIO
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import helper, numpy_helper
from rich.console import Console

from reptrt.cli import main
from reptrt.core.errors import ConfigError
from reptrt.core.metrics import sqnr_db
from reptrt.data.dataset import open_dataset
from reptrt.demo import digits
from reptrt.graph.net import model_from_net, net_from_model
from reptrt.graph.preprocess import read_preprocess
from reptrt.judge.diagnose import diagnose
from reptrt.judge.diagnose.report import Diagnosis, LayerDiagnosis
from reptrt.judge.evaluate import evaluate
from reptrt.judge.options import EvaluateOptions
from reptrt.pipeline import (
    CalibrateOptions,
    ExportOptions,
    Source,
    calibrate,
    calibrate_net,
    calibration_images,
    export,
    float_model,
    prepare,
)
from reptrt.quantize.calib.options import ThresholdOptions
from tests.rewrite.test_splits import conv_net, rep_weight
from tests.support.helpers import ort_run
from tests.support.onnx_nets import Builder, plain_chain
from tests.support.qdq_nets import residual_net, with_outputs

COUNT = 40  # a whole batch and a part of one
MAX = ThresholdOptions("max")  # amax is then plain to see
PLAIN = CalibrateOptions(
    images=COUNT, threshold=MAX, equalize=False, split="none", full_range=False, correct_bias=False
)


def save(model: onnx.ModelProto, folder: Path) -> tuple[Path, Path, np.ndarray]:
    """Write a model and images for it; return both paths and the images."""
    channels, *size = (d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim[1:])
    x = np.random.default_rng(3).standard_normal((COUNT, channels, *size)).astype(np.float32)
    onnx.save(model, str(folder / "m.onnx"))
    np.savez(folder / "x.npz", x=x)
    return folder / "m.onnx", folder / "x.npz", x


def by_layer(found: Diagnosis) -> dict[str, LayerDiagnosis]:
    return {layer.layer: layer for layer in found.layers}


def rendered(found: Diagnosis) -> str:
    console = Console(file=StringIO(), width=160)
    for table in found.to_tables():
        console.print(table)
    return console.file.getvalue() + "\n".join(found.to_lines())  # type: ignore[attr-defined]


# An oracle: nodes one by one in onnxruntime, rounding in numpy ------------------------------------


def run_node(node: onnx.NodeProto, x: np.ndarray, constants: dict[str, np.ndarray]) -> np.ndarray:
    """Run one layer on its input."""
    names = [name for name in node.input if name in constants]
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info(node.input[0], onnx.TensorProto.FLOAT, x.shape)],
        [onnx.ValueInfoProto(name=node.output[0])],
        [numpy_helper.from_array(constants[name], name) for name in names],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    return ort_run(onnx.shape_inference.infer_shapes(model), {node.input[0]: x})[node.output[0]]


def rounded_weight(weight: np.ndarray) -> np.ndarray:
    scale = np.abs(weight).max(axis=tuple(range(1, weight.ndim)), keepdims=True) / 127
    return (np.rint(weight / scale) * scale).astype(np.float32)


def rounded_input(x: np.ndarray, amax: float) -> np.ndarray:
    scale = amax / 127
    return (np.clip(np.rint(x / scale), -128, 127) * scale).astype(np.float32)


def noises(
    model: onnx.ModelProto, images: np.ndarray, layer: str, amax: float | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return a layer's output, and with a quantized weight, and with a quantized input."""
    node = next(node for node in model.graph.node if node.name == layer)
    constants = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    name = node.input[0]
    x = images if name == "x" else ort_run(with_outputs(model, [name]), {"x": images})[name]
    other = constants | {node.input[1]: rounded_weight(constants[node.input[1]])}
    x_dq = rounded_input(x, float(np.abs(x).max()) if amax is None else amax)
    return (
        run_node(node, x, constants),
        run_node(node, x, other),
        run_node(node, x_dq, constants),
    )


def test_full_range_takes_six_decibels_off_the_activation_noise(tmp_path: Path) -> None:
    file, data, _ = save(residual_net(), tmp_path)
    options = replace(PLAIN, full_range=True, max_overhead=10.0)
    report = calibrate(file, data, tmp_path / "q.onnx", options)
    found = by_layer(diagnose(file, data, options, report))
    net = net_from_model(onnx.load(file))
    readers = {node.name: node.inputs[0].name for node in net.graph.nodes if node.inputs}
    full = [name for name in found if readers[name] in report.full_range]
    assert full
    for name in full:
        gain = found[name].after.activation_sqnr_db - found[name].before.activation_sqnr_db
        assert gain == pytest.approx(20 * np.log10(255 / 127), abs=1.5), name  # few values


def test_noise_of_each_layer_against_onnxruntime(tmp_path: Path) -> None:
    model = residual_net()
    file, data, x = save(model, tmp_path)
    found = by_layer(diagnose(file, data, PLAIN))
    assert len(found) == 12
    inner = ort_run(with_outputs(model, ["stem.relu", "left.relu", "right.clip"]), {"x": x})
    common = max(float(np.abs(inner[name]).max()) for name in ("left.relu", "right.clip"))
    amax = {
        "a1": float(inner["stem.relu"].max()),  # the pair stands before the MaxPool
        "last": common,  # of a Concat
    }
    for name, layer in found.items():
        exact, with_weight, with_input = noises(model, x, name, amax.get(name))
        expected = (sqnr_db(exact, with_weight), sqnr_db(exact, with_input))
        # Rounding in float32 on either side moves a tie here and there.
        assert layer.before.weight_sqnr_db == pytest.approx(expected[0], abs=0.02), name
        assert layer.before.activation_sqnr_db == pytest.approx(expected[1], abs=0.1), name
        assert layer.form == "none"
        assert layer.after == layer.before  # nothing was prepared


def uneven_chain() -> onnx.ModelProto:
    """A chain whose channels have very different ranges."""
    model = plain_chain()
    for tensor in model.graph.initializer:
        if tensor.name.startswith(("c1", "c2")):
            value = numpy_helper.to_array(tensor)
            factors = np.geomspace(0.1, 10, len(value)).astype(np.float32)
            value = value * factors.reshape(-1, *[1] * (value.ndim - 1))
            tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    return model


def test_noise_after_equalization_is_in_the_units_of_the_net_as_it_is(tmp_path: Path) -> None:
    original = uneven_chain()
    file, data, x = save(original, tmp_path)
    options = replace(PLAIN, equalize=True)
    result = diagnose(file, data, options)
    found = by_layer(result)
    net = net_from_model(onnx.load(str(file)))
    prepare(net, open_dataset(data, read_preprocess(net), limit=COUNT), options)
    prepared = model_from_net(net)
    biases = [
        {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
        for model in (original, prepared)
    ]
    for name in ("c1", "c2", "head"):
        grown = biases[1][f"{name}.bias"] / biases[0][f"{name}.bias"]
        assert (grown.max() / grown.min() > 10) == (name != "head")
        shape = (1, -1, 1, 1) if name != "head" else (1, -1)
        exact, with_weight, with_input = (
            part / grown.reshape(shape) for part in noises(prepared, x, name)
        )
        after = found[name].after
        assert after.weight_sqnr_db == pytest.approx(sqnr_db(exact, with_weight), abs=0.02)
        assert after.activation_sqnr_db == pytest.approx(sqnr_db(exact, with_input), abs=0.1)
    assert found["c2"].after.activation_sqnr_db > found["c2"].before.activation_sqnr_db + 3
    assert result.equalized == 2
    assert result.reading[-1].startswith("2 tensors equalized: W8A8 goes from ")


@pytest.mark.parametrize("form", ["identity", "coarse-fine"])
def test_noise_of_a_split_layer_is_that_of_the_rest(tmp_path: Path, form: str) -> None:
    weight = rep_weight(np.random.default_rng(1), 6, 6, 3, 1)
    model = model_from_net(conv_net(weight, groups=1, stride=1, pad=1, height=6))
    file, data, x = save(model, tmp_path)
    options = replace(PLAIN, split=form)  # type: ignore[arg-type]
    found = by_layer(diagnose(file, data, options))["conv"]
    centre = np.zeros_like(weight)
    if form == "identity":
        channels = np.arange(6)
        centre[channels, channels, 1, 1] = weight[channels, channels, 1, 1]
    else:
        centre[:, :, 1, 1] = weight[:, :, 1, 1]
        centre = rounded_weight(centre)  # the coarse codes: exact in INT8
    exact = noises(model, x, "conv")[0]
    node = next(node for node in model.graph.node if node.name == "conv")
    constants = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    constants[node.input[1]] = centre + rounded_weight(weight - centre)
    expected = sqnr_db(exact, run_node(node, x, constants))
    assert found.form == form
    assert found.after.weight_sqnr_db == pytest.approx(expected, abs=0.02)
    assert found.after.weight_sqnr_db > found.before.weight_sqnr_db + 6
    assert found.after.activation_sqnr_db == pytest.approx(
        found.before.activation_sqnr_db, abs=0.01
    )
    assert found.after.bits_left == pytest.approx(np.log2(255))


# Which branch ------------------------------------------------------------------------------------

GAINS = {  # of the 3 x 3 and the 1 x 1 branch; the identity has 1
    "quiet": (0.02, 0.05),
    "middle": (0.02, 9.0),
    "wide": (9.0, 0.02),
}
DOMINANT = {"quiet": "identity", "middle": "1x1", "wide": "3x3"}
READ = {"quiet": "diagonal", "middle": "centre", "wide": "around"}


def branches_net() -> onnx.ModelProto:
    """Three rep blocks in train form, each with another branch that is the largest."""
    b = Builder(channels=6)
    x = b.relu(b.conv("x", 6, "stem"))
    for block, gains in GAINS.items():
        weights = [
            b.constant(
                f"{block}.{name}.weight",
                (gain * b.rng.uniform(0.5, 1.0, (6, 6, size, size))).astype(np.float32),
            )
            for name, size, gain in zip(("dense", "point"), (3, 1), gains, strict=True)
        ]
        dense = b.node("Conv", [x, weights[0]], f"{block}.3x3", pads=[1] * 4)
        point = b.node("Conv", [x, weights[1]], f"{block}.1x1")
        total = b.node("Add", [b.node("Add", [dense, point], f"{block}.two"), x], f"{block}.sum")
        b.channels[total] = 6
        x = b.relu(total)
    return b.model(b.head(x))


@pytest.fixture
def fused(tmp_path: Path) -> tuple[Path, Path]:
    train_form, data, _ = save(branches_net(), tmp_path)
    export(Source(str(train_form)), tmp_path / "fused.onnx", ExportOptions())
    return tmp_path / "fused.onnx", data


def kernels(path: Path) -> dict[str, np.ndarray]:
    model = onnx.load(str(path))
    constants = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    return {n.name: constants[n.input[1]] for n in model.graph.node if n.op_type == "Conv"}


def bits_of_the_rest(kernel: np.ndarray, part: str) -> float:
    """Count, channel by channel, the codes of what does not belong to the largest branch."""
    bits = []
    for channel, taps in enumerate(kernel):
        rest = taps.copy()
        if part == "identity":
            rest[channel, 1, 1] = 0
        elif part == "1x1":
            rest[:, 1, 1] = 0
        else:  # the others lie under the 3 x 3 branch, at the centre
            rest = rest[:, 1:2, 1:2]
        largest = np.abs(rest).max() / (np.abs(taps).max() / 127)
        bits.append(np.log2(2 * largest + 1))
    return float(np.median(bits))


def test_the_branch_that_was_made_largest_is_named(fused: tuple[Path, Path]) -> None:
    file, data = fused
    result = diagnose(file, data, PLAIN)
    found = by_layer(result)
    for block, kind in DOMINANT.items():
        layer = found[block]
        assert layer.source == "branches"
        assert (layer.parts[0].kind, layer.parts[0].share) == (kind, 1.0)
        assert {part.kind for part in layer.parts} == {"identity", "1x1", "3x3"}
        expected = bits_of_the_rest(kernels(file)[block], kind)
        assert layer.before.bits_left == pytest.approx(expected, abs=1e-3)
        assert f"{kind} 100 %" in rendered(result)
    for name in ("stem", "head"):  # were no rep blocks
        assert (found[name].source, found[name].parts) == (None, ())
        assert found[name].before.bits_left is None


def test_without_records_the_kernel_is_read_and_that_is_said(fused: tuple[Path, Path]) -> None:
    file, data = fused
    model = onnx.load(str(file))
    kept = [prop for prop in model.metadata_props if "provenance" not in prop.key]
    del model.metadata_props[:]
    model.metadata_props.extend(kept)
    bare = file.with_name("bare.onnx")
    onnx.save(model, str(bare))
    result = diagnose(bare, data, PLAIN)
    for block, part in READ.items():
        layer = by_layer(result)[block]
        assert (layer.source, layer.parts[0].kind) == ("kernel", part)
    text = rendered(result)
    assert "diagonal* 100 %" in text
    assert "* read off the kernel" in text
    assert "branch" not in " ".join(result.reading)
    assert "(read off the kernels)" in result.reading[0]


def test_several_identities_count_as_their_sum(tmp_path: Path) -> None:
    """Two identities of opposite sign are nothing together, whatever each of them is."""
    b = Builder(channels=4)
    weight = b.constant("block.dense.weight", np.full((4, 4, 3, 3), 0.1, dtype=np.float32))
    minus = b.constant("block.minus", np.full((1, 4, 1, 1), -0.98, dtype=np.float32))
    dense = b.node("Conv", ["x", weight], "dense", pads=[1] * 4)
    scaled = b.node("Mul", ["x", minus], "scaled")
    total = b.node("Add", [b.node("Add", [dense, scaled], "two"), "x"], "sum")
    b.channels[total] = 4
    train_form, data, _ = save(b.model(b.head(b.relu(total))), tmp_path)
    export(Source(str(train_form)), tmp_path / "fused.onnx", ExportOptions())
    layer = diagnose(tmp_path / "fused.onnx", data, PLAIN).layers[0]
    assert layer.source == "branches"
    assert (layer.parts[0].kind, layer.parts[0].share) == ("3x3", 1.0)


def test_an_ordinary_net_gets_no_claim(tmp_path: Path) -> None:
    b = Builder(channels=16)  # pointwise, depthwise and 3 x 3
    x = b.relu(b.conv("x", 16, "c1", size=1, pads=[0] * 4))
    x = b.relu(b.conv(b.relu(b.conv(x, 16, "c2", group=16)), 16, "c3"))
    file, data, _ = save(b.model(b.head(x)), tmp_path)
    result = diagnose(file, data, PLAIN)
    assert "branch" not in rendered(result)
    assert not any(layer.source == "branches" for layer in result.layers)
    assert result.reading[0] == "No part of the kernels stands out, as it would in a rep-net."
    assert by_layer(result)["c3"].parts[0].kind == "around"
    assert (
        result.reading[1]
        == f"Plain W8A8 is enough for this net: {result.corners[2].sqnr_db:.1f} dB."
    )


# The four corners --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    folder = tmp_path_factory.mktemp("demo")
    source = Source("repvgg", digits.WEIGHTS, digits.ARCHITECTURE)
    options = ExportOptions(digits.INPUT_SIZE, digits.MEAN, digits.STD)
    export(source, folder / "m.onnx", options)
    x = digits.load_digits().train.x[:160]
    np.savez(folder / "x.npz", x=x)
    return folder / "m.onnx", folder / "x.npz"


@pytest.mark.slow
def test_corners_of_a_rep_net(demo: tuple[Path, Path], tmp_path: Path) -> None:
    file, data = demo
    options = CalibrateOptions(images=160)
    report = calibrate(file, data, tmp_path / "q.onnx", options)
    calibrate(
        file,
        data,
        tmp_path / "p.onnx",
        replace(
            options,
            equalize=False,
            split="none",
            full_range=False,
            correct_bias=False,
            rounding="nearest",
        ),
    )
    found = diagnose(file, data, options, report, layer_images=32)
    weights, activations, both, method = found.corners
    assert [corner.name for corner in found.corners] == ["W8A32", "W32A8", "W8A8", "W8A8"]
    assert [corner.prepared for corner in found.corners] == [False, False, False, True]
    assert weights.sqnr_db < activations.sqnr_db - 3
    assert both.sqnr_db < weights.sqnr_db + 0.5
    assert method.sqnr_db > both.sqnr_db + 6
    assert (found.images, found.layer_images) == (160, 32)
    judged = evaluate(
        [tmp_path / "p.onnx", tmp_path / "q.onnx"], data, EvaluateOptions(reference=file, threads=1)
    )
    for corner, result in zip((both, method), judged.results, strict=True):
        # onnxruntime computes the same codes; a tie in float32 may fall the other way.
        assert corner.sqnr_db == pytest.approx(result.sqnr_db, abs=0.2)
        assert corner.agreement == pytest.approx(result.agreement, abs=1.01 / 160)
    first, second, third = found.reading
    assert first.startswith("8 of 11 rep layers: the identity branch sets the weight range")
    assert second.startswith("Weights are the limit: W8A32 ")
    assert f"{both.sqnr_db:.1f} to {method.sqnr_db:.1f} dB" in third
    again = diagnose(file, data, options, layer_images=32)
    assert (again.layers, again.corners) == (found.layers, found.corners)


def test_activations_can_be_the_limit(tmp_path: Path) -> None:
    b = Builder()
    x = b.relu(b.conv("x", 8, "c1"))
    loud = b.constant("loud", np.array([200.0] + [1.0] * 7, np.float32).reshape(1, 8, 1, 1))
    spread = b.node("Mul", [x, loud], "spread")
    b.channels[spread] = 8
    weight = b.rng.standard_normal((8, 8, 3, 3)).astype(np.float32)
    weight[:, 0] = 0  # the loud channel matters to nobody and costs all others
    x = b.relu(b.node("Conv", [spread, b.constant("c2.weight", weight)], "c2", pads=[1] * 4))
    b.channels[x] = 8
    file, data, _ = save(b.model(b.head(x)), tmp_path)
    found = diagnose(file, data, PLAIN)
    assert found.reading[1].startswith("Activations are the limit: W8A32 ")
    layer = by_layer(found)["c2"].before
    assert layer.activation_sqnr_db < layer.weight_sqnr_db - 10


@pytest.mark.slow
def test_bits_exclusion_and_fp16(demo: tuple[Path, Path]) -> None:
    file, data = demo
    options = CalibrateOptions(
        images=64,
        weight_bits=6,
        activation_bits=7,
        exclude=("^stage1.0$", "^linear$"),
        high_precision="fp16",
    )
    found = diagnose(file, data, options)
    assert [corner.name for corner in found.corners] == ["W6A32", "W32A7", "W6A7", "W6A7"]
    assert not {"stage1.0", "linear"} & by_layer(found).keys()
    assert "bits left of 6" in rendered(found)
    assert all((layer.before.bits_left or 0) <= 6 for layer in found.layers)


def test_plain_keeps_the_rule_and_bits_that_were_asked_for(tmp_path: Path) -> None:
    file, data, _ = save(plain_chain(), tmp_path)
    options = CalibrateOptions(
        images=COUNT, threshold=ThresholdOptions("percentile", 90.0), activation_bits=7
    )
    plain = replace(options, equalize=False, split="none", full_range=False, correct_bias=False)
    calibrate(file, data, tmp_path / "p.onnx", plain)
    (judged,) = evaluate(
        [tmp_path / "p.onnx"], data, EvaluateOptions(reference=file, threads=1)
    ).results
    corner = diagnose(file, data, options).corners[2]
    assert corner.sqnr_db == pytest.approx(judged.sqnr_db, abs=0.2)


def test_an_output_without_classes_has_no_agreement(tmp_path: Path) -> None:
    b = Builder()
    file, data, _ = save(b.model(b.conv(b.relu(b.conv("x", 4, "c1")), 4, "c2")), tmp_path)
    found = diagnose(file, data, PLAIN)
    assert [corner.agreement for corner in found.corners] == [None] * 4
    assert "agreement" not in found.reading[-1]


def test_nothing_lost_is_null_in_json_and_exact_in_the_table(tmp_path: Path) -> None:
    b = Builder()
    weight = b.rng.integers(-127, 128, (4, 3, 3, 3)).astype(np.float32)
    weight[:, 0, 0, 0] = 127  # scale 1: every weight is a code
    y = b.node("Conv", ["x", b.constant("w", weight)], "conv", pads=[1] * 4)
    b.channels[y] = 4
    file, data, _ = save(b.model(b.head(b.relu(y))), tmp_path)
    found = diagnose(file, data, PLAIN)
    assert by_layer(found)["conv"].before.weight_sqnr_db == float("inf")
    assert "exact" in rendered(found)
    content = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert content["layers"][0]["before"]["weight_sqnr_db"] is None


# The command, and what is refused ----------------------------------------------------------------


@pytest.mark.parametrize("wanted", [True, False], ids=["asked", "not asked"])
def test_the_command(tmp_path: Path, wanted: bool) -> None:
    file, data, _ = save(plain_chain(), tmp_path)
    output, report = tmp_path / "q.onnx", tmp_path / "r.json"
    arguments = [file, "--data", data, "-n", 8, "-o", output, "--json", report]
    arguments += ["--diagnose"] if wanted else []
    done = CliRunner().invoke(main, ["calibrate", *map(str, arguments)])
    assert done.exit_code == 0, done.output
    content = json.loads(report.read_text())
    assert content["path"] == str(output)
    assert ("diagnosis" in content) == wanted
    assert ("W8A8 with the options given" in done.stdout) == wanted
    if wanted:
        diagnosis = content["diagnosis"]
        assert {layer["layer"] for layer in diagnosis["layers"]} == {"c1", "c2", "head"}
        assert [corner["name"] for corner in diagnosis["corners"]][:2] == ["W8A32", "W32A8"]
        assert done.stdout.rstrip().endswith(diagnosis["reading"][-1])
    names = {"m.onnx", "x.npz", "q.onnx", "q.onnx.json", "r.json"}
    assert {path.name for path in tmp_path.iterdir()} == names


def test_a_report_of_something_else_is_refused(tmp_path: Path) -> None:
    file, data, _ = save(plain_chain(), tmp_path)
    (tmp_path / "other").mkdir()
    other, others_data, _ = save(residual_net(), tmp_path / "other")
    report = calibrate(other, others_data, tmp_path / "q.onnx", PLAIN)
    with pytest.raises(ConfigError, match=r"calibrated: was calibrated from another model than"):
        diagnose(file, data, PLAIN, report)


def test_a_calibration_on_other_images_or_with_other_options_is_refused(tmp_path: Path) -> None:
    file, data, pixels = save(plain_chain(), tmp_path)
    report = calibrate(file, data, tmp_path / "q.onnx", PLAIN)
    net = float_model(file)
    made = calibrate_net(net, calibration_images(net, data, PLAIN), PLAIN)
    np.savez(tmp_path / "others.npz", x=255 - pixels)
    others = tmp_path / "others.npz"
    for calibrated in (report, made):
        with pytest.raises(ConfigError, match=f"calibrated: .* on other images than the {COUNT} "):
            diagnose(file, others, PLAIN, calibrated)
        changed = replace(PLAIN, correct_bias=True, weight_bits=4)
        with pytest.raises(ConfigError, match=r"other options \(correct_bias, weight_bits\); pass"):
            diagnose(file, data, changed, calibrated)
        moved = replace(PLAIN, memory_budget=1.0)  # changes no number
        assert diagnose(file, data, moved, calibrated).images == COUNT


def test_no_images_for_the_layers_is_refused(tmp_path: Path) -> None:
    file, data, _ = save(plain_chain(), tmp_path)
    with pytest.raises(ConfigError, match="layer_images: got 0, expected at least 1"):
        diagnose(file, data, PLAIN, layer_images=0)
