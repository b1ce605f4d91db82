"""Every operator against onnxruntime, in both precisions, and whatever the order of a batch."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from onnx import TensorProto

from reptrt.core.errors import RewriteError
from reptrt.execute.torchgraph import TorchGraph
from reptrt.execute.torchops import OPERATORS
from tests.support.helpers import ort_run
from tests.support.operator_cases import (
    BINARY,
    C2,
    CASES,
    INTS,
    LAYERS,
    QUANTIZE,
    RESIZE,
    SCALE,
    UNARY,
    Array,
    Case,
    X,
    case_id,
    data,
    ints,
    resize,
)


def torch_run(
    case: Case, double: bool = False, feed: dict[str, Array] | None = None
) -> list[Array]:
    graph = TorchGraph(case.model())
    inputs = {name: torch.from_numpy(np.asarray(x)) for name, x in (feed or case.feed()).items()}
    if double:
        graph = graph.double()
    outputs = graph.run(inputs, graph.output_names)
    return [outputs[name].numpy() for name in graph.output_names]


def assert_equals_onnxruntime(case: Case) -> None:
    """Equal shapes, types and values: 5e-6 relative to the largest output covers float32 sums."""
    expected = list(ort_run(case.model(), case.feed(), optimize=False).values())
    for got, want in zip(torch_run(case), expected, strict=True):
        assert got.shape == want.shape
        assert got.dtype == want.dtype
        scale = max(1.0, float(np.abs(want).max(initial=0)))
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=5e-6 * scale)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_operator_equals_onnxruntime(case: Case) -> None:
    assert_equals_onnxruntime(case)


def test_every_operator_has_a_case() -> None:
    assert {case.op for case in CASES} == set(OPERATORS)


FLOAT_CASES = [
    case
    for case in CASES
    if all(x.dtype == np.float32 for x in case.x) and not {"Cast", "Resize"} & {case.op}
]


@pytest.mark.parametrize("case", FLOAT_CASES, ids=case_id)
def test_double_precision_refines_the_same_result(case: Case) -> None:
    feed = {name: x.astype(np.float64) for name, x in case.feed().items()}
    for single, double in zip(torch_run(case), torch_run(case, True, feed), strict=True):
        if single.dtype == np.float32 and not case.op.startswith("ConstantOfShape"):
            assert double.dtype == np.float64
        if case.op != "QuantizeLinear":  # a code may differ where x / scale is near a tie
            scale = max(1.0, float(np.abs(double).max(initial=0)))
            np.testing.assert_allclose(single, double, rtol=1e-5, atol=5e-6 * scale)


def test_float64_is_computed_in_float64() -> None:
    # exp(1) in float32 differs from the float64 value in the eighth digit.
    case = Case("Exp", (np.ones(1, np.float32),))
    assert torch_run(case, double=True, feed={"x0": np.ones(1)})[0][0] == np.exp(np.float64(1))


BATCH = 7
ALONG_BATCH = {  # reads along the batch, or is given something that is no batch
    "Cast-from-bool",
    "Clip-computed",
    "Conv-computed-weight",
    "Gemm-scaled",
    "MatMul-batched",
    "Not",
    "CastLike",
    "Cast-float",
    "Conv-3d",
}
PER_IMAGE = [
    case
    for case in [*UNARY, *LAYERS, *RESIZE, *QUANTIZE[:4], *BINARY]
    if case_id(case) not in ALONG_BATCH and len(case.x) == 1 and case.x[0].dtype == np.float32
]


def _batch_shape(case: Case, large: bool) -> list[int]:
    """Return an odd-sized batch of the case's images, enlarged so that several threads share it."""
    shape = [BATCH, *case.x[0].shape[1:]]
    if case.op == "Resize" and any(c is not None and c.dtype == np.int64 for c in case.constants):
        return [3, *shape[1:]]  # the graph fixes the batch
    if large and len(shape) == 4 and case.op not in ("LayerNormalization", "MatMul", "Resize"):
        return [*shape[:2], 61, 43]
    return shape


@pytest.mark.slow
@pytest.mark.parametrize(
    ("threads", "large"), [(1, False), (2, False), (2, True)], ids=["one", "two", "two-large"]
)
@pytest.mark.parametrize("case", PER_IMAGE, ids=case_id)
def test_an_image_gives_the_same_bits_anywhere_in_a_batch(
    case: Case, threads: int, large: bool, torch_threads: Callable[[int], None]
) -> None:
    torch_threads(threads)
    x = data(*_batch_shape(case, large), seed=5, low=0.1)
    (y,) = torch_run(case, feed={"x0": x})
    for seed in range(2):
        order = np.random.default_rng(seed).permutation(len(x))
        (moved,) = torch_run(case, feed={"x0": x[order]})
        np.testing.assert_array_equal(moved, y[order])


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    "sizes", [(5, 8, 1), (13, 10, 1), (46, 6, 2), (32, 1, 1), (70, 8, 1)], ids=str
)
def test_pointwise_convolutions_give_the_same_bits_anywhere_in_a_batch(
    sizes: tuple[int, int, int], threads: int, torch_threads: Callable[[int], None]
) -> None:
    # Uneven channel counts on one thread: torch's own convolution fails this.
    channels, filters, group = sizes
    torch_threads(threads)
    weight = data(filters, channels // group, 1, 1, seed=1)
    case = Case("Conv", (data(9, channels, 33, 5),), (weight, data(filters)), {"group": group})
    order = np.random.default_rng(1).permutation(9)
    (y,) = torch_run(case)
    (moved,) = torch_run(case, feed={"x0": case.x[0][order]})
    np.testing.assert_array_equal(moved, y[order])
    assert_equals_onnxruntime(case)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("rows", [1, 2, 7, 33])
@pytest.mark.parametrize(("inputs", "outputs"), [(7, 6), (100, 7), (256, 10), (48, 12)])
def test_a_row_of_a_matrix_product_is_the_same_in_any_batch(
    inputs: int, outputs: int, rows: int, threads: int, torch_threads: Callable[[int], None]
) -> None:
    torch_threads(threads)
    case = Case("Gemm", (data(40, inputs),), (data(outputs, inputs, seed=1),), {"transB": 1})
    (whole,) = torch_run(case)
    (part,) = torch_run(case, feed={"x0": case.x[0][:rows]})
    np.testing.assert_array_equal(part, whole[:rows])


@pytest.fixture
def torch_threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@st.composite
def windows(draw: st.DrawFn) -> dict[str, Any]:
    """Return the geometry of a two-dimensional window that fits a 9 x 8 image."""
    kernel = [draw(st.integers(1, 4)) for _ in range(2)]
    return {
        "kernel_shape": kernel,
        "strides": [draw(st.integers(1, 3)) for _ in range(2)],
        "pads": [draw(st.integers(0, kernel[i % 2] - 1)) for i in range(4)],
    }


AUTO_PADS = st.sampled_from(["NOTSET", "SAME_UPPER", "SAME_LOWER", "VALID"])


def _auto(window: dict[str, Any], auto: str) -> dict[str, Any]:
    kept = {key: value for key, value in window.items() if key != "pads" or auto == "NOTSET"}
    return {**kept, "auto_pad": auto}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    windows(),
    AUTO_PADS,
    st.sampled_from([(4, 1), (6, 2), (4, 4)]),
    st.integers(1, 2),
    st.booleans(),
)
def test_conv_geometry(
    window: dict[str, Any], auto: str, sizes: tuple[int, int], dilation: int, bias: bool
) -> None:
    channels, group = sizes
    weight = data(2 * group, channels // group, *window["kernel_shape"], seed=1)
    attrs = {**_auto(window, auto), "group": group}
    if auto in ("NOTSET", "VALID"):
        attrs["dilations"] = [dilation, 1]
    constants = (weight, data(2 * group, seed=2)) if bias else (weight,)
    assert_equals_onnxruntime(Case("Conv", (data(2, channels, 9, 8),), constants, attrs))


# A last window that would start in the padding behind the image is left out.
OVERHANG = {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [0, 0, 1, 2]}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(windows(), AUTO_PADS, st.booleans(), st.booleans())
@example(OVERHANG, "NOTSET", True, False)
@example(OVERHANG, "NOTSET", True, True)
def test_average_pool_geometry(
    window: dict[str, Any], auto: str, ceil: bool, include: bool
) -> None:
    attrs = {**_auto(window, auto), "count_include_pad": int(include)}
    if auto == "NOTSET":
        attrs["ceil_mode"] = int(ceil)
    assert_equals_onnxruntime(Case("AveragePool", (data(2, 3, 9, 8),), attrs=attrs, opset=19))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(windows(), AUTO_PADS, st.booleans(), st.integers(1, 2))
@example(OVERHANG, "NOTSET", True, 1)
def test_max_pool_geometry(window: dict[str, Any], auto: str, ceil: bool, dilation: int) -> None:
    attrs = _auto(window, auto)
    if auto == "NOTSET":
        attrs["ceil_mode"] = int(ceil)
    if auto in ("NOTSET", "VALID"):
        attrs["dilations"] = [1, dilation]
    else:  # onnxruntime ignores dilations here, and fails where a stride exceeds its kernel
        attrs["strides"] = list(map(min, attrs["strides"], attrs["kernel_shape"]))
    assert_equals_onnxruntime(Case("MaxPool", (data(2, 3, 9, 8),), attrs=attrs, opset=19))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.integers(1, 12),
    st.sampled_from(["half_pixel", "align_corners", "asymmetric", "pytorch_half_pixel"]),
    st.sampled_from(["floor", "ceil", "round_prefer_floor", "round_prefer_ceil"]),
)
def test_nearest_resize_geometry(size: int, coordinates: str, rounding: str) -> None:
    case = resize(
        sizes=[3, 4, size, 10], coordinate_transformation_mode=coordinates, nearest_mode=rounding
    )
    assert_equals_onnxruntime(case)


REFUSED = {
    "cubic": (resize([1, 1, 2, 2], mode="cubic"), "Resize with mode cubic"),
    "antialias": (resize([1, 1, 2, 2], opset=18, antialias=1), "antialias 1"),
    "crop": (
        resize([1, 1, 2, 2], coordinate_transformation_mode="tf_crop_and_resize"),
        "tf_crop_and_resize",
    ),
    "asymmetric linear": (
        resize([1, 1, 2, 2], mode="linear", coordinate_transformation_mode="asymmetric"),
        "mode linear with coordinate_transformation_mode asymmetric",
    ),
    "indices": (
        Case("MaxPool", (X,), attrs={"kernel_shape": [2, 2]}, outputs=2),
        "MaxPool with 2 outputs in use",
    ),
    "training": (
        Case("Dropout", (X,), (np.float32(0.5), np.bool_(True))),
        "Dropout with training mode",
    ),
    "output_shape": (
        Case("ConvTranspose", (C2,), (data(6, 4, 3, 3),), {"output_shape": [20, 20]}),
        "auto_pad or output_shape",
    ),
    "wrap": (Case("Pad", (X,), (ints(0, 0, 1, 1, 0, 0, 1, 1),), {"mode": "wrap"}, 19), "mode wrap"),
    "string": (Case("Cast", (X,), attrs={"to": TensorProto.STRING}), "Cast with type STRING"),
    "block": (
        Case("DequantizeLinear", (INTS.astype(np.int8),), (SCALE,), {"block_size": 2}, 21),
        "DequantizeLinear with block_size 2",
    ),
    "fp8": (
        Case("QuantizeLinear", (X,), (SCALE,), {"output_dtype": TensorProto.FLOAT8E4M3FN}, 21),
        "QuantizeLinear with",
    ),
}


@pytest.mark.parametrize("refused", REFUSED)
def test_a_form_that_cannot_be_run_is_named_before_anything_runs(refused: str) -> None:
    case, reason = REFUSED[refused]
    with pytest.raises(RewriteError, match=rf"1 nodes cannot be run: .*{reason}.*\(node\)"):
        torch_run(case)
