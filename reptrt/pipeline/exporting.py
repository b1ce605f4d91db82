"""export: a source as one fused float ONNX file, proved equal."""

import contextlib
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import onnx

from reptrt.core.artifacts import (
    read_sidecar,
    refuse_overwriting,
    require_folder,
    sha256_of,
    write_artifact,
)
from reptrt.exporter.export import (
    ExportSettings,
    Proof,
    block_outputs,
    fuse,
    model_from_file,
    onnx_from_module,
    prove,
)
from reptrt.graph.net import blaming, bytes_from_model, model_from_net, net_from_model
from reptrt.graph.preprocess import Preprocess, read_preprocess
from reptrt.pipeline.options import ExportOptions, recorded_options
from reptrt.rewrite.contract import Skipped
from reptrt.sources.source import Source, module_from_source

_IMAGENET_SIZE = (3, 224, 224)
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What `export` wrote and proved."""

    path: Path
    sha256: str
    proof: Proof
    skipped: tuple[Skipped, ...]  # sums that look like rep blocks and were left alone
    num_parameters: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        content: dict[str, Any] = asdict(self) | {"path": str(self.path)}
        content["blocks"] = content["proof"].pop("blocks")
        proof: dict[str, Any] = content.pop("proof")
        return content | proof


def export(source: Source, output: Path, options: ExportOptions) -> ExportReport:
    """Write a net as one fused float ONNX file with its preprocessing, proved equal to the source.

    Raises:
        ReptrtError: the source, its weights or an option cannot be used; or the fused net differs
            from the source by more than the tolerance, in which case nothing is written.
    """
    with blaming(Path(source.name)) if source.is_onnx else contextlib.nullcontext():
        return _export(source, output, options)


def _export(source: Source, output: Path, options: ExportOptions) -> ExportReport:
    started = time.perf_counter()
    require_folder(output)
    refuse_overwriting(output, source.files)
    module = None
    if source.is_onnx:
        read_sidecar(Path(source.name))
        original = model_from_file(Path(source.name), options.opset, options.input_size)
        preprocess = _preprocess(source, options, original)
    else:
        module = module_from_source(_with_channels(source, options))
        preprocess = _preprocess(source, options, None)
        original = onnx_from_module(module, preprocess, ExportSettings(options.opset))
    net, reports = fuse(original, preprocess)
    fused = model_from_net(net)
    blocks = block_outputs(net, original, reports[-1].changed)
    proof = prove(original, fused, blocks, tolerance=options.tolerance, module=module)
    proof.check()
    sidecar = write_artifact(
        output,
        bytes_from_model(fused),
        artifact="float-onnx",
        parents=_parents(source),
        options={"source": source.name, **recorded_options(options)},
        details={"proof": asdict(proof), "skipped": [asdict(s) for s in reports[-1].skipped]},
    )
    return ExportReport(
        path=output,
        sha256=sidecar.sha256,
        proof=proof,
        skipped=reports[-1].skipped,
        num_parameters=_num_parameters(fused),
        seconds=time.perf_counter() - started,
    )


def _with_channels(source: Source, options: ExportOptions) -> Source:
    """Let the input size say how many channels a net of the zoo reads."""
    given = source.architecture.in_channels is not None
    if ":" in source.name or options.input_size is None or given:
        return source
    architecture = replace(source.architecture, in_channels=options.input_size[0])
    return replace(source, architecture=architecture)


def _preprocess(
    source: Source, options: ExportOptions, original: onnx.ModelProto | None
) -> Preprocess:
    """Return the preprocessing: what was asked for, else what the source implies."""
    imagenet = source.is_imagenet_variant
    if original is not None:
        base = read_preprocess(net_from_model(original))
    else:
        base = Preprocess.plain(*(options.input_size or _IMAGENET_SIZE))
        if imagenet and base.channels == len(_IMAGENET_MEAN):
            base = replace(base, mean=_IMAGENET_MEAN, std=_IMAGENET_STD, resize="crop")
    given = {"mean": options.mean, "std": options.std, "resize": options.resize}
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    return replace(base, **changes)


def _parents(source: Source) -> dict[str, str]:
    return {path.name: sha256_of(path) for path in source.files}


def _num_parameters(model: onnx.ModelProto) -> int:
    """Return how many values the arrays of a model hold; scalars are bounds and the like."""
    values = [onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer]
    return int(sum(value.size for value in values if value.ndim))
