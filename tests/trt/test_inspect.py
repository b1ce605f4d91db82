"""What is in a network or an engine, and intent against engine."""

import importlib.util
import json
import sys

import pytest

from reptrt.core.errors import ConfigError, EngineError
from reptrt.trt import driver
from reptrt.trt.audit import audit, compare
from reptrt.trt.build import build_engine
from reptrt.trt.driver import Gpu
from reptrt.trt.inspect import Inspection, inspect, inspect_onnx
from reptrt.trt.inspector import onnx_names, parse_inspector
from reptrt.trt.options import BuildOptions
from reptrt.trt.rtx_plan import layers_of_plan
from tests.support import inspector_json
from tests.support.engines import engine_details, write_fake_engine
from tests.support.fake_tensorrt import API, FakeTensorrt, plan_of
from tests.support.qdq_graphs import qdq_model, save

needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed"
)
SCHEMAS = {
    "10": inspector_json.version_10,
    "10 dynamic": inspector_json.version_10_dynamic,
    "11": inspector_json.version_11,
}


@pytest.mark.parametrize("schema", SCHEMAS)
def test_both_schemas_say_the_same(schema):
    inputs, outputs, layers = parse_inspector(SCHEMAS[schema]())
    assert [tensor.name for tensor in inputs] == ["x.q"]
    assert [tensor.name for tensor in outputs] == ["y", "n"]
    assert [layer.precision for layer in layers if not layer.is_reformat and layer.kernel] == [
        "INT8",
        "FP32",
        "FP16",
        "FP16",
    ]
    assert layers[0].origin == ("conv0.weight.dequantize", "conv0", "relu0")
    assert [layer.name for layer in layers if layer.is_quantization] == ["r0.dequantize"]
    assert [layer.is_reformat for layer in layers].count(True) == 1


@pytest.mark.parametrize("schema", ["10", "11"])
def test_types_and_shapes_of_tensors(schema):
    inputs, outputs, layers = parse_inspector(SCHEMAS[schema]())
    assert (inputs[0].shape, inputs[0].dtype) == ((8, 32, 16, 16), "INT8")
    assert [tensor.dtype for tensor in outputs] == ["FP16", "FP16"]
    reformat = layers[1]
    assert (reformat.inputs[0].dtype, reformat.outputs[0].dtype) == ("FP16", "FP32")


def test_only_the_combined_field_of_10_hides_types():
    inputs, _, layers = parse_inspector(inspector_json.version_10_dynamic())
    assert inputs[0].dtype == "?"
    assert inputs[0].shape == (-1, 32, 16, 16)
    assert layers[0].precision == "INT8"  # from the weights
    assert layers[-1].precision == "FP16"  # from the kernel's name


@pytest.mark.parametrize("text", ["", "[]", "{}", "Layers:\n conv0", '{"Layers": [1]}'])
def test_an_answer_that_is_not_understood(text):
    with pytest.raises(EngineError, match="the engine inspector's answer is not understood"):
        parse_inspector(text)


def inspection_of(text, tmp_path):
    return Inspection(tmp_path / "m.engine", "engine", "tensorrt", *parse_inspector(text), None)


@pytest.mark.parametrize("schema", SCHEMAS)
def test_audit_explains_every_miss(schema, tmp_path):
    result = compare(inspection_of(SCHEMAS[schema](), tmp_path), inspector_json.PLANNED)
    assert (result.built, len(result.planned)) == (1, 5)
    reasons = {miss.layer: (miss.precision, miss.reason) for miss in result.misses}
    assert list(reasons) == ["conv1", "narrow", "conv3", "gone"]
    assert reasons["conv1"][0] == "FP32"
    assert "r0.dequantize runs on its own before it" in reasons["conv1"][1]
    assert "narrow (8 channels" in reasons["narrow"][1]
    assert "another kernel for conv3 (sm80_xmma_fprop_implicit_gemm_f16f16" in reasons["conv3"][1]
    assert reasons["gone"] == ("?", reasons["gone"][1])
    assert "no layer of the engine names it" in reasons["gone"][1]
    assert len(result.reformats) == 1
    assert result.quantization_passes == ("r0.dequantize",)
    assert "1 of 5 planned layers run in INT8  1 reformats  1 Q/DQ passes" in result.to_lines()[0]
    assert result.float_outputs == ()  # conv0 writes FP16, but nobody quantizes that again
    json.dumps(result.to_dict())


def test_reformats_are_told_with_their_types(tmp_path):
    result = compare(inspection_of(inspector_json.version_11(), tmp_path), ("conv0",))
    assert result.misses == ()
    assert result.reformats[0].startswith("Reformatting CopyNode for Input Tensor 0 to conv1: FP16")
    assert "-> FP32 Row major linear" in result.reformats[0]


def test_an_engine_without_details_cannot_be_audited(tmp_path):
    with pytest.raises(EngineError, match="only the names of its layers; build it with reptrt"):
        compare(inspection_of(inspector_json.names_only(), tmp_path), ("conv0",))


def test_names_only_can_still_be_listed(tmp_path):
    inspection = inspection_of(inspector_json.names_only(), tmp_path)
    assert [layer.origin for layer in inspection.layers] == [("conv0", "relu0"), ("conv1",)]


def test_inspect_onnx_shows_the_plan(tmp_path):
    path = save(qdq_model(), tmp_path / "m.onnx")
    inspection = inspect(path)
    assert inspection.planned == ("conv0", "conv1")
    by_name = {layer.name: layer for layer in inspection.layers}
    assert by_name["conv0"].precision == "INT8"
    assert by_name["relu0"].precision == "FP32"
    assert by_name["q0"].precision == "INT8"  # the type of its output
    assert by_name["conv1"].outputs[0].shape == (-1, 16, 8, 8)
    assert (inspection.inputs[0].name, inspection.inputs[0].shape) == ("input", (-1, 3, 8, 8))
    assert [tensor.name for tensor in inspection.outputs] == ["logits"]
    assert inspection.precisions["INT8"] == 4
    json.dumps(inspection.to_dict())
    assert inspection.to_table().row_count == len(inspection.layers)


def test_inspect_onnx_of_a_float_graph_plans_nothing(tmp_path):
    model = qdq_model()
    for node in model.graph.node:
        if node.op_type == "Conv":
            node.input[0] = {"dq0": "input", "dq1": "r0"}[node.input[0]]
    assert inspect_onnx(save(model, tmp_path / "m.onnx")).planned == ()


@pytest.fixture(params=API)
def fake(request, monkeypatch):
    module = FakeTensorrt(request.param)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(driver, "find_gpu", lambda: Gpu("Fake GPU", "sm89", (12, 8)))
    old = request.param.startswith("tensorrt-10")
    module.inspector_text = SCHEMAS["10" if old else "11"]()
    return module


def engine_of(fake, path, planned):
    return write_fake_engine(path, plan_of(fake), engine_details(int8_layers=tuple(planned)))


def test_inspect_engine_sets_the_shapes_before_it_asks(fake, tmp_path):
    path = engine_of(fake, tmp_path / "m.engine", ["conv0"])
    inspection = inspect(path)
    assert inspection.planned == ("conv0",)
    assert len(inspection.reformats) == 1
    names = [call[0] for call in fake.calls]
    assert fake.called("IExecutionContext.set_input_shape") == [("input", (8, 3, 4, 4))]
    asked = names.index("EngineInspector.get_engine_information")
    assert names.index("IExecutionContext.set_input_shape") < asked
    assert names.index("EngineInspector.execution_context") < asked
    json_form = fake.LayerInformationFormat.JSON
    assert fake.called("EngineInspector.get_engine_information") == [(json_form,)]


def test_audit_takes_the_plan_from_the_sidecar_or_the_graph(fake, tmp_path):
    path = engine_of(fake, tmp_path / "m.engine", ["conv0"])
    assert audit(path).misses == ()
    source = save(qdq_model(), tmp_path / "m.onnx")
    assert [miss.layer for miss in audit(path, source).misses] == ["conv1"]


def test_audit_without_a_plan(fake, tmp_path):
    path = tmp_path / "m.engine"
    path.write_bytes(plan_of(fake))
    with pytest.raises(ConfigError, match="no sidecar says what was planned INT8; give the ONNX"):
        audit(path)


# --- engines of tensorrt-rtx, read without a GPU -------------------------------------------------


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(driver, "find_gpu", lambda: "no NVIDIA driver on this machine")


def build_rtx(model, folder):
    options = BuildOptions("tensorrt-rtx", targets=("sm89",))
    source = save(model, folder / "net.onnx")
    build_engine(source, folder / "net.engine", options)
    return folder / "net.engine"


@needs_rtx
def test_every_planned_layer_of_a_real_engine_is_int8(no_gpu, tmp_path):
    path = build_rtx(qdq_model(num_convs=4, channels=32), tmp_path)
    result = audit(path)
    assert result.planned == ("conv0", "conv1", "conv2", "conv3")
    assert result.misses == ()
    inspection = inspect(path)
    convs = [layer for layer in inspection.layers if layer.kind == "Convolution"]
    assert [layer.name for layer in convs] == list(result.planned)
    assert {layer.inputs[0].dtype for layer in convs} == {"INT8"}
    assert convs[1].inputs[1].shape == (32, 32, 3, 3)
    assert inspection.made_by.startswith("tensorrt-rtx 1.")
    assert (inspection.inputs[0].name, inspection.inputs[0].shape) == ("input", (-1, 3, 8, 8))


@needs_rtx
def test_a_float_layer_of_a_real_engine_is_a_miss(no_gpu, tmp_path):
    wanted = save(qdq_model(), tmp_path / "wanted.onnx")
    model = qdq_model()
    next(node for node in model.graph.node if node.name == "conv1").input[0] = "r0"
    path = build_rtx(model, tmp_path)
    assert audit(path).misses == ()  # its own plan is kept
    misses = audit(path, wanted).misses
    assert [(miss.layer, miss.precision) for miss in misses] == [("conv1", "FP16")]


@needs_rtx
def test_an_rtx_engine_whose_program_is_not_readable(no_gpu, tmp_path):
    path = build_rtx(qdq_model(), tmp_path)
    content = path.read_bytes().replace(b"header {", b"HEADER {")
    with pytest.raises(EngineError, match="program is not readable without a GPU"):
        layers_of_plan(content, "m.engine")


def test_other_engines_are_not_read_without_a_gpu(no_gpu, tmp_path):
    path = tmp_path / "m.engine"
    path.write_bytes(plan_of(FakeTensorrt("tensorrt-11.4.0.106")))
    with pytest.raises(EngineError, match="using an engine needs an NVIDIA GPU"):
        inspect(path)


PROGRAM = b"""junk\0header {
  tensor={ dims={ "n" 3 4 4 } mem_prop=0 name="x.q" offset=0 strides={ 1 } type=int8 }
  tensor={ dims={ 8 3 3 3 } name="w" offset=0 region="consts" type=int8 }
  tensor={ dims={ "n" 8 4 4 } name="c" offset=0 strides={ 1 } type=float }
  tensor={ dims={ "n" 8 4 4 } name="c.q" offset=0 strides={ 1 } type=int8 }
  tensor={ dims={ 1 } name="proxy" offset=0 type=int64 }
 label bb1: 
  shape_call={ name="s" stream=0  layers="" subg_id=0 }
  corrltn={ name="conv" output={"c" } input={"x.q" "w" } stream=0 relu=false layers="[ONNX Layer: conv]\x1f[ONNX Layer: dq[0]]" }
  function={ name=__myl_Mul fqn=__myl_Mul_0x1 args={ "c" "proxy" "c.q" } input_args={ "c" "proxy" } output_args={ "c.q" } cond_fqn = { binary = 0 } layers="[ONNX Layer: q1]\x1f[ONNX Layer: relu]" swap_ab=false }
}
shape_main {
  function={ name=__myl_No input_args={ "c" } output_args={ "c.q" } layers="" }
}
\0more
"""  # noqa: E501


def test_launches_of_a_hand_written_program(tmp_path):
    conv, kernel = layers_of_plan(PROGRAM, "m.engine")
    assert (conv.name, conv.kind, conv.precision) == ("conv", "Convolution", "INT8")
    assert conv.origin == ("conv", "dq[0]")
    assert [tensor.shape for tensor in conv.inputs] == [(-1, 3, 4, 4), (8, 3, 3, 3)]
    assert (kernel.name, kernel.kind, kernel.precision) == ("__myl_Mul", "Kernel", "INT8")
    assert [tensor.name for tensor in kernel.inputs] == ["c"]
    inspection = Inspection(tmp_path, "engine", "rtx", (), (), (conv, kernel), None)
    result = compare(inspection, ("conv",))
    assert result.float_outputs == ("conv: FP32, made INT8 by __myl_Mul",)
    assert "1 float outputs quantized by another launch" in result.to_lines()[0]


@pytest.mark.parametrize("separator", ["\x1e", "\x1f", "\n"], ids=["10", "rtx", "text"])
def test_onnx_names(separator):
    text = separator.join(["[ONNX Layer: a/b]", "[ONNX Layer: c[1]]", "[ONNX Layer: a/b]"])
    assert onnx_names(text) == ("a/b", "c[1]")
    assert onnx_names("") == ()
