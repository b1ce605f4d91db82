"""The proof refuses a wrong net, whatever float32 costs, and does not blame fusion for float32."""

import numpy as np
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from reptrt.core.errors import RewriteError
from reptrt.exporter.from_module import ExportSettings, onnx_from_module
from reptrt.exporter.fuse import fuse
from reptrt.exporter.prove import Proof, block_outputs, probe_images, prove
from reptrt.graph.net import model_from_net
from reptrt.graph.preprocess import Preprocess
from tests.support.random_nets import norm

INPUT = Preprocess(3, 16, 20, mean=(0.4, 0.5, 0.6), std=(0.2, 0.2, 0.3))


class Block(nn.Module):
    """relu(norm(wide(x)) + norm(point(x)) + offset) - offset: an offset costs float32 its bits."""

    def __init__(self, offset: float = 0.0) -> None:
        super().__init__()
        self.wide = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), norm(4))
        self.point = nn.Sequential(nn.Conv2d(3, 4, 1), norm(4))
        self.offset = offset

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.wide(x) + self.point(x) + self.offset) - self.offset


def proved(module: nn.Module, *, wrong: float = 0.0, with_torch: bool = True) -> Proof:
    """Prove the fused form of a module, its first weight ``wrong`` times too large."""
    module = module.eval()
    original = onnx_from_module(module, INPUT, ExportSettings())
    net, report = fuse(original, INPUT)
    fused = model_from_net(net)
    weight = next(t for t in fused.graph.initializer if len(t.dims) == 4)
    values = numpy_helper.to_array(weight) * np.float32(1 + wrong)
    weight.CopyFrom(numpy_helper.from_array(values, weight.name))
    blocks = block_outputs(net, original, report.changed)
    torch_net = module if with_torch else None
    return prove(original, fused, blocks, INPUT, tolerance=1e-4, module=torch_net)


def make(offset: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    return Block(offset)


def test_a_good_net_is_proved_without_a_word_on_float32() -> None:
    proof = proved(make())
    assert proof.ill_conditioned is None
    assert len(proof.blocks) == 1
    assert 0 < proof.overall.relative < 1e-5


@pytest.mark.parametrize("with_torch", [True, False], ids=["module", "file"])
def test_a_wrong_weight_is_refused(with_torch: bool) -> None:
    with pytest.raises(RewriteError, match=r"after fusion the largest difference .*tolerance"):
        proved(make(), wrong=0.01, with_torch=with_torch)


@pytest.mark.parametrize("with_torch", [True, False], ids=["module", "file"])
def test_an_ill_conditioned_net_is_proved_and_said_to_be_one(with_torch: bool) -> None:
    proof = proved(make(1e4), with_torch=with_torch)
    assert proof.overall.relative > 1e-4
    assert proof.ill_conditioned is not None
    assert "float32 alone costs the source" in proof.ill_conditioned


def test_a_wrong_weight_of_an_ill_conditioned_net_is_refused() -> None:
    with pytest.raises(RewriteError, match=r"float32 alone costs the source \d\.\de-04"):
        proved(make(1e4), wrong=0.1)


class Branching(nn.Module):
    """Adds what the example's values decide on: tracing keeps one branch."""

    def __init__(self) -> None:
        super().__init__()
        self.block = make()

    def forward(self, x: Tensor) -> Tensor:
        y = self.block(x)
        return y + 1 if bool(x.abs().sum() > 0) else y


def test_what_the_exporter_changed_is_not_blamed_on_fusion() -> None:
    with pytest.raises(RewriteError, match=r"what torch exported differs from the module by 1 at"):
        proved(Branching())


class TwoOutputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = make(), make()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"boxes": self.second(x), "scores": self.first(x)}


def test_every_output_is_proved() -> None:
    assert proved(TwoOutputs()).overall.name in ("boxes", "scores")
    with pytest.raises(RewriteError, match=r"second|boxes"):
        proved(TwoOutputs(), wrong=0.01)


def test_probe_images_are_what_preprocessing_makes() -> None:
    images = probe_images(INPUT, 3)
    assert images.shape == (3, 3, 16, 20)
    mean, std = (np.array(v)[:, None, None] for v in (INPUT.mean, INPUT.std))
    pixels = (images * std + mean) * 255
    np.testing.assert_allclose(pixels, pixels.round(), atol=1e-3)
    assert pixels.min() >= -1e-3
    assert pixels.max() <= 255.001
    patch = images[1, :, :8, :8]
    np.testing.assert_array_equal(patch, np.broadcast_to(patch[:, :1, :1], patch.shape))
