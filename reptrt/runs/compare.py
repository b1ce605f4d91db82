"""The differences between two records, and between two networks layer by layer."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from reptrt.core.arrays import Float64Array
from reptrt.core.errors import ArtifactError
from reptrt.graph.net import Net
from reptrt.graph.quantized import LayerWeight, activation_scales, layer_weights
from reptrt.graph.splits import read_splits

_NAMED = 5  # names that a line lists
_NEAR = 1.0005  # four digits do not tell smaller ratios from 1


@dataclass(frozen=True, slots=True)
class Change:
    """A recorded value that differs between A and B; None: it is not recorded."""

    name: str
    a: Any
    b: Any

    def __str__(self) -> str:
        return f"{self.name}: {_shown(self.a)} -> {_shown(self.b)}"


@dataclass(frozen=True, slots=True)
class ScaleChange:
    """The scale of an activation that differs; of several channels, the largest ratio."""

    tensor: str
    a: float
    b: float
    ratio: float | None  # larger / smaller; None: the shapes differ, or a scale is not positive


@dataclass(frozen=True, slots=True)
class WeightChange:
    """The weight of a layer that differs; numbers are None where shapes or types differ."""

    layer: str
    form_a: str  # "int8 24x24x3x3"
    form_b: str
    differing: int | None  # number of codes, or floats, that differ
    total: int  # number of codes in A
    max_difference: float | None  # of real values: code times scale
    scale_ratio: float | None  # larger / smaller, of the channel where it is largest
    bias_difference: float | None  # largest difference; None: A or B has no bias


@dataclass(frozen=True, slots=True)
class Comparison:
    """The differences between two networks; layers and tensors are matched by name."""

    file: str
    num_tensors: int  # quantized activations that are in both
    scales: tuple[ScaleChange, ...]  # those that differ, the largest ratio first
    tensors_only_a: tuple[str, ...]
    tensors_only_b: tuple[str, ...]
    num_layers: int  # layers with a constant weight that are in both
    weights: tuple[WeightChange, ...]  # those that differ, in the order of A
    layers_only_a: tuple[str, ...]
    layers_only_b: tuple[str, ...]
    splits: tuple[Change, ...]  # layer: form in A and B, where they differ

    def to_lines(self) -> list[str]:
        """Return the counts for people."""
        lines = []
        if self.num_tensors or self.tensors_only_a or self.tensors_only_b:
            ratios = [change.ratio for change in self.scales if change.ratio is not None]
            worst = f", by a factor of up to {ratio_text(max(ratios))}" if ratios else ""
            lines.append(f"{len(self.scales)} of {self.num_tensors} scales differ{worst}")
        codes = [change for change in self.weights if change.differing is not None]
        number = sum(change.differing or 0 for change in codes)
        of = sum(change.total for change in codes)
        share = f", in {number} of {of} values" if codes else ""
        lines.append(f"{len(self.weights)} of {self.num_layers} layers differ{share}")
        for title, names in (
            ("tensors only in A", self.tensors_only_a),
            ("tensors only in B", self.tensors_only_b),
            ("layers only in A", self.layers_only_a),
            ("layers only in B", self.layers_only_b),
        ):
            if names:
                more = ", ..." if len(names) > _NAMED else ""
                lines.append(f"{len(names)} {title}: {', '.join(names[:_NAMED])}{more}")
        return [f"{self.file}  {line}" for line in lines]


def changes(a: Mapping[str, Any], b: Mapping[str, Any]) -> tuple[Change, ...]:
    """Return the differences between two nested mappings, by dotted name.

    >>> changes({"x": {"y": 1, "z": 2}}, {"x": {"y": 1, "z": 3}})
    (Change(name='x.z', a=2, b=3),)
    """
    flat_a, flat_b = dict(_flat(a)), dict(_flat(b))
    names = [*flat_a, *(name for name in flat_b if name not in flat_a)]
    pairs = (Change(name, flat_a.get(name), flat_b.get(name)) for name in names)
    return tuple(change for change in pairs if change.a != change.b)


def ratio_text(ratio: float | None) -> str:
    """Return a ratio for people.

    >>> ratio_text(1.23456), ratio_text(1.0000003)
    ('1.235', '1 + 3.0e-07')
    """
    if ratio is None:
        return "-"
    return f"{ratio:.4g}" if ratio == 1 or ratio >= _NEAR else f"1 + {ratio - 1:.1e}"


def compare_nets(a: Net, b: Net, file: str) -> Comparison:
    """Compare the scales, codes and splits of two networks."""
    scales_a, scales_b = activation_scales(a), activation_scales(b)
    weights_a, weights_b = layer_weights(a), layer_weights(b)
    tensors = [name for name in scales_a if name in scales_b]
    layers = [name for name in weights_a if name in weights_b]
    scales = [
        _scale_change(name, scales_a[name], scales_b[name])
        for name in tensors
        if not np.array_equal(scales_a[name], scales_b[name])
    ]
    weights = (_weight_change(name, weights_a[name], weights_b[name]) for name in layers)
    forms_a, forms_b = ({s.layer: s.form for s in read_splits(net)} for net in (a, b))
    return Comparison(
        file=file,
        num_tensors=len(tensors),
        scales=tuple(sorted(scales, key=lambda s: s.ratio or float("inf"), reverse=True)),
        tensors_only_a=tuple(name for name in scales_a if name not in scales_b),
        tensors_only_b=tuple(name for name in scales_b if name not in scales_a),
        num_layers=len(layers),
        weights=tuple(change for change in weights if change is not None),
        layers_only_a=tuple(name for name in weights_a if name not in weights_b),
        layers_only_b=tuple(name for name in weights_b if name not in weights_a),
        splits=changes(forms_a, forms_b),
    )


def _flat(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in content.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _shown(value: Any) -> str:
    return "none" if value is None else str(value)


def _scale_change(tensor: str, a: Float64Array, b: Float64Array) -> ScaleChange:
    ratios = _ratios(a, b)
    index = 0 if ratios is None else int(ratios.argmax())
    ratio = None if ratios is None else float(ratios[index])
    if not (a.size and b.size):
        raise ArtifactError(f"tensor {tensor}: its scale is empty, expected a number")
    return ScaleChange(tensor, float(a.flat[index]), float(b.flat[index]), ratio)


def _ratios(a: Float64Array | None, b: Float64Array | None) -> Float64Array | None:
    """Return the larger scale by the smaller, for each channel; None if there is no such number."""
    if a is None or b is None or a.size != b.size or not ((a > 0).all() and (b > 0).all()):
        return None
    ratios = a.ravel() / b.ravel()
    return np.maximum(ratios, 1 / ratios)


def _weight_change(layer: str, a: LayerWeight, b: LayerWeight) -> WeightChange | None:
    """Return what differs between two weights, or None if nothing does."""
    comparable = a.form == b.form
    differing = int((a.values != b.values).sum()) if comparable else None
    ratios, bias = _ratios(a.scale, b.scale), _bias_difference(a.bias, b.bias)
    ratio = None if ratios is None else float(ratios.max())
    if comparable and differing == 0 and ratio in (None, 1.0) and not bias:
        return None
    difference = None
    if comparable:
        difference = float(np.abs(a.dequantized() - b.dequantized()).max(initial=0.0))
    return WeightChange(
        layer=layer,
        form_a=a.form,
        form_b=b.form,
        differing=differing,
        total=a.values.size,
        max_difference=difference,
        scale_ratio=ratio,
        bias_difference=bias,
    )


def _bias_difference(a: Float64Array | None, b: Float64Array | None) -> float | None:
    if a is None or b is None or a.shape != b.shape:
        return None
    return float(np.abs(a - b).max(initial=0.0))
