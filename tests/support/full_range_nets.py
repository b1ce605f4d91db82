"""Random small nets with UINT8 activations whose arithmetic is exact in float32.

All scales are powers of two, and weights and biases are multiples of small powers of two. No sum is
rounded, so equivalent graphs give the same codes, also for ties.
"""

from collections.abc import Collection
from dataclasses import dataclass, field

import numpy as np
import onnx
from hypothesis import strategies as st
from onnx import numpy_helper

from reptrt.core.grid import Grid, channel_amax, quantize, scale_from_amax
from reptrt.graph.net import Net, constant_value, model_from_net, net_from_model
from reptrt.graph.placement import Placement, place
from reptrt.graph.plan import QuantizedWeight, plan_from_placement
from reptrt.graph.qdq import insert_qdq, quantize_weights
from reptrt.rewrite.recentre import full_range_obstacle
from reptrt.rewrite.split_coarse_fine import split_coarse_fine
from reptrt.rewrite.split_identity import split_identity
from tests.support.helpers import ort_run
from tests.support.onnx_nets import Builder, give_identity
from tests.support.qdq_nets import with_outputs

WEIGHTS = Grid.weight(8)


@dataclass
class Case:
    """A float model, and which of its convolutions are split."""

    model: onnx.ModelProto
    identity: list[str] = field(default_factory=list)
    scalar: list[str] = field(default_factory=list)
    coarse_fine: list[str] = field(default_factory=list)


def on_grid(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same model with weights and biases rounded to multiples of 1/64."""
    rounded = onnx.ModelProto()
    rounded.CopyFrom(model)
    for tensor in rounded.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if values.dtype == np.float32:
            values = np.rint(values * 64).astype(np.float32) / np.float32(64)
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    return rounded


def split_net(case: Case, precision: str = "float") -> Net:
    """The float net with its splits."""
    net = net_from_model(case.model)
    for form, layers in (("identity", case.identity), ("identity-scalar", case.scalar)):
        give_identity(net, layers)
        report = split_identity(net, layers, grid=WEIGHTS, form=form, precision=precision)
        assert not report.skipped
    report = split_coarse_fine(net, case.coarse_fine, grid=WEIGHTS, precision=precision)
    assert not report.skipped
    return net


def unsigned(
    net: Net, x: np.ndarray, *, bits: int = 8, exact: bool = True, leave: Collection[str] = ()
) -> tuple[Net, list[str]]:
    """Quantize a float net with UINT8 pairs wherever there is no obstacle; thresholds are maxima.

    Returns the net and the tensors that have full range.
    """
    placement = place(net)
    full_range = [
        a.tensor
        for a in placement.activations
        if a.tensor not in leave and full_range_obstacle(net, placement, a.tensor) is None
    ]
    weights = _exact_weights(net, placement) if exact else quantize_weights(net, placement, WEIGHTS)
    scales = _scales(net, placement, x, full_range, bits, exact)
    quantized = net.copy()
    grid = Grid.activation(bits)
    insert_qdq(quantized, plan_from_placement(placement, scales, weights, grid, full_range))
    return quantized, full_range


def _scales(
    net: Net, placement: Placement, x: np.ndarray, full_range: list[str], bits: int, exact: bool
) -> dict[str, float]:
    names = [activation.tensor for activation in placement.activations]
    probe = with_outputs(model_from_net(net.copy()), names)
    values = ort_run(probe, {"x": x}, optimize=False) | {"x": x}
    scales: dict[str, float] = {}
    for activation in placement.activations:
        grid = Grid.activation(bits)
        grid = grid.full_range if activation.tensor in full_range else grid
        group = [a.tensor for a in placement.activations if a.group == activation.group]
        amax = max(float(np.abs(values[name]).max()) for name in group)
        scale = scale_from_amax(max(amax, 1e-3), grid)
        scales[activation.tensor] = float(_power_of_two(scale) if exact else scale)
    return scales


def _exact_weights(net: Net, placement: Placement) -> dict[str, QuantizedWeight]:
    nodes = {node.name: node for node in net.graph.nodes}
    weights = {}
    for weight in placement.weights:
        values = constant_value(nodes[weight.node].inputs[1])
        scale = _power_of_two(scale_from_amax(channel_amax(values, weight.axis), WEIGHTS))
        codes = quantize(values, scale, WEIGHTS, weight.axis)
        weights[weight.node] = QuantizedWeight(codes, scale, weight.axis)
    return weights


def _power_of_two(scale: np.ndarray) -> np.ndarray:
    return np.exp2(np.ceil(np.log2(scale))).astype(np.float32)


class RandomNet:
    """Draws one net, stage by stage."""

    def __init__(self, draw: st.DrawFn) -> None:
        self.draw = draw
        self.size = draw(st.integers(6, 9))
        self.b = Builder(channels=3, size=self.size, seed=draw(st.integers(0, 999)))
        self.case = Case(onnx.ModelProto())
        self.at = self.size, self.size
        self.count = 0
        self.y = self.conv("x", 8)

    def name(self) -> str:
        self.count += 1
        return f"c{self.count}"

    def conv(self, x: str, outputs: int, *, affine: bool = False) -> str:
        """Any convolution that leaves two rows and columns, then ReLU."""
        choose = self.draw
        groups = choose(st.sampled_from([1, 1, 2, 8])) if self.b.channels[x] == 8 else 1
        taps, stride, dilation = (choose(st.sampled_from(n)) for n in ([1, 2, 3], [1, 2], [1, 2]))
        pads = choose(st.lists(st.integers(0, 2), min_size=4, max_size=4))
        reach = (taps - 1) * dilation
        sizes = [(self.at[i] + pads[i] + pads[i + 2] - reach - 1) // stride + 1 for i in (0, 1)]
        if min(sizes) < 2:
            stride, pads = 1, [reach // 2] * 2 + [reach - reach // 2] * 2
            sizes = list(self.at)
        self.at = sizes[0], sizes[1]
        attrs = {"pads": pads, "strides": [stride] * 2, "dilations": [dilation] * 2}
        y = self.b.conv(x, outputs, self.name(), size=taps, group=groups, **attrs)
        if affine:
            gain = np.exp2(self.b.rng.integers(-1, 2, (1, outputs, 1, 1))).astype(np.float32)
            shift = self.b.rng.standard_normal((1, outputs, 1, 1)).astype(np.float32)
            for op, value in (("Mul", gain), ("Add", shift)):
                y = self.b.node(op, [y, self.b.constant(f"{y}.{op}.value", value)], f"{y}.{op}")
        return self.b.relu(y)

    def stage(self) -> None:
        kind = self.draw(
            st.sampled_from(["conv", "affine", "split", "residual", "skip", "maxpool", "average"])
        )
        if kind in ("conv", "affine"):
            self.y = self.conv(self.y, 8, affine=kind == "affine")
        elif kind == "split":
            names = self.draw(
                st.sampled_from([self.case.identity, self.case.scalar, self.case.coarse_fine])
            )
            names.append(self.name())
            y = self.b.conv(self.y, 8, names[-1])
            self.y = self.b.relu(y)
        elif kind in ("residual", "skip"):
            inner = self.b.relu(self.b.conv(self.y, 8, self.name()))
            main = self.b.conv(inner if kind == "residual" else self.y, 8, self.name())
            order = self.draw(st.permutations([main, self.y]))
            self.y = self.b.relu(self.b.node("Add", order, f"{main}.add"))
        elif min(self.at) >= 4:
            self._pool(kind)

    def _pool(self, kind: str) -> None:
        name = f"{self.name()}.pool"
        if kind == "maxpool":
            attrs = {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}
            self.at = (self.at[0] + 1) // 2, (self.at[1] + 1) // 2
            self.y = self.b.node("MaxPool", [self.y], name, **attrs)
            return
        attrs = {"kernel_shape": [2, 2], "strides": [2, 2]}
        self.at = self.at[0] // 2, self.at[1] // 2
        self.y = self.b.node("AveragePool", [self.y], name, **attrs)

    def finish(self) -> Case:
        if self.draw(st.booleans()):
            flat = self.b.node("Flatten", [self.y], "flat")
            self.b.channels[flat] = self.b.channels[self.y] * self.at[0] * self.at[1]
            self.case.model = on_grid(self.b.model(self.b.gemm(flat, 5, "head")))
        else:
            self.case.model = on_grid(self.b.model(self.b.head(self.y)))
        return self.case


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """A net of two to five stages."""
    net = RandomNet(draw)
    for _ in range(draw(st.integers(1, 4))):
        net.stage()
    return net.finish()
