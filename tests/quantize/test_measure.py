"""The unit in which errors of outputs and of a detector's raw heads are measured, brute force."""

from collections.abc import Mapping

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor

from reptrt.execute.torchgraph import TorchGraph
from reptrt.quantize.calib.measure import Measure
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


def numbers(sums: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, tuple[float, float]]:
    return {group: (float(signal), float(error)) for group, (signal, error) in sums.items()}


def places(values: Mapping[str, Tensor], names: list[str]) -> np.ndarray:
    """Return tensors (N, C, H, W) as rows of places (N, P, C), one after the other."""
    return np.concatenate([values[n].flatten(2).transpose(1, 2).numpy() for n in names], 1)


@pytest.mark.parametrize("order", [1, 2])
def test_boxes_count_by_the_score_of_their_place(order: int) -> None:
    measure, exact, noisy = values_of(detector("yolov6"))
    sums = numbers(measure.sums(exact, noisy, order))
    p, q = exact["scores.turned"].numpy(), noisy["scores.turned"].numpy()
    signal, error = np.zeros(2), np.zeros(2)
    for n in range(len(p)):
        for a in range(p.shape[1]):
            signal[0] += (p[n, a] ** order).sum()
            error[0] += (np.abs(p[n, a] - q[n, a]) ** order).sum()
            for name in ("boxes.low", "boxes.high"):
                b, c = exact[name][n, a].numpy(), noisy[name][n, a].numpy()
                signal[1] += p[n, a].max() * (np.abs(b) ** order).sum()
                error[1] += p[n, a].max() * (np.abs(b - c) ** order).sum()
    assert sums.keys() == {"scores", "boxes of 2"}
    assert sums["scores"] == pytest.approx((signal[0], error[0]), rel=1e-9)
    assert sums["boxes of 2"] == pytest.approx((signal[1], error[1]), rel=1e-9)


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
    assert sums["scores"] == pytest.approx((np.square(p).sum(), np.square(p - q).sum()), rel=1e-9)
    expected = ((w * np.square(b)).sum(), (w * np.square(b - c)).sum())
    assert sums["boxes of 4"] == pytest.approx(expected, rel=1e-9)
    assert CLASSES > 1


def test_bins_of_a_side_count_by_the_score_of_their_place() -> None:
    measure, exact, noisy = values_of(detector("yolov8"))
    sums = numbers(measure.sums(exact, noisy))
    w = exact["scores"].amax(1)[:, None, None, :]
    assert exact["bins.p"].dim() == 4
    (name,) = sums.keys() - {"scores"}
    error = float((w * (exact["bins.p"] - noisy["bins.p"]).square()).sum())
    assert sums[name] == pytest.approx((float((w * exact["bins.p"].square()).sum()), error))


@pytest.mark.parametrize("form", FORMS)
def test_equal_values_have_no_error(form: str) -> None:
    measure, exact, _ = values_of(detector(form))
    sums = numbers(measure.sums(exact, exact))
    assert measure.is_detector
    assert all(error == 0 and signal > 0 for signal, error in sums.values())


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
