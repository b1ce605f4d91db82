"""Small detectors with the decoding tails of well-known families, as their exporters write them."""

from collections.abc import Callable, Mapping

import numpy as np
import onnx

from tests.support.onnx_nets import Builder

CLASSES, SIZE, BINS = 3, 16, 4
_LEVELS = (8, 4)  # height and width
_PLACES = sum(size * size for size in _LEVELS)


class DetectorBuilder(Builder):
    """Two levels of features, and what decodes them."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(size=SIZE, seed=seed)
        first = self.relu(self.conv("x", 8, "stem", strides=[2, 2]))
        self.levels = (first, self.relu(self.conv(first, 8, "down", strides=[2, 2])))

    def prediction(self, name: str, outputs: int, level: int, bias: float = 0.0) -> str:
        made = self.conv(self.levels[level], outputs, f"{name}.{level}", size=1)
        shift = np.full(outputs, bias, np.float32)
        self.constants[-1].raw_data = shift.tobytes()  # the bias is the constant made last
        return made

    def reshaped(self, x: str, *shape: int, name: str | None = None) -> str:
        name = name or f"{x}.flat"
        return self.node("Reshape", [x, self.constant(f"{name}.shape", np.array(shape))], name)

    def flat(self, x: str, channels: int) -> str:
        """(N, C, H, W) -> (N, C, H W)."""
        return self.reshaped(x, 0, channels, -1)

    def joined(self, parts: list[str], name: str, axis: int = 2) -> str:
        return self.node("Concat", parts, name, axis=axis)

    def turned(self, x: str) -> str:
        return self.node("Transpose", [x], f"{x}.turned", perm=[0, 2, 1])

    def numbers(self, name: str, *values: float) -> str:
        return self.constant(name, np.array(values, np.float32))

    def split(self, x: str, sizes: list[int], axis: int, names: list[str]) -> list[str]:
        self.constant(f"{x}.sizes", np.array(sizes))
        node = onnx.helper.make_node("Split", [x, f"{x}.sizes"], names, name=f"{x}.split")
        node.attribute.append(onnx.helper.make_attribute("axis", axis))
        self.nodes.append(node)
        self.channels |= dict.fromkeys(names, 0)
        return names

    def boxes(self, sides: str, name: str = "boxes", axis: int = 2) -> str:
        """Grid centres minus and plus two distances each, times a stride: xyxy in pixels."""
        low, high = self.split(sides, [2, 2], axis, [f"{name}.low", f"{name}.high"])
        shape = (1, _PLACES, 2) if axis == 2 else (1, 2, _PLACES)
        grid = self.rng.integers(0, 8, shape).astype(np.float32) + 0.5
        self.constant(f"{name}.grid", grid)
        corners = [
            self.node("Sub", [f"{name}.grid", low], f"{name}.from"),
            self.node("Add", [f"{name}.grid", high], f"{name}.to"),
        ]
        joined = self.joined(corners, f"{name}.corners", axis)
        return self.node("Mul", [joined, self.numbers(f"{name}.stride", 8.0)], name)


def _yolov6(b: DetectorBuilder) -> list[str]:
    scores, sides = [], []
    for level in range(2):
        logits = b.prediction("cls", CLASSES, level, -3.0)
        scores.append(b.flat(b.node("Sigmoid", [logits], f"cls.{level}.p"), CLASSES))
        sides.append(b.flat(b.prediction("reg", 4, level, 1.0), 4))
    boxes = b.boxes(b.turned(b.joined(sides, "sides")))
    ones = b.constant("ones", np.ones((1, _PLACES, 1), np.float32))
    batch = b.node("Mul", [b.node("ReduceMax", [boxes], "any", axes=[2], keepdims=1), "zero"], "0s")
    b.numbers("zero", 0.0)
    b.node("Add", [batch, ones], "certain")
    return [b.joined([boxes, "certain", b.turned(b.joined(scores, "scores"))], "y")]


def _yolox(b: DetectorBuilder) -> list[str]:
    levels = []
    for level in range(2):
        parts = [b.prediction("reg", 4, level)]
        for name, count in (("obj", 1), ("cls", CLASSES)):
            logits = b.prediction(name, count, level, -3.0)
            parts.append(b.node("Sigmoid", [logits], f"{name}.{level}.p"))
        levels.append(b.flat(b.joined(parts, f"level.{level}", 1), 5 + CLASSES))
    everything = b.turned(b.joined(levels, "places"))
    centre, size, rest = b.split(everything, [2, 2, 1 + CLASSES], 2, ["centre", "size", "rest"])
    b.constant("grid", b.rng.integers(0, 8, (1, _PLACES, 2)).astype(np.float32))
    moved = b.node("Add", [centre, "grid"], "moved")
    return [b.joined([moved, b.node("Exp", [size], "grown"), rest], "y")]


def _yolov5(b: DetectorBuilder) -> list[str]:
    places = []
    for level, edge in enumerate(_LEVELS):
        raw = b.prediction("head", 2 * (5 + CLASSES), level, -2.0)
        shaped = b.reshaped(raw, 0, 2, 5 + CLASSES, edge, edge)
        last = b.node("Transpose", [shaped], f"{raw}.last", perm=[0, 1, 3, 4, 2])
        p = b.node("Sigmoid", [last], f"{raw}.p")
        names = [f"{part}.{level}" for part in ("xy", "wh", "conf")]
        xy, wh, conf = b.split(p, [2, 2, 1 + CLASSES], 4, names)
        b.constant(f"grid.{level}", b.rng.integers(0, 8, (1, 1, edge, edge, 2)).astype(np.float32))
        at = b.node("Add", [b.node("Mul", [xy, b.numbers(f"two.{level}", 2)], f"xy2.{level}"),
                            f"grid.{level}"], f"at.{level}")  # fmt: skip
        b.numbers(f"anchor.{level}", 8.0)
        size = b.node("Mul", [b.node("Pow", [wh, b.numbers(f"power.{level}", 2)], f"wh2.{level}"),
                              f"anchor.{level}"], f"size.{level}")  # fmt: skip
        level_rows = b.joined([at, size, conf], f"rows.{level}", 4)
        places.append(b.reshaped(level_rows, 0, -1, 5 + CLASSES))
    return [b.joined(places, "y", 1)]


def _yolov8(b: DetectorBuilder) -> list[str]:
    levels = []
    for level in range(2):
        parts = [b.prediction("bins", 4 * BINS, level), b.prediction("cls", CLASSES, level, -3.0)]
        levels.append(b.flat(b.joined(parts, f"level.{level}", 1), 4 * BINS + CLASSES))
    names = ["bins", "logits"]
    bins, logits = b.split(b.joined(levels, "places"), [4 * BINS, CLASSES], 1, names)
    turned = b.node("Transpose", [b.reshaped(bins, 0, 4, BINS, _PLACES)], "bins.last",
                    perm=[0, 2, 1, 3])  # fmt: skip
    p = b.node("Softmax", [turned], "bins.p", axis=1)
    b.constant("range", np.arange(BINS, dtype=np.float32).reshape(1, BINS, 1, 1))
    weighed = [b.node("Mul", [p, "range"], "weighed"), b.constant("axes", np.array([1]))]
    sides = b.node("ReduceSum", weighed, "sides", keepdims=0)
    scores = b.node("Sigmoid", [logits], "scores")
    return [b.joined([b.boxes(sides, axis=1), scores], "y", 1)]


def _ssd(b: DetectorBuilder) -> list[str]:
    logits, offsets = [], []
    for level in range(2):
        logits.append(b.flat(b.prediction("cls", 1 + CLASSES, level), 1 + CLASSES))
        offsets.append(b.flat(b.prediction("reg", 4, level), 4))
    boxes = b.boxes(b.turned(b.joined(offsets, "offsets")))
    return [boxes, b.node("Softmax", [b.turned(b.joined(logits, "logits"))], "scores", axis=2)]


def _centres(b: DetectorBuilder) -> list[str]:
    heat = b.node("Sigmoid", [b.prediction("heat", CLASSES, 0, -2.0)], "heat")
    pool = b.node("MaxPool", [heat], "near", kernel_shape=[3, 3], pads=[1] * 4, strides=[1, 1])
    peak = b.node("Cast", [b.node("Equal", [heat, pool], "equal")], "peak", to=1)
    size = b.node("Relu", [b.prediction("size", 2, 0, 1.0)], "size")
    return [b.node("Mul", [heat, peak], "kept"), b.node("Exp", [size], "grown")]


FORMS: Mapping[str, Callable[[DetectorBuilder], list[str]]] = {
    "yolov6": _yolov6,
    "yolox": _yolox,
    "yolov5": _yolov5,
    "yolov8": _yolov8,
    "ssd": _ssd,
    "centres": _centres,
}
"""Name -> what decodes the levels of a builder and returns the names of the outputs."""


def detector(form: str, seed: int = 0) -> onnx.ModelProto:
    """Return a detector (N, 3, 16, 16) -> boxes and scores in the form of a family."""
    builder = DetectorBuilder(seed)
    return builder.model(*FORMS[form](builder), opset=17)
