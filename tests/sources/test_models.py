from collections.abc import Mapping

import pytest
import torch
from torch import nn

from reptrt.core.errors import ConfigError
from reptrt.sources import models
from reptrt.sources.checkpoint import load_weights, read_checkpoint
from reptrt.sources.models import ArchitectureOptions
from tests.support.helpers import SHARED, needs_shared

# Exactly what the command lines of the design document say.
REPVGG_CIFAR10 = ArchitectureOptions(
    widths=(32, 32, 64, 128, 256), blocks=(2, 4, 14, 1), strides=(2, 1, 2, 2, 1), num_classes=10
)
MOBILEONE_CIFAR10 = ArchitectureOptions(
    widths=(32, 64, 128, 256), blocks=(2, 4, 6, 1), strides=(1, 2, 2, 1), branches=2
)
SMALL_REPVGG = ArchitectureOptions(
    widths=(8, 8, 16), blocks=(1, 2), strides=(1, 1, 2), groups=2, num_classes=3
)
SMALL_MOBILEONE = ArchitectureOptions(
    widths=(16, 32), blocks=(1, 2), strides=(1, 2), branches=2, se_blocks=(0, 1), num_classes=3
)

# Deploy form: parameters in millions and multiply-adds in billions at 224 x 224 (RepVGG: the
# official checkpoints as listed by OpenMMLab and the paper; MobileOne: the paper's table);
# train form: parameters in millions as listed by timm.
PUBLISHED = {
    "repvgg_a0": (8.31, 1.36, 9.11),
    "repvgg_a1": (12.79, 2.37, 14.09),
    "repvgg_a2": (25.49, 5.12, 28.21),
    "repvgg_b0": (14.34, 3.06, 15.82),
    "repvgg_b1": (51.83, 11.82, 57.42),
    "repvgg_b1g2": (41.36, 8.82, 45.78),
    "repvgg_b1g4": (36.13, 7.32, 39.97),
    "repvgg_b2": (80.32, 18.39, 89.02),
    "repvgg_b2g2": (63.96, 13.68, 70.85),
    "repvgg_b2g4": (55.77, 11.33, 61.76),
    "repvgg_b3": (110.96, 26.22, 123.09),
    "repvgg_b3g2": (87.40, 19.45, 96.91),
    "repvgg_b3g4": (75.62, 16.06, 83.83),
    "mobileone_s0": (2.08, 0.275, 5.29),
    "mobileone_s1": (4.76, 0.825, 4.83),
    "mobileone_s2": (7.81, 1.299, 7.88),
    "mobileone_s3": (10.08, 1.896, 10.17),
    "mobileone_s4": (14.84, 2.978, 14.95),
}


def on_meta(name: str, options: ArchitectureOptions, *, deploy: bool) -> nn.Module:
    """Build without memory for the weights."""
    with torch.device("meta"):
        return models.build(name, options, deploy=deploy).eval()


def num_parameters(net: nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


def multiply_adds(net: nn.Module, size: int) -> int:
    """Count multiply-adds of convolutions and linear layers for one image."""
    counts = []
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(
                lambda layer, _, out: counts.append(out.numel() * layer.weight[0].numel())
            )
    net(torch.zeros(1, 3, size, size, device="meta"))
    return sum(counts)


def bn_keys(prefix: str) -> set[str]:
    names = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    return {f"{prefix}.{name}" for name in names}


def branch_keys(prefix: str) -> set[str]:
    return {f"{prefix}.conv.weight"} | bn_keys(f"{prefix}.bn")


def randomize(net: nn.Module) -> nn.Module:
    """Give BatchNorms statistics and affines as after training; return the net in eval mode."""
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            for tensor in (layer.running_mean, layer.bias.data):
                tensor.normal_(0.0, 0.3)
            for tensor in (layer.running_var, layer.weight.data):
                tensor.uniform_(0.5, 1.5)
    return net.eval()


def fused(state: Mapping[str, torch.Tensor], deploy: nn.Module, conv_name: str) -> dict:
    """Fuse a train-form state dict by the papers' formula, driven by the names alone (float64).

    A branch is kernel * t and beta - mean * t with t = gamma / sqrt(var + 1e-5); a 1x1 kernel is
    the centre of a kxk one; a lone BatchNorm is a convolution with the identity kernel.
    """
    result = {}
    for name, target in deploy.state_dict().items():
        block, found, kind = name.partition(f"{conv_name}.")
        if not found:
            result[name] = state[name]
            continue
        total = torch.zeros(target.shape, dtype=torch.float64)
        for key in (key for key in state if key.startswith(block) and key.endswith("running_var")):
            bn = key.removesuffix("running_var")
            gamma, beta, mean, var = (
                state[bn + field].double()
                for field in ("weight", "bias", "running_mean", "running_var")
            )
            t = gamma / torch.sqrt(var + 1e-5)
            if kind == "bias":
                total += beta - mean * t
            elif (conv := bn.removesuffix("bn.") + "conv.weight") in state:
                kernel = state[conv].double() * t[:, None, None, None]
                pad = (total.shape[-1] - kernel.shape[-1]) // 2
                total += nn.functional.pad(kernel, [pad] * 4)
            else:
                per_group, centre = total.shape[1], total.shape[-1] // 2
                for channel in range(len(t)):
                    total[channel, channel % per_group, centre, centre] += t[channel]
        result[name] = total.float()
    return result


def test_names_are_families_and_their_variants():
    detectors = {f"yolov6{size}" for size in ("", "n", "s", "m", "l")}
    assert set(models.names()) == {"repvgg", "mobileone", *PUBLISHED, *detectors}
    assert [name for name in models.names() if not models.is_variant(name)] == [
        "repvgg",
        "mobileone",
        "yolov6",
    ]
    assert not models.is_variant("resnet50")


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED, ids=str)
def test_variant_has_the_published_size_and_cost(name):
    deploy_millions, billions, train_millions = PUBLISHED[name]
    deploy = on_meta(name, ArchitectureOptions(), deploy=True)
    train = on_meta(name, ArchitectureOptions(), deploy=False)
    # Sources round or truncate to two digits.
    assert num_parameters(deploy) / 1e6 == pytest.approx(deploy_millions, abs=0.0101)
    assert num_parameters(train) / 1e6 == pytest.approx(train_millions, abs=0.0101)
    # Some sources count the addition of the bias too: at most 0.3 %.
    assert multiply_adds(deploy, 224) / 1e9 == pytest.approx(billions, rel=3e-3)


@pytest.mark.parametrize(
    ("name", "options"),
    [("repvgg", REPVGG_CIFAR10), ("mobileone", MOBILEONE_CIFAR10)],
    ids=["repvgg", "mobileone"],
)
@needs_shared
def test_trained_nets_load_strictly_by_their_command_line(name, options):
    path = SHARED / "zoo" / f"{name}_cifar10.pt"
    checkpoint = read_checkpoint(path)
    state = checkpoint.preferred
    assert not models.is_deploy_state(state)
    net = models.build(name, models.options_from_state(name, options, state), deploy=False)
    assert {k: v.shape for k, v in net.state_dict().items()} == {
        k: v.shape for k, v in state.items()
    }
    load_weights(net, checkpoint)
    assert all(
        torch.equal(value, state[key])
        for key, value in net.state_dict().items()
        if not key.endswith("num_batches_tracked")
    )
    with torch.no_grad():
        assert net.eval()(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_repvgg_parameter_names_are_the_official_ones():
    train = models.build("repvgg", SMALL_REPVGG, deploy=False).state_dict()
    blocks = ("stage0", "stage1.0", "stage2.0", "stage2.1")
    expected = {"linear.weight", "linear.bias"}
    for block in blocks:
        expected |= branch_keys(f"{block}.rbr_dense") | branch_keys(f"{block}.rbr_1x1")
    expected |= bn_keys("stage1.0.rbr_identity") | bn_keys("stage2.1.rbr_identity")
    assert set(train) == expected
    assert set(models.build("repvgg", SMALL_REPVGG, deploy=True).state_dict()) == {
        "linear.weight",
        "linear.bias",
        *(f"{block}.rbr_reparam.{kind}" for block in blocks for kind in ("weight", "bias")),
    }


def test_mobileone_parameter_names_are_the_official_ones():
    train = models.build("mobileone", SMALL_MOBILEONE, deploy=False).state_dict()
    depthwise = ("stage1.0", "stage2.0", "stage2.2")
    pointwise = ("stage1.1", "stage2.1", "stage2.3")
    se = {
        f"{block}.se.{layer}.{kind}"
        for block in ("stage2.2", "stage2.3")
        for layer in ("reduce", "expand")
        for kind in ("weight", "bias")
    }
    expected = se | {"linear.weight", "linear.bias"}
    expected |= branch_keys("stage0.rbr_conv.0") | branch_keys("stage0.rbr_scale")
    for block in depthwise + pointwise:
        expected |= branch_keys(f"{block}.rbr_conv.0") | branch_keys(f"{block}.rbr_conv.1")
    for block in depthwise:
        expected |= branch_keys(f"{block}.rbr_scale")
    for block in ("stage1.0", "stage1.1", "stage2.2", "stage2.3"):
        expected |= bn_keys(f"{block}.rbr_skip")
    assert set(train) == expected
    assert set(models.build("mobileone", SMALL_MOBILEONE, deploy=True).state_dict()) == {
        "linear.weight",
        "linear.bias",
        *se,
        *(
            f"{block}.reparam_conv.{kind}"
            for block in ("stage0", *depthwise, *pointwise)
            for kind in ("weight", "bias")
        ),
    }


@pytest.mark.parametrize(
    ("name", "options", "conv_name"),
    [
        ("repvgg", SMALL_REPVGG, "rbr_reparam"),
        ("mobileone", SMALL_MOBILEONE, "reparam_conv"),
    ],
    ids=["repvgg", "mobileone"],
)
def test_train_form_fused_by_the_papers_formula_equals_the_deploy_form(name, options, conv_name):
    torch.manual_seed(0)
    train = randomize(models.build(name, options, deploy=False))
    deploy = models.build(name, options, deploy=True).eval()
    deploy.load_state_dict(fused(train.state_dict(), deploy, conv_name))
    images = torch.randn(2, 3, 12, 12)
    with torch.no_grad():
        expected, got = train(images), deploy(images)
    assert expected.std() > 1e-3
    # float32 rounding of a few hundred products per output, five layers deep
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_groups_are_on_every_second_layer_of_the_whole_net():
    net = on_meta("repvgg_b1g4", ArchitectureOptions(), deploy=True)
    groups = [layer.groups for layer in net.modules() if isinstance(layer, nn.Conv2d)]
    assert len(groups) == 28
    assert [index for index, count in enumerate(groups) if count == 4] == list(range(2, 27, 2))
    assert set(groups) == {1, 4}


def test_s4_has_squeeze_excite_in_the_last_blocks():
    net = on_meta("mobileone_s4", ArchitectureOptions(), deploy=False)
    with_se = {name.split(".se.")[0] for name in net.state_dict() if ".se." in name}
    assert with_se == {f"stage3.{index}" for index in range(10, 20)} | {"stage4.0", "stage4.1"}
    assert net.get_parameter("stage4.1.se.reduce.weight").shape == (128, 2048, 1, 1)


@pytest.mark.parametrize(
    ("widths", "strides", "stem_width", "stem_stride"),
    [
        ((32, 48), (1, 1), 32, 2),
        ((96, 48), (1, 1), 64, 2),
        ((16, 96, 48), (1, 1), 16, 2),
        ((96, 48), (1, 1, 1), 64, 1),
    ],
    ids=["first-width", "at-most-64", "given-width", "given-stride"],
)
def test_stem_of_mobileone(widths, strides, stem_width, stem_stride):
    options = ArchitectureOptions(widths=widths, blocks=(1, 1), strides=strides)
    stem = on_meta("mobileone", options, deploy=True).get_submodule("stage0.reparam_conv")
    assert (stem.out_channels, stem.stride) == (stem_width, (stem_stride, stem_stride))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["repvgg", "mobileone"], ids=str)
def test_bare_family_is_its_smallest_variant(name):
    smallest = next(variant for variant in models.names() if variant.startswith(f"{name}_"))
    for deploy in (False, True):
        bare, variant = (
            on_meta(which, ArchitectureOptions(), deploy=deploy) for which in (name, smallest)
        )
        assert str(bare) == str(variant)


def test_other_numbers_of_stages_classes_and_channels():
    options = ArchitectureOptions(
        widths=(4, 8, 12), blocks=(1, 2), strides=(1, 2, 3), num_classes=5, in_channels=1
    )
    net = models.build("repvgg", options, deploy=False).eval()
    images = torch.zeros(2, 1, 12, 12)
    with torch.no_grad():
        assert net.get_submodule("stage1")(net.get_submodule("stage0")(images)).shape[2:] == (6, 6)
        assert net(images).shape == (2, 5)
    six = ArchitectureOptions(widths=(4,) * 6, blocks=(1,) * 6, in_channels=2)
    with torch.no_grad():
        assert models.build("mobileone", six, deploy=True)(torch.zeros(1, 2, 8, 8)).shape == (
            1,
            1000,
        )


def test_variants_take_classes_and_channels():
    net = on_meta("repvgg_a0", ArchitectureOptions(num_classes=7, in_channels=1), deploy=True)
    assert net.get_parameter("linear.weight").shape == (7, 1280)
    assert net.get_parameter("stage0.rbr_reparam.weight").shape == (48, 1, 3, 3)


@pytest.mark.slow
@pytest.mark.parametrize("deploy", [False, True], ids=["train", "deploy"])
@pytest.mark.parametrize("name", ["repvgg_a0", "mobileone_s0", "mobileone_s4"], ids=str)
def test_fresh_net_is_seedable_and_its_activations_neither_grow_nor_fade(name, deploy):
    torch.manual_seed(3)
    net = models.build(name, ArchitectureOptions(), deploy=deploy)
    torch.manual_seed(3)
    again = models.build(name, ArchitectureOptions(), deploy=deploy)
    assert all(map(torch.equal, net.parameters(), again.parameters()))
    features: list[torch.Tensor] = []
    net.get_submodule("gap").register_forward_hook(lambda *args: features.append(args[2]))
    with torch.no_grad():
        net.eval()(torch.randn(2, 3, 64, 64))
        net(torch.zeros(1, 3, 64, 64))
    assert 0.01 < float(features[0].square().mean().sqrt()) < 100
    assert not features[1].any()  # no part of the first comes from biases


def test_deploy_form_is_recognised_by_its_names():
    for name, options in (("repvgg", SMALL_REPVGG), ("mobileone", SMALL_MOBILEONE)):
        for deploy in (False, True):
            state = on_meta(name, options, deploy=deploy).state_dict()
            assert models.is_deploy_state(state) is deploy
            assert (
                models.is_deploy_state({f"backbone.{key}": state[key] for key in state}) is deploy
            )
    assert models.is_deploy_state({"rbr_reparam.weight": torch.zeros(1)})
    assert not models.is_deploy_state({})


def test_number_of_classes_comes_from_the_checkpoint_unless_given():
    state = {"linear.weight": torch.zeros(10, 256)}
    free, given = ArchitectureOptions(branches=2), ArchitectureOptions(num_classes=4)
    assert models.options_from_state("mobileone", free, state) == ArchitectureOptions(
        branches=2, num_classes=10
    )
    assert models.options_from_state("repvgg", given, state) is given
    prefixed = {f"model.{name}": value for name, value in state.items()}
    assert models.options_from_state("mobileone", free, prefixed).num_classes == 10
    two = {**prefixed, "teacher.linear.weight": torch.zeros(12, 256)}
    assert models.options_from_state("mobileone", free, two).num_classes is None
    assert models.options_from_state("repvgg_a0", free, {"head.weight": torch.zeros(3)}) == free
    assert models.options_from_state("repvgg", free, {"linear.weight": torch.tensor(1.0)}) == free


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("repvg_a0", {}, r"'repvg_a0' is not known; did you mean repvgg_a0, .*\?"),
        ("RepVGG-B1g4", {}, r"'RepVGG-B1g4' is not known; did you mean repvgg_b1g4, "),
        ("xyz", {}, r"'xyz' is not known; known: repvgg, repvgg_a0, .*, mobileone_s4, yolov6"),
        (
            "repvgg",
            {"widths": (8, 8), "blocks": (1, 1)},
            r"widths: got 2 entries \(8,8\), expected 3 \(the stem, then one per entry of bl",
        ),
        (
            "repvgg",
            {"blocks": (1, 1, 1)},
            r"widths: got 5 entries \(48,48,96,192,1280\), expected 4",
        ),
        (
            "repvgg",
            {"widths": (8, 8), "blocks": (1,), "strides": (1, 1, 1)},
            r"strides: got 3 entries \(1,1,1\), expected 2",
        ),
        (
            "mobileone",
            {"widths": (8, 8), "blocks": (1, 1, 1)},
            r"widths: got 2 entries \(8,8\), expected 3 or 4 \(.*the stem's in front\)",
        ),
        (
            "mobileone",
            {"strides": (1, 1, 1, 1, 1, 1)},
            r"strides: got 6 entries \(1,1,1,1,1,1\), expected 4 or 5",
        ),
        ("mobileone", {"se_blocks": (1,)}, r"se_blocks: got 1 entries \(1\), expected 4"),
        ("mobileone", {"se_blocks": (3, 0, 0, 0)}, r"se_blocks: got 3,0,0,0, expected at most"),
        (
            "repvgg_a0",
            {"widths": (8,), "groups": 2},
            r"got widths, groups, expected only num_classes, in_channels; 'repvgg' is",
        ),
        ("mobileone", {"groups": 2}, r"mobileone: got groups, expected only widths, "),
        ("repvgg", {"branches": 2}, r"repvgg: got branches, expected only widths, "),
        (
            "repvgg",
            {"groups": 4, "widths": (8, 8, 10), "blocks": (1, 2)},
            r"groups: layer 2 has 8 -> 10 channels, which do not divide into 4 groups",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 12 else "",
)
def test_impossible_architectures_are_refused(name, options, message):
    with pytest.raises(ConfigError, match=message):
        models.build(name, ArchitectureOptions(**options), deploy=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"widths": ()}, r"widths: the list is empty"),
        ({"widths": (8, 0, 8)}, r"widths: got 8,0,8, expected whole numbers from 1 up"),
        ({"blocks": (-1,)}, r"blocks: got -1,"),
        ({"strides": (1.5,)}, r"strides: got 1.5,"),
        ({"num_classes": 0}, r"num_classes: got 0,"),
        ({"in_channels": -3}, r"in_channels: got -3,"),
        ({"groups": 0}, r"groups: got 0,"),
        ({"branches": 0}, r"branches: got 0,"),
        ({"csp": 1.5}, r"csp: got 1.5, expected a part above 0, up to 1"),
        ({"se_blocks": (0, -1)}, r"se_blocks: got 0,-1, expected whole numbers from 0 up"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_numbers_that_cannot_be_are_refused(options, message):
    with pytest.raises(ConfigError, match=message) as caught:
        ArchitectureOptions(**options)
    assert "\n" not in str(caught.value)
