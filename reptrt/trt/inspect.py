"""List the layers of a network or an engine."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import onnx
from rich.table import Table

from reptrt.core.result import Result
from reptrt.graph.intent import node_name, planned_int8
from reptrt.graph.model import Model, label_of, proto_of
from reptrt.trt import driver
from reptrt.trt.details import EngineRecord, TensorInfo, read_engine_record
from reptrt.trt.driver import Gpu
from reptrt.trt.file import OpenEngine, PlanHeader, open_engine, read_header
from reptrt.trt.inspector import UNKNOWN, Layer, Tensor, parse_inspector, type_in
from reptrt.trt.rtx_plan import layers_of_plan


@dataclass(frozen=True, slots=True, repr=False)
class Inspection(Result):
    """The layers of a network or an engine."""

    path: Path  # of the file; of a model in memory, its name
    kind: Literal["onnx", "engine"]
    made_by: str  # producer of the ONNX file, or TensorRT and its version
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    layers: tuple[Layer, ...]
    planned: tuple[str, ...] | None  # names of the layers planned INT8; None: not known

    @property
    def precisions(self) -> dict[str, int]:
        """Number of layers by the type they compute in, reformats left out."""
        counts = Counter(layer.precision for layer in self.layers if not layer.is_reformat)
        return dict(counts.most_common())

    @property
    def reformats(self) -> tuple[Layer, ...]:
        """The layers that only copy."""
        return tuple(layer for layer in self.layers if layer.is_reformat)

    def to_dict(self) -> dict[str, Any]:
        """Return the inspection as JSON values."""
        return asdict(self) | {
            "path": str(self.path),
            "precisions": self.precisions,
            "reformats": len(self.reformats),
        }

    def to_table(self) -> Table:
        """Return the layers as a table for people."""
        table = Table(box=None, pad_edge=False, title=f"{self.path}  {self.made_by}")
        for title in ("layer", "kind", "precision", "output"):
            table.add_column(title, overflow="fold")
        for layer in self.layers:
            shapes = [f"{_shape(out.shape)} {out.dtype}" for out in layer.outputs]
            table.add_row(layer.name, layer.kind, layer.precision, ", ".join(shapes))
        return table


def inspect(network: Path | Model) -> Inspection:
    """Return the layers of an .onnx file, of a model in memory, or of an engine.

    Raises:
        ArtifactError: the file cannot be read.
        EngineError: an engine that cannot be used on this machine.
    """
    if isinstance(network, Path) and network.suffix.lower() != ".onnx":
        return inspect_engine(network)
    return inspect_onnx(network)


def inspect_onnx(network: Path | Model) -> Inspection:
    """Return the nodes of an ONNX model; ``precision`` is what the graph asks for.

    A layer planned INT8 counts as INT8, every other as the type of its output.

    Raises:
        ArtifactError: the file cannot be read.
    """
    model = onnx.shape_inference.infer_shapes(proto_of(network))
    graph = model.graph
    tensors = {info.name: _onnx_tensor(info) for info in (*graph.value_info, *graph.input)}
    tensors |= {info.name: _onnx_tensor(info) for info in graph.output}
    tensors |= {
        constant.name: Tensor(constant.name, tuple(constant.dims), _onnx_type(constant.data_type))
        for constant in graph.initializer
    }
    planned = planned_int8(model)
    constants = {constant.name for constant in graph.initializer}
    return Inspection(
        path=Path(label_of(network)),
        kind="onnx",
        made_by=f"{model.producer_name or 'ONNX'} {model.producer_version}".strip(),
        inputs=tuple(tensors[info.name] for info in graph.input if info.name not in constants),
        outputs=tuple(tensors[info.name] for info in graph.output),
        layers=tuple(_onnx_layer(node, tensors, planned) for node in graph.node),
        planned=planned,
    )


def inspect_engine(path: Path) -> Inspection:
    """Return the layers of an engine, as TensorRT's engine inspector describes them.

    Dynamic inputs are set to the shape that the engine is optimised for, so that formats are known.
    On a machine without a GPU an engine of tensorrt_rtx is read by `reptrt.trt.rtx_plan`.

    Raises:
        ArtifactError: the file cannot be read.
        EngineError: an engine that cannot be used on this machine.
    """
    header = read_header(path)
    if header.backend == "tensorrt-rtx" and not isinstance(driver.find_gpu(), Gpu):
        return _inspect_without_gpu(path, header)
    with open_engine(path) as opened:
        text = _inspector_text(opened)
        made_by = f"{opened.header.label} on {opened.gpu.name}"
        planned = _planned(opened.record)
    inputs, outputs, layers = parse_inspector(text)
    return Inspection(path, "engine", made_by, inputs, outputs, layers, planned)


def _inspect_without_gpu(path: Path, header: PlanHeader) -> Inspection:
    record = read_engine_record(path)
    inputs = () if record is None else _tensors(record.details.inputs)
    outputs = () if record is None else _tensors(record.details.outputs)
    layers = layers_of_plan(path.read_bytes(), str(path))
    made_by = f"{header.label}, read without a GPU"
    return Inspection(path, "engine", made_by, inputs, outputs, layers, _planned(record))


def _tensors(infos: Sequence[TensorInfo]) -> tuple[Tensor, ...]:
    return tuple(Tensor(info.name, info.shape, type_in(info.dtype)) for info in infos)


def _planned(record: EngineRecord | None) -> tuple[str, ...] | None:
    return None if record is None else record.details.int8_layers


def _inspector_text(opened: OpenEngine) -> str:
    """Ask the inspector, with a context whose input shapes are set."""
    trt, engine = opened.backend.trt, opened.engine
    context = engine.create_execution_context()
    for index in range(engine.num_io_tensors if context is not None else 0):
        name = engine.get_tensor_name(index)
        is_input = engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
        if is_input and -1 in tuple(engine.get_tensor_shape(name)):
            optimum = engine.get_tensor_profile_shape(name, 0)[1]
            context.set_input_shape(name, tuple(optimum))
    inspector = engine.create_engine_inspector()
    inspector.execution_context = context
    return str(inspector.get_engine_information(trt.LayerInformationFormat.JSON))


def _onnx_layer(
    node: onnx.NodeProto, tensors: Mapping[str, Tensor], planned: Sequence[str]
) -> Layer:
    name = node_name(node)
    inputs = tuple(tensors.get(t, Tensor(t, (), UNKNOWN)) for t in node.input if t)
    outputs = tuple(tensors.get(t, Tensor(t, (), UNKNOWN)) for t in node.output if t)
    precision = "INT8" if name in planned else (outputs[0].dtype if outputs else UNKNOWN)
    return Layer(name, node.op_type, precision, inputs, outputs, origin=(name,))


def _onnx_tensor(info: onnx.ValueInfoProto) -> Tensor:
    kind = info.type.tensor_type
    dims = tuple(d.dim_value if d.HasField("dim_value") else -1 for d in kind.shape.dim)
    return Tensor(info.name, dims, _onnx_type(kind.elem_type))


def _onnx_type(code: int) -> str:
    return type_in(onnx.TensorProto.DataType.Name(code))


def _shape(shape: Sequence[int]) -> str:
    return "x".join("?" if size < 0 else str(size) for size in shape) or "scalar"
