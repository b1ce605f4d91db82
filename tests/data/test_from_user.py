import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from reptrt.core.errors import DataError
from reptrt.data.arrays import Arrays
from reptrt.data.dataset import open_dataset
from reptrt.data.from_user import images_from
from reptrt.graph.preprocess import Preprocess

PREPROCESS = Preprocess(3, 8, 6, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (10, 3, 8, 6), dtype=np.uint8)
LABELS = RNG.integers(0, 4, 10)
FLOATS = RNG.standard_normal((10, 3, 8, 6)).astype(np.float32).clip(-0.7, 1.7)


def prepared(value: Any, **options: Any) -> np.ndarray:
    dataset = open_dataset(images_from(value, **options), PREPROCESS)
    return np.concatenate(list(dataset.batches(4)))


def normalized() -> np.ndarray:
    mean, std = (np.float32(v)[:, None, None] for v in (PREPROCESS.mean, PREPROCESS.std))
    return (PIXELS.astype(np.float32) / np.float32(255) - mean) / std


def test_pixels_are_prepared_in_whatever_form_they_come(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=PIXELS)
    np.savez(tmp_path / "last.npz", x=PIXELS.transpose(0, 2, 3, 1))
    tensor = torch.from_numpy(PIXELS)
    forms = [
        PIXELS,
        PIXELS.transpose(0, 2, 3, 1),
        tensor,
        (PIXELS, LABELS),
        [PIXELS[:4], PIXELS[4:]],
        (PIXELS[:4], PIXELS[4:]),
        [(PIXELS[:4], LABELS[:4]), (PIXELS[4:], LABELS[4:])],
        iter([PIXELS[:4], tensor[4:]]),
        DataLoader(TensorDataset(tensor), batch_size=3),
        DataLoader(TensorDataset(tensor, torch.from_numpy(LABELS)), batch_size=3),
        tmp_path / "x.npz",
        str(tmp_path / "last.npz"),
    ]
    for form in forms:
        assert np.array_equal(prepared(form), normalized())


def test_floats_are_the_input_already() -> None:
    assert np.array_equal(prepared(FLOATS), FLOATS)
    assert np.array_equal(prepared(torch.from_numpy(FLOATS).double()), FLOATS)
    assert np.array_equal(prepared(torch.from_numpy(FLOATS).requires_grad_()), FLOATS)


def test_labels_come_along_or_are_ignored() -> None:
    loader = DataLoader(TensorDataset(torch.from_numpy(PIXELS), torch.from_numpy(LABELS)), 3)
    for form in (loader, (PIXELS, LABELS), [(PIXELS, LABELS)]):
        images = images_from(form)
        assert isinstance(images, Arrays)
        assert np.array_equal(images.labels, LABELS)
    boxes = [(PIXELS[:4], [{"boxes": 1}] * 4), (PIXELS[4:], [{"boxes": 1}] * 6)]
    masks = (PIXELS, PIXELS[:, 0])
    for form in (loader, boxes, masks):
        images = images_from(form, labels=False)
        assert isinstance(images, Arrays)
        assert images.labels is None
        assert np.array_equal(images.images, PIXELS)


def test_a_limit_ends_the_reading_of_a_loader() -> None:
    taken = []

    def batches() -> Any:
        for start in range(0, 10, 4):
            taken.append(start)
            yield PIXELS[start : start + 4], LABELS[start : start + 4]

    images = images_from(batches(), limit=5)
    assert isinstance(images, Arrays)
    assert np.array_equal(images.images, PIXELS[:5])
    assert np.array_equal(images.labels, LABELS[:5])
    assert taken == [0, 4]


class NoBatches:
    pass


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"images": PIXELS}, r"got a dict, expected an array or tensor"),
        (NoBatches(), r"got a NoBatches, expected .* an \.npy$"),
        (None, r"got a NoneType, expected"),
        (3, r"got an int, expected"),
        (TensorDataset(torch.from_numpy(PIXELS)), r"TensorDataset.*wrap it in .*DataLoader"),
        ([], r"got no batches from a list"),
        (PIXELS[0], r"shape \(3, 8, 6\), expected .*images\[None\]"),
        (list(PIXELS), r"batch 0: shape \(3, 8, 6\), expected"),
        ([{"x": PIXELS}], r"batch 0 of a list is a dict, expected an array or tensor"),
        ([(PIXELS, "a")], r"batch 0: labels are a str, expected class indices"),
        ([(PIXELS, ["a"] * 10)], r"batch 0 of a list is a tuple \(ndarray, list\), expected"),
        ([(PIXELS, LABELS, LABELS)], r"batch 0 of a list is a tuple \(ndarray, ndarray, ndarray\)"),
        ([("a", PIXELS)], r"batch 0 of a list is a tuple \(str, ndarray\)"),
        ([PIXELS, PIXELS[..., :5]], r"batch 1 has images uint8 \(3, 8, 5\), batch 0 uint8"),
        ([PIXELS, FLOATS], r"batch 1 has images float32 .*, batch 0 uint8"),
        ([PIXELS, (PIXELS, LABELS)], r"some batches have labels and some do not"),
        ((PIXELS, LABELS[:3]), r"labels has shape \(3,\), expected \(10,\)"),
        ((PIXELS, LABELS.astype(float)), r"labels is float64 or negative"),
        ((PIXELS, LABELS - 9), r"labels is int64 or negative"),
    ],
)
def test_what_is_no_images(value: Any, message: str) -> None:
    with pytest.raises(DataError, match=rf"^held_out: .*{message}") as caught:
        images_from(value, parameter="held_out")
    assert "\n" not in str(caught.value)


def test_an_array_of_another_layout() -> None:
    with pytest.raises(DataError, match=r"^images: 8 channels in an array"):
        open_dataset(images_from(PIXELS.transpose(0, 2, 1, 3)), PREPROCESS)


@pytest.mark.parametrize(
    ("images", "doubt"),
    [
        (PIXELS.astype(np.float32), "but pixels prepared as the network says lie between"),
        (PIXELS / np.float32(255), "look like pixels / 255 without mean and std"),
    ],
)
def test_floats_that_do_not_look_prepared(
    images: np.ndarray, doubt: str, caplog: pytest.LogCaptureFixture
) -> None:
    open_dataset(images_from(images), PREPROCESS)
    assert doubt in caplog.text


def test_a_network_without_mean_and_std_takes_normalized_floats(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It may have been exported for a loader that normalizes."""
    plain = Preprocess.plain(3, 8, 6)
    open_dataset(images_from(3 * FLOATS), plain)
    open_dataset(images_from(PIXELS / np.float32(255)), plain)
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        open_dataset(images_from(PIXELS.astype(np.float32)), plain)
    assert "look like pixels 0..255; pass those as uint8" in caplog.text
