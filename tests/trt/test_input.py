"""The rest of a graph becomes FP16 for the engine, and only there."""

import importlib.util
import json
import logging
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper

from reptrt.cli import main
from reptrt.core.artifacts import read_sidecar
from reptrt.core.errors import RewriteError
from reptrt.core.metrics import sqnr_db
from reptrt.graph.intent import planned_int8
from reptrt.trt.build import build_engine
from reptrt.trt.details import Rest
from reptrt.trt.input import is_half, with_rest
from reptrt.trt.inspect import inspect_onnx
from reptrt.trt.options import BuildOptions
from reptrt.trt.rtx_plan import layers_of_plan
from tests.support.helpers import ort_run
from tests.support.onnx_nets import plain_chain
from tests.support.qdq_graphs import model_of, qdq_model, save
from tests.support.qdq_nets import images, quantized, residual_net

needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed"
)


def small_scale() -> onnx.ModelProto:
    """The first layer's weight scale is below FP16's normal range."""
    model = qdq_model()
    for tensor in model.graph.initializer:
        if tensor.name == "conv0.scale":
            tensor.CopyFrom(numpy_helper.from_array(np.full(16, 1e-6, np.float32), tensor.name))
    return model


@pytest.mark.parametrize("make", [lambda: quantized(residual_net(), images()), plain_chain])
def test_an_fp32_rest_is_converted_and_the_plan_stays(make) -> None:  # type: ignore[no-untyped-def]
    before = make()
    content = before.SerializeToString()
    after, rest = with_rest(before, "fp16")
    assert before.SerializeToString() == content
    assert rest.state == "converted"
    assert rest.num_converted > 5
    assert rest.left_fp32 == ()
    assert is_half(after)
    assert not is_half(before)
    assert planned_int8(after) == planned_int8(before)
    ends = [[(t.name, t.type) for t in (*m.graph.input, *m.graph.output)] for m in (before, after)]
    assert ends[0] == ends[1]
    x = {"x": images(8, seed=5)}
    (expected,), (got,) = (list(ort_run(m, x, False).values()) for m in (before, after))
    assert sqnr_db(expected, got) > 30  # a code that FP16 moves across a rounding edge is 1 step


def test_fp32_is_left_alone_if_asked_for() -> None:
    model = qdq_model()
    assert with_rest(model, "fp32") == (model, Rest("fp32"))


@pytest.mark.parametrize("kind", [TensorProto.FLOAT16, TensorProto.BFLOAT16])
def test_a_graph_with_half_types_is_left_as_it_is(kind: int, caplog) -> None:  # type: ignore
    """Its FP32 parts too: they may be FP32 for a reason."""
    weight = helper.make_tensor("w", kind, [4, 3, 1, 1], [1.0] * 12)
    cast = helper.make_node("Cast", ["input"], ["x"], name="cast", to=kind)
    conv = helper.make_node("Conv", ["x", "w"], ["c"], name="conv")
    back = helper.make_node("Cast", ["c"], ["f"], name="back", to=TensorProto.FLOAT)
    softmax = helper.make_node("Softmax", ["f"], ["y"], name="softmax", axis=1)
    model = model_of([cast, conv, back, softmax], ["N", 3, 8, 8], ["N", 4, 8, 8])
    model.graph.initializer.append(weight)
    assert with_rest(model, "fp16") == (model, Rest("was fp16"))
    assert caplog.messages == []
    assert with_rest(model, "fp32") == (model, Rest("was fp16"))
    assert caplog.messages == [
        "high precision fp32: the graph is FP16 already and is left as it is"
    ]


def test_constants_stored_in_half_do_not_make_a_half_graph() -> None:
    """Weights kept in FP16 to save space, computed with in FP32."""
    nodes = [
        helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(np.float16(2.0))),
        helper.make_node("Cast", ["w"], ["w32"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["input", "w32"], ["y"]),
    ]
    assert not is_half(model_of(nodes, ["N", 3, 8, 8], ["N", 3, 8, 8]))


def test_what_fp16_cannot_hold_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "reptrt")
    after, rest = with_rest(small_scale(), "fp16")
    assert [skip.node for skip in rest.left_fp32] == ["w0"]
    assert str(rest).endswith("nodes converted, 1 left in fp32)")
    (warning,) = (r.getMessage() for r in caplog.records if r.levelno == logging.WARNING)
    assert warning.startswith("1 node stays in FP32")
    (info,) = (r.getMessage() for r in caplog.records if r.levelno == logging.INFO)
    assert info.startswith("w0 stays in FP32: scale 1e-06 is outside")
    kept = numpy_helper.to_array(
        next(t for t in after.graph.initializer if t.name.startswith("conv0.scale"))
    )
    assert kept.dtype == np.float32
    assert planned_int8(after) == ("conv0", "conv1")


def test_control_flow_says_what_to_do() -> None:
    value = helper.make_tensor_value_info("two", TensorProto.FLOAT, [])
    two = helper.make_node("Constant", [], ["two"], value_float=2.0)
    branch = helper.make_graph([two], "branch", [], [value])
    fork = helper.make_node("If", ["yes"], ["z"], "fork", then_branch=branch, else_branch=branch)
    nodes = [fork, helper.make_node("Mul", ["input", "z"], ["y"])]
    model = model_of(nodes, ["N", 3, 8, 8], ["N", 3, 8, 8], {"yes": np.array(True)})
    with pytest.raises(RewriteError, match=r"fork: If is control flow.*high_precision=.fp32."):
        with_rest(model, "fp16")


# --- in engines ----------------------------------------------------------------------------------


def types_in(path: Path) -> set[str]:
    layers = layers_of_plan(path.read_bytes(), str(path))
    return {tensor.dtype for layer in layers for tensor in (*layer.inputs, *layer.outputs)}


@needs_rtx
def test_engines_have_an_fp16_rest_unless_asked_otherwise(tmp_path: Path) -> None:
    source = save(qdq_model(), tmp_path / "m.onnx")
    content = source.read_bytes()
    summary = build_engine(source, tmp_path / "half.engine", BuildOptions("tensorrt-rtx"))
    full = BuildOptions("tensorrt-rtx", high_precision="fp32")
    other = build_engine(source, tmp_path / "full.engine", full)
    assert source.read_bytes() == content
    assert summary.details.rest.state == "converted"
    assert other.details.rest == Rest("fp32")
    for found in (summary.details, other.details):
        assert {t.dtype for t in (*found.inputs, *found.outputs)} == {"FLOAT"}
        assert found.int8_layers == ("conv0", "conv1")
    assert {"INT8", "FP16"} <= types_in(tmp_path / "half.engine")
    assert "FP16" not in types_in(tmp_path / "full.engine")


@needs_rtx
def test_the_engine_is_that_of_a_file_calibrated_with_an_fp16_rest(tmp_path: Path) -> None:
    half, _ = with_rest(qdq_model(), "fp16")
    paths = [save(qdq_model(), tmp_path / "a.onnx"), save(half, tmp_path / "b.onnx")]
    found = []
    for path in paths:
        engine = path.with_suffix(".engine")
        summary = build_engine(path, engine, BuildOptions("tensorrt-rtx", targets=("sm89",)))
        launches = layers_of_plan(engine.read_bytes(), "")
        kinds = [(launch.kind, launch.precision, launch.origin) for launch in launches]
        found.append((summary.details.num_layers, kinds))
    assert found[0] == found[1]


@needs_rtx
def test_sidecar_json_and_command_say_what_was_done(tmp_path: Path, caplog) -> None:  # type: ignore
    caplog.set_level(logging.WARNING, "reptrt")
    source, engine = save(small_scale(), tmp_path / "m.onnx"), tmp_path / "m.engine"
    command = ["build-engine", str(source), "-o", str(engine), "--backend", "tensorrt-rtx"]
    result = CliRunner().invoke(main, [*command, "--json", str(tmp_path / "j")])
    assert result.exit_code == 0
    assert "2 planned INT8, rest fp16 (" in result.stdout
    assert "1 left in fp32)" in result.stdout
    assert "1 node stays in FP32" in result.stderr
    assert "w0" not in result.stderr
    verbose = CliRunner().invoke(main, ["-v", *command])
    assert "w0 stays in FP32: scale 1e-06" in verbose.stderr
    content = json.loads((tmp_path / "j").read_text())["rest"]
    sidecar = read_sidecar(engine)
    assert sidecar is not None
    assert sidecar.options["high_precision"] == "fp16"
    assert sidecar.details["rest"] == content
    assert content["state"] == "converted"
    assert [skip["node"] for skip in content["left_fp32"]] == ["w0"]
    result = CliRunner().invoke(main, [*command, "--high-precision", "fp32"])
    assert "rest fp32" in result.stdout


def test_the_plan_of_the_file_is_the_plan_of_the_engine(tmp_path: Path) -> None:
    """An audit may be given either graph."""
    model = quantized(residual_net(), images())
    half, _ = with_rest(model, "fp16")
    plans = [inspect_onnx(save(m, tmp_path / "m.onnx")).planned for m in (model, half)]
    assert plans[0] == plans[1]
