"""A network as a model of a repository of Triton Inference Server.

    REPO/NAME/config.pbtxt   what Triton reads: inputs, outputs, batching, instances
    REPO/NAME/1/model.plan   the engine, or model.onnx
    REPO/NAME/labels.txt     one class a line, if given
    REPO/NAME/README.md      preprocessing, what the outputs are, and where it runs

The configuration holds the preprocessing too, as JSON, so that clients can read it.
"""

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from reptrt.core.errors import ArtifactError, ConfigError, option
from reptrt.graph.preprocess import GREY, Preprocess, crop_cover
from reptrt.rewrite.append_nms import OUTPUTS
from reptrt.trt.details import TensorInfo

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
_FILES = {"tensorrt_plan": "model.plan", "onnxruntime_onnx": "model.onnx"}
_KINDS = {"tensorrt_plan": "KIND_GPU", "onnxruntime_onnx": "KIND_AUTO"}
_CLASSES = OUTPUTS[3]


@dataclass(frozen=True, slots=True)
class Served:
    """What is written into the files of one model."""

    name: str
    platform: Literal["tensorrt_plan", "onnxruntime_onnx"]
    content: Path | bytes  # the engine, or the bytes of the ONNX file
    sha256: str  # of the engine or of the ONNX file, hex
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    labels: tuple[str, ...] | None
    preprocess: Preprocess | None
    max_batch_size: int  # 0: the network takes a single batch size
    instances: int
    max_queue_delay_us: int
    runs: str  # where it runs, one sentence or two
    warning: str | None = None  # why a stock Triton cannot load it

    @property
    def has_nms(self) -> bool:
        """Whether the outputs are finished detections."""
        return tuple(tensor.name for tensor in self.outputs) == OUTPUTS


def write_repository(served: Served, repository: Path) -> None:
    """Write a model into a repository, whole or not at all; other models in it stay as they are.

    Raises:
        ArtifactError: the repository cannot be written or holds a model of this name.
        ConfigError: Triton has no type for a tensor.
    """
    with _new_folder(repository, served.name) as folder:
        (folder / "config.pbtxt").write_text(_config(served), encoding="utf-8")
        (folder / "README.md").write_text(_readme(served), encoding="utf-8")
        if served.labels is not None:
            (folder / "labels.txt").write_text("\n".join(served.labels) + "\n", encoding="utf-8")
        (folder / "1").mkdir()
        target = folder / "1" / _FILES[served.platform]
        if isinstance(served.content, bytes):
            target.write_bytes(served.content)
        else:
            shutil.copyfile(served.content, target)


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


def _config(served: Served) -> str:
    """Return config.pbtxt: ModelConfig of Triton's model_config.proto as protobuf text."""
    lines = [
        f"name: {_quoted(served.name)}",
        f"platform: {_quoted(served.platform)}",
        f"max_batch_size: {served.max_batch_size}",
    ]
    lines += [_tensor(served, "input", tensor) for tensor in served.inputs]
    for index, tensor in enumerate(served.outputs):
        of_classes = tensor.name == _CLASSES if served.has_nms else index == 0
        labelled = of_classes and served.labels is not None
        lines.append(_tensor(served, "output", tensor, 'label_filename: "labels.txt"' * labelled))
    kind = _KINDS[served.platform]
    lines.append(f"instance_group {{ count: {served.instances} kind: {kind} }}")
    if served.max_batch_size > 1:
        delay = served.max_queue_delay_us
        lines.append(f"dynamic_batching {{ max_queue_delay_microseconds: {delay} }}")
    file = "engine" if served.platform == "tensorrt_plan" else "onnx"
    parameters = {f"reptrt.{file}_sha256": served.sha256}
    if served.preprocess is not None:
        parameters["reptrt.preprocess"] = json.dumps(served.preprocess.to_dict(), sort_keys=True)
    for key, value in parameters.items():
        lines.append(
            f"parameters {{ key: {_quoted(key)} value {{ string_value: {_quoted(value)} }} }}"
        )
    return "\n".join(lines) + "\n"


def _tensor(served: Served, role: str, tensor: TensorInfo, more: str = "") -> str:
    kind = _TYPES.get(tensor.dtype)
    if kind is None:
        raise ConfigError(f"{role} {tensor.name}: {tensor.dtype}, which Triton cannot serve")
    dims = ", ".join(str(size) for size in _dims(served, tensor.shape))
    fields = f"name: {_quoted(tensor.name)} data_type: {kind} dims: [ {dims} ] {more}"
    return f"{role} {{ {fields.rstrip()} }}"


def _dims(served: Served, shape: Sequence[int]) -> Sequence[int]:
    """Return a shape as Triton wants it: without the batch if that can change."""
    return shape[1:] if served.max_batch_size else shape


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


def _readme(served: Served) -> str:
    """Return the note for people: what to send, what comes back, and where the network runs."""
    rows = [
        f"| {role} | {tensor.name} | {tensor.dtype} | {list(_dims(served, tensor.shape))} |"
        for role, tensors in (("input", served.inputs), ("output", served.outputs))
        for tensor in tensors
    ]
    batch = f"Batches of 1 to {served.max_batch_size}; the shapes below are those of one image."
    parts = [
        f"# {served.name}",
        batch if served.max_batch_size else "The batch size is fixed; the shapes below include it.",
        "\n".join(["| | name | type | shape |", "|---|---|---|---|", *rows]),
        "## Preprocessing\n\n" + _preprocessing(served.preprocess),
        "## Detections\n\n" + _detections(served) if served.has_nms else "",
        f"## Where it runs\n\n{served.runs}",
        "" if served.warning is None else f"**Not here: {served.warning}.**",
        "    tritonserver --model-repository=REPO",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _detections(served: Served) -> str:
    number, boxes, scores, classes = OUTPUTS
    names = "" if served.labels is None else "; 0 is the first line of labels.txt"
    text = (
        f"The first {number} entries of {boxes}, {scores} and {classes} are used, the others are "
        f"0. A box is x1, y1, x2, y2 in pixels of the input; classes count from 0{names}."
    )
    preprocess = served.preprocess
    if preprocess is None or preprocess.resize != "letterbox":
        return text
    height, width = preprocess.height, preprocess.width
    return (
        f"{text} Back to an image of w x h pixels:\n\n"
        f"    s = min({width} / w, {height} / h), sw = round(w * s), sh = round(h * s)\n"
        f"    x = (x - ({width} - sw) // 2) * w / sw, y = (y - ({height} - sh) // 2) * h / sh"
    )


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
