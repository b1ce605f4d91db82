"""A torch module as a train-form ONNX model: batch norms and branches as the author wrote them."""

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import onnx
import torch
from torch import nn

from reptrt.core.errors import ConfigError, option
from reptrt.execute.module_outputs import flat_outputs, flattening
from reptrt.graph.net import WEIGHTED_OPS
from reptrt.graph.preprocess import Preprocess

Exporter = Literal["torchscript", "dynamo"]

_OTHER_FLOAT = re.compile(r"\b(Half|BFloat16|Double|b?float16|float64)\b", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class ExportSettings:
    """How a torch module becomes ONNX."""

    opset: int = 19
    exporters: tuple[Exporter, ...] = ("torchscript", "dynamo")  # tried in this order


def onnx_from_module(
    module: nn.Module, preprocess: Preprocess, settings: ExportSettings
) -> onnx.ModelProto:
    """Export a torch module in eval mode with a dynamic batch, batch norms unfused.

    torch's TorchScript exporter is tried first (an order of magnitude faster, and it leaves the
    batch norms for us to fold in float64); where torch no longer has it, or it fails, the dynamo
    exporter. Outputs in dicts, dataclasses and nested tuples become outputs of the graph, named
    after where they lie.

    Raises:
        ConfigError: neither exporter takes the module.
    """
    example = torch.zeros(2, preprocess.channels, preprocess.height, preprocess.width)
    reasons = []
    for exporter in settings.exporters:
        try:
            outputs = _outputs(module, example)
            with _silence(), flattening(module):
                model = _EXPORTERS[exporter](module, example, settings.opset, outputs)
            return _of_float_layers(onnx.shape_inference.infer_shapes(model))
        except Exception as err:  # the exporters raise whatever the user's forward raises
            reasons.append(str(err).strip().splitlines()[0] if str(err).strip() else repr(err))
    raise ConfigError(
        f"{type(module).__name__}: cannot be exported with input {tuple(example.shape)} "
        f"({reasons[0]}); {_remedy(reasons[0])}"
    )


def _of_float_layers(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model; refuse layers in half precision, which autocast in a forward leaves.

    Raises:
        ConfigError: it has such layers.
    """
    types = {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
    halves = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
    layers = [
        (node.name, types[node.input[0]])
        for node in model.graph.node
        if node.op_type in WEIGHTED_OPS and types.get(node.input[0]) in halves
    ]
    if layers:
        name, kind = layers[0]
        raise ConfigError(
            f"{len(layers)} layers in {onnx.TensorProto.DataType.Name(kind).lower()}, the first is "
            f"{name} (autocast?)"
        )
    return model


def _remedy(reason: str) -> str:
    """Return what to do about an exception that a module's forward raised."""
    dtype = _OTHER_FLOAT.search(reason)
    if dtype is not None:
        return (
            f"forward casts to {dtype[0]}: leave the casts and autocast out, float32 is what is "
            "exported"
        )
    return f"check {option('input_size')} and that forward takes one image batch"


def _outputs(module: nn.Module, example: torch.Tensor) -> dict[str, bool]:
    """Return the names of a module's outputs, and whether the first axis of each is the batch.

    Raises:
        ConfigError: the module returns no tensor.
    """
    with torch.no_grad():
        result = module(example)
    outputs = flat_outputs(result)
    if not outputs:
        raise ConfigError(
            f"forward returns {type(result).__name__} without a tensor in it, expected tensors, "
            "also in tuples, lists, dicts, named tuples or dataclasses"
        )
    return {name: value.shape[:1] == example.shape[:1] for name, value in outputs.items()}


def _export_torchscript(
    module: nn.Module, example: torch.Tensor, opset: int, outputs: Mapping[str, bool]
) -> onnx.ModelProto:
    buffer: Any = io.BytesIO()  # torch takes a stream here; its stub does not say so
    torch.onnx.export(
        module,
        (example,),
        buffer,
        dynamo=False,
        opset_version=opset,
        input_names=["input"],
        output_names=list(outputs),
        dynamic_axes={
            name: {0: "N"} for name, is_batch in {"input": True, **outputs}.items() if is_batch
        },
        training=torch.onnx.TrainingMode.PRESERVE,  # eval mode, but batch norms left unfused
        do_constant_folding=True,  # explicit pads and reshapes need it
    )
    model = onnx.load_model_from_string(buffer.getvalue())
    _restore_names(model, list(outputs))
    return model


def _restore_names(model: onnx.ModelProto, names: Sequence[str]) -> None:
    """Give outputs their names back that were folded into constants and lost them, in place."""
    for value, name in zip(model.graph.output, names, strict=True):
        if value.name != name:
            model.graph.node.append(onnx.helper.make_node("Identity", [value.name], [name]))
            value.name = name


def _export_dynamo(
    module: nn.Module, example: torch.Tensor, opset: int, outputs: Mapping[str, bool]
) -> onnx.ModelProto:
    program = torch.onnx.export(
        module,
        (example,),
        dynamo=True,
        opset_version=opset,
        input_names=["input"],
        output_names=list(outputs),
        dynamic_shapes=({0: torch.export.Dim("N")},),
        verbose=False,
    )
    if program is None:
        raise ConfigError("the dynamo exporter returned nothing")
    return program.model_proto


_EXPORTERS: Mapping[
    Exporter, Callable[[nn.Module, torch.Tensor, int, Mapping[str, bool]], onnx.ModelProto]
] = {"torchscript": _export_torchscript, "dynamo": _export_dynamo}


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keep torch's exporters quiet: their deprecation warnings are not the user's business."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
