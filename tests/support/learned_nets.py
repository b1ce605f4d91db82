"""A tiny net with the weights of a fused rep-net, quick to learn, and images for it."""

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import numpy_helper

from reptrt.core.grid import Grid, scale_from_amax
from reptrt.data.dataset import Dataset, open_dataset
from reptrt.graph.net import Net, model_from_net, net_from_model
from reptrt.graph.placement import place
from reptrt.graph.plan import QuantPlan, plan_from_placement
from reptrt.graph.preprocess import Preprocess, write_preprocess
from reptrt.graph.qdq import insert_qdq, quantize_weights
from reptrt.quantize.reconstruct.driver import Quantized, reconstruct
from reptrt.quantize.reconstruct.options import LearnOptions, ReconstructReport
from reptrt.quantize.reconstruct.resume import Finished
from reptrt.rewrite.fold_affine import fold_affine
from reptrt.rewrite.insert_affine import insert_affine
from tests.support.helpers import ort_run
from tests.support.onnx_nets import Builder
from tests.support.qdq_nets import with_outputs

SIZE = 6
CHANNELS = 8


def rep_net(blocks: int = 3, seed: int = 0) -> onnx.ModelProto:
    """A stem, blocks whose identity is far larger than their other taps, and a head."""
    b = Builder(size=SIZE, seed=seed)
    y = b.relu(b.conv("x", CHANNELS, "stem"))
    for i in range(blocks):
        y = b.relu(b.conv(y, CHANNELS, f"block{i}"))
        kernel = next(t for t in b.constants if t.name == f"block{i}.weight")
        weight = 0.1 * numpy_helper.to_array(kernel)
        channels = np.arange(CHANNELS)
        weight[channels, channels, 1, 1] += b.rng.uniform(1.0, 2.0, CHANNELS)
        kernel.CopyFrom(numpy_helper.from_array(weight.astype(np.float32), kernel.name))
    return b.model(b.head(y))


def write_net(path: Path, model: onnx.ModelProto) -> Path:
    """Write a model with its preprocessing."""
    net = net_from_model(model)
    channels, height, width = net.graph.inputs[0].shape[1:]
    write_preprocess(net, Preprocess(channels, height, width, (0.5,) * 3, (0.25,) * 3))
    onnx.save(model_from_net(net), str(path))
    return path


def write_images(path: Path, count: int, seed: int = 0, size: int = SIZE) -> Path:
    """Write ramps of colour with a little noise as uint8 pixels; neighbours are similar."""
    rng = np.random.default_rng(seed)
    colour, across, down = rng.uniform(-1, 1, (3, count, 3, 1, 1))
    at = np.linspace(-1, 1, size)
    ramps = 128 + 60 * colour + 30 * across * at + 30 * down * at[:, None]
    noisy = ramps + rng.normal(0, 5, ramps.shape)
    np.savez(path, x=noisy.clip(0, 255).astype(np.uint8), y=rng.integers(0, 5, count))
    return path


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    """A net quantized to nearest, with everything that its reconstruction needs."""

    model: onnx.ModelProto
    net: Net  # Q/DQ, without affines
    reference: Net
    plan: QuantPlan
    data: Dataset
    grid: Grid

    def learn(self, folder: Path, options: LearnOptions) -> tuple[Net, ReconstructReport]:
        """Learn a copy of the net; affines are folded."""
        net = self.net.copy()
        if options.affine:
            insert_affine(net)
        report, plan = reconstruct(
            Quantized(net, self.reference, self.plan, self.grid),
            self.data,
            options,
            device=torch.device("cpu"),
            finished=Finished(folder / "o.onnx", {"options": asdict(options)}),
        )
        fold_affine(net, plan)
        return net, report

    def sqnr(self, net: Net, x: np.ndarray) -> float:
        """Return the SQNR of a net's first output by onnxruntime, in dB."""
        (expected,) = ort_run(self.model, {"x": x}).values()
        (got,) = ort_run(model_from_net(net.copy()), {"x": x}, optimize=False).values()
        return float(10 * np.log10(np.square(expected).sum() / np.square(got - expected).sum()))


def nearest(model: onnx.ModelProto, path: Path, *, weight_bits: int = 8, bits: int = 8) -> Case:
    """Quantize a model on images, to nearest, with the largest values as thresholds."""
    net = net_from_model(model)
    channels, height, width = net.graph.inputs[0].shape[1:]
    preprocess = Preprocess(channels, height, width, (0.5,) * 3, (0.25,) * 3)
    data = open_dataset(path, preprocess)
    (x,) = data.batches(data.length)
    placement = place(net)
    names = [activation.tensor for activation in placement.activations]
    values = ort_run(with_outputs(model, names), {"x": x}, optimize=False) | {"x": x}
    amax: dict[int, float] = {}
    for activation in placement.activations:
        largest = float(np.abs(values[activation.tensor]).max())
        amax[activation.group] = max(amax.get(activation.group, 0.0), largest)
    codes, grid = Grid.activation(bits), Grid.weight(weight_bits)
    scales = {a.tensor: float(scale_from_amax(amax[a.group], codes)) for a in placement.activations}
    reference = net.copy()
    plan = plan_from_placement(placement, scales, quantize_weights(net, placement, grid), codes)
    insert_qdq(net, plan)
    return Case(model, net, reference, plan, data, grid)
