"""Parse the engine inspector's JSON, in both of its forms.

    |                   | 10.x                                 | 11.x, tensorrt_rtx              |
    | inputs, outputs   | "Bindings": [name]                   | "I/O Tensors": [{"Name", ...}]  |
    | type of a tensor  | "Format/Datatype": "... INT8 format" | "Datatype": "Int8"              |
    | ... dynamic shape | "N/A due to dynamic shapes"          | the type is known               |
    | layers            | objects; names only if it was built without detailed verbosity         |

The type that a layer computes in is that of its weights. If the JSON does not give it, it is that
of the first input, and else the type that the name of the kernel mentions.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from reptrt.core.errors import EngineError

UNKNOWN = "?"
TYPES = {
    "INT8": r"s?int8|i8",
    "UINT8": r"uint8",
    "INT4": r"int4",
    "INT32": r"int32",
    "INT64": r"int64",
    "FP8": r"fp8|float8\w*",
    "FP4": r"fp4\w*",
    "BF16": r"bf16|bfloat16",
    "FP16": r"fp16|half|float16",
    "FP32": r"fp32|float|float32",
    "BOOL": r"bool",
}
_KERNEL_TYPES = {  # parts of kernel names that mention the type of the factors
    "INT8": r"i8i8|i8f32|i8i32|s8s8|int8|i8816|i16832|imma",
    "FP16": r"f16f16|h884|h1688|h16816|hmma|hgemm|fp16|half",
    "BF16": r"bf16",
    "FP32": r"tf32|f32f32|sgemm|scudnn|ffma|fp32|float",
}


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor of a network or an engine; -1 is a dimension that can change."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # "INT8", "FP16", "FP32"...; "?" if the inspector does not say
    format: str = ""  # memory layout, in the inspector's words


@dataclass(frozen=True, slots=True)
class Layer:
    """A node of a network, or a layer that TensorRT made of one or more nodes."""

    name: str
    kind: str  # operator, or the inspector's LayerType
    precision: str  # type it computes in; "?" if unknown
    inputs: tuple[Tensor, ...] = ()
    outputs: tuple[Tensor, ...] = ()
    origin: tuple[str, ...] = ()  # names of the ONNX nodes it was made from
    kernel: str = ""

    @property
    def is_reformat(self) -> bool:
        """Whether the layer only copies a tensor into another layout or type."""
        return self.kind == "Reformat" or self.name.startswith("Reformatting CopyNode")

    @property
    def is_quantization(self) -> bool:
        """Whether the layer only quantizes or dequantizes: fusion would save this pass."""
        return bool(self.origin) and all(
            re.search("quantize", name, re.IGNORECASE) for name in self.origin
        )


def parse_inspector(
    text: str,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], tuple[Layer, ...]]:
    """Return inputs, outputs and layers from the engine inspector's JSON, 10.x or 11.x.

    Raises:
        EngineError: the text has neither form.
    """
    try:
        content = json.loads(text, strict=False)  # 10.x separates names by a bare control character
        layers = tuple(_layer(layer) for layer in content["Layers"])
    except (ValueError, KeyError, TypeError, AttributeError) as err:
        raise EngineError(f"the engine inspector's answer is not understood ({err!r})") from err
    if "I/O Tensors" in content:
        tensors = [(_tensor(t), t.get("IOMode", "")) for t in content["I/O Tensors"]]
        inputs = tuple(tensor for tensor, mode in tensors if mode.upper() == "INPUT")
        outputs = tuple(tensor for tensor, mode in tensors if mode.upper() == "OUTPUT")
        return inputs, outputs, layers
    return *_bound_tensors(content.get("Bindings", ()), layers), layers


def onnx_names(metadata: str) -> tuple[str, ...]:
    """Return the ONNX node names in ``[ONNX Layer: a]`` and so on, in order, once each.

    They are separated by 0x1e, by 0x1f in tensorrt_rtx.
    """
    parts = (part.strip() for part in re.split(r"[\x1e\x1f\n]", metadata))
    names = (
        part.removeprefix("[ONNX Layer: ").removesuffix("]")
        for part in parts
        if part.startswith("[ONNX Layer: ")
    )
    return tuple(dict.fromkeys(names))


def _layer(layer: str | Mapping[str, Any]) -> Layer:
    if isinstance(layer, str):  # built without details
        return Layer(layer, UNKNOWN, UNKNOWN, origin=_parts(layer))
    name = str(layer["Name"])
    inputs = tuple(_tensor(tensor) for tensor in layer.get("Inputs", ()))
    kernel = str(layer.get("TacticName", ""))
    return Layer(
        name=name,
        kind=str(layer.get("LayerType", UNKNOWN)),
        precision=_precision(layer, inputs, kernel),
        inputs=inputs,
        outputs=tuple(_tensor(tensor) for tensor in layer.get("Outputs", ())),
        origin=onnx_names(str(layer.get("Metadata", ""))) or _parts(name),
        kernel=kernel,
    )


def _precision(layer: Mapping[str, Any], inputs: Sequence[Tensor], kernel: str) -> str:
    """Return the type that a layer computes in: see the module's docstring."""
    weights = layer.get("Weights")
    if isinstance(weights, Mapping) and weights.get("Count", 1):
        dtype = type_in(str(weights.get("Type", "")))
        if dtype != UNKNOWN:
            return dtype
    if inputs and inputs[0].dtype != UNKNOWN:
        return inputs[0].dtype
    return type_in(kernel, _KERNEL_TYPES, whole_words=False)


def _tensor(tensor: Mapping[str, Any]) -> Tensor:
    combined = str(tensor.get("Format/Datatype", ""))
    dtype = str(tensor.get("Datatype") or tensor.get("DataType") or combined)
    return Tensor(
        name=str(tensor.get("Name", "")),
        shape=tuple(int(size) for size in tensor.get("Dimensions", ())),
        dtype=type_in(dtype),
        format=str(tensor.get("Format") or combined),
    )


def _bound_tensors(
    names: Iterable[str], layers: Sequence[Layer]
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Return inputs and outputs for the names that 10.x lists: outputs are what layers produce."""
    made = {tensor.name: tensor for layer in layers for tensor in layer.outputs}
    read = {tensor.name: tensor for layer in layers for tensor in layer.inputs}
    names = [re.sub(r" \[profile \d+\]$", "", name) for name in names]
    inputs = tuple(read.get(name, Tensor(name, (), UNKNOWN)) for name in names if name not in made)
    return inputs, tuple(made[name] for name in names if name in made)


def _parts(name: str) -> tuple[str, ...]:
    return tuple(name.split(" + "))


def type_in(text: str, types: Mapping[str, str] = TYPES, whole_words: bool = True) -> str:
    """Return the type that a text mentions, or "?"."""
    edge = r"\b" if whole_words else ""
    for dtype, pattern in types.items():
        if re.search(f"{edge}(?:{pattern}){edge}", text, re.IGNORECASE):
            return dtype
    return UNKNOWN
