"""The Python API: one function per command. Only here and in the command line do stages meet.

export -> calibrate -> build_engine -> evaluate, bench; run does it all
"""

import logging
import time
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import onnx
import torch

from reptrt.affine import Grid, scale_from_amax
from reptrt.artifacts import (
    read_sidecar,
    refuse_overwriting,
    require_folder,
    sha256_of,
    write_artifact,
)
from reptrt.calib.channels import ChannelStats, collect_channels
from reptrt.calib.collect import collect, merge_groups
from reptrt.calib.histogram import Histogram
from reptrt.calib.thresholds import ThresholdOptions, amax_from_histogram
from reptrt.choices import HighPrecision, Recipe, Resize, SplitMode, SplitPrecision
from reptrt.choose import Decision, Form, choose_splits, num_macs
from reptrt.data import Dataset, open_dataset
from reptrt.errors import ConfigError
from reptrt.export import (
    ExportSettings,
    Proof,
    block_outputs,
    fuse,
    model_from_file,
    onnx_from_module,
    prove,
)
from reptrt.graph import (
    Net,
    bytes_from_model,
    model_from_net,
    net_from_model,
    read_model,
    refuse_not_finite,
    weighted_nodes,
)
from reptrt.placement import Placement, place
from reptrt.preprocess import Preprocess, read_preprocess
from reptrt.qdq import insert_qdq, quantize_weights
from reptrt.rewrite.contract import Skipped
from reptrt.rewrite.equalize import equalize, find_links
from reptrt.rewrite.split_coarse_fine import split_coarse_fine
from reptrt.rewrite.split_identity import split_identity
from reptrt.rewrite.to_fp16 import to_fp16
from reptrt.sources import Source, module_from_source
from reptrt.splits import Split, read_splits
from reptrt.torchgraph import TorchGraph

_LOG = logging.getLogger(__name__)

_IMAGENET_SIZE = (3, 224, 224)
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True, slots=True)
class ExportOptions:
    """Options of `export`; None means what the source implies."""

    input_size: tuple[int, int, int] | None = None  # C, H, W
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    resize: Resize | None = None
    opset: int = 19
    tolerance: float = 1e-4  # of the largest value, per block and overall


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What `export` wrote and proved."""

    path: Path
    sha256: str
    proof: Proof
    skipped: tuple[Skipped, ...]  # sums that look like rep blocks and were left alone
    num_parameters: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
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
        options={"source": source.name, **plain_options(options)},
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


@dataclass(frozen=True, slots=True)
class CalibrateOptions:
    """Options of `calibrate`."""

    images: int = 512
    recipe: Recipe = "fast"
    threshold: ThresholdOptions = field(default_factory=ThresholdOptions)
    equalize: bool = True
    split: SplitMode = "auto"
    split_precision: SplitPrecision = "float"
    max_overhead: float = 0.10  # extra multiply-accumulates that auto may spend, of the net's own
    weight_bits: int = 8
    activation_bits: int = 8
    exclude: tuple[str, ...] = ()  # regular expressions over layer names
    high_precision: HighPrecision = "fp32"  # of what is not INT8; fp16 for engines
    device: str = "cpu"
    seed: int = 0  # of the sample of images

    def __post_init__(self) -> None:
        for name, bits in (("weight", self.weight_bits), ("activation", self.activation_bits)):
            if not 2 <= bits <= 8:
                raise ConfigError(f"--{name}-bits: got {bits}, expected 2..8 (simulated in INT8)")
        if self.equalize and self.split_precision == "int8" and self.split != "none":
            raise ConfigError(
                "--split-precision int8: the summands lie before the ReLU, where equalized "
                "channels have no common range; give --no-equalize too, or --split-precision float"
            )
        if not self.max_overhead >= 0:
            raise ConfigError(f"--max-overhead: got {self.max_overhead}, expected 0 or more")

    @property
    def grids(self) -> tuple[Grid, Grid]:
        """The codes of activations and of weights."""
        return Grid.activation(self.activation_bits), Grid.weight(self.weight_bits)

    @property
    def simulation(self) -> str | None:
        """Why the result is a simulation that no engine can run; None if it is not."""
        if self.weight_bits == self.activation_bits == 8:
            return None
        return f"{self.weight_bits}-bit weights, {self.activation_bits}-bit activations inside INT8"


@dataclass(frozen=True, slots=True)
class TensorScale:
    """What calibration found for one activation."""

    tensor: str
    maximum: float  # largest |x| seen
    amax: float  # largest |x| kept
    scale: float
    zeros: float  # fraction of exact zeros


@dataclass(frozen=True, slots=True)
class CalibrateReport:
    """What `calibrate` wrote."""

    path: Path
    sha256: str
    images: int
    layers: int
    tensors: tuple[TensorScale, ...]
    equalized: int  # tensors whose channels were given equal ranges
    splits: tuple[Split, ...]
    decisions: tuple[Decision, ...]  # of --split auto
    overhead: float  # extra multiply-accumulates of the splits that auto chose, of the net's own
    simulation: str | None
    seconds: Mapping[str, float]  # per stage

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return asdict(self) | {"path": str(self.path), "seconds": dict(self.seconds)}


def calibrate(model: Path, data: Path, output: Path, options: CalibrateOptions) -> CalibrateReport:
    """Quantize a float ONNX file to INT8 with scales found on images; write the Q/DQ ONNX file.

    Raises:
        ReptrtError: the model or the images cannot be used; nothing is written.
    """
    require_folder(output)
    refuse_overwriting(output, [model])
    read_sidecar(model)
    clock = _Clock()
    net = net_from_model(read_model(model))
    refuse_not_finite(net)
    excluded = place(net, options.exclude).excluded
    dataset = open_dataset(data, read_preprocess(net), limit=options.images, seed=options.seed)
    clock.lap("load")
    prepared = prepare(net, dataset, options, excluded)
    clock.lap("prepare")
    placement = place(net, options.exclude)
    histograms = _collect(net, placement, dataset, options.device)
    clock.lap("collect")
    grid, weight_grid = options.grids
    tensors = _tensor_scales(placement, histograms, options.threshold, grid)
    clock.lap("thresholds")
    weights = quantize_weights(net, placement, weight_grid)
    insert_qdq(net, placement, {t.tensor: t.scale for t in tensors}, weights, grid)
    left_fp32 = to_fp16(net).skipped if options.high_precision == "fp16" else ()
    for skip in left_fp32:
        _LOG.warning("%s stays in FP32: %s", skip.node, skip.reason)
    if options.simulation is not None:
        net.metadata["reptrt.simulation"] = options.simulation
    content = bytes_from_model(model_from_net(net))
    sidecar = write_artifact(
        output,
        content,
        artifact="int8-onnx",
        parents={model.name: sha256_of(model), str(data.name): dataset.digest()},
        options=plain_options(options),
        details={
            "splits": [asdict(split) for split in prepared.splits],
            "left_fp32": [asdict(skip) for skip in left_fp32],
            **({"simulation": options.simulation} if options.simulation else {}),
        },
    )
    clock.lap("write")
    return CalibrateReport(
        path=output,
        sha256=sidecar.sha256,
        images=dataset.length,
        layers=len(placement.weights),
        tensors=tensors,
        equalized=prepared.equalized,
        splits=prepared.splits,
        decisions=prepared.decisions,
        overhead=prepared.overhead,
        simulation=options.simulation,
        seconds=clock.laps,
    )


@dataclass(frozen=True, slots=True)
class Prepared:
    """What was done to a float graph before it was quantized."""

    equalized: int
    splits: tuple[Split, ...]
    decisions: tuple[Decision, ...]
    overhead: float


def prepare(
    net: Net, dataset: Dataset, options: CalibrateOptions, excluded: Collection[str] = ()
) -> Prepared:
    """Equalize and split a float net in place, as the options say; its output stays the same."""
    layers = {
        node.name: node.inputs[0].name
        for node in weighted_nodes(net.graph)
        if node.name not in excluded
    }
    stats: dict[str, ChannelStats] = {}
    if options.equalize or options.split == "auto":
        linked = [link.tensor.name for link in find_links(net)[0]]
        wanted = sorted({*layers.values(), *linked})
        with torch.inference_mode():
            graph = TorchGraph(net, torch_device(options.device))
            stats = collect_channels(graph, dataset, wanted)
    inputs = {layer: stats[name] for layer, name in layers.items() if name in stats}
    equalized = 0
    if options.equalize:
        report, grown = equalize(net, {name: found.maximum for name, found in stats.items()})
        equalized = len(report.changed)
        inputs = {
            layer: found.scaled(grown[layer]) if layer in grown else found
            for layer, found in inputs.items()
        }
    decisions: tuple[Decision, ...] = ()
    chosen: dict[str, Form] = {}
    if options.split == "auto":
        decisions = choose_splits(net, inputs, options.grids, options.max_overhead)
        chosen = {decision.layer: decision.form for decision in decisions}
    elif options.split != "none":
        chosen = dict.fromkeys(layers, options.split)
    total = num_macs(net)
    _split(net, chosen, options)
    extra = sum(decision.option(decision.form).extra_macs for decision in decisions)
    return Prepared(equalized, read_splits(net), decisions, extra / total if total else 0.0)


def _split(net: Net, chosen: Mapping[str, Form], options: CalibrateOptions) -> None:
    layers = {
        form: [layer for layer, wanted in chosen.items() if wanted == form]
        for form in ("identity", "coarse-fine")
    }
    grid, precision = options.grids[1], options.split_precision
    split_identity(net, layers["identity"], grid=grid, precision=precision)
    split_coarse_fine(net, layers["coarse-fine"], grid=grid, precision=precision)


def _collect(net: Net, placement: Placement, dataset: Dataset, device: str) -> dict[str, Histogram]:
    with torch.inference_mode():
        graph = TorchGraph(net, torch_device(device))
        return collect(graph, dataset, [a.tensor for a in placement.activations])


def _tensor_scales(
    placement: Placement,
    histograms: dict[str, Histogram],
    threshold: ThresholdOptions,
    grid: Grid,
) -> tuple[TensorScale, ...]:
    groups = merge_groups(placement.activations, histograms)
    amax = {key: amax_from_histogram(h, threshold, grid) for key, h in groups.items()}
    found = []
    for activation in placement.activations:
        histogram = histograms[activation.tensor]
        total = int(histogram.counts.sum()) + histogram.zeros
        kept = amax[activation.group]
        found.append(
            TensorScale(
                tensor=activation.tensor,
                maximum=histogram.maximum,
                amax=kept,
                scale=float(scale_from_amax(kept, grid)),
                zeros=histogram.zeros / total,
            )
        )
    return tuple(found)


def torch_device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "--device cuda: torch finds no CUDA device; use --device cpu, or install a CUDA build "
            "of torch and a driver"
        )
    return torch.device(name)


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
    sizes = [onnx.numpy_helper.to_array(tensor).size for tensor in model.graph.initializer]
    return int(sum(sizes))


def plain_options(options: Any) -> dict[str, Any]:
    """Return an options dataclass as JSON values."""
    return {
        name: str(value) if isinstance(value, Path) else value
        for name, value in asdict(options).items()
    }


class _Clock:
    """Seconds per stage."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] = now - self._last
        self._last = now


__all__ = [
    "CalibrateOptions",
    "CalibrateReport",
    "ExportOptions",
    "ExportReport",
    "Source",
    "calibrate",
    "export",
    "plain_options",
]
