"""Where accuracy goes: every form of a net between its checkpoint and its engine, rung by rung.

    train-form       torch                     the checkpoint as it was trained
    fused            torch graph, onnxruntime  the float ONNX file, in two executors
    equalized        onnxruntime               each rewrite, as far as the options ask for it
    identity         onnxruntime               ... splits
    coarse-fine      onnxruntime               ... splits
    INT8 weights     torch graph               codes in the weights, float activations
    INT8             torch graph, onnxruntime  the Q/DQ file, simulated and run; where it was
                                               learned, the nearest codes come before
    engine           tensorrt                  where there is a GPU

All rungs see the same images. Each is compared with the first (what all steps have cost so far) and
with the rung before it (what this step alone costs). Outputs of three rungs are kept at a time.
"""

import logging
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import onnx
import torch
from torch import nn

from reptrt.core.artifacts import read_sidecar, write_json
from reptrt.core.errors import ArtifactError, ConfigError, EngineError
from reptrt.core.options_json import options_from_json
from reptrt.data.dataset import Dataset, Images, open_dataset
from reptrt.execute.runner import OrtRunner, Runner, open_runner
from reptrt.execute.torch_runner import float_activations, graph_runner, int8_runner, module_runner
from reptrt.exporter.from_file import model_from_file
from reptrt.graph.model import Model, Network
from reptrt.graph.net import Net, bytes_from_model, model_from_net
from reptrt.graph.preprocess import Preprocess, read_preprocess
from reptrt.judge.rungs import Ladder, Step, measure
from reptrt.judge.tasks import open_task
from reptrt.pipeline import (
    Calibrated,
    CalibrateOptions,
    calibrate_net,
    calibration_images,
    export_net,
    prepare,
    split_layers,
    torch_device,
    with_float_layers,
)
from reptrt.runs.inputs import check_data, check_source, source_files
from reptrt.runs.manifest import FILE, LADDER_FILE, Manifest, check_made, read_finished
from reptrt.runs.options import RunOptions
from reptrt.runs.run import ENGINE_FILE, FLOAT_FILE, INT8_FILE
from reptrt.sources.module import deployable_copy
from reptrt.sources.source import Source, module_from_source
from reptrt.trt import driver
from reptrt.trt.build import build_engine

_LOG = logging.getLogger(__name__)

_JUDGED = ("export", "calibrate", "build-engine")  # stages whose files are rungs


class Forms(NamedTuple):
    """What the stages made of a source: files, or models in memory."""

    fused: Network
    int8: Network
    engine: Path | None = None  # None: built for the last rung where it can run


def ladder(
    source: Source | nn.Module, data: Images, calib_data: Images, options: RunOptions
) -> Ladder:
    """Export and calibrate a source, and judge every rung on the same images.

    Args:
        source: the net. An ONNX file is its own first rung.
        data: images to judge on, with labels where top-1 is wanted.
        calib_data: calibration images.
        options: of the stages; ``eval_limit`` and ``threads`` hold for every rung.

    Raises:
        ReptrtError: a stage failed, or a rung other than the engine cannot be run.
    """
    fused = export_net(source, options.export)
    dataset = calibration_images(fused, calib_data, options.calibrate)
    int8 = calibrate_net(fused, dataset, options.calibrate)
    return climb(source, Forms(fused, int8), data, calib_data, options)


def ladder_of_run(folder: Path, data: Path | None = None, limit: int | None = None) -> Ladder:
    """Judge every rung of a finished run, with its options and the files that it made.

    On the run's own images the result is kept in the folder as ``ladder.json``, for the report.

    Args:
        folder: of the run.
        data: images to judge on; None: those of the run.
        limit: a sample of so many images; None: as in the run.

    Raises:
        ArtifactError: there is no finished run, or its inputs or files have changed.
        ReptrtError: a rung other than the engine cannot be run.
    """
    manifest = read_finished(folder)
    where = str(folder / FILE)
    options = options_from_json(RunOptions, manifest.options, f"{where}: options")
    source = options_from_json(Source, manifest.source, f"{where}: source")
    check_source(manifest.source_files, source_files(source))
    check_data("calib_data", manifest.data, manifest.data.path)
    check_made(folder, manifest)
    if data is None:
        data = manifest.eval_data.path
        check_data("data", manifest.eval_data, data)
        if manifest.annotations is not None:
            check_data("annotations", manifest.annotations, manifest.annotations.path)
    engine = folder / ENGINE_FILE if "build-engine" in manifest.stages else None
    forms = Forms(folder / FLOAT_FILE, folder / INT8_FILE, engine)
    if limit is not None:
        options = replace(options, eval_limit=limit)
    measured = climb(source, forms, data, manifest.data.path, options)
    if data == manifest.eval_data.path:
        _keep(folder, manifest, measured)
    return measured


def _keep(folder: Path, manifest: Manifest, measured: Ladder) -> None:
    """Write the ladder of a run for its report, with the hashes of the files that it compares."""
    files = {r.file: r.sha256 for name, r in manifest.stages.items() if name in _JUDGED}
    content = {"files": files, "data": manifest.eval_data.sha256, **measured.to_dict()}
    try:
        write_json(folder / LADDER_FILE, content)
    except ArtifactError as err:
        _LOG.warning("the report of this run will have no ladder: %s", err)


def climb(
    source: Source | nn.Module,
    forms: Forms,
    data: Images,
    calib_data: Images,
    options: RunOptions,
) -> Ladder:
    """Judge every rung between a source and the forms that the stages made of it.

    Args:
        source: the net, as it came.
        forms: what was made of it.
        data: images to judge on.
        calib_data: calibration images.
        options: that it was made with.

    Raises:
        ReptrtError: a rung other than the engine cannot be run.
    """
    fused = _read(forms.fused)
    dataset = open_dataset(data, read_preprocess(fused.to_net()), limit=options.eval_limit)
    task = open_task(options, data)
    return measure(_steps(source, fused, forms, calib_data, options), dataset, task)


def _read(network: Network) -> Model:
    return Model.read(network) if isinstance(network, Path) else network


def _steps(
    source: Source | nn.Module,
    fused: Model,
    forms: Forms,
    calib_data: Images,
    options: RunOptions,
) -> Iterator[Step]:
    """Yield the rungs in order; each net is made when its turn comes."""
    options = replace(options, calibrate=_with_names(options.calibrate, forms.int8))
    device = torch_device(options.calibrate.device)
    net = fused.to_net()
    yield _first(source, read_preprocess(net), options, device)
    yield Step("fused", "torch graph", lambda: graph_runner(net, device))
    yield Step("fused", "onnxruntime", lambda: _open(fused, options))
    dataset = calibration_images(fused, calib_data, options.calibrate)
    for name, rewritten in _rewritten(net, dataset, options.calibrate):
        yield _in_onnxruntime(name, model_from_net(rewritten), options)
    yield from _quantized(fused, _read(forms.int8), dataset, options)
    yield Step("engine", "tensorrt", lambda: _open_engine(forms, options), may_fail=True)


def _with_names(options: CalibrateOptions, int8: Network) -> CalibrateOptions:
    """Return options that name the layers which ``auto:N`` left in float in an INT8 model."""
    if options.most_float_layers is None:
        return options
    if isinstance(int8, Calibrated):
        choice = int8.report.in_float
        return with_float_layers(options, () if choice is None else choice.kept)
    sidecar = read_sidecar(int8) if isinstance(int8, Path) else None
    decisions = (sidecar.details if sidecar else {}).get("in_float", {}).get("decisions", ())
    return with_float_layers(options, [d["layer"] for d in decisions if d["kept"]])


def _quantized(fused: Model, int8: Model, dataset: Dataset, options: RunOptions) -> Iterator[Step]:
    """Yield the INT8 model; where it was learned, its codes and scales before that too."""
    device, calibrating = torch_device(options.calibrate.device), options.calibrate
    bits = calibrating.weight_bits, calibrating.activation_bits
    label = "INT8" if bits == (8, 8) else f"W{bits[0]}A{bits[1]}"
    start, end = int8, ""
    learns = calibrating.learning is not None
    if learns:
        before = calibrating.without_learning
        start, end = calibrate_net(fused, dataset, before), f", {before.rounding}"
    net = start.to_net()
    skipped = float_activations(net)
    yield Step(f"{label} weights{end}", "torch graph", lambda: graph_runner(net, device, skipped))
    yield Step(f"{label}{end}", "torch graph", lambda: int8_runner(start.proto, device))
    if learns:
        end = ", learned"
        yield Step(f"{label}{end}", "torch graph", lambda: int8_runner(int8.proto, device))
    yield Step(f"{label}{end}", "onnxruntime", lambda: _open(int8, options))


def _first(
    source: Source | nn.Module, preprocess: Preprocess, options: RunOptions, device: torch.device
) -> Step:
    """Return the rung that everything is compared with: the source as it is."""
    if isinstance(source, nn.Module):
        copied = deployable_copy(source)
        return Step("train-form", "torch", lambda: module_runner(copied, device))
    if source.is_onnx:
        exporting = options.export
        model = model_from_file(Path(source.name), exporting.opset, exporting.input_size)
        return _in_onnxruntime("source", model, options)
    if not source.is_factory and source.architecture.in_channels is None:
        architecture = replace(source.architecture, in_channels=preprocess.channels)
        source = replace(source, architecture=architecture)
    module = module_from_source(source)
    if source.is_factory and source.weights is None:
        _check_repeatable(source, module)
    return Step("train-form", "torch", lambda: module_runner(module, device))


def _check_repeatable(source: Source, module: nn.Module) -> None:
    """Refuse a factory that makes another net at each call: there is nothing to compare with."""
    again = module_from_source(source).state_dict()
    for name, value in module.state_dict().items():
        if not torch.equal(value, again[name]):
            raise ConfigError(
                f"{source.name}: the factory makes other weights at each call (first {name}), so "
                "what was exported is not what it returns now; save them and give --weights, or "
                "let it load or seed them"
            )


def _rewritten(
    fused: Net, dataset: Dataset, options: CalibrateOptions
) -> Iterator[tuple[str, Net]]:
    """Yield the float net after each rewrite that the options ask for, with a name for it."""
    parts = options.parts
    if not parts.equalize and parts.split == "none":
        return
    whole, net = fused.copy(), fused.copy()
    prepared = prepare(whole, dataset, options)
    if parts.equalize:
        prepare(net, dataset, replace(options, split="none"))
        yield f"equalized ({_count(prepared.equalized, 'tensor')})", net
    forms = {split.layer: split.form for split in prepared.splits}
    coarse = [layer for layer, form in forms.items() if form == "coarse-fine"]
    identity = {layer: form for layer, form in forms.items() if form != "coarse-fine"}
    if identity and coarse:
        net = net.copy()
        split_layers(net, identity, options)
    if identity:
        yield f"identity split ({_count(len(identity), 'layer')})", net if coarse else whole
    if coarse:
        yield f"coarse-fine split ({_count(len(coarse), 'layer')})", whole


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _in_onnxruntime(name: str, model: onnx.ModelProto, options: RunOptions) -> Step:
    content = bytes_from_model(model)
    return Step(name, "onnxruntime", lambda: OrtRunner(content, threads=options.threads))


def _open(model: Model, options: RunOptions) -> Runner:
    return open_runner(model, threads=options.threads)


def _open_engine(forms: Forms, options: RunOptions) -> Runner:
    """Open the engine, built first if there is none.

    Raises:
        EngineError: there is no GPU, or TensorRT refuses.
        MissingDependencyError: TensorRT or pycuda is not installed.
    """
    gpu = driver.find_gpu()
    if isinstance(gpu, str):
        raise EngineError(gpu)
    if forms.engine is not None:
        return open_runner(forms.engine)
    with tempfile.TemporaryDirectory() as folder:  # an engine is read into memory when it is opened
        engine = Path(folder) / ENGINE_FILE
        build_engine(forms.int8, engine, options.build)
        return open_runner(engine)
