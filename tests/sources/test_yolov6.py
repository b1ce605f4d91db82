"""YOLOv6: names, shapes, sizes and outputs are those of the official code; its files load."""

import hashlib
import zlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from reptrt.core.errors import CheckpointError, ConfigError
from reptrt.graph.preprocess import Preprocess
from reptrt.sources import models
from reptrt.sources.models import ArchitectureOptions
from reptrt.sources.source import Source, implied_preprocess, module_from_source
from tests.support.helpers import SHARED, needs_shared
from tests.support.yolov6_files import save_official

SMALL = ArchitectureOptions(
    widths=(8, 8, 16, 16, 16, 16, 8, 8, 16, 16, 16), blocks=(1, 2, 1, 1, 2, 1, 1, 1), num_classes=3
)
SMALL_CSP = replace(SMALL, csp=0.5, dfl=True, blocks=(4, 2, 1, 1, 2, 1, 1, 1))

# From the official code with 7 classes: digests of names and shapes in train and deploy form; and,
# with the weights of `fill`, the last row (x, y, width, height, 1, scores) of an image 64 x 96.
OFFICIAL = {
    ("yolov6n", False): (
        *("e9ad4e8fd461c1e0", "f85cb3858456b32b"),
        (80.2396, 47.6409, 0.873657, 4.67237),
        (0.540842, 0.480741, 0.444887, 0.521455, 0.507493, 0.482617, 0.502623),
    ),
    ("yolov6n", True): (
        *("9c681030d5f02fca", "efcf6cf53d3fc96a"),
        (80.2795, 48.7772, 513.257, 512.096),
        (0.540842, 0.480741, 0.444887, 0.521455, 0.507493, 0.482617, 0.502623),
    ),
    ("yolov6s", False): (
        *("1d41ad7acb04e409", "8e7bd1c61091b8d5"),
        (80.6764, 46.0542, -2.72786, 5.03182),
        (0.520962, 0.50815, 0.469186, 0.511661, 0.472825, 0.455482, 0.507854),
    ),
    ("yolov6m", True): (
        *("456dcd3a7a5e7ae3", "0eb90e3c3e0e86ca"),
        (80.3224, 45.938, 515.513, 511.649),
        (0.524966, 0.488271, 0.451619, 0.525945, 0.502662, 0.458464, 0.504285),
    ),
    ("yolov6l", True): (
        *("5307256fd6dd6b31", "6bb514668b491aef"),
        (79.8141, 47.6721, 508.69, 520.694),
        (0.526144, 0.486945, 0.437291, 0.515957, 0.513863, 0.485668, 0.520807),
    ),
}
# Of the deploy form with 80 classes, as published: parameters in millions; billions of operations
# (two for each multiply-add) at 640 x 640, where a transposed convolution is counted as if every
# output had all k x k products, of which it has 1 / stride^2.
PUBLISHED = {
    "yolov6n": (4.7, 11.4),
    "yolov6s": (18.5, 45.3),
    "yolov6m": (34.9, 85.8),
    "yolov6l": (59.6, 150.7),
}
# Names and shapes only: nothing is computed, so that the large nets are quick too.
META = torch.device("meta")


def digest(state: Mapping[str, torch.Tensor]) -> str:
    lines = "".join(f"{name} {tuple(value.shape)}\n" for name, value in sorted(state.items()))
    return hashlib.sha256(lines.encode()).hexdigest()[:16]


def fill(net: nn.Module) -> nn.Module:
    """Give every tensor values that follow from its name alone."""
    for name, tensor in net.state_dict().items():
        if name.startswith("detect.proj") or not tensor.is_floating_point():
            continue
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        normal = rng.standard_normal(tuple(tensor.shape))
        if name.endswith("running_var"):
            value = 1 + 0.5 * np.tanh(normal)
        elif tensor.ndim == 1:
            value = 0.1 * normal + 0.5 * name.endswith("weight")
        else:
            value = normal / np.sqrt(tensor[0].numel())
        tensor.copy_(torch.from_numpy(value))
    return net.eval()


@pytest.mark.parametrize(("name", "dfl"), OFFICIAL, ids=str)
def test_names_and_shapes_are_the_official_ones(name: str, dfl: bool) -> None:
    options = ArchitectureOptions(num_classes=7, dfl=dfl if name == "yolov6n" else None)
    for deploy, expected in ((False, OFFICIAL[name, dfl][0]), (True, OFFICIAL[name, dfl][1])):
        with META:
            state = models.build(name, options, deploy=deploy).state_dict()
        assert digest(state) == expected
        assert models.is_deploy_state(state) is deploy
        assert models.options_from_state(name, ArchitectureOptions(), state) == (
            ArchitectureOptions(num_classes=7, dfl=dfl)
        )


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dfl"), OFFICIAL, ids=str)
def test_outputs_are_the_official_ones(name: str, dfl: bool) -> None:
    net = fill(models.build(name, ArchitectureOptions(num_classes=7, dfl=dfl), deploy=False))
    image = np.sin(np.arange(3 * 64 * 96)).astype(np.float32).reshape(1, 3, 64, 96) * 0.5 + 0.5
    with torch.no_grad():
        (rows,) = net(torch.from_numpy(image)).double().numpy()
    assert rows.shape == (8 * 12 + 4 * 6 + 2 * 3, 12)
    boxes, scores = OFFICIAL[name, dfl][2:]
    np.testing.assert_allclose(rows[-1, :4], boxes, atol=2e-3)
    np.testing.assert_allclose(rows[-1, 5:], scores, atol=2e-5)
    np.testing.assert_array_equal(rows[:, 4], 1)


@pytest.mark.parametrize("name", PUBLISHED)
def test_size_and_cost_are_the_published_ones(name: str) -> None:
    millions, billions = PUBLISHED[name]
    products = []

    def count(layer: nn.Module, _: object, y: torch.Tensor) -> None:
        assert isinstance(layer, nn.Conv2d | nn.ConvTranspose2d)
        inputs = layer.in_channels // layer.groups
        products.append(y.numel() * inputs * layer.weight[0, 0].numel())

    with META:
        net = models.build(name, ArchitectureOptions(), deploy=True).eval()
        for layer in net.modules():
            if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
                layer.register_forward_hook(count)
        net(torch.zeros(1, 3, 640, 640))
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(millions, abs=0.06)
    assert 2 * sum(products) / 1e9 == pytest.approx(billions, abs=0.051)


def decoded_by_hand(raw: Mapping[str, torch.Tensor]) -> np.ndarray:
    """Cell by cell: the middle of a cell, less left and top, plus right and bottom, in strides."""
    rows = []
    for level, stride in enumerate((8, 16, 32)):
        logits, sides = raw[f"cls{level}"].double().numpy(), raw[f"reg{level}"].double().numpy()
        for y, x in np.ndindex(logits.shape[2:]):
            left, top, right, bottom = sides[0, :, y, x]
            x1, y1 = (x + 0.5 - left) * stride, (y + 0.5 - top) * stride
            x2, y2 = (x + 0.5 + right) * stride, (y + 0.5 + bottom) * stride
            scores = 1 / (1 + np.exp(-logits[0, :, y, x]))
            rows.append([(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1, 1, *scores])
    return np.array(rows)


@pytest.mark.parametrize("options", [SMALL, SMALL_CSP], ids=["distances", "dfl"])
def test_raw_heads_decode_to_the_decoded_form(options: ArchitectureOptions) -> None:
    decoded = fill(models.build("yolov6", options, deploy=False))
    raw = fill(models.build("yolov6", replace(options, head="raw"), deploy=False))
    image = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        rows, tensors = decoded(image)[0], raw(image)
    assert list(tensors) == ["cls0", "reg0", "cls1", "reg1", "cls2", "reg2"]
    assert [tuple(x.shape[1:]) for x in tensors.values()][:2] == [(3, 8, 12), (4, 8, 12)]
    np.testing.assert_allclose(rows, decoded_by_hand(tensors), rtol=1e-5, atol=1e-4)


def test_a_distance_is_the_mean_of_its_distribution() -> None:
    net = fill(models.build("yolov6", replace(SMALL_CSP, head="raw"), deploy=False))
    bins = {}
    net.detect.reg_preds[1].register_forward_hook(lambda *args: bins.update(x=args[2].double()))
    with torch.no_grad():
        distances = net(torch.rand(1, 3, 64, 64))["reg1"]
    for side, (y, x) in ((0, (0, 1)), (3, (2, 3))):
        weights = np.exp(bins["x"][0, 17 * side : 17 * side + 17, y, x].numpy())
        mean = (weights * np.arange(17)).sum() / weights.sum()
        assert float(distances[0, side, y, x]) == pytest.approx(mean, rel=1e-5)


@pytest.mark.parametrize("name", ["yolov6n", "yolov6m", "yolov6"])
def test_images_are_letterboxed(name: str) -> None:
    expected = replace(Preprocess.plain(3, 640, 640), resize="letterbox")
    assert implied_preprocess(Source(name), None) == expected
    gray = replace(Preprocess.plain(1, 320, 416), resize="letterbox")
    assert implied_preprocess(Source(name), (1, 320, 416)) == gray
    message = r"yolov6\w?: input_size: got 320 x 400, expected multiples of 32"
    with pytest.raises(ConfigError, match=message):
        implied_preprocess(Source(name), (3, 320, 400))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("repvgg_a0", {"head": "raw"}, "repvgg_a0: got head, expected only num_classes, in_ch"),
        ("mobileone", {"head": "decoded"}, "mobileone: got head, expected only widths, "),
        ("yolov6n", {"widths": (8,)}, "yolov6n: got widths, expected only dfl, head, num_classes"),
        ("yolov6", {"widths": (8,) * 5}, r"widths: got 5 entries .* expected 11 \(5 of the back"),
        ("yolov6", {"blocks": (1,) * 4}, r"blocks: got 4 entries .* expected 8 \(4 stages of"),
        ("yolov6n", {"head": "boxes"}, r"head: got 'boxes', expected one of \('decoded', 'raw'\)"),
    ],
)
def test_options_that_do_not_fit(name: str, options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        models.build(name, ArchitectureOptions(**options), deploy=False)


# --- weights -----------------------------------------------------------------------------------


def of_small(weights: Path, **options: object) -> Source:
    return Source("yolov6", weights, replace(SMALL, num_classes=None, **options))


def half(net: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.half().float() for name, value in net.state_dict().items()}


@pytest.mark.parametrize("ema", [True, False], ids=["ema", "model"])
def test_an_official_file_with_branches_of_training_loads_and_they_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, ema: bool
) -> None:
    net = fill(models.build("yolov6", SMALL, deploy=False))
    extra = {
        "cls_preds_ab": nn.ModuleList(nn.Conv2d(width, 9, 1) for width in (8, 16, 16)),
        "reg_preds_ab": nn.ModuleList(nn.Conv2d(width, 12, 1) for width in (8, 16, 16)),
    }
    path = save_official(tmp_path / "a.pt", net, extra=extra, ema=ema)
    expected = half(net)
    loaded = module_from_source(of_small(path)).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in expected.items())
    assert (
        f"{path}: 12 tensors that only training uses are left out "
        "(detect.cls_preds_ab.*, detect.reg_preds_ab.*)"
    ) in caplog.messages


def test_a_distilled_file_keeps_the_branch_of_inference(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    net = fill(models.build("yolov6", SMALL, deploy=False))
    extra = {"reg_preds_dist": nn.ModuleList(nn.Conv2d(width, 68, 1) for width in (8, 16, 16))}
    path = save_official(tmp_path / "a.pt", net, extra=extra, ema=False)
    loaded = module_from_source(of_small(path)).state_dict()
    assert tuple(loaded["detect.reg_preds.0.weight"].shape) == (4, 8, 1, 1)
    assert "6 tensors that only training uses are left out (detect.reg_preds_dist.*)" in caplog.text


def test_other_branches_are_not_dropped(tmp_path: Path) -> None:
    net = models.build("yolov6", SMALL, deploy=False)
    extra: dict[str, nn.Module] = {"seg_preds": nn.ModuleList([nn.Conv2d(8, 9, 1)])}
    path = save_official(tmp_path / "a.pt", net, extra=extra, ema=False)
    with pytest.raises(CheckpointError, match=r"2 unexpected \(detect.seg_preds.0.weight, "):
        module_from_source(of_small(path))


@pytest.mark.parametrize("deploy", [False, True], ids=["train", "deploy"])
@pytest.mark.parametrize("dfl", [False, True], ids=["distances", "dfl"])
def test_weights_say_form_classes_and_distributions(
    tmp_path: Path, deploy: bool, dfl: bool
) -> None:
    net = fill(models.build("yolov6", replace(SMALL, dfl=dfl), deploy=deploy))
    torch.save({"ema": {f"module.{k}": v for k, v in net.state_dict().items()}}, tmp_path / "a.pt")
    loaded = module_from_source(of_small(tmp_path / "a.pt"))
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(loaded(image), net(image))


@needs_shared
def test_the_trained_net_loads_with_its_three_classes() -> None:
    weights = SHARED / "zoo" / "yolov6n_bccd.pt"
    net = module_from_source(Source("yolov6n", weights))
    with torch.no_grad():
        assert net(torch.zeros(2, 3, 64, 64)).shape == (2, 84, 8)
    with pytest.raises(CheckpointError, match=r"got \(3, 32, 1, 1\), expected \(4, 32, 1, 1\)"):
        module_from_source(Source("yolov6n", weights, ArchitectureOptions(num_classes=4)))
