"""Rank layers by what each costs alone, in the measure of the task: mAP, agreement or SQNR.

All layers are ranked by the error of the outputs on a few held-out calibration images, which is
cheap (`quantize.calib.sensitivity`). The worst of them are judged by the task on the given images:
the outputs with only this layer in INT8 against those of the float net. The whole INT8 net is
judged too, so that the parts can be compared with the whole.

JSON:

    {"task": "detect", "images": 87, "judged": 10, "seconds": 31.4,
     "nets": [{"name": "float", "sqnr_db": null, "map": 0.41, ...},
              {"name": "all layers", "sqnr_db": 21.3, "map": 0.40, ...}],
     "layers": [{"layer": "stem", "error": 0.0021, "share": 0.31, "sqnr_db": 27.0, "cost": 0.004,
                 "map": 0.406, ...}, ...]}

``error`` is that of the outputs over their power, ``share`` its part of the sum over all layers,
``cost`` what ranks the judged layers; it is null for layers that were not judged by the task.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from reptrt.core.clock import Clock
from reptrt.core.result import Result
from reptrt.data.dataset import Dataset, Images, open_dataset
from reptrt.execute.torchgraph import TorchGraph
from reptrt.graph.model import Model
from reptrt.graph.preprocess import read_preprocess
from reptrt.graph.probes import probes_of
from reptrt.judge.options import RankOptions
from reptrt.judge.outputs import Distance, Outputs
from reptrt.judge.tasks import open_task
from reptrt.judge.tasks.protocol import Column, Measures, Tally, Task, score
from reptrt.pipeline import calibration_images, float_model, plan_with_float_layers, torch_device
from reptrt.quantize.calib.outputs import parts
from reptrt.quantize.calib.sensitivity import IMAGES, NetPair, errors_alone, outputs_alone

_FLOAT, _WHOLE = "float", "all layers"


@dataclass(frozen=True, slots=True)
class RankedNet:
    """One form of the net, judged by the task."""

    name: str  # "float", "all layers", or the layer that is INT8
    sqnr_db: float | None  # of the outputs, against the float net; None: they are equal
    measures: Measures


@dataclass(frozen=True, slots=True)
class RankedLayer:
    """What one layer costs alone."""

    layer: str
    error: float  # of the outputs over their power, on calibration images
    share: float  # of the sum of these errors
    cost: float | None  # in the unit of the task, larger is worse; None: not judged by the task
    judged: RankedNet | None


@dataclass(frozen=True, slots=True, repr=False)
class Ranking(Result):
    """The layers of a net, the costliest first."""

    task: str
    images: int  # judged by the task
    nets: tuple[RankedNet, RankedNet]  # the float net, and the net with all layers in INT8
    layers: tuple[RankedLayer, ...]
    columns: tuple[Column, ...]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return the ranking as JSON values."""
        judged = [layer for layer in self.layers if layer.judged is not None]
        return {
            "task": self.task,
            "images": self.images,
            "judged": len(judged),
            "seconds": self.seconds,
            "nets": [{"name": net.name, **_content(net)} for net in self.nets],
            "layers": [
                {
                    "layer": layer.layer,
                    "error": layer.error,
                    "share": layer.share,
                    "cost": layer.cost,
                    **({} if layer.judged is None else _content(layer.judged)),
                }
                for layer in self.layers
            ],
        }

    def to_table(self) -> Table:
        """Return the layers that were judged by the task as a table for people."""
        table = Table(box=None, pad_edge=False)
        table.add_column("only INT8", overflow="fold")
        for title in ("of all errors", "SQNR dB", *(column.title for column in self.columns)):
            table.add_column(title, justify="right", no_wrap=True)
        for net in self.nets:
            table.add_row(net.name, "", *self._cells(net))
        for layer in self.layers:
            if layer.judged is not None:
                share = f"{100 * layer.share:.1f} %"
                table.add_row(layer.layer, share, *self._cells(layer.judged))
        return table

    def to_lines(self) -> list[str]:
        """Return what the table leaves out."""
        judged = sum(layer.judged is not None for layer in self.layers)
        return [
            f"{judged} of {len(self.layers)} layers, each alone in INT8, on {self.images} images; "
            f"the others have smaller errors of the outputs.  {self.seconds:.1f} s"
        ]

    def _cells(self, net: RankedNet) -> list[str]:
        ratio = "equal" if net.sqnr_db is None else f"{net.sqnr_db:.2f}"
        return [ratio, *(column.cell(net.measures) for column in self.columns)]


def rank_layers(
    model: Path | Model, images: Images, calib_images: Images, options: RankOptions
) -> Ranking:
    """Measure what the layers of a float net cost alone in INT8.

    Args:
        model: a fused float model, or its file.
        images: to judge on, with the labels or annotations that the task needs.
        calib_images: calibration images.
        options: of calibration and of the task, and how many layers are judged by it.

    Raises:
        ReptrtError: the model or the images cannot be used.
    """
    started = time.perf_counter()
    source, calibrating = float_model(model), options.calibrate
    task = open_task(options, images)
    preprocess = read_preprocess(source.to_net())
    dataset = open_dataset(images, preprocess, limit=options.eval_limit, seed=calibrating.seed)
    calibration = calibration_images(source, calib_images, calibrating)
    planned, _ = plan_with_float_layers(source.to_net(), calibration, calibrating, Clock())
    device = torch_device(calibrating.device)
    pair = NetPair(TorchGraph(planned.reference, device), TorchGraph(planned.quantized(), device))
    probes = {probe.layer: probe for probe in probes_of(planned.reference, planned.layers)}
    judges = parts(calibration)[1]
    few = judges.spread(min(IMAGES, judges.length))
    errors = errors_alone(pair, list(probes.values()), few)
    worst = sorted(errors, key=lambda layer: -errors[layer])
    chosen = [probes[layer] for layer in worst[: options.layers]]
    judged = _Judged(task, dataset, [_FLOAT, _WHOLE, *worst[: options.layers]])
    names = pair.exact.output_names
    for alone in outputs_alone(pair, chosen, dataset, names):
        judged.add(alone.layer, alone.exact, alone.outputs)
        if alone.is_last:
            judged.add(_FLOAT, alone.exact, alone.exact)
            inputs = {pair.quantized.input_names[0]: alone.images}
            with torch.inference_mode():
                judged.add(_WHOLE, alone.exact, pair.quantized.run(inputs, names))
    nets, total = judged.nets(), sum(errors.values()) or 1.0
    layers = [
        RankedLayer(
            layer,
            errors[layer],
            errors[layer] / total,
            _cost(task, nets[_FLOAT], nets[layer]) if layer in nets else None,
            nets.get(layer),
        )
        for layer in worst
    ]
    return Ranking(
        task=options.task,
        images=dataset.length,
        nets=(nets[_FLOAT], nets[_WHOLE]),
        layers=tuple(sorted(layers, key=_by_cost)),
        columns=task.columns,
        seconds=time.perf_counter() - started,
    )


class _Judged:
    """Several forms of one net while the task judges them."""

    def __init__(self, task: Task[Any], dataset: Dataset, names: Sequence[str]) -> None:
        self._task = task
        self._tallies: dict[str, Tally[Any]] = {name: task.tally(name, dataset) for name in names}
        self._distances = {name: Distance() for name in names}

    def add(self, name: str, exact: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        """Add the outputs of a form, and of the float net, for the next images."""
        arrays = _arrays(outputs)
        self._tallies[name].add(arrays)
        self._distances[name].add(_arrays(exact), arrays)

    def nets(self) -> dict[str, RankedNet]:
        """Return what the task found out, by name."""
        findings = {name: tally.findings() for name, tally in self._tallies.items()}
        return {
            name: RankedNet(
                name,
                None if math.isinf(ratio := self._distances[name].sqnr_db) else ratio,
                {**found.measures, **self._task.compare(findings[_FLOAT], found)},
            )
            for name, found in findings.items()
        }


def _arrays(outputs: Mapping[str, Tensor]) -> Outputs:
    """Return outputs as arrays; those whose first axis is not the batch are left out."""
    arrays = {name: value.cpu().numpy() for name, value in outputs.items()}
    rows = len(next(iter(arrays.values())))
    return {name: value for name, value in arrays.items() if value.ndim and len(value) == rows}


def _cost(task: Task[Any], exact: RankedNet, net: RankedNet) -> float:
    """Return what a net costs: lost agreement, else lost score, else noise over signal."""
    same = net.measures.get("agreement")
    if same is not None:
        return 1.0 - float(same)
    before, after = score(task, exact.measures), score(task, net.measures)
    if before is not None and after is not None:
        return before - after
    return 0.0 if net.sqnr_db is None else float(10.0 ** (-net.sqnr_db / 10.0))


def _by_cost(layer: RankedLayer) -> tuple[bool, float, float]:
    """Sort judged layers first, the costliest first; equal ones by their errors."""
    return layer.cost is None, -(layer.cost or 0.0), -layer.error


def _content(net: RankedNet) -> dict[str, Any]:
    return {"sqnr_db": net.sqnr_db, **net.measures}
