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
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import onnx
import torch
from torch import nn

from reptrt.core.artifacts import write_json
from reptrt.core.errors import ArtifactError, ConfigError, EngineError
from reptrt.core.options_json import options_from_json
from reptrt.data.dataset import open_dataset
from reptrt.execute.runner import OrtRunner, Runner, open_runner
from reptrt.execute.torch_runner import float_activations, graph_runner, int8_runner, module_runner
from reptrt.exporter.export import model_from_file
from reptrt.graph.net import Net, bytes_from_model, model_from_net, net_from_model, read_model
from reptrt.graph.preprocess import Preprocess, read_preprocess
from reptrt.judge.rungs import Ladder, Step, measure
from reptrt.pipeline import CalibrateOptions, calibrate, export, prepare, split_layers, torch_device
from reptrt.runs.inputs import check_data, check_source, source_files
from reptrt.runs.manifest import FILE, LADDER_FILE, Manifest, check_made, read_finished
from reptrt.runs.options import RunOptions
from reptrt.runs.run import ENGINE_FILE, FLOAT_FILE, INT8_FILE
from reptrt.sources.source import Source, module_from_source
from reptrt.trt import driver
from reptrt.trt.build import build_engine

_LOG = logging.getLogger(__name__)

_JUDGED = ("export", "calibrate", "build-engine")  # stages whose files are rungs
_NEAREST: Mapping[str, Any] = {  # options of calibrate that learn nothing
    "recipe": "fast",
    "rounding": "nearest",
    "qprep": False,
    "keep_affine": False,
}


class Files(NamedTuple):
    """What the stages made of a source."""

    float_onnx: Path
    int8_onnx: Path
    engine: Path | None = None  # None: built for the last rung where it can run


def ladder(source: Source, data: Path, calib_data: Path, options: RunOptions) -> Ladder:
    """Export and calibrate a source, and judge every rung on the same images.

    Args:
        source: the net. An ONNX file is its own first rung.
        data: images to judge on, with labels where top-1 is wanted.
        calib_data: calibration images.
        options: of the stages; ``eval_limit`` and ``threads`` hold for every rung.

    Raises:
        ReptrtError: a stage failed, or a rung other than the engine cannot be run.
    """
    with tempfile.TemporaryDirectory() as folder:
        files = Files(Path(folder) / FLOAT_FILE, Path(folder) / INT8_FILE)
        export(source, files.float_onnx, options.export)
        calibrate(files.float_onnx, calib_data, files.int8_onnx, options.calibrate)
        return climb(source, files, data, calib_data, options)


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
    found = read_finished(folder)
    where = str(folder / FILE)
    options = options_from_json(RunOptions, found.options, f"{where}: options")
    source = options_from_json(Source, found.source, f"{where}: source")
    check_source(found.source_files, source_files(source))
    check_data("--calib-data", found.data, found.data.path)
    check_made(folder, found)
    if data is None:
        data = found.eval_data.path
        check_data("--data", found.eval_data, data)
    engine = folder / ENGINE_FILE if "build-engine" in found.stages else None
    files = Files(folder / FLOAT_FILE, folder / INT8_FILE, engine)
    if limit is not None:
        options = replace(options, eval_limit=limit)
    measured = climb(source, files, data, found.data.path, options)
    if data == found.eval_data.path:
        _keep(folder, found, measured)
    return measured


def _keep(folder: Path, found: Manifest, measured: Ladder) -> None:
    """Write the ladder of a run, with what it is about, for the run's report."""
    files = {r.file: r.sha256 for name, r in found.stages.items() if name in _JUDGED}
    content = {"files": files, "data": found.eval_data.sha256, **measured.to_dict()}
    try:
        write_json(folder / LADDER_FILE, content)
    except ArtifactError as err:
        _LOG.warning("the report of this run will have no ladder: %s", err)


def climb(
    source: Source, files: Files, data: Path, calib_data: Path, options: RunOptions
) -> Ladder:
    """Judge every rung between a source and the files that were made of it."""
    preprocess = read_preprocess(net_from_model(read_model(files.float_onnx)))
    dataset = open_dataset(data, preprocess, limit=options.eval_limit)
    with tempfile.TemporaryDirectory() as folder:
        steps = _steps(source, files, calib_data, options, Path(folder))
        return measure(steps, dataset)


def _steps(
    source: Source, files: Files, calib_data: Path, options: RunOptions, folder: Path
) -> Iterator[Step]:
    """Yield the rungs in order; each net is made when its turn comes."""
    device = torch_device(options.calibrate.device)
    fp = net_from_model(read_model(files.float_onnx))
    yield _first(source, read_preprocess(fp), options, device)
    yield Step("fused", "torch graph", lambda: graph_runner(fp, device))
    yield Step("fused", "onnxruntime", lambda: _open(files.float_onnx, options))
    for name, net in _rewritten(fp, calib_data, options.calibrate):
        yield _in_onnxruntime(name, model_from_net(net), options)
    yield from _quantized(files, calib_data, options, folder)
    yield Step("engine", "tensorrt", lambda: _open_engine(files, options, folder), may_fail=True)


def _quantized(files: Files, calib_data: Path, options: RunOptions, folder: Path) -> Iterator[Step]:
    """Yield the INT8 file; where it was learned, its nearest codes and scales before that."""
    device, calibrating = torch_device(options.calibrate.device), options.calibrate
    bits = calibrating.weight_bits, calibrating.activation_bits
    label = "INT8" if bits == (8, 8) else f"W{bits[0]}A{bits[1]}"
    nearest, end = files.int8_onnx, ""
    learns = calibrating.learning is not None
    if learns:
        nearest, end = folder / "nearest.onnx", ", nearest"
        calibrate(files.float_onnx, calib_data, nearest, replace(calibrating, **_NEAREST))
    model = read_model(nearest)
    net = net_from_model(model)
    skipped = float_activations(net)
    yield Step(f"{label} weights{end}", "torch graph", lambda: graph_runner(net, device, skipped))
    yield Step(f"{label}{end}", "torch graph", lambda: int8_runner(model, device))
    if learns:
        learned, end = read_model(files.int8_onnx), ", learned"
        yield Step(f"{label}{end}", "torch graph", lambda: int8_runner(learned, device))
    yield Step(f"{label}{end}", "onnxruntime", lambda: _open(files.int8_onnx, options))


def _first(
    source: Source, preprocess: Preprocess, options: RunOptions, device: torch.device
) -> Step:
    """Return the rung that everything is compared with: the source as it is."""
    if source.is_onnx:
        wanted = options.export
        model = model_from_file(Path(source.name), wanted.opset, wanted.input_size)
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
    fused: Net, calib_data: Path, options: CalibrateOptions
) -> Iterator[tuple[str, Net]]:
    """Yield the float net after each rewrite that the options ask for, with a name for it."""
    if not options.equalize and options.split == "none":
        return
    dataset = open_dataset(
        calib_data, read_preprocess(fused), limit=options.images, seed=options.seed
    )
    whole, net = fused.copy(), fused.copy()
    prepared = prepare(whole, dataset, options)
    if options.equalize:
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


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _in_onnxruntime(name: str, model: onnx.ModelProto, options: RunOptions) -> Step:
    content = bytes_from_model(model)
    return Step(name, "onnxruntime", lambda: OrtRunner(content, threads=options.threads))


def _open(path: Path, options: RunOptions) -> Runner:
    return open_runner(path, threads=options.threads)


def _open_engine(files: Files, options: RunOptions, folder: Path) -> Runner:
    """Open the engine, built first if there is none.

    Raises:
        EngineError: there is no GPU, or TensorRT refuses.
        MissingDependencyError: TensorRT or pycuda is not installed.
    """
    gpu = driver.find_gpu()
    if isinstance(gpu, str):
        raise EngineError(gpu)
    engine = files.engine
    if engine is None:
        engine = folder / ENGINE_FILE
        build_engine(files.int8_onnx, engine, options.build)
    return open_runner(engine)
