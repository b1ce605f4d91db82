"""Collecting: every value is counted once, with the same bits in any order, in bounded memory."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from reptrt.core.errors import CalibrationError
from reptrt.data.dataset import Dataset, open_dataset
from reptrt.execute.torchgraph import TorchGraph
from reptrt.graph.net import net_from_model
from reptrt.graph.placement import Activation
from reptrt.graph.preprocess import Preprocess
from reptrt.pipeline.candidates import factors_of_tensors
from reptrt.quantize.calib.channels import collect_channels
from reptrt.quantize.calib.collect import COMPUTE_BATCH, Kept, collect, collect_kept, merge_groups
from reptrt.quantize.calib.histogram import Histogram, histogram_of
from reptrt.rewrite.equalize import equalize, find_streams
from tests.support.helpers import ort_run
from tests.support.onnx_nets import Builder, basic_block
from tests.support.qdq_nets import residual_net, with_outputs

TENSORS = ["x", "stem.relu", "c1.relu", "add.relu", "pool"]
PIXELS = np.random.default_rng(5).integers(0, 256, (2 * COMPUTE_BATCH + 5, 3, 8, 8), dtype=np.uint8)
PREPROCESS = Preprocess(3, 8, 8, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))


@dataclass(frozen=True)
class Pixels:
    """An array as the source of a data set."""

    pixels: np.ndarray

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.pixels[start:stop]


def dataset_of(pixels: np.ndarray) -> Dataset:
    return Dataset("memory", len(pixels), None, PREPROCESS, Pixels(pixels))


def collected(
    pixels: np.ndarray, model: onnx.ModelProto, tensors: list[str] = TENSORS
) -> dict[str, Histogram]:
    with torch.inference_mode():
        return dict(collect(TorchGraph(model), dataset_of(pixels), tensors).histograms)


def assert_equal(got: dict[str, Histogram], expected: dict[str, Histogram]) -> None:
    assert set(got) == set(expected)
    for name, histogram in expected.items():
        np.testing.assert_array_equal(got[name].counts, histogram.counts, err_msg=name)
        for field in ("width", "zeros", "minimum", "maximum"):
            assert getattr(got[name], field) == getattr(histogram, field), (name, field)


def test_every_value_of_every_image_is_counted_once() -> None:
    model = basic_block()
    x = next(dataset_of(PIXELS).batches(len(PIXELS)))
    expected = ort_run(with_outputs(model, TENSORS), {"x": x}) | {"x": x}
    found = collected(PIXELS, model)
    for name in TENSORS:
        values = expected[name]
        histogram = found[name]
        assert histogram.counts.sum() + histogram.zeros == values.size
        # onnxruntime adds up in another order: a few values cross the border of a bin, and of
        # the ReLU
        assert histogram.maximum == pytest.approx(float(np.abs(values).max()), rel=1e-5)
        assert abs(histogram.zeros - int((values == 0).sum())) <= 2
        same = histogram_of(torch.from_numpy(values)).counts
        assert np.abs(histogram.counts - same).sum() <= 0.02 * values.size


@pytest.mark.parametrize("seed", range(4))
def test_the_order_of_the_images_changes_no_bit(seed: int) -> None:
    model = residual_net()
    tensors = [name for node in model.graph.node if (name := node.output[0]) != "head"]
    expected = collected(PIXELS, model, tensors)
    order = np.random.default_rng(seed).permutation(len(PIXELS))
    assert_equal(collected(PIXELS[order], model, tensors), expected)


@pytest.mark.parametrize("count", [1, COMPUTE_BATCH - 1, COMPUTE_BATCH, COMPUTE_BATCH + 1])
def test_parts_add_up_to_the_whole(count: int) -> None:
    """The images that fill up the last batch are not counted and do not change the others."""
    model = basic_block()
    first, second = collected(PIXELS[:count], model), collected(PIXELS[count:], model)
    merged = {name: first[name].merged(second[name]) for name in first}
    assert_equal(merged, collected(PIXELS, model))


def test_an_axis_that_holds_the_batch_and_more() -> None:
    b = Builder()
    y = b.node("Reshape", [b.relu("x"), b.constant("rows", np.int64([-1, 8]))], "rows.out")
    model = b.model(b.node("Sigmoid", [y], "y"))
    found = collected(PIXELS[:5], model, ["rows.out"])["rows.out"]
    assert found.counts.sum() + found.zeros == PIXELS[:5].size


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e35])
def test_a_tensor_that_is_no_number_is_named(bad: float) -> None:
    model = basic_block()
    for tensor in model.graph.initializer:
        if tensor.name == "c1.bias":
            values = onnx.numpy_helper.to_array(tensor).copy()
            values[3] = bad
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    with pytest.raises(CalibrationError, match=r"c1\.relu: holds NaN, Inf or values past 1e30"):
        collected(PIXELS, model)


def single(values: list[float]) -> Histogram:
    return histogram_of(torch.tensor(values))


def test_tensors_of_a_group_get_one_histogram() -> None:
    activations = (
        Activation("a", (("cat", 0),), 0),
        Activation("b", (("conv", 0),), 1),
        Activation("c", (("cat", 1),), 0),
    )
    found = {"a": single([1.0, 0.0]), "b": single([5.0]), "c": single([-3.0])}
    merged = merge_groups(activations, found)
    assert set(merged) == {0, 1}
    assert_equal({"g": merged[0]}, {"g": single([1.0, 0.0, -3.0])})
    assert_equal({"g": merged[1]}, {"g": single([5.0])})


def test_only_images_that_are_all_equal_are_said_to_be() -> None:
    same = np.repeat(PIXELS[:1], COMPUTE_BATCH + 3, axis=0)
    other = same.copy()
    other[-1, 0, 0, 0] ^= 1
    graph = TorchGraph(basic_block())
    found = [collect(graph, dataset_of(p), ["x"]).same_images for p in (same, other, same[:1])]
    assert found == [True, False, False]


def test_a_folder_and_an_array_of_the_same_pixels(tmp_path: Path) -> None:
    from PIL import Image

    (tmp_path / "folder").mkdir()
    for i, pixels in enumerate(PIXELS):
        Image.fromarray(pixels.transpose(1, 2, 0)).save(tmp_path / "folder" / f"{i:03d}.png")
    np.savez(tmp_path / "all.npz", x=PIXELS)
    np.save(tmp_path / "all.npy", PIXELS)
    sources = [
        open_dataset(tmp_path / name, PREPROCESS) for name in ("folder", "all.npz", "all.npy")
    ]
    graph = TorchGraph(basic_block())
    with torch.inference_mode():
        found = [dict(collect(graph, dataset, TENSORS).histograms) for dataset in sources]
    assert_equal(found[1], found[0])
    assert_equal(found[2], found[0])


_PEAK = """
import resource, sys
import numpy as np, torch
from tests.quantize.test_collect import Dataset, PREPROCESS, Path, TorchGraph, collect
from tests.support.onnx_nets import Builder
from reptrt.graph.preprocess import Preprocess

class Made:
    def read(self, start, stop):
        return np.full((stop - start, 3, 64, 64), start % 251, np.uint8)

b = Builder(size=64)
y = b.relu(b.conv("x", 16, "c1"))
graph = TorchGraph(b.model(b.head(b.relu(b.conv(y, 16, "c2")))))
preprocess = Preprocess.plain(3, 64, 64)
for count in (64, 1024):
    with torch.inference_mode():
        collect(graph, Dataset("made", count, None, preprocess, Made()), ["x", "c1.relu"])
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_images() -> None:
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", _PEAK], cwd=root, capture_output=True, text=True, check=True
    )
    few, many = (int(line) / 1024 for line in done.stdout.split())  # MiB
    # the images alone would be 180 MiB as floats, their activations 4 GiB
    assert many - few < 20


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_statistics_per_channel(seed: int | None) -> None:
    model = basic_block()
    pixels = (
        PIXELS if seed is None else PIXELS[np.random.default_rng(seed).permutation(len(PIXELS))]
    )
    names = ["x", "stem.relu", "add.relu", "pool", "flat"]
    x = next(dataset_of(PIXELS).batches(len(PIXELS)))
    expected = ort_run(with_outputs(model, names), {"x": x}, optimize=False) | {"x": x}
    with torch.inference_mode():
        graph = TorchGraph(model)
        found = collect_channels(graph, dataset_of(pixels), names)
        as_they_are = collect_channels(graph, dataset_of(PIXELS), names)
    for name in names:
        values = expected[name].astype(np.float64)
        others = tuple(axis for axis in range(values.ndim) if axis != 1)
        np.testing.assert_allclose(found[name].maximum, np.abs(values).max(others), rtol=1e-5)
        np.testing.assert_allclose(found[name].mean_square, (values**2).mean(others), rtol=1e-5)
        np.testing.assert_array_equal(found[name].maximum, as_they_are[name].maximum)
        np.testing.assert_allclose(
            found[name].mean_square, as_they_are[name].mean_square, rtol=1e-12
        )


def test_kept_values_give_what_a_pass_over_the_scaled_net_gives() -> None:
    """Oracle: the equalized net, run again; powers of two scale without rounding."""
    net, dataset = net_from_model(basic_block()), dataset_of(PIXELS)
    names = ["x", "stem.relu", "add.relu", "pool"]
    streams = find_streams(net)[0]
    assert streams
    rng = np.random.default_rng(3)
    kept = Kept(1 << 30, dataset.length)
    with torch.inference_mode():
        collect_channels(TorchGraph(net), dataset, names, kept)
        sizes = {s.name: s.producers[0].inputs[1].values.shape[0] for s in streams}
        factors = {name: 2.0 ** rng.integers(-3, 4, size) for name, size in sizes.items()}
        scaled = factors_of_tensors(net, factors)
        equalize(net, streams, factors)
        expected = collect(TorchGraph(net), dataset, names, names)
        assert kept.holds(names)
        kept.factors = scaled
        found = collect_kept(kept, dataset, names, names)
    assert not scaled.keys().isdisjoint(names)
    assert_equal(dict(found.histograms), dict(expected.histograms))
    for name in names:
        torch.testing.assert_close(found.means[name], expected.means[name], rtol=1e-6, atol=0)


@pytest.mark.parametrize("images", [3, 100])
def test_nothing_is_kept_that_would_not_fit_for_all_images(images: int) -> None:
    value = torch.zeros(COMPUTE_BATCH, 4)
    kept = Kept(16 * 100, images)
    kept.record("a", COMPUTE_BATCH, value)
    assert kept.holds(["a"])
    kept.record("b", COMPUTE_BATCH, value)  # with both, 2 x 16 bytes for each image
    assert kept.holds(["a", "b"]) == (images == 3)
    kept.clear()
    assert not kept.holds(["a"])
