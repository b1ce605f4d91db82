"""Pack a network for the machine that serves it: with NMS, as a Triton model or one ONNX file.

An engine becomes a model of Triton's TensorRT backend; its inputs and outputs are read from its
sidecar, so neither TensorRT nor a GPU is needed here. An ONNX file becomes a model of Triton's
onnxruntime backend, or one ONNX file with NMS behind it.
"""

import hashlib
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx
from rich.table import Table

from reptrt.core.artifacts import (
    ONNX_SUFFIXES,
    is_engine_file,
    refuse_overwriting,
    require_folder,
    write_artifact,
)
from reptrt.core.errors import ArtifactError, ConfigError, option
from reptrt.core.options_json import json_from_options
from reptrt.core.result import Result
from reptrt.data.labels import read_labels
from reptrt.graph.detector_layouts import DetectorLayout, layout_of_outputs
from reptrt.graph.model import Model, Network
from reptrt.graph.net import QUANTIZED_OPS, bytes_from_model, model_from_net
from reptrt.graph.preprocess import stored_preprocess
from reptrt.rewrite.append_nms import NmsForm, append_nms, nms_classes
from reptrt.trt.details import EngineDetails, TensorInfo, read_engine_record
from reptrt.trt.file import PlanHeader, read_header
from reptrt.trt.options import DEFAULT_BATCHES, PackageOptions
from reptrt.trt.triton import Served, write_repository
from reptrt.trt.versions import no_nms

_NAMES = {"FLOAT16": "HALF", "BFLOAT16": "BF16"}  # ONNX's name of a type -> TensorRT's


@dataclass(frozen=True, slots=True, repr=False)
class PackageReport(Result):
    """What `package` wrote."""

    path: Path  # REPO/NAME, or the ONNX file
    name: str
    platform: (
        str  # "tensorrt_plan", "onnxruntime_onnx": Triton's; "onnxruntime", "tensorrt": a file
    )
    max_batch_size: int  # 0: the network takes a single batch size
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    num_labels: int | None
    warning: str | None  # why a stock Triton cannot load the engine

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return asdict(self) | {"path": str(self.path)}

    def to_table(self) -> Table:
        """Return what was written, one row each."""
        table = Table(box=None, pad_edge=False, show_header=False)
        table.add_row("folder" if self.path.is_dir() else "file", str(self.path))
        table.add_row("for", self.platform)
        table.add_row("largest batch", str(self.max_batch_size or "fixed"))
        table.add_row("inputs", ", ".join(self.inputs))
        table.add_row("outputs", ", ".join(self.outputs))
        return table

    def to_lines(self) -> list[str]:
        """Return the warning if there is one."""
        return [] if self.warning is None else [f"warning: {self.warning}"]


def package(source: Network, output: Path, options: PackageOptions) -> PackageReport:
    """Write a network into a Triton model repository, or as an ONNX file with NMS.

    Args:
        source: an engine, an ONNX file, or a model in memory.
        output: the repository, whose other models stay as they are; or a name that ends in .onnx.
        options: of the package.

    Raises:
        ArtifactError: a file cannot be read or written, or the repository has a model of this name.
        EngineError: an engine is damaged.
        ConfigError: an option does not fit the network, or Triton has no type for a tensor.
        RewriteError: NMS cannot be appended.
    """
    if options.nms.append and options.platform == "tensorrt-rtx":
        raise ConfigError(f"{option('nms')}: {no_nms(options.platform)}")
    if isinstance(source, Path) and is_engine_file(source):
        served, platform = _served_engine(source, options), "tensorrt"
    else:
        model = Model.read(source) if isinstance(source, Path) else source
        if output.suffix.lower() in ONNX_SUFFIXES:
            return _write_file(model, output, options)
        served, platform = _served_model(model, options), "onnxruntime"
    _check_platform(options, served, platform)
    write_repository(served, output)
    return _report(served, output / served.name, served.platform)


def _check_platform(options: PackageOptions, served: Served, platform: str) -> None:
    """Refuse a platform that the network is not of."""
    asked = "tensorrt" if options.platform == "tensorrt-rtx" else options.platform
    if asked in ("auto", platform):
        return
    remedy = (
        "package the .onnx file that it was built from"
        if platform == "tensorrt"
        else f"build it first with reptrt build-engine (and {option('nms')} there) and package "
        f"the engine, or write one file: {option('output')} FILE.onnx"
    )
    kind = "an engine" if platform == "tensorrt" else "an ONNX file"
    raise ConfigError(
        f"{option('platform', options.platform)}: {served.name} is {kind}, which Triton serves "
        f"with {platform} only; {remedy}"
    )


def _write_file(model: Model, output: Path, options: PackageOptions) -> PackageReport:
    """Write one ONNX file with NMS behind it."""
    if not options.nms.append:
        raise ConfigError(
            f"{option('output')} {output}: one ONNX file is written with {option('nms')} only; "
            "give a folder for a Triton repository"
        )
    require_folder(output)
    refuse_overwriting(output, [] if model.path is None else [model.path])
    plugin = options.platform == "tensorrt"
    proto = _with_nms(model, "plugin" if plugin else "onnx", options)
    platform = "tensorrt" if plugin else "onnxruntime"
    content = bytes_from_model(proto)
    served = _served(model, proto, content, options)
    quantized = any(node.op_type in QUANTIZED_OPS for node in proto.graph.node)
    write_artifact(
        output,
        content,
        artifact="int8-onnx" if quantized else "float-onnx",
        parents={model.name: model.sha256},
        options=json_from_options(options),
    )
    return _report(served, output, platform)


def _with_nms(model: Model, form: NmsForm, options: PackageOptions) -> onnx.ModelProto:
    if not options.nms.append:
        return model.proto
    net = model.to_net()
    append_nms(net, form, options.nms)
    return model_from_net(net)


def _served_model(model: Model, options: PackageOptions) -> Served:
    proto = _with_nms(model, "onnx", options)
    return _served(model, proto, bytes_from_model(proto), options)


def _served(
    model: Model, proto: onnx.ModelProto, content: bytes, options: PackageOptions
) -> Served:
    """Return an ONNX model as Triton's onnxruntime backend serves it."""
    net = Model(name=model.name, proto=proto, sha256=model.sha256).to_net()
    inputs, outputs = (_tensor_infos(part) for part in (proto.graph.input, proto.graph.output))
    changes = all(tensor.shape[:1] == (-1,) for tensor in (*inputs, *outputs))
    return Served(
        name=_name(model.name, options),
        platform="onnxruntime_onnx",
        content=content,
        sha256=hashlib.sha256(content).hexdigest(),
        inputs=inputs,
        outputs=outputs,
        labels=_labels(options, outputs, nms_classes(net)),
        preprocess=stored_preprocess(net),
        max_batch_size=DEFAULT_BATCHES.maximum[0] if changes else 0,
        instances=options.instances,
        max_queue_delay_us=options.max_queue_delay_us,
        runs="ONNX file: Triton's onnxruntime backend runs it on CPUs and GPUs.",
    )


def _tensor_infos(values: Any) -> tuple[TensorInfo, ...]:
    infos = []
    for value in values:
        kind = value.type.tensor_type
        shape = tuple(dim.dim_value if dim.dim_value > 0 else -1 for dim in kind.shape.dim)
        name = onnx.TensorProto.DataType.Name(kind.elem_type)
        infos.append(TensorInfo(value.name, shape, _NAMES.get(name, name)))
    return tuple(infos)


def _served_engine(engine: Path, options: PackageOptions) -> Served:
    header = read_header(engine)
    record = read_engine_record(engine)
    if record is None:
        raise ArtifactError(
            f"{engine}: has no sidecar, which lists its inputs and outputs; build it with reptrt "
            "build-engine"
        )
    if options.nms.append:
        raise ConfigError(
            f"{option('nms')}: {engine} is built already; give it to reptrt build-engine"
        )
    details = record.details
    targets = ", ".join(details.targets) or "every GPU from sm80 on that tensorrt-rtx runs on"
    return Served(
        name=_name(engine.name, options),
        platform="tensorrt_plan",
        content=engine,
        sha256=record.sha256,
        inputs=details.inputs,
        outputs=details.outputs,
        labels=_labels(options, details.outputs, details.num_classes),
        preprocess=details.preprocess,
        max_batch_size=_max_batch_size(details),
        instances=options.instances,
        max_queue_delay_us=options.max_queue_delay_us,
        runs=f"Engine of {header.label} for {targets}. Triton loads it if it carries the same "
        "TensorRT (see the support matrix of its releases) and runs on one of these GPUs.",
        warning=_warning(header),
    )


def _name(file: str, options: PackageOptions) -> str:
    return options.name or re.sub(r"[^A-Za-z0-9_-]", "_", Path(file).stem)


def _labels(
    options: PackageOptions, outputs: tuple[TensorInfo, ...], num_classes: int | None
) -> tuple[str, ...] | None:
    """Read one label for each class of a detector, or of the last axis of the first output."""
    if options.labels is None:
        return None
    names = [tensor.name for tensor in outputs]
    layout = layout_of_outputs([tensor.shape for tensor in outputs], names=names)
    if isinstance(layout, DetectorLayout):
        count = layout.num_classes or num_classes
    else:
        count = outputs[0].shape[-1] if outputs[0].shape else 1
    return read_labels(options.labels, count, outputs[0].name)


def _max_batch_size(details: EngineDetails) -> int:
    """Return the largest batch; 0 if a first dimension is fixed, so that Triton must not batch."""
    if any(tensor.shape[:1] != (-1,) for tensor in (*details.inputs, *details.outputs)):
        return 0
    return min(shapes.maximum[0] for shapes in details.profile.values())


def _warning(header: PlanHeader) -> str | None:
    if header.backend == "tensorrt":
        return None
    return (
        f"engine of {header.label}: Triton's TensorRT backend loads engines of tensorrt only; "
        "build it with backend tensorrt on the machine that serves it"
    )


def _report(served: Served, path: Path, platform: str) -> PackageReport:
    return PackageReport(
        path=path,
        name=served.name,
        platform=platform,
        max_batch_size=served.max_batch_size,
        inputs=tuple(tensor.name for tensor in served.inputs),
        outputs=tuple(tensor.name for tensor in served.outputs),
        num_labels=None if served.labels is None else len(served.labels),
        warning=served.warning,
    )
