"""The scales of activations: a threshold rule and a margin, chosen by the outputs where asked for.

`--threshold auto` compares rules by the outputs of the judging images (`quantize.calib.outputs`).
It takes the rule with the least error, then widens all thresholds together in steps of an eighth
of an octave as long as the error falls (ours).
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace

import numpy as np

from reptrt.core.choices import Threshold
from reptrt.core.grid import Grid, scale_from_amax
from reptrt.execute.torchgraph import Override
from reptrt.graph.net import Net
from reptrt.graph.placement import Placement
from reptrt.pipeline.options import CalibrateOptions
from reptrt.pipeline.preparing import Prepared
from reptrt.pipeline.reports import TensorScale
from reptrt.pipeline.trial import Trial, clamp_to
from reptrt.quantize.calib.collect import merge_groups
from reptrt.quantize.calib.histogram import NUM_BINS, Histogram
from reptrt.quantize.calib.options import ThresholdOptions
from reptrt.quantize.calib.outputs import Outputs, least
from reptrt.quantize.calib.thresholds import amax_from_histogram
from reptrt.quantize.choose import full_range_of

_REPORTED_BINS = 64  # more than half of them are used
_MERGED = NUM_BINS // _REPORTED_BINS
_WIDER = 2 ** (1 / 8)  # one step of the search for a margin
_WIDEST = 4.0  # where the search ends


@dataclass(frozen=True, slots=True)
class ActivationScales:
    """The scales of all activations, and how they were chosen."""

    tensors: tuple[TensorScale, ...]
    summands: frozenset[str]  # tensors that have thresholds of their own, without a margin
    rule: Threshold
    margin: float  # factor by which the thresholds of the rule were widened; 1 for a given rule

    @property
    def by_tensor(self) -> dict[str, float]:
        """Tensor -> scale."""
        return {tensor.tensor: tensor.scale for tensor in self.tensors}

    @property
    def grids(self) -> dict[str, Grid]:
        """Tensor -> codes."""
        return {tensor.tensor: tensor.grid for tensor in self.tensors}

    def widened(self, factor: float) -> "ActivationScales":
        """Return the same scales with thresholds multiplied by a factor."""
        tensors = tuple(
            tensor if tensor.tensor in self.summands else tensor.widened(factor)
            for tensor in self.tensors
        )
        return replace(self, tensors=tensors, margin=self.margin * factor)


def choose_scales(
    net: Net,
    prepared: Prepared,
    histograms: Mapping[str, Histogram],
    outputs: Outputs,
    options: CalibrateOptions,
    summands: Collection[str] = (),
) -> ActivationScales:
    """Return the scales of all activations.

    Args:
        net: the prepared float net; not changed.
        prepared: its placement and full ranges.
        histograms: tensor -> histogram of |x|.
        outputs: judges a net by its outputs; used where there is more than one candidate rule.
        options: of calibration.
        summands: tensors whose histogram shows what a sum needs of them.
    """
    grids = _grids_of(prepared, histograms, options)
    alone = frozenset(summands if options.is_auto else ())
    candidates = [
        ActivationScales(
            _tensor_scales(prepared.placement, histograms, rule, grids, alone),
            alone,
            rule.rule or "auto",
            1.0,
        )
        for rule in options.parts.threshold.candidates
    ]
    if len(candidates) == 1:
        return candidates[0]

    trial = Trial(net, prepared.placement, outputs, options)  # with float weights

    def error(scales: ActivationScales, most: float) -> float:
        return trial.error(scales.by_tensor, scales.grids, limits_of(prepared, scales), most=most)

    return _with_margin(*least(candidates, error), error)


def _with_margin(
    chosen: ActivationScales, least: float, error: Callable[[ActivationScales, float], float]
) -> ActivationScales:
    """Return the scales widened in equal steps as long as the error of the outputs falls."""
    best, margin = chosen, 1.0
    while margin < _WIDEST:
        margin *= _WIDER
        wider = chosen.widened(margin)
        if (now := error(wider, least)) >= least:
            break
        best, least = wider, now
    return best


def limits_of(prepared: Prepared, scales: ActivationScales) -> dict[str, Override]:
    """Return functions that clamp activations to what would have been kept without the judges.

    The judging images were used to measure ranges, so they never exceed them; other images do.

    Args:
        prepared: the ranges with and without the judging images.
        scales: the thresholds, measured with them.
    """
    return {
        tensor.tensor: clamp_to(tensor.amax * prepared.without_judges[tensor.tensor])
        for tensor in scales.tensors
        if tensor.tensor in prepared.without_judges
    }


def _grids_of(
    prepared: Prepared, histograms: Mapping[str, Histogram], options: CalibrateOptions
) -> dict[str, Grid]:
    """Return the codes of every activation.

    Where the runtime has zero points, the codes are spread over the values that a tensor takes.
    """
    grid, full_range = options.grids[0], full_range_of(prepared.ranges)
    activations = prepared.placement.activations
    grids = {a.tensor: grid.full_range if a.tensor in full_range else grid for a in activations}
    if not (options.runtime.unsigned and options.parts.full_range and grid.is_whole):
        return grids
    groups = merge_groups(activations, histograms)
    alive = (a for a in activations if groups[a.group].maximum > 0)
    return grids | {a.tensor: Grid.between(*groups[a.group].range) for a in alive}


def _tensor_scales(
    placement: Placement,
    histograms: Mapping[str, Histogram],
    threshold: ThresholdOptions,
    grids: Mapping[str, Grid],
    summands: Collection[str],
) -> tuple[TensorScale, ...]:
    groups = merge_groups(placement.activations, histograms)
    tensors = []
    for activation in placement.activations:
        histogram = histograms[activation.tensor]
        total = int(histogram.counts.sum()) + histogram.zeros
        codes, rule = grids[activation.tensor], threshold
        if activation.tensor in summands:
            rule = ThresholdOptions("mse")
        group = groups[activation.group]
        kept = amax_from_histogram(group, rule, codes.mirrored)
        if codes.is_whole and codes.qmin < 0 and codes.zero_point:
            low, high = (max(min(bound, kept), -kept) for bound in group.range)
            codes = Grid.between(low, high)
        tensors.append(
            TensorScale(
                tensor=activation.tensor,
                maximum=histogram.maximum,
                amax=kept,
                scale=float(scale_from_amax(kept, codes.mirrored)),
                grid=codes,
                zeros=histogram.zeros / total,
                bins=_bins(histogram),
                bin_width=histogram.width * _MERGED,
            )
        )
    return tuple(tensors)


def _bins(histogram: Histogram) -> tuple[int, ...]:
    """Return the counts of neighbouring bins together, up to the largest value."""
    counts = histogram.counts.reshape(-1, _MERGED).sum(axis=1)
    last = np.flatnonzero(counts)
    return tuple(counts[: last[-1] + 1].tolist()) if len(last) else ()
