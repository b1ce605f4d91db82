"""export: a source as one fused float ONNX file, proved equal."""

import contextlib
import logging
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import onnx
from torch import nn

from reptrt.core.artifacts import (
    ONNX_SUFFIXES,
    read_sidecar,
    refuse_overwriting,
    require_folder,
    require_suffix,
    sha256_of,
)
from reptrt.core.errors import ConfigError, option
from reptrt.core.notes import kept_notes
from reptrt.core.options_json import json_from_options
from reptrt.exporter.from_file import model_from_file
from reptrt.exporter.from_module import ExportSettings, onnx_from_module
from reptrt.exporter.fuse import fuse
from reptrt.exporter.prove import block_outputs, prove
from reptrt.graph.model import blaming
from reptrt.graph.net import net_from_model
from reptrt.graph.preprocess import Preprocess, read_preprocess
from reptrt.pipeline.options import ExportOptions
from reptrt.pipeline.reports import ExportReport
from reptrt.pipeline.values import Exported, Origin, finished_model
from reptrt.sources.module import deployable_copy, state_sha256
from reptrt.sources.source import Source, implied_preprocess, module_from_source

_LOG = logging.getLogger(__name__)


def export(source: Source, output: Path, options: ExportOptions) -> ExportReport:
    """Write a net as one fused float ONNX file with its preprocessing, proved equal to the source.

    Args:
        source: a net of the zoo or of timm, a factory, or an ONNX file, train-form or fused.
        output: the ONNX file to write.
        options: of export.

    Raises:
        ReptrtError: as `export_net`; nothing is written.
    """
    require_folder(output)
    refuse_overwriting(output, source.files)
    require_suffix(output, ONNX_SUFFIXES, "a network")
    exported = export_net(source, options)
    exported.save(output)
    return replace(exported.report, path=output)


def export_net(
    source: Source | nn.Module, options: ExportOptions, *, name: str | None = None
) -> Exported:
    """Return a net as one fused float ONNX model with its preprocessing, proved equal to it.

    Args:
        source: a net of the zoo or of timm, a factory, or an ONNX file, train-form or fused; or a
            torch module, which is not changed: a copy of it is exported in eval mode, on the CPU
            and in float32.
        options: of export; a module needs ``input_size``.
        name: of the result; None: that of the source.

    Raises:
        ReptrtError: the source, its weights or an option cannot be used; or the fused net differs
            from the source by more than the tolerance.
    """
    started = time.perf_counter()
    with _blaming(source), kept_notes() as notes:
        original = _original(source, options)
        made = _fused(original, options, name or original.name, started)
    return replace(made, report=replace(made.report, notes=tuple(notes)))


def _blaming(source: Source | nn.Module) -> contextlib.AbstractContextManager[None]:
    if isinstance(source, Source) and source.is_onnx:
        return blaming(Path(source.name))
    return contextlib.nullcontext()


class _Original(NamedTuple):
    """A net as it came, in ONNX, and where it came from."""

    name: str
    asked_for: str  # the source, as the sidecar records it
    model: onnx.ModelProto
    preprocess: Preprocess
    module: nn.Module | None  # None: it came as ONNX
    parents: Mapping[str, str]


def _original(source: Source | nn.Module, options: ExportOptions) -> _Original:
    if isinstance(source, nn.Module):
        return _from_module(source, options)
    return _from_onnx(source, options) if source.is_onnx else _from_source(source, options)


def _from_onnx(source: Source, options: ExportOptions) -> _Original:
    path = Path(source.name)
    read_sidecar(path)
    model = model_from_file(path, options.opset, options.input_size)
    preprocess = _as_asked(read_preprocess(net_from_model(model)), options)
    return _Original(path.stem, source.name, model, preprocess, None, _parents(source))


def _from_source(source: Source, options: ExportOptions) -> _Original:
    module = module_from_source(_with_channels(source, options))
    preprocess = _as_asked(implied_preprocess(source, options.input_size), options)
    model = onnx_from_module(module, preprocess, ExportSettings(options.opset))
    name = source.name.rpartition(":")[2]
    return _Original(name, source.name, model, preprocess, module, _parents(source))


def _from_module(module: nn.Module, options: ExportOptions) -> _Original:
    if options.input_size is None:
        raise ConfigError(
            f"{option('input_size')}: got None, expected (C, H, W), the size of the images that "
            f"{type(module).__name__} takes"
        )
    copied = deployable_copy(module)
    preprocess = _as_asked(Preprocess.plain(*options.input_size), options)
    model = onnx_from_module(copied, preprocess, ExportSettings(options.opset))
    kind = type(copied)
    where = f"{kind.__module__}.{kind.__qualname__}"
    parents = {f"{kind.__name__} state_dict": state_sha256(copied)}
    return _Original(kind.__name__, where, model, preprocess, copied, parents)


def _fused(original: _Original, options: ExportOptions, name: str, started: float) -> Exported:
    if (doubt := original.preprocess.doubt) is not None:
        _LOG.warning("%s: images are divided by 255 first; divide mean and std too", doubt)
    net, merged = fuse(original.model, original.preprocess)
    proto, sha256 = finished_model(net)
    blocks = block_outputs(net, original.model, merged.changed)
    proof = prove(
        original.model,
        proto,
        blocks,
        original.preprocess,
        tolerance=options.tolerance,
        module=original.module,
    )
    report = ExportReport(
        path=None,
        sha256=sha256,
        proof=proof,
        skipped=merged.skipped,
        num_parameters=_num_parameters(proto),
        seconds=time.perf_counter() - started,
    )
    origin = Origin(
        artifact="float-onnx",
        parents=original.parents,
        options={"source": original.asked_for, **json_from_options(options)},
        details={"proof": asdict(proof), "skipped": [asdict(skip) for skip in merged.skipped]},
    )
    return Exported(name=name, proto=proto, sha256=sha256, origin=origin, report=report)


def _with_channels(source: Source, options: ExportOptions) -> Source:
    """Let the input size say how many channels a net of the zoo or of timm reads."""
    is_set = source.architecture.in_channels is not None
    if source.is_factory or options.input_size is None or is_set:
        return source
    architecture = replace(source.architecture, in_channels=options.input_size[0])
    return replace(source, architecture=architecture)


def _as_asked(base: Preprocess, options: ExportOptions) -> Preprocess:
    """Return the preprocessing that the source implies, overridden by the given options."""
    asked = {"mean": options.mean, "std": options.std, "resize": options.resize}
    changes: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    return replace(base, **changes)


def _parents(source: Source) -> dict[str, str]:
    return {path.name: sha256_of(path) for path in source.files}


def _num_parameters(model: onnx.ModelProto) -> int:
    """Return how many values the arrays of a model hold; scalars are bounds and the like."""
    values = [onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer]
    return int(sum(value.size for value in values if value.ndim))
