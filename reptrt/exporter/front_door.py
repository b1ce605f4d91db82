"""Bring a float ONNX file of any exporter into the form that every stage expects.

`export` and `calibrate` bring files in through `accept`. A model that is in this form already, as
every model that reptrt exported, comes back unchanged. In this order:

1. local functions are inlined;
2. a DequantizeLinear that makes numbers of a UINT8 input is arithmetic; any other quantized model
   is refused;
3. weights leave the list of inputs (IR version 3 had them there), IR version 4 at least;
4. inputs that no node reads are dropped; one image batch in FLOAT or UINT8 has to remain;
5. float16 and bfloat16 are widened to float32 (`widen`): weights keep their values, arithmetic is
   done in float32;
6. an opset before 13 is raised; opsets outside of 9 to 25 are refused;
7. the size of the image is set, if it is given;
8. a batch size that is fixed is made free where onnxruntime proves it (`free_batch`);
9. what depends on constants and known sizes alone is computed (`constants`);
10. the mean of a distribution over bins is written as a product and a sum (`sum_bins`);
11. how the input is formed is recorded where it is unusual: channels last, or pixels 0..255.
"""

import logging

import onnx
import onnx.inliner
import onnx.version_converter

from reptrt.core.errors import ConfigError, option
from reptrt.exporter.constants import has_constant_arithmetic, with_constants_folded
from reptrt.exporter.free_batch import with_free_batch
from reptrt.exporter.pixels import widen_pixels
from reptrt.exporter.widen import widen
from reptrt.graph.input_form import layout_of
from reptrt.graph.net import QUANTIZED_OPS, model_from_net, net_from_model, used_inputs
from reptrt.graph.preprocess import Preprocess, read_preprocess, stored_preprocess, write_preprocess
from reptrt.rewrite.sum_bins import sum_bins

OLDEST_OPSET, NEWEST_OPSET = 9, 25
MIN_OPSET = 13  # the first with a DequantizeLinear per channel
DEFAULT_OPSET = 19

_TYPES = (onnx.TensorProto.FLOAT, onnx.TensorProto.UINT8)
_LOG = logging.getLogger(__name__)

Size = tuple[int, int, int]  # C, H, W


def accept(model: onnx.ModelProto, where: str, size: Size | None = None) -> onnx.ModelProto:
    """Return a float model in the form that every stage expects; what was changed is logged.

    Args:
        model: a checked model; it is not changed.
        where: what messages call it.
        size: (C, H, W) of the image, for a model that leaves them open.

    Raises:
        ConfigError: it is quantized, reads several inputs or one of another type than FLOAT,
            FLOAT16, BFLOAT16 or UINT8, its opset is not supported, or the size does not fit.
    """
    accepted = onnx.inliner.inline_local_functions(model) if model.functions else _copy(model)
    widen_pixels(accepted, where)
    _refuse_quantized(accepted, where)
    keep_weights_from_inputs(accepted)
    _drop_unused_inputs(accepted, where)
    half = widen(accepted)
    if half:
        _LOG.warning("%s: %s is widened to float32; weights keep their values", where, half)
    _check_input(accepted, where)
    opset = opset_of(accepted, where)
    if opset < MIN_OPSET:
        accepted = raise_opset(accepted, where, DEFAULT_OPSET)
    if size is not None:
        _set_input_size(accepted, where, size)
    freed = with_free_batch(accepted, where)
    if has_constant_arithmetic(freed):
        freed = with_constants_folded(freed)
    return _with_input_form(_with_summed_bins(freed), where)


def keep_weights_from_inputs(model: onnx.ModelProto) -> None:
    """Take initializers off the list of inputs, where IR version 3 required them to be."""
    constants = {tensor.name for tensor in model.graph.initializer}
    _keep_inputs(model, [value for value in model.graph.input if value.name not in constants])
    model.ir_version = max(model.ir_version, 4)


def opset_of(model: onnx.ModelProto, where: str) -> int:
    """Return the version of the default operator set.

    Raises:
        ConfigError: there is none, or it is not one of 9 to 25.
    """
    versions = [entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")]
    opset = max(versions, default=0)
    if not OLDEST_OPSET <= opset <= NEWEST_OPSET:
        raise ConfigError(
            f"{where}: opset {opset or 'missing'}, expected {OLDEST_OPSET} to {NEWEST_OPSET}; "
            f"export the net anew with opset {DEFAULT_OPSET}"
        )
    return opset


def raise_opset(model: onnx.ModelProto, where: str, opset: int) -> onnx.ModelProto:
    """Return the model with at least the given opset, converted by onnx.

    A model that onnx cannot convert stays as it is if its opset is `MIN_OPSET` or newer.

    Raises:
        ConfigError: it is older.
    """
    current = opset_of(model, where)
    if current >= opset:
        return model
    try:
        return onnx.version_converter.convert_version(model, opset)
    except Exception as err:  # the converter raises RuntimeError and its own C++ types
        if current >= MIN_OPSET:
            return model
        reason = " ".join(str(err).split())[-160:]
        raise ConfigError(
            f"{where}: onnx cannot raise opset {current} to {opset} ({reason}); export the net "
            f"with opset {MIN_OPSET} or newer"
        ) from err


def _copy(model: onnx.ModelProto) -> onnx.ModelProto:
    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    return copied


def _refuse_quantized(model: onnx.ModelProto, where: str) -> None:
    quantized = [node for node in model.graph.node if node.op_type in QUANTIZED_OPS]
    if quantized:
        raise ConfigError(
            f"{where}: is already quantized ({quantized[0].op_type} {quantized[0].name}, "
            f"{len(quantized)} in all); expected a float ONNX file"
        )


def _keep_inputs(model: onnx.ModelProto, inputs: list[onnx.ValueInfoProto]) -> None:
    if len(inputs) < len(model.graph.input):
        del model.graph.input[:]
        model.graph.input.extend(inputs)


def _drop_unused_inputs(model: onnx.ModelProto, where: str) -> None:
    """Drop inputs that no node reads; refuse a model that reads several, or none."""
    if len(model.graph.input) == 1:
        return
    used = used_inputs(model.graph)
    if len(used) != 1:
        listed = ", ".join(value.name for value in used) or "none"
        raise ConfigError(
            f"{where}: has {len(model.graph.input)} inputs and reads {listed}; expected one image "
            "batch: export the net with its other inputs as constants"
        )
    dropped = [value.name for value in model.graph.input if value not in used]
    _LOG.warning("%s: input %s is dropped: no node reads it", where, ", ".join(dropped))
    _keep_inputs(model, used)


def _check_input(model: onnx.ModelProto, where: str) -> None:
    value = model.graph.input[0]
    kind = value.type.tensor_type.elem_type
    if kind not in _TYPES:
        raise ConfigError(
            f"{where}: input {value.name} is {onnx.TensorProto.DataType.Name(kind)}, expected "
            "FLOAT (float32), FLOAT16 or UINT8; export the net with such an input"
        )


def _set_input_size(model: onnx.ModelProto, where: str, size: Size) -> None:
    value = model.graph.input[0]
    dims = value.type.tensor_type.shape.dim
    if len(dims) != 4:
        raise ConfigError(
            f"{where}: input {value.name} has rank {len(dims)}, expected (N, C, H, W)"
        )
    axes = layout_of(net_from_model(model))
    for name, wanted in zip("CHW", size, strict=True):
        dim = dims[axes.index(name)]
        if dim.dim_value not in (0, wanted):
            raise ConfigError(
                f"{where}: input {value.name} has {name} = {dim.dim_value}, {option('input_size')} "
                f"says {wanted}; leave it out or export the net anew"
            )
        dim.dim_value = wanted


def _with_summed_bins(model: onnx.ModelProto) -> onnx.ModelProto:
    if all(node.op_type != "Softmax" for node in model.graph.node):
        return model
    net = net_from_model(model)
    return model_from_net(net) if sum_bins(net).changed else model


def _with_input_form(model: onnx.ModelProto, where: str) -> onnx.ModelProto:
    """Record that a model takes channels last or pixels 0..255, unless its metadata say more."""
    net = net_from_model(model)
    dims = model.graph.input[0].type.tensor_type.shape.dim
    if (
        stored_preprocess(net) is not None
        or len(dims) != 4
        or not all(d.dim_value for d in dims[1:])
    ):
        return model
    preprocess = read_preprocess(net)
    if preprocess == Preprocess.plain(preprocess.channels, preprocess.height, preprocess.width):
        return model
    name = model.graph.input[0].name
    if preprocess.layout == "NHWC":
        _LOG.warning("%s: input %s is NHWC: images are given with channels last", where, name)
    if preprocess.values != "normalized":
        kind = "UINT8" if preprocess.values == "bytes" else "scaled inside the net"
        _LOG.warning("%s: input %s is %s: images are given as pixels 0..255", where, name, kind)
    write_preprocess(net, preprocess)
    onnx.helper.set_model_props(model, dict(sorted(net.metadata.items())))
    return model
