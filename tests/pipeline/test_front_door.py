"""Float files that anybody wrote come into calibrate; onnxruntime runs them and the INT8 files."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from reptrt.core.errors import ArtifactError, ConfigError, DataError, ReptrtError
from reptrt.execute.runner import OrtRunner, refuse_unrunnable
from reptrt.exporter.front_door import accept
from reptrt.graph.net import net_from_model
from reptrt.graph.preprocess import read_preprocess
from reptrt.judge.evaluate import evaluate
from reptrt.judge.options import EvaluateOptions
from reptrt.pipeline import (
    PLAIN_INT8,
    CalibrateOptions,
    ExportOptions,
    calibrate,
    export,
    float_model,
)
from reptrt.quantize.reconstruct.options import LearnOptions
from reptrt.sources.source import Source
from tests.support.helpers import ort_run
from tests.support.onnx_nets import Builder, plain_chain

COUNT, SIZE = 40, 8
PIXELS = np.random.default_rng(3).integers(0, 256, (COUNT, 3, SIZE, SIZE), dtype=np.uint8)
SCALED = PIXELS.astype(np.float32) / np.float32(255)
PLAIN = replace(PLAIN_INT8, images=COUNT)
LEAST_DB = 25.0


@pytest.fixture
def data(tmp_path: Path) -> Path:
    np.savez(tmp_path / "data.npz", x=PIXELS)
    return tmp_path / "data.npz"


def saved(model: onnx.ModelProto, folder: Path) -> Path:
    onnx.save(model, str(folder / "m.onnx"))
    return folder / "m.onnx"


def written(
    model: onnx.ModelProto, folder: Path, data: Path, options: CalibrateOptions = PLAIN
) -> onnx.ModelProto:
    calibrate(saved(model, folder), data, folder / "o.onnx", options)
    return onnx.load(str(folder / "o.onnx"))


def sqnr_db(model: onnx.ModelProto, int8: onnx.ModelProto, x: np.ndarray, batch: int = 0) -> float:
    """The SQNR of the INT8 model's outputs on an input that each gets in its own type."""
    runs = []
    for proto in (model, int8):
        with OrtRunner(proto.SerializeToString()) as runner:
            step = batch or len(x)
            parts = [runner.run(x[i : i + step]) for i in range(0, len(x), step)]
        runs.append(np.concatenate([next(iter(part.values())) for part in parts]))
    exact, got = (run.astype(np.float64) for run in runs)
    return float(10 * np.log10((exact**2).sum() / ((exact - got) ** 2).sum()))


# Half precision ----------------------------------------------------------------------------------


def half(keep_io: bool, opset: int, kind: int = TensorProto.FLOAT16) -> onnx.ModelProto:
    """The chain as a float16 converter writes it."""
    model = plain_chain()
    model.opset_import[0].version = opset
    del model.graph.value_info[:]
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor)
        half_values = helper.make_tensor(tensor.name, kind, values.shape, values.flatten())
        tensor.CopyFrom(half_values)
    (x,), (y,) = model.graph.input, model.graph.output
    if keep_io:
        last = y.name
        for node in model.graph.node:
            names = {"x": "x.half"}
            node.input[:] = [names.get(name, name) for name in node.input]
        model.graph.node.insert(0, helper.make_node("Cast", ["x"], ["x.half"], to=kind))
        model.graph.node.append(helper.make_node("Cast", [last], ["y"], to=TensorProto.FLOAT))
        y.name = "y"
    else:
        for value in (x, y):
            value.type.tensor_type.elem_type = kind
    return model


@pytest.mark.parametrize("opset", [13, 19])
@pytest.mark.parametrize("keep_io", [True, False])
def test_float16_is_widened(
    tmp_path: Path, data: Path, keep_io: bool, opset: int, caplog: pytest.LogCaptureFixture
) -> None:
    model = half(keep_io, opset)
    int8 = written(model, tmp_path, data)
    assert sqnr_db(model, int8, SCALED) > LEAST_DB
    assert "float16 is widened to float32" in caplog.text
    kinds = {tensor.data_type for tensor in int8.graph.initializer}
    assert TensorProto.FLOAT16 not in kinds
    assert "Cast" not in [node.op_type for node in int8.graph.node]


def test_widened_weights_keep_their_values() -> None:
    model = half(True, 19, TensorProto.BFLOAT16)
    wide = accept(model, "net")
    assert {t.data_type for t in wide.graph.initializer} == {TensorProto.FLOAT}
    for before, after in zip(model.graph.initializer, wide.graph.initializer, strict=True):
        exact = numpy_helper.to_array(before).astype(np.float32)
        np.testing.assert_array_equal(numpy_helper.to_array(after), exact)


def test_eval_takes_float16_files_as_they_are(tmp_path: Path, data: Path) -> None:
    paths = [tmp_path / name for name in ("full.onnx", "kept.onnx")]
    for path, keep_io in zip(paths, (False, True), strict=True):
        onnx.save(half(keep_io, 19), str(path))
    (result,) = evaluate([paths[0]], data, EvaluateOptions(reference=paths[1])).results
    assert result.sqnr_db is None or result.sqnr_db > 50  # the same arithmetic


# The input ---------------------------------------------------------------------------------------


def in_front(
    nodes: list[onnx.NodeProto],
    constants: dict[str, Any],
    shape: tuple[int, ...] = (3, SIZE, SIZE),
    kind: int = TensorProto.UINT8,
) -> onnx.ModelProto:
    """The chain behind nodes from "image" to "x"."""
    model = plain_chain()
    for index, node in enumerate(nodes):
        model.graph.node.insert(index, node)
    for name, value in constants.items():
        array = np.asarray(value, getattr(value, "dtype", np.float32))
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    model.graph.input[0].CopyFrom(helper.make_tensor_value_info("image", kind, ["N", *shape]))
    onnx.checker.check_model(model, full_check=True)
    return model


def node(op: str, *names: str, **attributes: Any) -> onnx.NodeProto:
    *inputs, output = names
    return helper.make_node(op, inputs, [output], name=output, **attributes)


FLOAT = {"to": TensorProto.FLOAT}
MEAN = np.float32([123.7, 116.3, 103.5]).reshape(3, 1, 1)
STD = np.float32([58.4, 57.1, 57.4]).reshape(3, 1, 1)
NHWC = (SIZE, SIZE, 3)
PERM = {"perm": [0, 3, 1, 2]}
BYTES = {
    "div": in_front([node("Cast", "image", "p", **FLOAT), node("Div", "p", "m", "x")], {"m": 255}),
    "mul": in_front(
        [node("Cast", "image", "p", **FLOAT), node("Mul", "m", "p", "x")], {"m": 1 / 255}
    ),
    "mean and std": in_front(
        [
            *(node("Cast", "image", "p", **FLOAT), node("Sub", "p", "m", "c")),
            node("Div", "c", "s", "x"),
        ],
        {"m": MEAN, "s": STD},
    ),
    "dequantized": in_front([node("DequantizeLinear", "image", "m", "x")], {"m": 1 / 255}),
    "dequantized from 128": in_front(
        [node("DequantizeLinear", "image", "m", "z", "x")], {"m": 1 / 128, "z": np.uint8(128)}
    ),
    "no scale": in_front([node("Cast", "image", "x", **FLOAT)], {}),
    "NHWC, cast first": in_front(
        [
            *(node("Cast", "image", "p", **FLOAT), node("Transpose", "p", "t", **PERM)),
            node("Div", "t", "m", "x"),
        ],
        {"m": 255},
        NHWC,
    ),
    "NHWC, cast last": in_front(
        [
            *(node("Transpose", "image", "t", **PERM), node("Cast", "t", "p", **FLOAT)),
            node("Div", "p", "m", "x"),
        ],
        {"m": 255},
        NHWC,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", list(BYTES))
@pytest.mark.parametrize("exported", [False, True])
def test_a_uint8_input_gets_bytes(tmp_path: Path, data: Path, name: str, exported: bool) -> None:
    model = source = BYTES[name]
    if exported:
        path = saved(model, tmp_path)
        export(Source(str(path)), tmp_path / "e.onnx", ExportOptions())
        source = onnx.load(str(tmp_path / "e.onnx"))
    int8 = written(source, tmp_path, data)
    assert int8.graph.input[0].type.tensor_type.elem_type == TensorProto.UINT8
    is_nhwc = name.startswith("NHWC")
    x = PIXELS.transpose(0, 2, 3, 1) if is_nhwc else PIXELS
    assert sqnr_db(model, int8, np.ascontiguousarray(x)) > LEAST_DB
    found = read_preprocess(net_from_model(int8))
    assert (found.values, found.layout) == ("bytes", "NHWC" if is_nhwc else "NCHW")
    assert (found.channels, found.mean, found.std) == (3, (0.0,) * 3, (1.0,) * 3)
    (result,) = evaluate(
        [tmp_path / "o.onnx"], data, EvaluateOptions(reference=tmp_path / "m.onnx")
    ).results
    assert result.sqnr_db is not None
    assert result.sqnr_db > LEAST_DB


def test_floats_for_a_uint8_input_are_refused_by_name(tmp_path: Path) -> None:
    np.savez(tmp_path / "floats.npz", x=SCALED)
    path = saved(BYTES["div"], tmp_path)
    with pytest.raises(DataError, match=r"floats.npz: images are float32, expected uint8.*UINT8"):
        calibrate(path, tmp_path / "floats.npz", tmp_path / "o.onnx", PLAIN)


def test_a_float_input_with_the_scaling_inside_gets_pixels(tmp_path: Path, data: Path) -> None:
    model = in_front(
        [node("Sub", "image", "m", "c"), node("Div", "c", "s", "x")],
        {"m": MEAN, "s": STD},
        kind=TensorProto.FLOAT,
    )
    assert sqnr_db(model, written(model, tmp_path, data), PIXELS.astype(np.float32)) > LEAST_DB


def test_a_mean_of_the_usual_scale_is_no_reason_for_pixels() -> None:
    nodes = [node("Sub", "image", "m", "c"), node("Div", "c", "s", "x")]
    constants = {"m": MEAN / 255, "s": STD / 255}
    model = in_front(nodes, constants, kind=TensorProto.FLOAT)
    assert read_preprocess(net_from_model(model)).values == "normalized"


def test_a_mean_for_a_net_that_scales_itself_is_refused(tmp_path: Path) -> None:
    source = Source(str(saved(BYTES["div"], tmp_path)))
    with pytest.raises(ConfigError, match=r"mean: got .*scales them itself"):
        export(source, tmp_path / "e.onnx", ExportOptions(mean=(0.5, 0.5, 0.5)))


@pytest.mark.parametrize("kind", ["folder", "NCHW", "NHWC", "floats"])
def test_nhwc_takes_all_kinds_of_data(tmp_path: Path, kind: str) -> None:
    model = in_front([node("Transpose", "image", "x", **PERM)], {}, NHWC, TensorProto.FLOAT)
    last = np.ascontiguousarray(PIXELS.transpose(0, 2, 3, 1))
    images = tmp_path / "images.npz"
    if kind == "folder":
        images = tmp_path / "images"
        images.mkdir()
        for index, pixels in enumerate(last):
            Image.fromarray(pixels).save(images / f"{index:02}.png")
    else:
        arrays = {"NCHW": PIXELS, "NHWC": last, "floats": last / np.float32(255)}
        np.savez(images, x=arrays[kind])
    int8 = written(model, tmp_path, images)
    assert sqnr_db(model, int8, last / np.float32(255)) > LEAST_DB


def test_channels_last_without_a_transpose_are_named(tmp_path: Path) -> None:
    b = Builder(channels=SIZE)
    model = b.model(b.head(b.relu(b.conv("x", 4, "c"))))
    model.graph.input[0].type.tensor_type.shape.dim[3].dim_value = 3
    del model.graph.value_info[:]
    Image.fromarray(PIXELS[0].transpose(1, 2, 0)).save(tmp_path / "a.png")
    one = replace(PLAIN, images=1)
    with pytest.raises(DataError, match=r"\(N, 8, 8, 3\) is NHWC"):
        calibrate(saved(model, tmp_path), tmp_path, tmp_path / "o.onnx", one)


def second_input(model: onnx.ModelProto, used: bool) -> onnx.ModelProto:
    model.graph.input.append(helper.make_tensor_value_info("size", TensorProto.FLOAT, [1]))
    if used:
        model.graph.node[0].input[0] = "brighter"
        model.graph.node.insert(0, node("Mul", "x", "size", "brighter"))
    return model


def test_an_input_that_no_node_reads_is_dropped(
    tmp_path: Path, data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    int8 = written(second_input(plain_chain(), used=False), tmp_path, data)
    assert [value.name for value in int8.graph.input] == ["x"]
    assert "input size is dropped: no node reads it" in caplog.text
    assert sqnr_db(plain_chain(), int8, SCALED) > LEAST_DB


def test_what_was_done_to_a_file_is_in_the_report(tmp_path: Path, data: Path) -> None:
    """A program reads the JSON and not the log."""
    model = second_input(half(False, 19), used=False)
    path = saved(model, tmp_path)
    same = np.repeat(PIXELS[:1], len(PIXELS), axis=0)
    np.savez(tmp_path / "same.npz", x=same)
    exported = export(Source(str(path)), tmp_path / "e.onnx", ExportOptions())
    report = calibrate(path, tmp_path / "same.npz", tmp_path / "o.onnx", PLAIN)
    expected = ("input size is dropped: no node reads it", "float16 is widened to float32")
    for notes in (exported.to_dict()["notes"], report.to_dict()["notes"]):
        assert [any(text in note for note in notes) for text in expected] == [True, True]
    assert len(report.notes) == len(set(report.notes)) == len(exported.notes) + 1
    assert "images are equal" in report.notes[-1]
    assert calibrate(tmp_path / "e.onnx", data, tmp_path / "p.onnx", PLAIN).notes == ()


def test_a_second_input_that_is_read_is_named(tmp_path: Path, data: Path) -> None:
    message = r"m.onnx: has 2 inputs and reads x, size; expected one image batch"
    refused(second_input(plain_chain(), used=True), tmp_path, data, message)


def refused(model: onnx.ModelProto, folder: Path, data: Path, message: str) -> None:
    before = sorted({*folder.iterdir(), saved(model, folder)})
    with pytest.raises(ReptrtError, match=message) as caught:
        calibrate(folder / "m.onnx", data, folder / "o.onnx", PLAIN)
    assert "\n" not in str(caught.value)
    assert sorted(folder.iterdir()) == before


# Old and new files -------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("opset", [9, 10, 11, 12, 13, 15, 17, 18, 19, 20, 21, 22, 23, 24, 25])
def test_opsets(tmp_path: Path, data: Path, opset: int) -> None:
    b = Builder()
    model = b.model(b.head(b.relu(b.conv("x", 8, "c"))), opset=opset)
    model.ir_version = 4 if opset < 10 else 8
    assert sqnr_db(model, written(model, tmp_path, data), SCALED) > LEAST_DB


@pytest.mark.parametrize("opset", [8, 26])
def test_opsets_that_are_refused(tmp_path: Path, data: Path, opset: int) -> None:
    model = plain_chain()
    model.opset_import[0].version = opset
    refused(model, tmp_path, data, rf"m.onnx: opset {opset}, expected 9 to 25; export")


def test_weights_among_the_inputs_and_in_a_file_of_their_own(tmp_path: Path, data: Path) -> None:
    model = plain_chain()
    model.graph.input.extend(
        helper.make_tensor_value_info(tensor.name, TensorProto.FLOAT, tensor.dims)
        for tensor in model.graph.initializer
    )
    stored = onnx.ModelProto()
    stored.CopyFrom(model)
    (tmp_path / "net").mkdir()
    path = tmp_path / "net" / "m.onnx"
    onnx.save(stored, str(path), save_as_external_data=True, location="weights", size_threshold=0)
    calibrate(path, data, tmp_path / "o.onnx", PLAIN)
    int8 = onnx.load(str(tmp_path / "o.onnx"), load_external_data=False)
    assert [value.name for value in int8.graph.input] == ["x"]
    assert sqnr_db(plain_chain(), int8, SCALED) > LEAST_DB


def test_local_functions_are_inlined(tmp_path: Path, data: Path) -> None:
    model = plain_chain()
    nodes = list(model.graph.node)
    conv = nodes[0]
    block = helper.make_function(
        "local", "Block", list(conv.input), ["c"], [conv], [helper.make_opsetid("", 19)]
    )
    block.node[0].output[0] = "c"
    model.graph.node[0].CopyFrom(
        helper.make_node("Block", conv.input, conv.output, conv.name, domain="local")
    )
    model.functions.append(block)
    model.opset_import.append(helper.make_opsetid("local", 1))
    int8 = written(model, tmp_path, data)
    assert sqnr_db(plain_chain(), int8, SCALED) > LEAST_DB
    assert not int8.functions


def test_what_reptrt_exported_comes_back_unchanged(tmp_path: Path) -> None:
    export(Source(str(saved(plain_chain(), tmp_path))), tmp_path / "e.onnx", ExportOptions())
    model = onnx.load(str(tmp_path / "e.onnx"))
    assert accept(model, "e").SerializeToString() == model.SerializeToString()


# What is written ---------------------------------------------------------------------------------


def broken() -> onnx.ModelProto:
    """A model that onnx's checker accepts and onnxruntime does not."""
    model = plain_chain()
    model.graph.node[0].op_type = "NoSuchOperator"
    model.graph.node[0].domain = "elsewhere"
    model.opset_import.append(helper.make_opsetid("elsewhere", 1))
    return model


def test_a_file_that_onnxruntime_refuses_is_not_written(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "reptrt.pipeline.calibrating.finished_model", lambda net: (broken(), "0" * 64)
    )
    message = r"onnxruntime \S+ refuses this model .*NoSuchOperator.*nothing was written"
    refused(plain_chain(), tmp_path, data, message)


def test_operators_of_another_runtime_are_not_held_against_a_file() -> None:
    refuse_unrunnable(broken(), "o.onnx", source=broken())
    with pytest.raises(ArtifactError, match=r"o.onnx: onnxruntime \S+ refuses"):
        refuse_unrunnable(broken(), "o.onnx", source=plain_chain())


# A fixed batch -----------------------------------------------------------------------------------


def with_middle(middle: Callable[[Builder, str], str], batch: int) -> onnx.ModelProto:
    """Conv -> ReLU -> middle -> conv -> ReLU -> head; the middle keeps (N, 4, 8, 8)."""
    b = Builder()
    y = middle(b, b.relu(b.conv("x", 4, "c1")))
    b.channels[y] = 4
    return b.model(b.head(b.relu(b.conv(y, 4, "c2"))), batch=batch)


def reshape(b: Builder, x: str, name: str, *target: int) -> str:
    return b.node("Reshape", [x, b.constant(f"{name}.shape", np.int64(target))], name)


def shuffle(batch: int) -> Callable[[Builder, str], str]:
    def middle(b: Builder, x: str) -> str:
        halves = reshape(b, x, "halves", batch, 2, 2, SIZE, SIZE)
        swapped = b.node("Transpose", [halves], "swapped", perm=[0, 2, 1, 3, 4])
        return reshape(b, swapped, "joined", batch, 4, SIZE, SIZE)

    return middle


def merged(b: Builder, x: str) -> str:
    """The batch is a part of an axis in between, as windows of attention have it."""
    rows = reshape(b, x, "rows", 4, SIZE * SIZE)
    return reshape(b, b.node("Sigmoid", [rows], "s"), "back", 1, 4, SIZE, SIZE)


def resized(b: Builder, x: str) -> str:
    sizes = b.constant("sizes", np.int64([1, 4, 2 * SIZE, 2 * SIZE]))
    return b.node("Resize", [x, "", "", sizes], "resized", mode="nearest")


def resized_unevenly(b: Builder, x: str) -> str:
    """15 / 11 and 13 / 11 are no float32 numbers."""
    for name, height, width in (("first", 11, 11), ("second", 15, 13)):
        sizes = b.constant(f"{name}.sizes", np.int64([1, 4, height, width]))
        x = b.node("Resize", [x, "", "", sizes], name, mode="linear")
    return x


def squeezed(b: Builder, x: str) -> str:
    """The batch is gone in between: it cannot be made free."""
    axis = b.constant("axis", np.int64([0]))
    image = b.node("Squeeze", [x, axis], "image")
    return b.node("Unsqueeze", [b.node("Tanh", [image], "t"), axis], "batch")


FIXED = {
    "shuffle": (shuffle(1), 1, True),
    "two at a time": (shuffle(2), 2, True),
    "merged": (merged, 1, True),
    "resized": (resized, 1, True),
    "resized unevenly": (resized_unevenly, 1, True),
    "squeezed": (squeezed, 1, False),
}
LEARNED = replace(PLAIN, learn=LearnOptions(iterations=4, batch=8))


@pytest.mark.slow
@pytest.mark.parametrize("name", list(FIXED))
@pytest.mark.parametrize("options", [PLAIN, LEARNED], ids=["plain", "learned"])
def test_a_fixed_batch(
    tmp_path: Path,
    data: Path,
    name: str,
    options: CalibrateOptions,
    caplog: pytest.LogCaptureFixture,
) -> None:
    middle, batch, is_freed = FIXED[name]
    model = with_middle(middle, batch)
    int8 = written(model, tmp_path, data, options)
    assert sqnr_db(model, int8, SCALED, batch) > LEAST_DB
    assert ("is made free" in caplog.text) == is_freed
    size = int8.graph.input[0].type.tensor_type.shape.dim[0].dim_value
    assert size == (0 if is_freed else batch)
    (result,) = evaluate(
        [tmp_path / "o.onnx"], data, EvaluateOptions(reference=tmp_path / "m.onnx", batch_size=7)
    ).results
    assert result.sqnr_db is not None
    assert result.sqnr_db > LEAST_DB


def test_freed_nets_compute_the_same_for_any_batch() -> None:
    for name in ("shuffle", "two at a time", "merged", "resized", "resized unevenly"):
        middle, batch, _ = FIXED[name]
        model = with_middle(middle, batch)
        free = accept(model, name)
        (got,) = ort_run(free, {"x": SCALED[:6]}).values()
        parts = [
            next(iter(ort_run(model, {"x": SCALED[i : i + batch]}).values()))
            for i in range(0, 6, batch)
        ]
        np.testing.assert_allclose(got, np.concatenate(parts), rtol=1e-5, atol=1e-6)


def test_sizes_that_a_detector_reads_are_constants_in_calibrate_too(tmp_path: Path) -> None:
    """The coordinates of cells, Range over the height, as in the heads of YOLO."""
    b = Builder(channels=3)
    feature = b.conv("x", 4, "conv")
    for name, value in (("axis", 2), ("start", 0), ("step", 1)):
        b.constant(name, np.int64(value))
    size = b.node("Gather", [b.node("Shape", [feature], "shape"), "axis"], "size", axis=0)
    cells = b.node("Range", ["start", size, "step"], "cells")
    cells = b.node("Cast", [cells], "floats", to=TensorProto.FLOAT)
    onnx.save(b.model(b.node("Add", [feature, cells], "y")), tmp_path / "net.onnx")
    model = float_model(tmp_path / "net.onnx")
    assert [node.op_type for node in model.proto.graph.node] == ["Conv", "Add"]
