"""A network as one fused float ONNX file, proved equal to where it came from.

    module --torch exporter--> train-form ONNX --simplify, fold_batchnorm, fuse_branches--> fused

All merging happens on the graph in float64, so a train-form ONNX file that somebody else exported
takes the same way. The result is then run against the original, block by block.
"""

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx
import torch
from torch import nn

from reptrt.core.errors import ConfigError, RewriteError
from reptrt.execute.runner import OrtRunner
from reptrt.graph.net import QUANTIZED_OPS, Net, net_from_model, read_model, refuse_not_finite
from reptrt.graph.preprocess import Preprocess, write_preprocess
from reptrt.rewrite.contract import RewriteReport
from reptrt.rewrite.fold_batchnorm import fold_batchnorm
from reptrt.rewrite.fuse_branches import fuse_branches
from reptrt.rewrite.naming import name_layers
from reptrt.rewrite.simplify import narrow_to_float32, simplify

MIN_OPSET, MAX_OPSET = 13, 20  # per-channel DequantizeLinear .. what TensorRT 10 and 11 both parse
_PROBE_IMAGES = 2

Exporter = Literal["torchscript", "dynamo"]


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
    """The differences found by running the fused net beside the original on seeded noise."""

    blocks: tuple[BlockDifference, ...]
    overall: BlockDifference
    tolerance: float

    def check(self) -> None:
        """Raise RewriteError if any difference is past the tolerance."""
        worst = max((*self.blocks, self.overall), key=lambda block: block.relative)
        if not worst.relative <= self.tolerance:
            raise RewriteError(
                f"{worst.name}: after fusion the largest difference is {worst.max_difference:.3g} "
                f"at values up to {worst.max_value:.3g} ({worst.relative:.1e}), expected at most "
                f"{self.tolerance:.0e} of the largest value; raise --tolerance if that is enough"
            )


@dataclass(frozen=True, slots=True)
class ExportSettings:
    """How a torch module becomes ONNX."""

    opset: int = 19
    exporters: tuple[Exporter, ...] = ("torchscript", "dynamo")  # tried in this order


def onnx_from_module(
    module: nn.Module, preprocess: Preprocess, settings: ExportSettings
) -> onnx.ModelProto:
    """Export a torch module in eval mode with a dynamic batch, batch norms unfused.

    torch's TorchScript exporter is asked first (an order of magnitude faster, and it leaves the
    batch norms for us to fold in float64); where torch no longer has it, or it fails, the dynamo
    exporter.

    Raises:
        ConfigError: neither exporter takes the module.
    """
    example = torch.zeros(2, preprocess.channels, preprocess.height, preprocess.width)
    reasons = []
    for exporter in settings.exporters:
        try:
            with _silence():
                model = _EXPORTERS[exporter](module, example, settings.opset)
            return onnx.shape_inference.infer_shapes(model)
        except Exception as err:  # the exporters raise whatever the user's forward raises
            reasons.append(str(err).strip().splitlines()[0] if str(err).strip() else repr(err))
    raise ConfigError(
        f"{type(module).__name__}: cannot be exported with input {tuple(example.shape)} "
        f"({reasons[0]}); check --input-size and that forward takes one image batch"
    )


def model_from_file(
    path: Path, opset: int, input_size: tuple[int, int, int] | None
) -> onnx.ModelProto:
    """Read an ONNX file that somebody else exported; raise its opset and set its input size.

    Raises:
        ArtifactError: the file cannot be read.
        ConfigError: it is quantized, has several inputs, or a size that does not fit.
    """
    model = read_model(path)
    quantized = [node for node in model.graph.node if node.op_type in QUANTIZED_OPS]
    if quantized:
        raise ConfigError(
            f"{path}: is already quantized ({quantized[0].op_type} {quantized[0].name}, "
            f"{len(quantized)} in all); expected a float ONNX file"
        )
    constants = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in constants]
    if len(inputs) != 1:
        raise ConfigError(f"{path}: has {len(inputs)} inputs, expected one image batch")
    if inputs[0].type.tensor_type.elem_type != onnx.TensorProto.FLOAT:
        kind = onnx.TensorProto.DataType.Name(inputs[0].type.tensor_type.elem_type)
        raise ConfigError(f"{path}: input {inputs[0].name} is {kind}, expected FLOAT (float32)")
    _set_input_size(path, inputs[0], input_size)
    return onnx.shape_inference.infer_shapes(_raise_opset(path, model, opset))


def fuse(model: onnx.ModelProto, preprocess: Preprocess) -> tuple[Net, tuple[RewriteReport, ...]]:
    """Return the fused net with its preprocessing, and what each rewrite did.

    Raises:
        ArtifactError: the weights hold NaN or Inf.
        RewriteError: the net is in train mode.
    """
    net = net_from_model(model)
    refuse_not_finite(net)
    reports = (simplify(net), fold_batchnorm(net), fuse_branches(net))
    narrow_to_float32(net)
    name_layers(net)
    write_preprocess(net, preprocess)
    return net, reports


def prove(
    original: onnx.ModelProto,
    fused: onnx.ModelProto,
    blocks: dict[str, str],
    *,
    tolerance: float,
    module: nn.Module | None = None,
    seed: int = 0,
) -> Proof:
    """Run original and fused net on the same seeded noise in onnxruntime and compare.

    Args:
        original: the net as exported.
        fused: the net after all rewrites.
        blocks: name of a fused convolution -> tensor that both nets compute there.
        tolerance: allowed max |difference| / max |value|, per block and overall.
        module: the torch net; the overall difference is then |torch - fused|.
        seed: of the noise.
    """
    shape = [d.dim_value for d in fused.graph.input[0].type.tensor_type.shape.dim]
    noise = np.random.default_rng(seed).standard_normal((shape[0] or _PROBE_IMAGES, *shape[1:]))
    x = noise.astype(np.float32)
    tensors = list(blocks.values())
    expected, got = _run(original, tensors, x), _run(fused, tensors, x)
    output = fused.graph.output[0].name
    reference = expected[output] if module is None else _run_torch(module, x)
    return Proof(
        blocks=tuple(
            _difference(name, expected[tensor], got[tensor]) for name, tensor in blocks.items()
        ),
        overall=_difference("output", reference, got[output]),
        tolerance=tolerance,
    )


def block_outputs(net: Net, original: onnx.ModelProto, names: tuple[str, ...]) -> dict[str, str]:
    """Return, for each fused convolution, the first tensor behind it that both nets compute."""
    known = {output for node in original.graph.node for output in node.output}
    outputs = {}
    for node in net.graph.nodes:
        if node.name in names:
            tensor = node.outputs[0]
            while tensor.name not in known:  # only a part of a sum was fused
                tensor = tensor.outputs[0].outputs[0]
            outputs[node.name] = tensor.name
    return outputs


def _run(
    model: onnx.ModelProto, tensors: list[str], x: npt.NDArray[np.float32]
) -> dict[str, npt.NDArray[np.float32]]:
    """Run a model and return the named inner tensors beside its outputs."""
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    outputs = {value.name for value in probe.graph.output}
    probe.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
        for name in tensors
        if name not in outputs
    )
    with OrtRunner(probe.SerializeToString()) as runner:
        return runner.run(x)


def _run_torch(module: nn.Module, x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    with torch.no_grad():
        result = module(torch.from_numpy(x))
    while isinstance(result, tuple | list):
        result = result[0]
    return np.asarray(result.numpy())


def _difference(
    name: str, expected: npt.NDArray[np.float32], got: npt.NDArray[np.float32]
) -> BlockDifference:
    with np.errstate(invalid="ignore"):  # infinity less infinity: NaN, and the proof fails
        difference = np.abs(expected.astype(np.float64) - got)
    return BlockDifference(name, float(difference.max()), float(np.abs(expected).max()))


def _export_torchscript(module: nn.Module, example: torch.Tensor, opset: int) -> onnx.ModelProto:
    buffer: Any = io.BytesIO()  # torch takes a stream here; its stub does not say so
    torch.onnx.export(
        module,
        (example,),
        buffer,
        dynamo=False,
        opset_version=opset,
        input_names=["input"],
        output_names=["output"],
        dynamic_axes={"input": {0: "N"}, "output": {0: "N"}},
        training=torch.onnx.TrainingMode.PRESERVE,  # eval mode, but batch norms left unfused
        do_constant_folding=True,  # explicit pads and reshapes need it
    )
    return onnx.load_model_from_string(buffer.getvalue())


def _export_dynamo(module: nn.Module, example: torch.Tensor, opset: int) -> onnx.ModelProto:
    program = torch.onnx.export(
        module,
        (example,),
        dynamo=True,
        opset_version=opset,
        input_names=["input"],
        output_names=["output"],
        dynamic_shapes=({0: torch.export.Dim("N")},),
        verbose=False,
    )
    if program is None:
        raise ConfigError("the dynamo exporter returned nothing")
    return program.model_proto


_EXPORTERS: Mapping[Exporter, Callable[[nn.Module, torch.Tensor, int], onnx.ModelProto]] = {
    "torchscript": _export_torchscript,
    "dynamo": _export_dynamo,
}


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keep torch's exporters from talking: their deprecations are our business, not the user's."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _set_input_size(
    path: Path, value: onnx.ValueInfoProto, wanted: tuple[int, int, int] | None
) -> None:
    dims = value.type.tensor_type.shape.dim
    if len(dims) != 4:
        raise ConfigError(f"{path}: input {value.name} has rank {len(dims)}, expected (N, C, H, W)")
    for index, name in enumerate("CHW", start=1):
        fixed = dims[index].dim_value
        if wanted is None and not fixed:
            raise ConfigError(
                f"{path}: {name} of input {value.name} is not fixed; give --input-size CxHxW"
            )
        if wanted is not None and fixed not in (0, wanted[index - 1]):
            raise ConfigError(
                f"{path}: input {value.name} has {name} = {fixed}, "
                f"--input-size says {wanted[index - 1]}; leave it out or export the net anew"
            )
        if wanted is not None:
            dims[index].dim_value = wanted[index - 1]


def _raise_opset(path: Path, model: onnx.ModelProto, opset: int) -> onnx.ModelProto:
    found = max(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    if found >= opset:
        return model
    try:
        return onnx.version_converter.convert_version(model, opset)
    except Exception as err:  # the converter raises RuntimeError and its own C++ types
        if found >= MIN_OPSET:
            return model
        raise ConfigError(
            f"{path}: opset {found} cannot be raised to {opset}; export it with opset 13 or newer"
        ) from err
