"""Find out why a net loses accuracy: which branch sets each weight range, what quantization costs.

    float.onnx --calibrate without preparation-> corners: weights, activations, both
               --calibrate with the options----> corner: the method
               --prepare, halves---------------> noise of each layer, before and after preparation

Everything is measured on the calibration images.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from reptrt.core.artifacts import read_sidecar
from reptrt.core.errors import ConfigError, option
from reptrt.core.options_json import json_from_options
from reptrt.data.dataset import Dataset, Images
from reptrt.execute.torchgraph import TorchGraph
from reptrt.graph.model import Model, label_of
from reptrt.graph.net import Net, constant_value, weighted_nodes
from reptrt.graph.placement import Placement, exactly, place
from reptrt.graph.probes import probes_of
from reptrt.graph.provenance import read_provenance
from reptrt.graph.splits import read_splits
from reptrt.judge.diagnose.measure import (
    Halves,
    Powers,
    closeness,
    halves_of,
    layer_powers,
    noise_db,
)
from reptrt.judge.diagnose.parts import WeightRange, bits_left, range_of_branches, range_of_kernel
from reptrt.judge.diagnose.report import Corner, Diagnosis, LayerDiagnosis, Noise
from reptrt.pipeline import (
    PLAIN_INT8,
    Calibrated,
    CalibrateOptions,
    CalibrateReport,
    calibrate_net,
    calibration_images,
    float_model,
    prepare,
    torch_device,
    with_float_layers,
)

_RESOURCES = ("device", "memory_budget")


def diagnose(
    model: Path | Model,
    images: Images,
    options: CalibrateOptions,
    calibrated: Calibrated | CalibrateReport | None = None,
    *,
    layer_images: int = 128,
) -> Diagnosis:
    """Measure on the calibration images where a float model loses accuracy, and what helps.

    Args:
        model: the fused float model, or its file.
        images: the calibration images.
        options: the options of calibration; the plain INT8 net that the method is compared with has
            the same bits and threshold rule, but no preparation.
        calibrated: the result of calibration with the same arguments, or its report with the path
            of the INT8 file; None: the net is calibrated here.
        layer_images: the number of images on which the layers are measured.

    Raises:
        ConfigError: ``calibrated`` was made from another model, other images or other options.
        ReptrtError: the model or the images cannot be used.
    """
    if layer_images < 1:
        raise ConfigError(f"{option('layer_images')}: got {layer_images}, expected at least 1")
    started = time.perf_counter()
    source = float_model(model)
    dataset = calibration_images(source, images, options)
    if calibrated is not None:
        _check_origin(calibrated, source, dataset, options)
    report, int8 = _report_and_model(calibrated or calibrate_net(source, dataset, options))
    if report.in_float is not None:
        options = with_float_layers(options, report.in_float.kept)
    plain = calibrate_net(source, dataset, _plain(options))
    few = calibration_images(source, images, options, min(layer_images, options.images))
    net, device = source.to_net(), torch_device(options.device)
    with torch.inference_mode():
        graphs = [TorchGraph(made.to_net(), device) for made in (plain, int8)]
        placement = place(net, options.exclude, options.float_nodes, plain.report.dead)
        halves = _halves(net, placement, plain.report, options)
        corners = _corners(halves, graphs, dataset, options)
        noise = noise_db(halves.exact, few)
        layers = [weight.node for weight in placement.weights]
        before = layer_powers(halves, probes_of(net, layers), few, "layers")
        prepared = net.copy()
        placement = prepare(prepared, dataset, options).placement
        if report.dead:
            in_float = (exactly(placement.excluded), exactly(placement.float_nodes))
            placement = place(prepared, *in_float, report.dead)
        halves = _halves(prepared, placement, report, options)
        after = layer_powers(halves, probes_of(prepared, layers), few, "prepared")
    return Diagnosis(
        images=dataset.length,
        layer_images=few.length,
        weight_bits=options.weight_bits,
        activation_bits=options.activation_bits,
        equalized=report.equalized,
        corners=corners,
        layers=_layers((net, prepared), (before, after), options),
        seconds=time.perf_counter() - started,
        noise_db=noise,
    )


def _check_origin(
    calibrated: Calibrated | CalibrateReport,
    model: Model,
    dataset: Dataset,
    options: CalibrateOptions,
) -> None:
    """Refuse an INT8 model that calibration with the given arguments would not return."""
    origin = _origin_of(calibrated)
    if origin is None:
        return
    parents = set(origin[0].values())
    asked, used = _effective(json_from_options(options)), _effective(origin[1])
    changed = sorted(
        name for name in asked.keys() | used.keys() if asked.get(name) != used.get(name)
    )
    if model.sha256 not in parents:
        reason = f"from another model than {label_of(model)}"
    elif dataset.digest() not in parents:
        reason = f"on other images than the {dataset.length} given"
    elif changed:
        reason = f"with other options ({', '.join(map(option, changed))})"
    else:
        return
    raise ConfigError(
        f"{option('calibrated')}: was calibrated {reason}; pass what calibrate returned for the "
        "same arguments, or nothing"
    )


def _origin_of(
    calibrated: Calibrated | CalibrateReport,
) -> tuple[Mapping[str, str], Mapping[str, Any]] | None:
    """Return the parents and options of a calibration; None for a file without a sidecar."""
    if isinstance(calibrated, Calibrated):
        return calibrated.origin.parents, calibrated.origin.options
    sidecar = None if calibrated.path is None else read_sidecar(calibrated.path)
    return None if sidecar is None else (sidecar.parents, sidecar.options)


def _effective(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that decide the result, not where and in how much memory it is made."""
    return {name: value for name, value in options.items() if name not in _RESOURCES}


def _report_and_model(calibrated: Calibrated | CalibrateReport) -> tuple[CalibrateReport, Model]:
    if isinstance(calibrated, Calibrated):
        return calibrated.report, calibrated
    if calibrated.path is None:
        raise ConfigError(
            f"{option('calibrated')}: got the report of a model in memory, expected the model "
            "itself, or the report of a file"
        )
    return calibrated, Model.read(calibrated.path)


def _plain(options: CalibrateOptions) -> CalibrateOptions:
    """Return the options for plain INT8: the same bits and rule, but no preparation."""
    kept = (
        *("images", "weight_bits", "activation_bits", "exclude", "float_nodes"),
        *("device", "seed"),
    )
    same = {name: getattr(options, name) for name in kept}
    return replace(PLAIN_INT8, threshold=options.parts.threshold, **same)


def _halves(
    net: Net, placement: Placement, report: CalibrateReport, options: CalibrateOptions
) -> Halves:
    """Return a net with only its weights and with only its activations quantized.

    The scales of activations are those of the report.
    """
    scales = {tensor.tensor: tensor.scale for tensor in report.tensors}
    if {activation.tensor for activation in placement.activations} != scales.keys():
        raise ConfigError(
            f"{option('calibrated')}: was calibrated from another model or with other options; "
            "pass what calibrate returned for the same arguments, or nothing"
        )
    device = torch_device(options.device)
    codes = {tensor.tensor: tensor.grid for tensor in report.tensors}
    return halves_of(net, placement, scales, options.grids, device, codes)


def _corners(
    halves: Halves, files: Sequence[TorchGraph], images: Dataset, options: CalibrateOptions
) -> tuple[Corner, Corner, Corner, Corner]:
    """Compare four nets with the float net: only weights, only activations, both, the method."""
    weight, activation = f"W{options.weight_bits}", f"A{options.activation_bits}"
    names = (f"{weight}A32", f"W32{activation}", weight + activation, weight + activation)
    graphs = (halves.weights, halves.activations, *files)
    distances = closeness(halves.exact, graphs, images)
    first, second, third, fourth = (
        Corner(name, graph is files[1], close.sqnr_db, close.agreement)
        for name, graph, close in zip(names, graphs, distances, strict=True)
    )
    return first, second, third, fourth


def _layers(
    nets: tuple[Net, Net],
    powers: tuple[Mapping[str, Powers], Mapping[str, Powers]],
    options: CalibrateOptions,
) -> tuple[LayerDiagnosis, ...]:
    """Return the range and the noise of each layer, before and after preparation."""
    ranges = _ranges(nets[0])
    forms = {split.layer: split.form for split in read_splits(nets[1])}
    layers = []
    for layer, before in powers[0].items():
        weight_range = ranges.get(layer)
        bits = [_bits(net, layer, weight_range, options) for net in nets]
        after = powers[1][layer].in_units_of(before.signal)
        layers.append(
            LayerDiagnosis(
                layer=layer,
                form=forms.get(layer, "none"),
                source=None if weight_range is None else weight_range.source,
                parts=() if weight_range is None else weight_range.parts,
                before=Noise(bits[0], *before.sqnr_db),
                after=Noise(bits[1], *after.sqnr_db),
            )
        )
    return tuple(layers)


def _ranges(net: Net) -> dict[str, WeightRange]:
    """Return what sets the range of each layer, from the records of its branches or its kernel.

    In a model with such records, a layer without a record was not a rep block and is left out.
    """
    records = read_provenance(net)
    nodes = {node.name: node for node in weighted_nodes(net.graph)}
    if records:
        return {
            layer: range_of_branches(nodes[layer], branches)
            for layer, branches in records.items()
            if layer in nodes
        }
    read = {name: range_of_kernel(node) for name, node in nodes.items()}
    return {name: weight_range for name, weight_range in read.items() if weight_range is not None}


def _bits(
    net: Net, layer: str, weight_range: WeightRange | None, options: CalibrateOptions
) -> float | None:
    """Return how many bits are left for the values beside those that set a layer's range."""
    if weight_range is None or weight_range.rest is None:
        return None
    split = {split.layer: split for split in read_splits(net)}.get(layer)
    names = (layer,) if split is None else (split.main, split.side)
    nodes = [node for node in net.graph.nodes if node.name in names and node.op == "Conv"]
    kernels = [np.asarray(constant_value(node.inputs[1])) for node in nodes]
    return bits_left(kernels, weight_range.rest, options.grids[1])
