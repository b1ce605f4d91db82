"""Calibration end to end: scales, bytes that depend on the images alone, and what is refused."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from PIL import Image

from reptrt.core.artifacts import read_sidecar, sha256_of
from reptrt.core.choices import SplitMode
from reptrt.core.errors import ArtifactError, CalibrationError, ConfigError, DataError, ReptrtError
from reptrt.graph.net import net_from_model
from reptrt.graph.preprocess import Preprocess, write_preprocess
from reptrt.judge.evaluate import evaluate
from reptrt.judge.options import EvaluateOptions
from reptrt.pipeline import (
    PLAIN_INT8,
    CalibrateOptions,
    ExportOptions,
    calibrate,
    export,
    quantities,
)
from reptrt.quantize.calib.collect import collect
from reptrt.quantize.calib.options import ThresholdOptions
from reptrt.sources.options import ArchitectureOptions
from reptrt.sources.source import Source
from tests.support.helpers import SHARED, needs_shared, optimized_op_counts, ort_run
from tests.support.learned_nets import rep_net, write_images, write_net
from tests.support.onnx_nets import Builder, basic_block, plain_chain, without_names
from tests.support.qdq_nets import residual_net, with_outputs

COUNT = 45
PIXELS = np.random.default_rng(11).integers(0, 256, (COUNT, 3, 8, 8), dtype=np.uint8)
# Scales on the net as it is; what is done to its weights first has tests of its own.
PLAIN = replace(PLAIN_INT8, images=COUNT)
MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.2, 0.3)


def save(model: onnx.ModelProto, path: Path) -> Path:
    """Write a model with preprocessing."""
    net = net_from_model(model)
    write_preprocess(net, Preprocess(3, 8, 8, MEAN, STD))
    helper.set_model_props(model, net.metadata)
    onnx.save(model, str(path))
    return path


def arrays(path: Path, pixels: np.ndarray = PIXELS) -> Path:
    np.savez(path, x=pixels)
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return arrays(tmp_path / "data.npz")


def network_inputs(pixels: np.ndarray) -> np.ndarray:
    scaled = pixels.astype(np.float32) / np.float32(255)
    mean, std = (np.float32(values)[:, None, None] for values in (MEAN, STD))
    return (scaled - mean) / std


def scales_of(path: Path) -> dict[str, float]:
    """Return the scale of each quantized activation in a written file."""
    model = onnx.load(str(path))
    values = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    return {
        node.input[0]: float(values[node.input[1]])
        for node in model.graph.node
        if node.op_type == "QuantizeLinear"
    }


def test_scales_are_those_of_the_float_net_on_the_images(tmp_path: Path, data: Path) -> None:
    model = residual_net()
    report = calibrate(save(model, tmp_path / "m.onnx"), data, tmp_path / "o.onnx", PLAIN)
    x = network_inputs(PIXELS)
    names = [t.tensor for t in report.tensors]
    values = ort_run(with_outputs(model, names), {"x": x}) | {"x": x}
    amax = {name: float(np.abs(values[name]).max()) for name in names}
    group = max(amax["left.relu"], amax["right.clip"], amax["cat"])  # one scale for the Concat
    amax |= dict.fromkeys(("left.relu", "right.clip", "cat"), group)
    written = scales_of(tmp_path / "o.onnx")
    assert set(written) == set(names)
    for found in report.tensors:
        assert found.amax == pytest.approx(amax[found.tensor], rel=1e-5)
        assert found.scale == pytest.approx(found.amax / 127, rel=1e-6)
        assert written[found.tensor] == found.scale
        zeros = float((values[found.tensor] == 0).mean())
        assert found.zeros == pytest.approx(zeros, abs=1e-3)
    assert (report.images, report.layers) == (COUNT, 12)
    json.dumps(report.to_dict())


def test_the_quantized_net_is_close(tmp_path: Path, data: Path) -> None:
    model = residual_net()
    calibrate(save(model, tmp_path / "m.onnx"), data, tmp_path / "o.onnx", PLAIN)
    (result,) = evaluate(
        [tmp_path / "o.onnx"], data, EvaluateOptions(reference=tmp_path / "m.onnx", threads=1)
    ).results
    assert result.sqnr_db is not None
    assert result.sqnr_db > 20  # 8 bits through a dozen layers with random weights


@pytest.mark.slow
def test_bytes_do_not_depend_on_order_or_on_how_images_are_stored(tmp_path: Path) -> None:
    model = save(residual_net(), tmp_path / "m.onnx")
    folder = tmp_path / "images"
    for i, pixels in enumerate(PIXELS):
        (folder / f"class{i % 3}").mkdir(parents=True, exist_ok=True)
        path = folder / f"class{i % 3}" / f"{i:02d}.png"
        Image.fromarray(pixels.transpose(1, 2, 0)).save(path)
    order = np.random.default_rng(0).permutation(COUNT)
    sources = {
        "as they are": arrays(tmp_path / "a.npz"),
        "shuffled": arrays(tmp_path / "b.npz", PIXELS[order]),
        "reversed": arrays(tmp_path / "c.npz", PIXELS[::-1]),
        "folder": folder,
    }
    mse = ThresholdOptions("mse")
    for options in (
        replace(PLAIN, threshold=mse),
        replace(PLAIN, threshold=ThresholdOptions("kl")),
        replace(PLAIN, threshold=mse, equalize=True),
        replace(PLAIN, threshold=mse, split="coarse-fine"),
    ):  # choices that held-out images judge do depend on which images those are
        written = set()
        for source in sources.values():
            calibrate(model, source, tmp_path / "o.onnx", options)
            written.add((tmp_path / "o.onnx").read_bytes())
        assert len(written) == 1, options


@pytest.mark.parametrize("split", ["auto", "identity"])
def test_values_that_do_not_fit_into_memory_are_computed_again(
    split: SplitMode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scales are the same to float rounding; summands in INT8 are new after the first pass."""
    path, passes = write_net(tmp_path / "m.onnx", rep_net(2)), []
    data = write_images(tmp_path / "d.npz", COUNT)
    monkeypatch.setattr(
        quantities, "collect", lambda *given: passes.append(given) or collect(*given)
    )
    options = CalibrateOptions(images=COUNT, split=split)
    if split == "identity":
        options = replace(options, split_precision="int8", max_overhead=1.0)
    scales = []
    for budget in (4.0, 1e-6):
        calibrate(path, data, tmp_path / "o.onnx", replace(options, memory_budget=budget))
        scales.append(scales_of(tmp_path / "o.onnx"))
    assert len(passes) == (1 if split == "auto" else 2)
    assert scales[0] == pytest.approx(scales[1], rel=1e-5)


def test_the_seed_chooses_the_images(tmp_path: Path, data: Path) -> None:
    model = save(plain_chain(), tmp_path / "m.onnx")
    written = []
    for seed in (0, 0, 1):
        options = replace(PLAIN, images=10, seed=seed)
        report = calibrate(model, data, tmp_path / "o.onnx", options)
        assert report.images == 10
        written.append((tmp_path / "o.onnx").read_bytes())
    assert written[0] == written[1] != written[2]


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["max", "percentile", "mse", "mae", "entropy", "kl"])
def test_every_rule_writes_a_net_that_runs(tmp_path: Path, data: Path, rule: str) -> None:
    options = replace(PLAIN, threshold=ThresholdOptions(rule))  # type: ignore[arg-type]
    model = save(residual_net(), tmp_path / "m.onnx")
    report = calibrate(model, data, tmp_path / "o.onnx", options)
    assert all(0 < t.amax <= max(u.maximum for u in report.tensors) for t in report.tensors)
    got = ort_run(onnx.load(str(tmp_path / "o.onnx")), {"x": network_inputs(PIXELS)})["head"]
    assert np.isfinite(got).all()


@pytest.mark.parametrize("split", ["auto", "coarse-fine"])
def test_a_node_of_any_kind_and_its_tail_stay_in_float(
    tmp_path: Path, data: Path, split: SplitMode
) -> None:
    model = save(residual_net(), tmp_path / "m.onnx")
    options = replace(PLAIN, float_nodes=("^pool$",), split=split)
    report = calibrate(model, data, tmp_path / "o.onnx", options)
    assert report.float_nodes == ("flat", "head", "pool")
    assert report.excluded == ("head",)
    assert report.left_float["nodes in float"] == "3: flat, head, pool"
    assert "flat, head, pool" in str(report)
    written = onnx.load(str(tmp_path / "o.onnx")).graph
    nodes = {node.name: node for node in written.node}
    dequantized = {n.output[0] for n in written.node if n.op_type == "DequantizeLinear"}
    assert dequantized.isdisjoint({*nodes["pool"].input, *nodes["head"].input})
    assert not {split.layer for split in report.splits} & {"head"}


def test_exclude_and_fewer_bits(tmp_path: Path, data: Path) -> None:
    model = save(residual_net(), tmp_path / "m.onnx")
    options = replace(PLAIN, exclude=("^stem$", "^head$"), weight_bits=4)
    report = calibrate(model, data, tmp_path / "o.onnx", options)
    assert report.layers == 10
    assert report.excluded == ("head", "stem")
    assert report.left_float == {"layers in float": "2: head, stem"}
    assert report.simulation == "4-bit weights, 8-bit activations inside INT8"
    written = onnx.load(str(tmp_path / "o.onnx"))
    assert {p.key: p.value for p in written.metadata_props}[
        "reptrt.simulation"
    ] == report.simulation
    kinds = {node.name: node for node in written.graph.node}
    weights = {t.name for t in written.graph.initializer}
    assert kinds["stem"].input[1] in weights  # float
    assert kinds["a1"].input[1] not in weights
    sidecar = read_sidecar(tmp_path / "o.onnx")
    assert sidecar is not None
    assert sidecar.details["simulation"] == report.simulation


def test_metadata_and_origin_travel_with_the_file(tmp_path: Path, data: Path) -> None:
    model = save(plain_chain(), tmp_path / "m.onnx")
    report = calibrate(model, data, tmp_path / "o.onnx", PLAIN)
    sidecar = read_sidecar(tmp_path / "o.onnx")
    assert sidecar is not None
    assert (sidecar.artifact, sidecar.sha256) == ("int8-onnx", report.sha256)
    assert sidecar.parents["m.onnx"] == sha256_of(model)
    assert set(sidecar.parents) == {"m.onnx", "data.npz"}
    before, after = (
        {p.key: p.value for p in onnx.load(str(path)).metadata_props}
        for path in (model, tmp_path / "o.onnx")
    )
    assert before.items() <= after.items()


def test_a_file_with_unnamed_nodes_is_quantized_all_the_same(tmp_path: Path, data: Path) -> None:
    named = calibrate(save(basic_block(), tmp_path / "m.onnx"), data, tmp_path / "a.onnx", PLAIN)
    nameless = save(without_names(basic_block()), tmp_path / "n.onnx")
    report = calibrate(nameless, data, tmp_path / "b.onnx", PLAIN)
    assert report.tensors == named.tensors
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def flattened(reshape: bool) -> onnx.ModelProto:
    """A net exported for one image, its head by Flatten or by Reshape to [1, -1]."""
    b = Builder()
    y = b.node("GlobalAveragePool", [b.relu(b.conv("x", 4, "c1"))], "pool")
    if reshape:
        y = b.node("Reshape", [y, b.constant("shape", np.int64([1, -1]))], "flat")
        b.channels[y] = 4
    else:
        y = b.node("Flatten", [y], "flat")
    return b.model(b.gemm(y, 5, "head"), batch=1)


@pytest.mark.parametrize("reshape", [False, True])
def test_a_net_for_one_image_at_a_time(tmp_path: Path, data: Path, reshape: bool) -> None:
    model = save(flattened(reshape), tmp_path / "m.onnx")
    calibrate(model, data, tmp_path / "o.onnx", PLAIN)
    (result,) = evaluate(
        [tmp_path / "o.onnx"], data, EvaluateOptions(reference=model, threads=1)
    ).results
    assert result.sqnr_db is not None
    assert result.sqnr_db > 20


# Refused -----------------------------------------------------------------------------------------


def refused(tmp_path: Path, model: onnx.ModelProto, data: Path, message: str) -> None:
    path = save(model, tmp_path / "m.onnx")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ReptrtError, match=message):
        calibrate(path, data, tmp_path / "o.onnx", PLAIN)
    assert sorted(tmp_path.iterdir()) == before


def test_operators_that_cannot_run_are_named_all_at_once(tmp_path: Path, data: Path) -> None:
    b = Builder()
    y = b.node("LRN", [b.relu(b.conv("x", 4, "c1"))], "norm1", size=3)
    y = b.node("LpPool", [y], "pool2", kernel_shape=[2, 2])
    y = b.node("LRN", [y], "norm3", size=3)
    message = r"3 nodes cannot be run: LRN \(norm1, norm3\); LpPool \(pool2\)"
    refused(tmp_path, b.model(b.head(b.conv(y, 4, "c2"))), data, message)


def change(model: onnx.ModelProto, name: str, function: Callable[[np.ndarray], None]) -> None:
    for tensor in model.graph.initializer:
        if tensor.name == name:
            values = numpy_helper.to_array(tensor).copy()
            function(values)
            tensor.CopyFrom(numpy_helper.from_array(values, name))


@pytest.mark.parametrize("name", ["c2.weight", "head.bias"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_no_numbers(tmp_path: Path, data: Path, name: str, bad: float) -> None:
    model = plain_chain()
    change(model, name, lambda values: values.reshape(-1).__setitem__(2, bad))
    refused(tmp_path, model, data, rf"1 constants hold NaN or Inf \({name}\)")


@pytest.mark.parametrize("bias", [1e35, 3e38])
def test_activations_that_are_no_numbers(tmp_path: Path, data: Path, bias: float) -> None:
    """Nothing else is said about them: warnings are errors here."""
    model = plain_chain()
    change(model, "c1.bias", lambda values: values.fill(bias))
    path = save(model, tmp_path / "m.onnx")
    for options in (PLAIN, CalibrateOptions(images=COUNT)):
        with pytest.raises(CalibrationError, match=r"c1\.relu: holds NaN, Inf or values past 1e30"):
            calibrate(path, data, tmp_path / "o.onnx", options)


def test_a_quantized_file(tmp_path: Path, data: Path) -> None:
    path = save(plain_chain(), tmp_path / "m.onnx")
    calibrate(path, data, tmp_path / "o.onnx", PLAIN)
    with pytest.raises(
        ConfigError, match=r"o\.onnx: is already quantized \(QuantizeLinear x\.quantize"
    ):
        calibrate(tmp_path / "o.onnx", data, tmp_path / "p.onnx", PLAIN)


def test_images_of_other_channels_and_too_few_of_them(tmp_path: Path) -> None:
    path = save(plain_chain(), tmp_path / "m.onnx")
    grey = arrays(tmp_path / "grey.npz", PIXELS[:, :1])
    with pytest.raises(DataError, match=r"grey\.npz: 1 channels in an array .*expected \(N, 3, 8"):
        calibrate(path, grey, tmp_path / "o.onnx", PLAIN)
    few = arrays(tmp_path / "few.npz", PIXELS[:7])
    with pytest.raises(DataError, match=r"few\.npz: got 7 images, expected 45"):
        calibrate(path, few, tmp_path / "o.onnx", PLAIN)
    assert not (tmp_path / "o.onnx").exists()


def test_the_model_is_never_overwritten(tmp_path: Path, data: Path) -> None:
    path = save(plain_chain(), tmp_path / "m.onnx")
    before = path.read_bytes()
    with pytest.raises(ArtifactError, match=r"is the file it would be made from"):
        calibrate(path, data, path, PLAIN)
    assert path.read_bytes() == before


def test_options_that_cannot_work() -> None:
    with pytest.raises(ConfigError, match=r"weight_bits: got 9, expected 2\.\.8"):
        CalibrateOptions(weight_bits=9)
    with pytest.raises(ConfigError, match=r"activation_bits: got 1, expected 2\.\.8"):
        CalibrateOptions(activation_bits=1)


def test_a_device_that_is_not_there(tmp_path: Path, data: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    path = save(plain_chain(), tmp_path / "m.onnx")
    with pytest.raises(ConfigError, match=r"device=.cuda.: torch finds no CUDA device"):
        calibrate(path, data, tmp_path / "o.onnx", replace(PLAIN, device="cuda"))


# Real nets ---------------------------------------------------------------------------------------

ZOO = {
    "repvgg": ArchitectureOptions(
        blocks=(2, 4, 14, 1), widths=(32, 32, 64, 128, 256), strides=(2, 1, 2, 2, 1), num_classes=10
    ),
    "mobileone": ArchitectureOptions(
        blocks=(2, 4, 6, 1),
        widths=(32, 64, 128, 256),
        strides=(1, 2, 2, 1),
        branches=2,
        num_classes=10,
    ),
}
CIFAR = ExportOptions(
    input_size=(3, 32, 32), mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616)
)


@pytest.mark.slow
@needs_shared
@pytest.mark.parametrize(
    ("name", "layers", "least_db"), [("repvgg", 22, 16), ("mobileone", 27, 18)]
)
def test_the_trained_nets_run_in_int8_at_the_rivals_level(
    tmp_path: Path, name: str, layers: int, least_db: float
) -> None:
    weights = SHARED / "zoo" / f"{name}_cifar10.pt"
    model, output = tmp_path / "m.onnx", tmp_path / "o.onnx"
    export(Source(name, weights, ZOO[name]), model, CIFAR)
    options = CalibrateOptions(
        images=256, equalize=False, split="none", full_range=False, correct_bias=False
    )
    calibrate(model, SHARED / "cifar10" / "calib", output, options)
    counts = optimized_op_counts(output)
    assert counts["QLinearConv"] == layers
    assert counts["QGemm"] == 1
    assert not {"Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul"} & set(counts)
    report = evaluate(
        [output], SHARED / "cifar10" / "test", EvaluateOptions(reference=model, limit=1000)
    )
    (result,) = report.results
    assert result.sqnr_db is not None
    assert result.sqnr_db > least_db
    assert result.agreement is not None
    assert result.agreement > 0.93


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty JPEG files of many sizes, smooth with some grain."""
    folder = tmp_path_factory.mktemp("photographs")
    rng = np.random.default_rng(0)
    for i in range(40):
        width, height = (int(side) for side in rng.integers(200, 300, 2))
        coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
        grain = rng.integers(-20, 20, smooth.shape)
        image = Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8))
        image.save(folder / f"{i:02d}.jpg", quality=85)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("name", "layers"), [("repvgg_a0", 22), ("mobileone_s0", 43)])
def test_imagenet_nets_go_the_whole_way(
    tmp_path: Path, photographs: Path, name: str, layers: int
) -> None:
    model, output = tmp_path / "m.onnx", tmp_path / "o.onnx"
    export(Source(name), model, ExportOptions())
    options = CalibrateOptions(images=32, split="none")
    report = calibrate(model, photographs, output, options)
    assert report.layers == layers + 1
    (result,) = evaluate([output], photographs, EvaluateOptions(reference=model, limit=8)).results
    assert result.sqnr_db is not None
    assert result.sqnr_db > 10  # random weights: all images look alike to the last layer
    counts = optimized_op_counts(output)
    assert counts["QLinearConv"] == layers
    assert not {"Conv", "FusedConv", "Gemm"} & set(counts)
