"""Prove that a fused net computes what its source does, and tell fusion from float32's own error.

    |source - fused| <= tolerance * max |source|          in onnxruntime, per block and per output

Where that fails, both are compared with the source in float64, which is computed only then. A net
can be so ill-conditioned that float32 alone is as far from float64 as the fused net is; then fusion
is not to blame, the proof holds and says so. If the fused net is further off, it is refused.
"""

import contextlib
import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx
import torch
from torch import nn

from reptrt.core.errors import ReptrtError, RewriteError, option
from reptrt.execute.module_outputs import flat_outputs
from reptrt.execute.runner import OrtRunner
from reptrt.execute.torchgraph import TorchGraph
from reptrt.graph.net import Net
from reptrt.graph.preprocess import Preprocess

_PROBE_IMAGES = 2
_AS_FLOAT32 = 10.0  # a fused net may be this many times as far from float64 as its source

Arrays = Mapping[str, npt.NDArray[np.floating]]


@dataclass(frozen=True, slots=True)
class BlockDifference:
    """How far one tensor of the fused net is from the original."""

    name: str
    max_difference: float
    max_value: float  # largest |value| of the original, the unit of the tolerance

    @property
    def relative(self) -> float:
        """Max |difference| / max |value|."""
        return self.max_difference / self.max_value if self.max_value else self.max_difference


@dataclass(frozen=True, slots=True)
class Proof:
    """The differences found by running the fused net beside the original on the same images."""

    blocks: tuple[BlockDifference, ...]
    overall: BlockDifference  # of the output that differs most
    tolerance: float
    ill_conditioned: str | None = None  # what float32 costs the source, where it is past tolerance


def probe_images(preprocess: Preprocess, batch: int, seed: int = 0) -> npt.NDArray[np.float32]:
    """Return seeded images as preprocessing makes them: pixels of 0..255, half of them in patches.

    Even images are noise by pixel, odd ones noise in patches of 8 x 8 pixels, so that deep layers
    see contrast too. float32 (batch, C, H, W), or (batch, H, W, C) for a net of that layout.
    """
    generator = np.random.default_rng(seed)
    shape = (preprocess.channels, preprocess.height, preprocess.width)
    pixels = np.empty((batch, *shape))
    for image in pixels:
        image[:] = generator.integers(0, 256, shape)
    for image in pixels[1::2]:
        image[:] = image[:, ::8, ::8].repeat(8, axis=1).repeat(8, axis=2)[:, : shape[1], : shape[2]]
    if preprocess.values == "normalized":
        mean, std = (np.asarray(v).reshape(-1, 1, 1) for v in (preprocess.mean, preprocess.std))
        pixels = (pixels / 255.0 - mean) / std
    if preprocess.layout == "NHWC":
        pixels = pixels.transpose(0, 2, 3, 1)
    return np.ascontiguousarray(pixels, dtype=np.float32)


def block_outputs(net: Net, original: onnx.ModelProto, names: Sequence[str]) -> dict[str, str]:
    """Return, for each fused convolution, the first tensor behind it that both nets compute."""
    computed = {output for node in original.graph.node for output in node.output}
    outputs = {}
    for node in net.graph.nodes:
        if node.name in names:
            tensor = node.outputs[0]
            while tensor.name not in computed:  # only a part of a sum was fused
                tensor = tensor.outputs[0].outputs[0]
            outputs[node.name] = tensor.name
    return outputs


def prove(
    original: onnx.ModelProto,
    fused: onnx.ModelProto,
    blocks: Mapping[str, str],
    preprocess: Preprocess,
    *,
    tolerance: float,
    module: nn.Module | None = None,
) -> Proof:
    """Run original and fused net on the same images in onnxruntime and compare.

    Args:
        original: the net as exported.
        fused: the net after all rewrites.
        blocks: name of a fused convolution -> tensor that both nets compute there.
        preprocess: what images go through.
        tolerance: allowed max |difference| / max |value|, per block and per output.
        module: the torch net; the outputs are then compared with its own.

    Raises:
        RewriteError: a difference is past the tolerance, and float32 does not explain it.
    """
    batch = fused.graph.input[0].type.tensor_type.shape.dim[0].dim_value or _PROBE_IMAGES
    x = probe_images(preprocess, batch)
    outputs = [value.name for value in fused.graph.output]
    places = [*blocks.items(), *((name, name) for name in outputs)]
    tensors = [tensor for _, tensor in places]
    runs: dict[str, Arrays] = {
        "source": _run(original, tensors, x),
        "fused": _run(fused, tensors, x),
    }
    if module is not None:
        runs["torch"] = _named(outputs, _run_torch(module, torch.from_numpy(x)))
    expected = {**runs["source"], **runs.get("torch", {})}
    differences = [
        _difference(name, expected[tensor], runs["fused"][tensor]) for name, tensor in places
    ]
    past = [d for d in differences if not d.relative <= tolerance]
    note = None
    if past:
        exact = _exact_runs(original, module, x, tensors)
        notes = [_excuse(d, dict(places)[d.name], runs, exact, tolerance) for d in past]
        note = f"{notes[0]}{f' (and {len(notes) - 1} more)' if len(notes) > 1 else ''}"
    num_blocks = len(blocks)
    return Proof(
        blocks=tuple(differences[:num_blocks]),
        overall=max(differences[num_blocks:], key=lambda d: d.relative),
        tolerance=tolerance,
        ill_conditioned=note,
    )


def _excuse(
    difference: BlockDifference,
    tensor: str,
    runs: Mapping[str, Arrays],
    exact: Mapping[str, Arrays],
    tolerance: float,
) -> str:
    """Return what float32 costs the source where it explains a difference.

    Raises:
        RewriteError: it does not.
    """
    truths = {name: values[tensor] for name, values in exact.items() if tensor in values}
    if not truths:
        raise _refusal(difference, tolerance, "there is no float64 reference")
    truth = truths["source"] if "source" in truths else truths["torch"]
    largest = float(np.abs(truth).max())
    if len(truths) == 2:
        apart = _distance(truths["source"], truths["torch"])
        if not apart <= tolerance * largest:
            raise RewriteError(
                f"{difference.name}: what torch exported differs from the module by {apart:.3g} at "
                f"values up to {largest:.3g}, in float64 too: its forward does not trace; make it "
                "free of branches on values and of constants of the batch"
            )
    cost = max(_distance(runs[name][tensor], values) for name, values in truths.items())
    if not _distance(runs["fused"][tensor], truth) <= _AS_FLOAT32 * cost:
        raise _refusal(difference, tolerance, f"float32 alone costs the source {cost:.1e}")
    return (
        f"{difference.name}: float32 alone costs the source {cost:.3g} at values up to "
        f"{largest:.3g}"
    )


def _refusal(difference: BlockDifference, tolerance: float, cause: str) -> RewriteError:
    return RewriteError(
        f"{difference.name}: after fusion the largest difference is "
        f"{difference.max_difference:.3g} at values up to {difference.max_value:.3g} "
        f"({difference.relative:.1e}; {cause}), expected at most {tolerance:.0e} of the largest "
        f"value; raise {option('tolerance')} if that is enough"
    )


def _exact_runs(
    original: onnx.ModelProto,
    module: nn.Module | None,
    x: npt.NDArray[np.float32],
    tensors: Sequence[str],
) -> dict[str, Arrays]:
    """Return tensors of the source in float64, computed by its graph and by torch.

    A runtime that cannot run the network has no entry.
    """
    images = torch.from_numpy(x).double()
    runs: dict[str, Arrays] = {}
    with contextlib.suppress(ReptrtError):  # an operator that TorchGraph does not have
        graph = TorchGraph(original).double()
        values = graph.run({graph.input_names[0]: images}, list(dict.fromkeys(tensors)))
        runs["source"] = {name: value.numpy() for name, value in values.items()}
    if module is not None:
        with contextlib.suppress(Exception):  # a forward may fix its type or its device
            outputs = [value.name for value in original.graph.output]
            runs["torch"] = _named(outputs, _run_torch(copy.deepcopy(module).double(), images))
    return runs


def _run(
    model: onnx.ModelProto, tensors: Sequence[str], x: npt.NDArray[np.float32]
) -> dict[str, npt.NDArray[np.floating]]:
    """Run a model and return the named inner tensors beside its outputs."""
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    outputs = {value.name for value in probe.graph.output}
    probe.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
        for name in dict.fromkeys(tensors)
        if name not in outputs
    )
    with OrtRunner(probe.SerializeToString()) as runner:
        return runner.run(x)


def _run_torch(module: nn.Module, x: torch.Tensor) -> list[npt.NDArray[np.floating]]:
    with torch.no_grad():
        return [np.asarray(value.numpy()) for value in flat_outputs(module(x)).values()]


def _named(names: Sequence[str], values: Sequence[npt.NDArray[np.floating]]) -> Arrays:
    """Return a module's outputs under the names that the graph gives them, in order."""
    return dict(zip(names, values, strict=False))


def _difference(
    name: str, expected: npt.NDArray[np.floating], got: npt.NDArray[np.floating]
) -> BlockDifference:
    return BlockDifference(name, _distance(expected, got), float(np.abs(expected).max()))


def _distance(first: npt.NDArray[np.floating], second: npt.NDArray[np.floating]) -> float:
    """Return the largest |first - second|."""
    with np.errstate(invalid="ignore"):  # infinity less infinity: NaN, and the proof fails
        return float(np.abs(first.astype(np.float64) - second).max())
