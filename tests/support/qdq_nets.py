"""Float networks quantized without calibration, with amax from onnxruntime on one batch."""

import numpy as np
import onnx

from reptrt.core.grid import Grid, scale_from_amax
from reptrt.graph.net import model_from_net, net_from_model
from reptrt.graph.placement import place
from reptrt.graph.plan import plan_from_placement
from reptrt.graph.qdq import insert_qdq, quantize_weights
from tests.support.helpers import ort_run
from tests.support.onnx_nets import Builder


def images(count: int = 4, channels: int = 3, size: int = 8, seed: int = 1) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((count, channels, size, size)).astype(np.float32)


def with_outputs(model: onnx.ModelProto, names: list[str]) -> onnx.ModelProto:
    """The same model with inner tensors as further outputs."""
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    present = {value.name for value in probe.graph.output}
    present |= {value.name for value in probe.graph.input}
    probe.graph.output.extend(onnx.ValueInfoProto(name=n) for n in names if n not in present)
    return probe


def quantized(
    model: onnx.ModelProto, x: np.ndarray, bits: int = 8, exclude: tuple[str, ...] = ()
) -> onnx.ModelProto:
    """The Q/DQ form of a float model with max thresholds over one batch."""
    net = net_from_model(model)
    placement = place(net, exclude)
    names = [activation.tensor for activation in placement.activations]
    values = ort_run(with_outputs(model, names), {"x": x}, optimize=False) | {"x": x}
    amax: dict[int, float] = {}
    for activation in placement.activations:
        largest = float(np.abs(values[activation.tensor]).max())
        amax[activation.group] = max(amax.get(activation.group, 0.0), largest)
    grid = Grid.activation(bits)
    scales = {a.tensor: float(scale_from_amax(amax[a.group], grid)) for a in placement.activations}
    weights = quantize_weights(net, placement, Grid.weight(bits))
    insert_qdq(net, plan_from_placement(placement, scales, weights, grid))
    return model_from_net(net)


def residual_net() -> onnx.ModelProto:
    """A net with every kind of pair: residual blocks, MaxPool, Concat, squeeze-excite, head."""
    b = Builder()
    y = b.relu(b.conv("x", 8, "stem"))
    y = b.node("MaxPool", [y], "pool1", kernel_shape=[2, 2], strides=[2, 2])
    y = b.relu(b.node("Add", [b.conv(b.relu(b.conv(y, 8, "a1")), 8, "a2"), y], "add1"))
    down = b.conv(y, 12, "down", size=1, pads=[0] * 4, strides=[2, 2])
    main = b.conv(b.relu(b.conv(y, 12, "b1", strides=[2, 2])), 12, "b2")
    y = b.relu(b.node("Add", [main, down], "add2"))
    s = b.relu(b.conv(b.node("GlobalAveragePool", [y], "squeeze"), 4, "s1", size=1))
    gate = b.node("Sigmoid", [b.conv(s, 12, "s2", size=1)], "gate")
    y = b.relu(b.node("Mul", [y, gate], "excite"))
    left = b.relu(b.conv(y, 8, "left"))
    right = b.node(
        "Clip",
        [b.conv(y, 4, "right"), b.constant("0", np.float32(0)), b.constant("6", np.float32(6))],
        "right.clip",
    )
    b.channels["right.clip"] = 4
    cat = b.node("Concat", [left, right], "cat", axis=1)
    b.channels[cat] = 12
    return b.model(b.head(b.relu(b.conv(cat, 8, "last"))))
