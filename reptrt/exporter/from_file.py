"""An ONNX file that somebody else exported, brought to the form that rewrites expect."""

from pathlib import Path

import onnx
import onnx.inliner
import onnx.version_converter

from reptrt.core.errors import ConfigError, option
from reptrt.graph.net import QUANTIZED_OPS, read_model

MIN_OPSET = 13  # the first with a DequantizeLinear per channel


def model_from_file(
    path: Path, opset: int, input_size: tuple[int, int, int] | None
) -> onnx.ModelProto:
    """Read an ONNX file; raise its opset and set its input size.

    Weights that are listed among the inputs (as before IR version 4) become initializers only, and
    calls of local functions are replaced by the functions' nodes.

    Raises:
        ArtifactError: the file cannot be read.
        ConfigError: it is quantized, has several inputs, or a size that does not fit.
    """
    model = read_model(path)
    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
    quantized = [node for node in model.graph.node if node.op_type in QUANTIZED_OPS]
    if quantized:
        raise ConfigError(
            f"{path}: is already quantized ({quantized[0].op_type} {quantized[0].name}, "
            f"{len(quantized)} in all); expected a float ONNX file"
        )
    _keep_weights_from_inputs(model)
    inputs = model.graph.input
    if len(inputs) != 1:
        raise ConfigError(f"{path}: has {len(inputs)} inputs, expected one image batch")
    if inputs[0].type.tensor_type.elem_type != onnx.TensorProto.FLOAT:
        kind = onnx.TensorProto.DataType.Name(inputs[0].type.tensor_type.elem_type)
        raise ConfigError(f"{path}: input {inputs[0].name} is {kind}, expected FLOAT (float32)")
    _set_input_size(path, inputs[0], input_size)
    return onnx.shape_inference.infer_shapes(_raise_opset(path, model, opset))


def _keep_weights_from_inputs(model: onnx.ModelProto) -> None:
    """Take initializers off the list of inputs, where IR version 3 required them to be."""
    constants = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in constants]
    if len(inputs) < len(model.graph.input):
        del model.graph.input[:]
        model.graph.input.extend(inputs)
    model.ir_version = max(model.ir_version, 4)


def _set_input_size(
    path: Path, value: onnx.ValueInfoProto, size: tuple[int, int, int] | None
) -> None:
    dims = value.type.tensor_type.shape.dim
    if len(dims) != 4:
        raise ConfigError(f"{path}: input {value.name} has rank {len(dims)}, expected (N, C, H, W)")
    for index, name in enumerate("CHW", start=1):
        fixed = dims[index].dim_value
        if size is None and not fixed:
            raise ConfigError(
                f"{path}: {name} of input {value.name} is not fixed; "
                f"give {option('input_size')} CxHxW"
            )
        if size is not None and fixed not in (0, size[index - 1]):
            raise ConfigError(
                f"{path}: input {value.name} has {name} = {fixed}, {option('input_size')} says "
                f"{size[index - 1]}; leave it out or export the net anew"
            )
        if size is not None:
            dims[index].dim_value = size[index - 1]


def _raise_opset(path: Path, model: onnx.ModelProto, opset: int) -> onnx.ModelProto:
    current = max(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    if current >= opset:
        return model
    try:
        return onnx.version_converter.convert_version(model, opset)
    except Exception as err:  # the converter raises RuntimeError and its own C++ types
        if current >= MIN_OPSET:
            return model
        raise ConfigError(
            f"{path}: opset {current} cannot be raised to {opset}; export it with opset 13 or newer"
        ) from err
