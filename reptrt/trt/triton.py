"""An engine as a model repository of Triton Inference Server.

    REPO/NAME/config.pbtxt   what Triton reads: inputs, outputs, batching, instances
    REPO/NAME/1/model.plan   the engine
    REPO/NAME/labels.txt     one class a line, if given
    REPO/NAME/README.md      preprocessing, and which Triton can serve it

Inputs and outputs are read from the engine's sidecar, so neither TensorRT nor a GPU is needed here.
The configuration holds the preprocessing too, as JSON, so that clients can read it.
"""

import contextlib
import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from reptrt.core.errors import ArtifactError, ConfigError, option
from reptrt.core.result import Result
from reptrt.graph.preprocess import GREY, Preprocess, crop_cover
from reptrt.trt.details import EngineDetails, EngineRecord, TensorInfo, read_engine_record
from reptrt.trt.file import PlanHeader, read_header
from reptrt.trt.options import PackageOptions

_TYPES = {  # TensorRT's name of a type -> Triton's
    "FLOAT": "TYPE_FP32",
    "HALF": "TYPE_FP16",
    "BF16": "TYPE_BF16",
    "INT8": "TYPE_INT8",
    "UINT8": "TYPE_UINT8",
    "INT32": "TYPE_INT32",
    "INT64": "TYPE_INT64",
    "BOOL": "TYPE_BOOL",
}


@dataclass(frozen=True, slots=True, repr=False)
class PackageReport(Result):
    """What `package` wrote."""

    path: Path  # REPO/NAME
    name: str
    max_batch_size: int  # 0: the engine takes a single batch size
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
        table.add_row("folder", str(self.path))
        table.add_row("largest batch", str(self.max_batch_size or "fixed"))
        table.add_row("inputs", ", ".join(self.inputs))
        table.add_row("outputs", ", ".join(self.outputs))
        return table

    def to_lines(self) -> list[str]:
        """Return the warning if there is one."""
        return [] if self.warning is None else [f"warning: {self.warning}"]


@dataclass(frozen=True, slots=True)
class _Model:
    """What is written into the files of a model repository."""

    name: str
    header: PlanHeader
    record: EngineRecord
    labels: tuple[str, ...] | None
    max_batch_size: int
    options: PackageOptions

    @property
    def details(self) -> EngineDetails:
        """What was built."""
        return self.record.details


def package(engine: Path, repository: Path, options: PackageOptions) -> PackageReport:
    """Write an engine into a Triton model repository, whole or not at all.

    Other models in the repository stay as they are.

    Raises:
        ArtifactError: the engine, its sidecar or the labels cannot be read, or the repository
            cannot be written or holds a model of this name.
        EngineError: the file is no engine.
        ConfigError: the labels do not fit, or Triton has no type for a tensor.
    """
    header = read_header(engine)
    record = read_engine_record(engine)
    if record is None:
        raise ArtifactError(
            f"{engine}: has no sidecar, which lists its inputs and outputs; build it with reptrt "
            "build-engine"
        )
    details = record.details
    name = options.name or re.sub(r"[^A-Za-z0-9_-]", "_", engine.stem)
    labels = None if options.labels is None else _read_labels(options.labels, details.outputs[0])
    model = _Model(name, header, record, labels, _max_batch_size(details), options)
    with _new_folder(repository, name) as folder:
        (folder / "config.pbtxt").write_text(_config(model), encoding="utf-8")
        (folder / "README.md").write_text(_readme(model), encoding="utf-8")
        if labels is not None:
            (folder / "labels.txt").write_text("\n".join(labels) + "\n", encoding="utf-8")
        (folder / "1").mkdir()
        shutil.copyfile(engine, folder / "1" / "model.plan")
    return PackageReport(
        path=repository / name,
        name=name,
        max_batch_size=model.max_batch_size,
        inputs=tuple(tensor.name for tensor in details.inputs),
        outputs=tuple(tensor.name for tensor in details.outputs),
        num_labels=None if labels is None else len(labels),
        warning=_warning(header),
    )


@contextlib.contextmanager
def _new_folder(repository: Path, name: str) -> Iterator[Path]:
    """Yield a temporary folder that becomes ``repository/name`` on success, else is gone."""
    target = repository / name
    if target.exists():
        raise ArtifactError(f"{target}: exists; remove it, or give another {option('name')}")
    if not repository.parent.is_dir():
        parent = repository.parent
        raise ArtifactError(f"{repository}: folder {parent} does not exist; create it first")
    existed = repository.exists()
    part: Path | None = None
    try:
        repository.mkdir(exist_ok=True)
        part = Path(tempfile.mkdtemp(dir=repository.parent, prefix=f".{name}.", suffix=".part"))
        yield part
        part.chmod(0o755)
        part.rename(target)
    except OSError as err:
        raise ArtifactError(f"{target}: cannot be written ({err.strerror or err})") from err
    finally:
        if part is not None:
            shutil.rmtree(part, ignore_errors=True)
        if not existed:
            with contextlib.suppress(OSError):
                repository.rmdir()  # only if nothing came into it


def _read_labels(path: Path, output: TensorInfo) -> tuple[str, ...]:
    """Read one label for each class of an output, whose last dimension counts the classes."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as err:
        raise ArtifactError(f"{path}: labels cannot be read ({err})") from err
    labels = tuple(line.strip() for line in text.splitlines())
    num_classes = output.shape[-1] if output.shape else 1
    if not all(labels) or len(labels) != num_classes:
        raise ConfigError(
            f"{option('labels')}: {path} has {len(labels)} lines ({labels.count('')} empty), "
            f"expected {num_classes}, one per class of {output.name}"
        )
    return labels


def _max_batch_size(details: EngineDetails) -> int:
    """Return the largest batch; 0 if a first dimension is fixed, so that Triton must not batch."""
    if any(tensor.shape[:1] != (-1,) for tensor in (*details.inputs, *details.outputs)):
        return 0
    return min(shapes.maximum[0] for shapes in details.profile.values())


def _config(model: _Model) -> str:
    """Return config.pbtxt: ModelConfig of Triton's model_config.proto as protobuf text."""
    details = model.details
    lines = [
        f"name: {_quoted(model.name)}",
        'platform: "tensorrt_plan"',
        f"max_batch_size: {model.max_batch_size}",
    ]
    lines += [_tensor(model, "input", tensor) for tensor in details.inputs]
    for index, tensor in enumerate(details.outputs):
        labelled = index == 0 and model.labels is not None
        lines.append(_tensor(model, "output", tensor, 'label_filename: "labels.txt"' * labelled))
    lines.append(f"instance_group {{ count: {model.options.instances} kind: KIND_GPU }}")
    if model.max_batch_size > 1:
        delay = model.options.max_queue_delay_us
        lines.append(f"dynamic_batching {{ max_queue_delay_microseconds: {delay} }}")
    parameters = {"reptrt.engine_sha256": model.record.sha256}
    if details.preprocess is not None:
        parameters["reptrt.preprocess"] = json.dumps(details.preprocess.to_dict(), sort_keys=True)
    for key, value in parameters.items():
        lines.append(
            f"parameters {{ key: {_quoted(key)} value {{ string_value: {_quoted(value)} }} }}"
        )
    return "\n".join(lines) + "\n"


def _tensor(model: _Model, role: str, tensor: TensorInfo, more: str = "") -> str:
    kind = _TYPES.get(tensor.dtype)
    if kind is None:
        raise ConfigError(f"{role} {tensor.name}: {tensor.dtype}, which Triton cannot serve")
    dims = ", ".join(str(size) for size in _dims(model, tensor.shape))
    fields = f"name: {_quoted(tensor.name)} data_type: {kind} dims: [ {dims} ] {more}"
    return f"{role} {{ {fields.rstrip()} }}"


def _dims(model: _Model, shape: Sequence[int]) -> Sequence[int]:
    """Return a shape as Triton wants it: without the batch if that can change."""
    return shape[1:] if model.max_batch_size else shape


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


def _warning(header: PlanHeader) -> str | None:
    if header.backend == "tensorrt":
        return None
    return (
        f"engine of {header.label}: Triton's TensorRT backend loads engines of tensorrt only; "
        "build it with backend tensorrt on the machine that serves it"
    )


def _readme(model: _Model) -> str:
    """Return the note for people: what to send, and where the engine runs."""
    details = model.details
    rows = [
        f"| {role} | {tensor.name} | {tensor.dtype} | {list(_dims(model, tensor.shape))} |"
        for role, tensors in (("input", details.inputs), ("output", details.outputs))
        for tensor in tensors
    ]
    batch = f"Batches of 1 to {model.max_batch_size}; the shapes below are those of one image."
    targets = ", ".join(details.targets) or "every GPU from sm80 on that tensorrt-rtx runs on"
    warning = _warning(model.header)
    parts = [
        f"# {model.name}",
        batch if model.max_batch_size else "The batch size is fixed; the shapes below include it.",
        "\n".join(["| | name | type | shape |", "|---|---|---|---|", *rows]),
        "## Preprocessing\n\n" + _preprocessing(details.preprocess),
        "## Where it runs\n\n"
        f"Engine of {model.header.label} for {targets}. Triton loads it if it carries the same "
        "TensorRT (see the support matrix of its releases) and runs on one of these GPUs.",
        "" if warning is None else f"**Not here: {warning}.**",
        "    tritonserver --model-repository=REPO",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _preprocessing(preprocess: Preprocess | None) -> str:
    if preprocess is None:
        return "Not recorded: ask whoever exported the network."
    size = f"{preprocess.height} x {preprocess.width}"
    cover = " x ".join(map(str, crop_cover(preprocess.height, preprocess.width)))
    resize = {
        "none": f"Images must be {size} already.",
        "stretch": f"Resize to {size}, bilinear, aspect ratio ignored.",
        "crop": f"Scale (bilinear, aspect ratio kept) until the image covers {cover}, then cut out "
        f"the centre {size}.",
        "letterbox": f"Scale (bilinear, aspect ratio kept) until the image fits {size}, and put it "
        f"in the middle of pixels {GREY}, the border rounded down at the top and left.",
    }[preprocess.resize]
    order = "channels last" if preprocess.layout == "NHWC" else "channels first"
    if preprocess.values != "normalized":
        kind = "uint8" if preprocess.values == "bytes" else "float32"
        return f"{resize} Pixels stay 0..255, as {kind}, {order} ({preprocess.channels})."
    return (
        f"{resize} Then, per channel, (x / 255 - mean) / std as float32, {order} "
        f"({preprocess.channels}):\n\n"
        f"- mean {list(preprocess.mean)}\n- std {list(preprocess.std)}"
    )
