"""Prepare the graph that an engine is built from: refuse what TensorRT cannot run, convert to FP16.

A strongly typed network takes every type from the graph. ONNX files keep in FP32 what is not INT8,
here called the rest, because a CPU can run that. So the rest is converted to FP16 here, in memory,
unless FP32 is asked for. Inputs and outputs of the graph keep their types.
"""

import logging
import math
from pathlib import Path

import onnx

from reptrt.core.choices import HighPrecision
from reptrt.core.errors import EngineError, option
from reptrt.graph.intent import runtime_scale_node, uint8_node
from reptrt.graph.made_for import recorded_target
from reptrt.graph.model import Model, Network, label_of
from reptrt.graph.net import WEIGHTED_OPS, model_from_net, net_from_model
from reptrt.rewrite.to_fp16 import log_left_fp32, to_fp16
from reptrt.trt.details import Rest

_LOG = logging.getLogger(__name__)
_HALF = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
_MAX_VALUES = 2**31 - 1  # per tensor
_TYPED = (*WEIGHTED_OPS, "QuantizeLinear", "DequantizeLinear")


def read_buildable(source: Network) -> Model:
    """Return an ONNX model; refuse one that TensorRT would accept but compute differently.

    Args:
        source: an ONNX file, or a model in memory.

    Raises:
        ArtifactError: the file cannot be read, or is not the one its sidecar was written for.
        EngineError: the file simulates fewer bits, is made for another runtime, has UINT8 codes, a
            scale that is computed at run time, or an input that is too large.
    """
    buildable = Model.read(source) if isinstance(source, Path) else source
    model, where = buildable.proto, label_of(source)
    simulation = metadata_of(model).get("reptrt.simulation")
    if simulation:
        raise EngineError(
            f"{where}: a simulation, no engine can run it ({simulation}); quantize to 8 bits"
        )
    target = recorded_target(model)
    if target is not None:
        raise EngineError(
            f"{where}: made for {target}, whose codes TensorRT does not take; calibrate again with "
            f"{option('target', 'tensorrt')}"
        )
    refused = uint8_node(model)
    if refused is not None:
        raise EngineError(
            f"{where}: node {refused}: its codes are UINT8, expected INT8 with zero point 0: "
            "TensorRT would clip 128..255 away; quantize with reptrt calibrate"
        )
    computed = runtime_scale_node(model)
    if computed is not None:  # tensorrt_rtx 1.7 ends the process on one
        raise EngineError(
            f"{where}: node {computed}: its scale is computed at run time, expected a constant; "
            "quantize statically with reptrt calibrate"
        )
    _refuse_huge(where, model)
    return buildable


def _refuse_huge(where: str, model: onnx.ModelProto) -> None:
    """Refuse inputs beyond TensorRT's limit; tensorrt_rtx 1.7 ends the process on one."""
    for value in model.graph.input:
        sizes = [max(1, dim.dim_value) for dim in value.type.tensor_type.shape.dim]
        if math.prod(sizes) > _MAX_VALUES:
            raise EngineError(
                f"{where}: input {value.name} is {sizes}, expected at most 2^31 - 1 values; "
                "export it with a dynamic batch"
            )


def with_rest(
    model: onnx.ModelProto, high_precision: HighPrecision
) -> tuple[onnx.ModelProto, Rest]:
    """Return the graph with its rest in the given type, and what was changed.

    A graph that has layers or scales in FP16 or BF16 is left as it is: its author chose the types.

    Raises:
        RewriteError: ``fp16`` was given, and the graph has control flow, a tensor of unknown type,
            or an opset that cannot be converted to 19.
    """
    if is_half(model):
        if high_precision == "fp32":
            _LOG.warning("high precision fp32: the graph is FP16 already and is left as it is")
        return model, Rest("was fp16")
    if high_precision == "fp32":
        return model, Rest("fp32")
    net = net_from_model(model)
    report = to_fp16(net)
    log_left_fp32(report.skipped)
    return model_from_net(net), Rest("converted", len(report.changed), report.skipped)


def is_half(model: onnx.ModelProto) -> bool:
    """Return whether a layer or a scale of the graph is FP16 or BF16."""
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Constant" and attribute.name == "value":
                types[node.output[0]] = attribute.t.data_type
    return any(
        types.get(name) in _HALF
        for node in model.graph.node
        if node.op_type in _TYPED
        for name in node.input
    )


def metadata_of(model: onnx.ModelProto) -> dict[str, str]:
    """Return the model's metadata_props."""
    return {prop.key: prop.value for prop in model.metadata_props}
