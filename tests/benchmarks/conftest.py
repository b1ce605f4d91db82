"""A RepVGG with random weights for images of the size of CIFAR-10, and such images."""

from pathlib import Path

import numpy as np
import pytest
import torch

from reptrt.data.dataset import Dataset, open_dataset
from reptrt.graph.net import Net, net_from_model, read_model
from reptrt.graph.preprocess import read_preprocess
from reptrt.pipeline import CalibrateOptions, ExportOptions, calibrate, export
from reptrt.sources.models import ArchitectureOptions
from reptrt.sources.source import Source

IMAGES = 128
SOURCE = Source(
    "repvgg",
    architecture=ArchitectureOptions(
        blocks=(2, 4, 6, 1), widths=(32, 32, 64, 128, 256), strides=(2, 1, 2, 2, 1), num_classes=10
    ),
)
EXPORT = ExportOptions(input_size=(3, 32, 32), mean=(0.5,) * 3, std=(0.25,) * 3)
FORMS = {
    "plain": CalibrateOptions(images=IMAGES, equalize=False, split="none", full_range=False),
    "identity": CalibrateOptions(images=IMAGES, split="identity", split_precision="int8"),
    "coarse-fine": CalibrateOptions(
        images=IMAGES, split="coarse-fine", split_precision="int8", equalize=False
    ),
    "default": CalibrateOptions(images=IMAGES),
}


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Use one thread, because several threads make times depend on the load of the machine."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder for the files of this run."""
    return tmp_path_factory.mktemp("benchmarks")


@pytest.fixture(scope="session")
def images(folder: Path) -> Path:
    """Smooth random images, so that the first layers see edges and not noise."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (IMAGES, 3, 8, 8), dtype=np.uint8)
    np.savez(folder / "x.npz", x=coarse.repeat(4, axis=2).repeat(4, axis=3))
    return folder / "x.npz"


@pytest.fixture(scope="session")
def float_file(folder: Path) -> Path:
    """The fused float net."""
    export(SOURCE, folder / "float.onnx", EXPORT)
    return folder / "float.onnx"


@pytest.fixture(scope="session")
def net(float_file: Path) -> Net:
    """The fused float net, read."""
    return net_from_model(read_model(float_file))


@pytest.fixture(scope="session")
def dataset(net: Net, images: Path) -> Dataset:
    """The images in the input form of the net."""
    return open_dataset(images, read_preprocess(net))


@pytest.fixture(scope="session")
def int8_files(folder: Path, float_file: Path, images: Path) -> dict[str, Path]:
    """The net in INT8, by the form of its splits."""
    files = {}
    for form, options in FORMS.items():
        files[form] = folder / f"{form}.onnx"
        calibrate(float_file, images, files[form], options)
    return files
