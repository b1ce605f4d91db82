"""Read the program inside a tensorrt_rtx engine, without a GPU and without TensorRT.

tensorrt_rtx compiles most of a network ahead of time and stores the result in the engine as text:
memory, tensors with their types, then one statement per launch, with the ONNX nodes of its origin:

    tensor={ ... name="c0" ... type=int8 }
    corrltn={ name="conv0" output={"c0" } input={"x" "w" } ... layers="[ONNX Layer: conv0]..." }

The text is undocumented and was seen in 1.7 only; an engine without it is an error. Which kernel
runs a convolution is decided on the GPU, but the types of its inputs and outputs are fixed here.
"""

import re
from collections.abc import Iterator, Mapping

from reptrt.core.errors import EngineError
from reptrt.trt.inspector import UNKNOWN, Layer, Tensor, onnx_names, type_in

_START = b"header {\n"
_KINDS = {"corrltn": "Convolution", "fully_connected": "Gemm", "function": "Kernel"}
_STATEMENT = re.compile(r"^  (\w+)=\{ (.*?)(?=^  \w+=\{|^ label|^\}|\Z)", re.MULTILINE | re.DOTALL)
_TENSOR = re.compile(r'dims=\{ (.*?)\}.*? name="(.*?)".* type=(\w+) ')


def layers_of_plan(plan: bytes, where: str) -> tuple[Layer, ...]:
    """Return the launches of a tensorrt_rtx engine, in order.

    Args:
        plan: the engine.
        where: its name, for messages.

    Raises:
        EngineError: the engine has no such program, or one in another form.
    """
    layers = tuple(layer for program in _programs(plan) for layer in _launches(program))
    if not layers:
        raise EngineError(
            f"{where}: its program is not readable without a GPU; inspect it on a machine with one"
        )
    return layers


def _programs(plan: bytes) -> Iterator[str]:
    """Yield the programs of an engine; a zero byte ends each."""
    start = plan.find(_START)
    while start >= 0:
        end = plan.find(b"\0", start)
        yield plan[start : end if end >= 0 else None].decode("utf-8", errors="replace")
        start = plan.find(_START, start + 1)


def _launches(program: str) -> Iterator[Layer]:
    body, _, _ = program.partition("shape_main {")
    tensors: dict[str, Tensor] = {}
    for statement in _STATEMENT.finditer(body):
        kind, text = statement.groups()
        if kind in ("tensor", "sub_tensor"):
            tensor = _tensor(text)
            if tensor is not None:
                tensors[tensor.name] = tensor
        elif kind in _KINDS:
            yield _launch(kind, text, tensors)


def _tensor(text: str) -> Tensor | None:
    match = _TENSOR.search(text)
    if match is None:
        return None
    dims, name, dtype = match.groups()
    sizes = re.findall(r'"[^"]*"|\d+', dims)
    shape = tuple(-1 if size.startswith('"') else int(size) for size in sizes)
    return Tensor(name, shape, type_in(dtype))


def _launch(kind: str, text: str, tensors: Mapping[str, Tensor]) -> Layer:
    match = re.match(r'name="?([^" ]*)"?', text)
    name = match.group(1) if match else ""
    inputs = _arguments(text, "input", tensors)
    outputs = _arguments(text, "output", tensors)
    nodes = re.search(r'layers="(.*?)"', text, re.DOTALL)
    is_kernel = kind == "function"
    typed = outputs if is_kernel else inputs  # a product has the type of its factors
    return Layer(
        name=name,
        kind=_KINDS[kind],
        precision=typed[0].dtype if typed else UNKNOWN,
        inputs=inputs,
        outputs=outputs,
        origin=onnx_names(nodes.group(1)) if nodes else (),
        kernel=name if is_kernel else "",
    )


def _arguments(text: str, role: str, tensors: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """Return the tensors in ``input={...}``, ``input_args={...}``... without the sizes (INT64)."""
    match = re.search(rf" {role}(?:_args)?=\{{(.*?)\}}", text)
    names = re.findall(r'"(.*?)"', match.group(1)) if match else []
    arguments = [tensors[name] for name in names if name in tensors]
    return tuple(tensor for tensor in arguments if tensor.dtype != "INT64")
