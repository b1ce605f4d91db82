"""Nets of timm by name. No test downloads: pretrained weights are faked where they are needed."""

import sys
from types import ModuleType

import pytest
import torch

from reptrt.core.errors import CheckpointError, ConfigError, MissingDependencyError
from reptrt.pipeline import ExportOptions, export
from reptrt.sources.options import ArchitectureOptions
from reptrt.sources.source import Source, implied_preprocess, module_from_source
from tests.support.without_torchvision import import_timm


@pytest.fixture
def timm() -> ModuleType:
    return import_timm()


def test_without_timm_the_message_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'reptrt\[timm\]'"):
        module_from_source(Source("timm:repvgg_a0"))
    with pytest.raises(MissingDependencyError, match=r"timm:repvgg_a0: timm cannot be imported"):
        implied_preprocess(Source("timm:repvgg_a0"), None)


@pytest.mark.slow
def test_name_without_a_tag_is_the_architecture_with_seeded_weights(timm, caplog):
    first, again, other = (
        module_from_source(Source("timm:repvgg_a0", seed=seed)).state_dict() for seed in (0, 0, 1)
    )
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert not torch.equal(first["head.fc.weight"], other["head.fc.weight"])
    assert caplog.messages[0] == (
        "timm:repvgg_a0: random weights; give a checkpoint, or a name with pretrained weights "
        "(repvgg_a0.rvgg_in1k)"
    )


def test_name_with_a_tag_asks_timm_for_pretrained_weights(timm, monkeypatch):
    asked = {}

    def create_model(name, **arguments):
        asked.update(arguments, name=name)
        return torch.nn.Conv2d(3, 4, 3)

    monkeypatch.setattr(timm, "create_model", create_model)
    net = module_from_source(
        Source("timm:repvgg_a0.rvgg_in1k", architecture=ArchitectureOptions(num_classes=7))
    )
    assert not net.training
    assert asked == {"name": "repvgg_a0.rvgg_in1k", "pretrained": True, "num_classes": 7}


def test_weights_that_cannot_be_downloaded_give_one_line(timm, monkeypatch):
    def create_model(name, **arguments):
        raise OSError("no\nnetwork")

    monkeypatch.setattr(timm, "create_model", create_model)
    with pytest.raises(CheckpointError) as caught:
        module_from_source(Source("timm:repvgg_a0.rvgg_in1k"))
    assert caught.value.on_cli() == (
        "timm:repvgg_a0.rvgg_in1k: timm raised OSError: no network; check the network, or download "
        "the weights and give --weights"
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["timm:mobileone_s0", "timm:mobileone_s0.apple_in1k"], ids=str)
def test_checkpoint_says_the_number_of_classes_and_replaces_pretrained_weights(
    timm, tmp_path, name
):
    torch.manual_seed(5)
    trained = timm.create_model("mobileone_s0", num_classes=4)
    torch.save({"state_dict_ema": trained.state_dict(), "arch": "mobileone_s0"}, tmp_path / "w.pt")
    got = module_from_source(Source(name, tmp_path / "w.pt")).state_dict()
    assert got["head.fc.weight"].shape[0] == 4
    assert all(torch.equal(value, got[key]) for key, value in trained.state_dict().items())


def test_preprocessing_is_timms(timm, caplog):
    implied_preprocess(Source("timm:repvgg_a0"), None)
    assert not caplog.messages
    got = implied_preprocess(Source("timm:fastvit_t8"), None)
    assert (got.channels, got.height, got.width, got.resize) == (3, 256, 256, "crop")
    assert (got.mean, got.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert caplog.messages == [
        "timm:fastvit_t8: timm evaluates it with crop 0.9, bicubic; images of other sizes are "
        "resized with crop 0.875, bilinear, which can change its accuracy a little"
    ]
    half = implied_preprocess(Source("timm:vit_tiny_patch16_224.augreg_in21k"), (3, 64, 64))
    assert (half.mean, half.std, half.height) == ((0.5,) * 3, (0.5,) * 3, 64)
    gray = implied_preprocess(Source("timm:repvgg_a0"), (1, 64, 64))
    assert (gray.mean, gray.std, gray.resize) == ((0.0,), (1.0,), "none")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("timm:repvg_a0", {}, r"timm:repvg_a0: timm has no net 'repvg_a0'; did you mean repvgg_a0"),
        ("timm:xqxqxq", {}, r"timm has no net 'xqxqxq'; see timm.list_models\(\)"),
        ("timm:repvgg_a0.abc", {}, r"timm has no weights 'abc'; it has repvgg_a0.rvgg_in1k"),
        ("timm:repvgg_a0", {"widths": (1, 2)}, r"got widths, expected only num_classes, in_chann"),
        ("timm:", {}, r"timm has no net ''"),
    ],
    ids=["typo", "unknown", "tag", "option", "empty"],
)
def test_what_timm_does_not_have_is_refused(timm, name, options, message):
    with pytest.raises(ConfigError, match=message):
        module_from_source(Source(name, architecture=ArchitectureOptions(**options)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["repvgg_a0", "mobileone_s0"], ids=str)
def test_timm_net_is_exported_and_fused(timm, tmp_path, name):
    output = tmp_path / "m.onnx"
    report = export(Source(f"timm:{name}"), output, ExportOptions(input_size=(3, 32, 32)))
    assert len(report.proof.blocks) > 15
    assert not report.skipped
    assert report.proof.overall.relative < 1e-4
