"""The unit in which errors of outputs and of a detector's raw heads are measured, brute force."""

from collections.abc import Mapping

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor

from reptrt.execute.torchgraph import TorchGraph
from reptrt.quantize.calib.measure import Measure, added, relative
from tests.support.detector_nets import CLASSES, FORMS, SIZE, detector
from tests.support.onnx_nets import Builder

X = torch.rand(4, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


def values_of(model: onnx.ModelProto) -> tuple[Measure, dict[str, Tensor], dict[str, Tensor]]:
    """Return a measure, the compared tensors, and the same with noise, in float64."""
    graph = TorchGraph(model).double()
    measure = Measure(graph)
    with torch.no_grad():
        exact = graph.run({"x": X}, measure.names)
        noisy = graph.run({"x": X + 0.1 * X.square()}, measure.names)
    return measure, exact, noisy


def numbers(sums: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, tuple[object, object]]:
    """Return sums as numbers, those of scores as lists with one for each class."""
    return {group: (signal.tolist(), error.tolist()) for group, (signal, error) in sums.items()}


def places(values: Mapping[str, Tensor], names: list[str]) -> np.ndarray:
    """Return tensors (N, C, H, W) as rows of places (N, P, C), one after the other."""
    return np.concatenate([values[n].flatten(2).transpose(1, 2).numpy() for n in names], 1)


@pytest.mark.parametrize("order", [1, 2])
def test_boxes_count_by_the_score_of_their_place(order: int) -> None:
    measure, exact, noisy = values_of(detector("yolov6"))
    sums = numbers(measure.sums(exact, noisy, order))
    p, q = exact["scores.turned"].numpy(), noisy["scores.turned"].numpy()
    scores, boxes = np.zeros((2, CLASSES)), np.zeros(2)
    for n in range(len(p)):
        for a in range(p.shape[1]):
            scores += p[n, a] ** order, np.abs(p[n, a] - q[n, a]) ** order
            for name in ("boxes.low", "boxes.high"):
                b, c = exact[name][n, a].numpy(), noisy[name][n, a].numpy()
                boxes[0] += p[n, a].max() * (np.abs(b) ** order).sum()
                boxes[1] += p[n, a].max() * (np.abs(b - c) ** order).sum()
    assert sums.keys() == {"scores of 3", "boxes of 2"}
    np.testing.assert_allclose(sums["scores of 3"], scores, rtol=1e-9)
    np.testing.assert_allclose(sums["boxes of 2"], boxes, rtol=1e-9)


def test_objectness_multiplies_the_scores_of_classes() -> None:
    measure, exact, noisy = values_of(detector("yolox"))
    sums = numbers(measure.sums(exact, noisy))
    levels = ("0", "1")
    p, q = (
        places(v, [f"obj.{n}.p" for n in levels]) * places(v, [f"cls.{n}.p" for n in levels])
        for v in (exact, noisy)
    )
    b, c = (places(v, [f"reg.{n}" for n in levels]) for v in (exact, noisy))
    w = p.max(axis=2, keepdims=True)
    expected = np.square(p).sum((0, 1)), np.square(p - q).sum((0, 1))
    np.testing.assert_allclose(sums["scores of 3"], expected, rtol=1e-9)
    expected = (w * np.square(b)).sum(), (w * np.square(b - c)).sum()
    np.testing.assert_allclose(sums["boxes of 4"], expected, rtol=1e-9)


def test_the_objectness_of_anchors_is_their_first_channel() -> None:
    measure, exact, noisy = values_of(detector("yolov5"))
    sums = numbers(measure.sums(exact, noisy))
    conf = ([v[f"conf.{n}"].flatten(1, 3).numpy() for n in "01"] for v in (exact, noisy))
    p, q = (np.concatenate([c[..., :1] * c[..., 1:] for c in levels], 1) for levels in conf)
    expected = np.square(p).sum((0, 1)), np.square(p - q).sum((0, 1))
    np.testing.assert_allclose(sums["scores of 3"], expected, rtol=1e-9)
    b, c = (
        np.concatenate([v[f"{x}.{n}"].flatten(1, 3).numpy() for n in "01"], 1)
        for v in (exact, noisy)
        for x in ("xy",)
    )
    d, e = (
        np.concatenate([v[f"wh.{n}"].flatten(1, 3).numpy() for n in "01"], 1)
        for v in (exact, noisy)
    )
    w = p.max(axis=2, keepdims=True)
    error = (w * np.square(b - c)).sum() + (w * np.square(d - e)).sum()
    assert sums["boxes of 2"][1] == pytest.approx(error, rel=1e-9)


def test_the_background_is_no_class() -> None:
    measure, exact, noisy = values_of(detector("ssd"))
    sums = numbers(measure.sums(exact, noisy))
    background = int(exact["scores"].mean((0, 1)).argmax())
    p, q = (np.delete(v["scores"].numpy(), background, axis=2) for v in (exact, noisy))
    expected = np.square(p).sum((0, 1)), np.square(p - q).sum((0, 1))
    np.testing.assert_allclose(sums["scores of 3"], expected, rtol=1e-9)
    error = sum(
        (p.max(axis=2, keepdims=True) * np.square((exact[n] - noisy[n]).numpy())).sum()
        for n in ("boxes.low", "boxes.high")
    )
    assert sums["boxes of 2"][1] == pytest.approx(error, rel=1e-9)


def test_a_class_counts_by_the_root_of_its_power() -> None:
    signal, error = torch.tensor([4.0, 100.0, 0.0]), torch.tensor([1.0, 1.0, 0.0])
    assert float(relative(signal, error)) == pytest.approx((1 / 2 + 1 / 10) / (2 + 10 + 1))
    assert float(relative(torch.tensor(4.0), torch.tensor(1.0))) == pytest.approx(1 / 4)


def test_sums_add_up_over_batches() -> None:
    measure, exact, noisy = values_of(detector("yolov6"))
    whole = numbers(measure.sums(exact, noisy))
    halves = [
        measure.sums({k: v[at] for k, v in exact.items()}, {k: v[at] for k, v in noisy.items()})
        for at in (slice(0, 2), slice(2, 4))
    ]
    for group, pair in numbers(added(*halves)).items():
        np.testing.assert_allclose(pair, whole[group], rtol=1e-9)


def test_bins_of_a_side_count_by_the_score_of_their_place() -> None:
    measure, exact, noisy = values_of(detector("yolov8"))
    sums = numbers(measure.sums(exact, noisy))
    w = exact["scores"].amax(1)[:, None, None, :]
    assert exact["bins.p"].dim() == 4
    (name,) = sums.keys() - {"scores of 3"}
    error = float((w * (exact["bins.p"] - noisy["bins.p"]).square()).sum())
    assert sums[name] == pytest.approx((float((w * exact["bins.p"].square()).sum()), error))


@pytest.mark.parametrize("form", FORMS)
def test_equal_values_have_no_error(form: str) -> None:
    measure, exact, _ = values_of(detector(form))
    sums = numbers(measure.sums(exact, exact))
    assert measure.is_detector
    assert all(np.max(error) == 0 and np.min(signal) > 0 for signal, error in sums.values())


def test_what_nobody_sees_hardly_counts() -> None:
    """Boxes of empty places move by ten strides, a box with an object by a hundredth of one."""
    measure, exact, _ = values_of(detector("yolov6"))
    scores = exact["scores.turned"]
    scores[:, 1:] = 1e-12
    exact["scores.turned"] = scores
    empty, full = dict(exact), dict(exact)
    for name in ("boxes.low", "boxes.high"):
        empty[name], full[name] = exact[name].clone(), exact[name].clone()
        empty[name][:, 1:] += 10
        full[name][:, 0] += 0.01
    errors = [numbers(measure.sums(exact, v))["boxes of 2"][1] for v in (empty, full)]
    assert 0 < errors[0] < errors[1]


def test_outputs_of_other_nets_are_measured_one_by_one() -> None:
    b = Builder()
    body = b.relu(b.conv("x", 8, "body"))
    model = b.model(b.conv(body, 3, "cls"), b.conv(body, 4, "reg"))
    graph = TorchGraph(model)
    measure = Measure(graph)
    assert not measure.is_detector
    assert measure.names == ("cls", "reg")
    exact = graph.run({"x": X[:, :, :8, :8]}, measure.names)
    sums = numbers(measure.sums(exact, {n: v + 1 for n, v in exact.items()}))
    for name, value in exact.items():
        assert sums[name] == pytest.approx((float(value.square().sum()), value.numel()), rel=1e-5)


def test_heads_without_scores_count_one_by_one() -> None:
    """Two maps of a segmentation net, which are resized behind the last layer."""
    b = Builder()
    body = b.relu(b.conv("x", 8, "body"))
    scales = b.constant("scales", np.float32([1, 1, 2, 2]))
    maps = [b.conv(body, 4, name) for name in ("main", "aux")]
    model = b.model(*(b.node("Resize", [m, "", scales], f"{m}.up", mode="linear") for m in maps))
    measure = Measure(TorchGraph(model))
    exact = {name: torch.full((2, 4, 8, 8), value) for name, value in (("main", 1.0), ("aux", 9.0))}
    sums = numbers(measure.sums(exact, {name: value + 1 for name, value in exact.items()}))
    assert {name: power for name, (power, _) in sums.items()} == {"main": 512, "aux": 512 * 81}
