"""Nets of random blocks and activation functions, for tests of where Q/DQ pairs are placed."""

from collections.abc import Callable, Mapping

import numpy as np
import onnx
from onnx import helper

from tests.support.onnx_nets import Builder

WIDTH = 16


def _value(b: Builder, number: float) -> str:
    return b.constant(f"c{len(b.constants)}", np.float32(number))


def _op(op: str, *numbers: float, **attrs: object) -> Callable[[Builder, str], str]:
    """Return an activation function of one node with constant operands."""

    def activation(b: Builder, x: str) -> str:
        return b.node(op, [x, *(_value(b, n) for n in numbers)], f"{x}.{op.lower()}", **attrs)

    return activation


def _silu(b: Builder, x: str) -> str:
    return b.node("Mul", [x, b.node("Sigmoid", [x], f"{x}.gate")], f"{x}.silu")


def _mish(b: Builder, x: str) -> str:
    gate = b.node("Tanh", [b.node("Softplus", [x], f"{x}.plus")], f"{x}.gate")
    return b.node("Mul", [x, gate], f"{x}.mish")


def _hard_swish(b: Builder, x: str) -> str:
    shifted = b.node("Add", [x, _value(b, 3)], f"{x}.shifted")
    gate = b.node("Clip", [shifted, _value(b, 0), _value(b, 6)], f"{x}.clip")
    gate = b.node("Div", [gate, _value(b, 6)], f"{x}.gate")
    return b.node("Mul", [x, gate], f"{x}.hswish")


def _gelu_erf(b: Builder, x: str) -> str:
    erf = b.node("Erf", [b.node("Div", [x, _value(b, 2**0.5)], f"{x}.div")], f"{x}.erf")
    gate = b.node("Add", [erf, _value(b, 1)], f"{x}.gate")
    product = b.node("Mul", [x, gate], f"{x}.product")
    return b.node("Mul", [product, _value(b, 0.5)], f"{x}.gelu")


def _gelu_tanh(b: Builder, x: str) -> str:
    cube = b.node("Pow", [x, _value(b, 3)], f"{x}.cube")
    inner = b.node("Add", [x, b.node("Mul", [cube, _value(b, 0.044715)], f"{x}.b")], f"{x}.inner")
    tanh = b.node("Tanh", [b.node("Mul", [inner, _value(b, 0.8)], f"{x}.a")], f"{x}.tanh")
    gate = b.node(
        "Mul", [b.node("Add", [tanh, _value(b, 1)], f"{x}.one"), _value(b, 0.5)], f"{x}.h"
    )
    return b.node("Mul", [x, gate], f"{x}.gelut")


ACTIVATIONS: Mapping[str, Callable[[Builder, str], str]] = {
    "relu": _op("Relu"),
    "relu6": _op("Clip", 0, 6),
    "leaky": _op("LeakyRelu"),
    "prelu": _op("PRelu", 0.2),
    "elu": _op("Elu"),
    "selu": _op("Selu"),
    "celu": _op("Celu", alpha=1.5),
    "tanh": _op("Tanh"),
    "softplus": _op("Softplus"),
    "softsign": _op("Softsign"),
    "hardswish": _op("HardSwish"),
    "max": _op("Max", 0),
    "min": _op("Min", 3),
    "abs": _op("Abs"),
    "mish": _mish,
    "silu": _silu,
    "hard swish by parts": _hard_swish,
    "gelu by erf": _gelu_erf,
    "gelu by tanh": _gelu_tanh,
    "none": lambda b, x: x,
}
Activation = Callable[[Builder, str], str]


def _plain(b: Builder, x: str, n: str, act: Activation) -> str:
    return act(b, b.conv(x, WIDTH, f"{n}.a"))


def _residual(b: Builder, x: str, n: str, act: Activation) -> str:
    y = b.conv(act(b, b.conv(x, WIDTH, f"{n}.a")), WIDTH, f"{n}.b")
    return act(b, b.node("Add", [y, x], f"{n}.add"))


def _two_skips(b: Builder, x: str, n: str, act: Activation) -> str:
    z = act(b, b.conv(x, WIDTH, f"{n}.a"))
    inner = b.node("Add", [x, b.conv(z, WIDTH, f"{n}.b")], f"{n}.add1")
    return act(b, b.node("Add", [inner, z], f"{n}.add2"))


def _sum(b: Builder, x: str, n: str, act: Activation) -> str:
    parts = [b.conv(x, WIDTH, f"{n}.{i}", size=1 + 2 * i) for i in range(3)]
    return act(b, b.node("Sum", [act(b, parts[0]), *parts[1:]], f"{n}.sum"))


def _halves(b: Builder, x: str, n: str, act: Activation) -> str:
    """Split, convolve one half, concatenate: the C2f block of YOLOv8."""
    halves = [f"{n}.left", f"{n}.right"]
    b.nodes.append(helper.make_node("Split", [x], halves, f"{n}.split", axis=1, num_outputs=2))
    b.channels |= dict.fromkeys(halves, WIDTH // 2)
    y = act(b, b.conv(halves[1], WIDTH, f"{n}.a"))
    cat = b.node("Concat", [*halves, y], f"{n}.cat", axis=1)
    b.channels[cat] = 2 * WIDTH
    return act(b, b.conv(cat, WIDTH, f"{n}.b"))


def _excite(b: Builder, x: str, n: str, act: Activation) -> str:
    y = act(b, b.conv(x, WIDTH, f"{n}.a"))
    s = act(b, b.conv(b.node("GlobalAveragePool", [y], f"{n}.pool"), WIDTH, f"{n}.down", size=1))
    gate = b.node("Sigmoid", [b.conv(s, WIDTH, f"{n}.up", size=1)], f"{n}.gate")
    return b.node("Mul", [y, gate], f"{n}.mul")


def _pools(b: Builder, x: str, n: str, act: Activation) -> str:
    same = {"kernel_shape": [3, 3], "pads": [1] * 4}
    y = b.node("MaxPool", [x], f"{n}.max", **same)
    y = b.node("AveragePool", [y], f"{n}.average", **same)
    y = b.node("AveragePool", [y], f"{n}.again", **same)
    return act(b, b.conv(y, WIDTH, f"{n}.a"))


def _pyramid(b: Builder, x: str, n: str, act: Activation) -> str:
    """Downsample and upsample with a nearest Resize, then concatenate with the block's input."""
    y = act(b, b.conv(x, WIDTH, f"{n}.a", strides=[2, 2]))
    scales = b.constant(f"{n}.scales", np.float32([1, 1, 2, 2]))
    y = b.node("Resize", [y, "", scales], f"{n}.up", mode="nearest")
    cat = b.node("Concat", [y, x], f"{n}.cat", axis=1)
    b.channels[cat] = 2 * WIDTH
    return act(b, b.conv(cat, WIDTH, f"{n}.b"))


def _padded(mode: str) -> Callable[[Builder, str, str, Activation], str]:
    def block(b: Builder, x: str, n: str, act: Activation) -> str:
        pads = b.constant(f"{n}.pads", np.array([0, 0, 1, 1, 0, 0, 1, 1]))
        y = b.node("Pad", [x, pads], f"{n}.pad", mode=mode)
        b.channels[y] = WIDTH
        return act(b, b.conv(y, WIDTH, f"{n}.a", pads=[0] * 4))

    return block


BLOCKS: Mapping[str, Callable[[Builder, str, str, Activation], str]] = {
    "plain": _plain,
    "residual": _residual,
    "two skips": _two_skips,
    "sum": _sum,
    "halves": _halves,
    "excite": _excite,
    "pools": _pools,
    "pyramid": _pyramid,
    "reflect": _padded("reflect"),
    "edge": _padded("edge"),
    "zeros": _padded("constant"),
}


def _classes(b: Builder, x: str) -> list[str]:
    return [b.head(x, 16)]


def _decoded(b: Builder, x: str) -> list[str]:
    """Boxes and scores of two levels, in one tensor."""
    levels = []
    for level in ("p3", "p4"):
        shape = b.constant(f"{level}.shape", np.array([0, 6, -1]))
        y = b.node("Reshape", [b.conv(x, 6, level, size=1), shape], f"{level}.flat")
        y = b.node("Sigmoid", [y], f"{level}.sigmoid")
        parts = [f"{level}.centre", f"{level}.size", f"{level}.score"]
        sizes = b.constant(f"{level}.sizes", np.array([2, 2, 2]))
        b.nodes.append(helper.make_node("Split", [y, sizes], parts, f"{level}.split", axis=1))
        corners = [
            b.node(op, [parts[0], parts[1]], f"{level}.{op.lower()}") for op in ("Sub", "Add")
        ]
        levels.append(b.node("Concat", [*corners, parts[2]], f"{level}.boxes", axis=1))
    boxes = b.node("Concat", levels, "boxes", axis=2)
    return [b.node("Transpose", [boxes], "y", perm=[0, 2, 1])]


def _two_outputs(b: Builder, x: str) -> list[str]:
    return [b.conv(x, WIDTH, "y"), x]


def _segmentation(b: Builder, x: str) -> list[str]:
    return [b.node("ArgMax", [b.conv(x, WIDTH, "logits")], "y", axis=1)]


TAILS: Mapping[str, Callable[[Builder, str], list[str]]] = {
    "classes": _classes,
    "decoded": _decoded,
    "two outputs": _two_outputs,
    "segmentation": _segmentation,
}


def placed_net(blocks: list[tuple[str, str]], tail: str) -> onnx.ModelProto:
    """Return a net of (block, activation) pairs and a tail.

    Args:
        blocks: keys of `BLOCKS` and `ACTIVATIONS`.
        tail: key of `TAILS`.
    """
    b = Builder(channels=WIDTH)
    x = "x"
    for place, (block, activation) in enumerate([("plain", "relu"), *blocks]):
        x = BLOCKS[block](b, x, f"b{place}", ACTIVATIONS[activation])
    return b.model(*TAILS[tail](b, x))
