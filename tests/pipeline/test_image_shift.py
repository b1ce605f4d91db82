"""Calibration images that do not look like the training images are named; the others are not."""

import base64
import json
import logging
import statistics
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

import reptrt
from reptrt.core.errors import ArtifactError
from reptrt.data.dataset import open_dataset
from reptrt.execute.torchgraph import TorchGraph
from reptrt.graph.net import net_from_model
from reptrt.graph.preprocess import Preprocess
from reptrt.graph.trained import take_trained
from reptrt.pipeline.image_shift import image_shift
from reptrt.pipeline.values import Exported
from tests.support.helpers import ort_run
from tests.support.qdq_nets import with_outputs

Images = npt.NDArray[np.uint8]
KEY = "reptrt.trained"


class Block(nn.Module):
    """A rep block: 3x3, 1x1 and, where it fits, identity, each with its batch norm."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.wide, self.wide_norm = nn.Conv2d(inputs, outputs, 3, padding=1), self._norm(outputs)
        self.point, self.point_norm = nn.Conv2d(inputs, outputs, 1), self._norm(outputs)
        self.norm = self._norm(outputs) if inputs == outputs else None

    @staticmethod
    def _norm(channels: int) -> nn.BatchNorm2d:
        norm = nn.BatchNorm2d(channels, momentum=None)  # the mean over all batches it has seen
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias)
        return norm

    def forward(self, x: Tensor) -> Tensor:
        total = self.wide_norm(self.wide(x)) + self.point_norm(self.point(x))
        return torch.relu(total if self.norm is None else total + self.norm(x))


def pictures(count: int, seed: int) -> Images:
    """Return pictures of one kind: dark ones, each with a grey level and a contrast of its own."""
    rng = np.random.default_rng(seed)
    level = rng.uniform(40, 90, (count, 1, 1, 1))
    texture = rng.normal(0, 1, (count, 3, 8, 8)) * rng.uniform(5, 25, (count, 1, 1, 1))
    return (level + texture + [[[20]], [[0]], [[-20]]]).clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    """A net whose batch norms have seen pictures, in the way in which training shows them."""
    torch.manual_seed(0)
    net = nn.Sequential(
        Block(3, 8),
        Block(8, 8),
        Block(8, 8),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )
    with torch.no_grad():
        net(torch.from_numpy(pictures(1024, 0)).float() / 255)
    return net.eval()


def notes_of(exported: Exported, images: Images) -> list[str]:
    made = reptrt.calibrate(exported, images)
    return [note for note in made.report.notes if "differ from those" in note]


def test_the_statistics_are_those_of_the_training_images(trained: nn.Module) -> None:
    model = reptrt.export(trained, input_size=(3, 8, 8)).proto
    found = take_trained(net_from_model(model))
    assert len(found) == 3
    (image,) = model.graph.input
    feeds = {image.name: pictures(1024, 0).astype(np.float32) / 255}
    values = ort_run(with_outputs(model, [*found]), feeds)
    for name, known in found.items():
        np.testing.assert_allclose(known.mean, values[name].mean((0, 2, 3)), atol=1e-3)
    terms = [trained[1].wide_norm, trained[1].point_norm, trained[1].norm]  # type: ignore[index]
    expected = torch.stack([norm.weight for norm in terms]).square().sum(0).sqrt()
    np.testing.assert_allclose(
        list(found.values())[1].deviation, expected.detach().numpy(), rtol=1e-6
    )


def test_images_of_the_training_set_are_not_named(trained: nn.Module) -> None:
    exported = reptrt.export(trained, input_size=(3, 8, 8))
    assert notes_of(exported, pictures(64, 1)) == []
    assert notes_of(exported, pictures(12, 2)) == []


class Windows(nn.Module):
    """A block that sees each quarter of an image as an image of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block(3, 4)
        self.last = nn.Linear(256, 4)

    def forward(self, x: Tensor) -> Tensor:
        windows = x.view(-1, 3, 2, 4, 2, 4).permute(0, 2, 4, 1, 3, 5).reshape(-1, 3, 4, 4)
        return self.last(self.block(windows).reshape(-1, 256))


@pytest.mark.parametrize("count", [10, 40])
def test_the_shift_is_that_of_the_formula(count: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(Windows(), nn.Unflatten(1, (4, 1, 1)), Block(4, 4), nn.Flatten())
    with torch.no_grad():
        net(torch.from_numpy(pictures(1024, 0)).float() / 255)
    model = reptrt.export(net.eval(), input_size=(3, 8, 8)).proto
    fused = net_from_model(model)
    known = take_trained(fused)
    images = pictures(count, 1) + np.uint8(60)
    np.save(tmp_path / "x.npy", images)
    data = open_dataset(tmp_path / "x.npy", Preprocess.plain(3, 8, 8))
    with torch.inference_mode():
        got = image_shift(TorchGraph(fused, torch.device("cpu")), data, known)

    (image,) = model.graph.input
    feeds = {image.name: images.astype(np.float32) / 255}
    values = ort_run(with_outputs(model, [*known]), feeds)
    assert [len(values[name]) for name in known] == [4 * count, count]
    shifts = []
    for name, trained in known.items():
        excess = 0.0
        for channel, mean in enumerate(trained.mean):
            means = [float(row[channel].mean(dtype=np.float64)) for row in values[name]]
            chance = statistics.variance(means) / len(means)
            excess += (statistics.fmean(means) - float(mean)) ** 2 - chance
        shifts.append((excess / sum(float(d) ** 2 for d in trained.deviation)) ** 0.5)
    assert abs(shifts[0] - shifts[1]) > 0.1  # or the largest could be any
    assert got == pytest.approx(max(shifts), rel=1e-4)


def test_windows_are_rows_of_their_images() -> None:
    torch.manual_seed(0)
    net = Windows()
    with torch.no_grad():
        net(torch.from_numpy(pictures(1024, 0)).float() / 255)
    exported = reptrt.export(net.eval(), input_size=(3, 8, 8))
    assert notes_of(exported, pictures(40, 1)) == []  # 32 and 8: the last batch is filled up
    assert len(notes_of(exported, pictures(40, 1) + np.uint8(100))) == 1


@pytest.mark.parametrize("change", ["light", "channels", "noise"])
def test_other_images_are_named(trained: nn.Module, change: str) -> None:
    exported = reptrt.export(trained, input_size=(3, 8, 8))
    own = pictures(64, 1)
    rng = np.random.default_rng(0)
    other = {
        "light": own + np.uint8(100),
        "channels": np.ascontiguousarray(own[:, ::-1]),
        "noise": rng.integers(0, 256, own.shape, dtype=np.uint8),
    }[change]
    (note,) = notes_of(exported, other)
    assert "check the images, the order of their channels, and mean and std" in note


def test_wrong_mean_and_std_are_named(trained: nn.Module) -> None:
    exported = reptrt.export(
        trained, input_size=(3, 8, 8), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)
    )
    assert len(notes_of(exported, pictures(64, 1))) == 1


def test_plain_int8_names_them_too_and_no_int8_file_keeps_the_statistics(
    trained: nn.Module,
) -> None:
    exported = reptrt.export(trained, input_size=(3, 8, 8))
    images = pictures(64, 1) + np.uint8(100)
    made = reptrt.calibrate(exported, images, options=replace(reptrt.PLAIN_INT8, images=64))
    assert any("differ from those" in note for note in made.report.notes)
    keys = {entry.key for entry in made.proto.metadata_props}
    assert KEY not in keys


def test_a_fused_file_that_is_exported_again_keeps_them(trained: nn.Module, tmp_path: Path) -> None:
    reptrt.export(trained, input_size=(3, 8, 8)).save(tmp_path / "m.onnx")
    again = reptrt.export(tmp_path / "m.onnx")
    assert len(notes_of(again, pictures(64, 1) + np.uint8(100))) == 1


def test_batch_norms_that_saw_no_image_say_nothing(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(Block(3, 4), nn.Flatten(), nn.Linear(256, 4)).eval()
    exported = reptrt.export(net, input_size=(3, 8, 8))
    assert KEY not in {entry.key for entry in exported.proto.metadata_props}
    with caplog.at_level(logging.WARNING):
        assert notes_of(exported, pictures(16, 0)) == []


def test_damaged_statistics_are_refused(trained: nn.Module) -> None:
    exported = reptrt.export(trained, input_size=(3, 8, 8))
    net = net_from_model(exported.proto)
    records = json.loads(net.metadata[KEY])
    name = next(iter(records))
    records[name]["mean"] = base64.b64encode(np.zeros(3, "<f4").tobytes()).decode()
    net.metadata[KEY] = json.dumps(records)
    with pytest.raises(ArtifactError, match=r"reptrt\.trained: .*3 means and 8 deviations"):
        take_trained(net)
