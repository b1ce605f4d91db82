import hashlib
import io
import logging
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from reptrt.core.errors import ConfigError, DataError
from reptrt.data.dataset import Dataset, open_dataset
from reptrt.data.images import ImageFiles, list_images, resized
from reptrt.graph.preprocess import Preprocess
from tests.support.helpers import SHARED, needs_shared

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
RGB8 = Preprocess(3, 8, 8, MEAN, STD)
RNG = np.random.default_rng(0)


def pixels(*shape: int) -> np.ndarray:
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def save(path: Path, image: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)
    return path


def everything(dataset: Dataset, size: int = 3) -> np.ndarray:
    return np.concatenate(list(dataset.batches(size)))


def normalized(images: np.ndarray, preprocess: Preprocess) -> np.ndarray:
    """(p / 255 - mean) / std step by step in float32; images (n, H, W, C) -> (n, C, H, W)."""
    x = images.astype(np.float32) / np.float32(255)
    x = (x - np.float32(preprocess.mean)) / np.float32(preprocess.std)
    return np.ascontiguousarray(x.transpose(0, 3, 1, 2))


@pytest.fixture
def class_folder(tmp_path: Path) -> Path:
    for name in ("cat", "ant", "bee"):
        for number in range(20):
            save(tmp_path / "data" / name / f"{number:02}.png", pixels(8, 8, 3))
    return tmp_path / "data"


# --- folders -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "parts"),
    [
        (("train", "test"), ("train", "test")),
        (("train2017/cat", "val2017/cat", "extra/cat"), ("train2017", "val2017")),
        (("a/cat", "a/dog", "b/cat", "b/dog"), ("a", "b")),
    ],
)
def test_the_folder_above_the_parts_of_a_data_set(
    tmp_path: Path, names: tuple[str, ...], parts: tuple[str, ...]
) -> None:
    for name in names:
        save(tmp_path / name / "0.png", pixels(8, 8, 3))
    listed = ", ".join(f"{part}/" for part in sorted(parts))
    message = f"{listed} are parts of a data set, not classes; give one of them, such as .*"
    with pytest.raises(DataError, match=message + sorted(parts)[0]):
        open_dataset(tmp_path, RGB8)


@pytest.mark.parametrize(
    "names", [("train", "car"), ("a/cat", "a/dog", "b/car"), ("all/cat", "all/dog")]
)
def test_classes_that_look_like_parts(tmp_path: Path, names: tuple[str, ...]) -> None:
    """One class called train, classes in groups, and a folder around the class folders."""
    for name in names:
        save(tmp_path / name / "0.png", pixels(8, 8, 3))
    assert open_dataset(tmp_path, RGB8).length == len(names)


def test_a_flat_folder_is_read_in_name_order_and_normalized(tmp_path: Path) -> None:
    images = {name: pixels(8, 8, 3) for name in ("b.png", "a.PNG", "c.bmp", "d.tif", "e.ppm")}
    for name, image in images.items():
        save(tmp_path / name, image)
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / ".hidden.png").write_text("no image")

    dataset = open_dataset(tmp_path, RGB8)

    assert dataset.length == 5
    assert dataset.labels is None
    expected = normalized(np.stack([images[name] for name in sorted(images)]), RGB8)
    found = everything(dataset)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("suffix", [".jpg", ".JPEG", ".webp", ".tiff"])
def test_every_suffix_is_an_image(tmp_path: Path, suffix: str) -> None:
    save(tmp_path / f"a{suffix}", pixels(8, 8, 3))
    assert everything(open_dataset(tmp_path, RGB8)).shape == (1, 3, 8, 8)


def test_labels_are_the_index_of_the_sorted_class_folder(class_folder: Path) -> None:
    (class_folder / "aaa_empty").mkdir()
    save(class_folder / "bee" / "deeper" / "x.png", pixels(8, 8, 3))
    (class_folder / ".cache").mkdir()

    dataset = open_dataset(class_folder, RGB8, labels=True)

    assert dataset.labels is not None
    assert np.bincount(dataset.labels).tolist() == [0, 20, 21, 20]  # aaa_empty ant bee cat
    assert not dataset.labels.flags.writeable
    assert [path.parent.name for path in list_images(class_folder).paths[::20]][:2] == [
        "ant",
        "bee",
    ]


def test_batches_are_the_same_whatever_their_size_and_number_of_passes(class_folder: Path) -> None:
    dataset = open_dataset(class_folder, RGB8)
    sizes = [len(batch) for batch in dataset.batches(25)]
    assert sizes == [25, 25, 10]
    np.testing.assert_array_equal(everything(dataset, 7), everything(dataset, 60))


def test_decoded_images_are_kept_when_they_fit(class_folder: Path) -> None:
    dataset = open_dataset(class_folder, RGB8)
    first = everything(dataset)
    for path in list_images(class_folder).paths:
        path.unlink()
    np.testing.assert_array_equal(everything(dataset, 8), first)


def test_an_abandoned_pass_does_not_disturb_the_next(class_folder: Path) -> None:
    dataset = open_dataset(class_folder, RGB8)
    next(dataset.batches(7))
    np.testing.assert_array_equal(
        everything(dataset, 16), everything(open_dataset(class_folder, RGB8))
    )


def test_images_that_do_not_fit_the_cache_are_decoded_again(class_folder: Path) -> None:
    paths = list_images(class_folder).paths
    cached, streamed = (ImageFiles(class_folder, paths, RGB8, size) for size in (10**9, 0))
    np.testing.assert_array_equal(streamed.read(5, 31), cached.read(5, 31))
    paths[7].unlink()
    with pytest.raises(
        DataError, match=r"1 of 60 images cannot be read: ant/07.png \(No such file"
    ):
        streamed.read(5, 31)


def test_large_images_are_decoded_in_order_by_threads(tmp_path: Path) -> None:
    images = pixels(9, 160, 150, 3)
    for number, image in enumerate(images):
        save(tmp_path / f"{number}.png", image)
    preprocess = Preprocess(3, 160, 150, MEAN, STD)
    found = everything(open_dataset(tmp_path, preprocess), 4)
    np.testing.assert_array_equal(found, normalized(images, preprocess))


# --- samples -----------------------------------------------------------------------------------


def test_a_sample_is_seeded_spread_and_without_replacement(class_folder: Path) -> None:
    whole = everything(open_dataset(class_folder, RGB8))
    dataset = open_dataset(class_folder, RGB8, limit=30, seed=4)
    sample = everything(dataset)

    assert dataset.length == len(sample) == 30
    positions = [int(np.flatnonzero((whole == image).all(axis=(1, 2, 3)))[0]) for image in sample]
    assert positions == sorted(set(positions))
    assert dataset.labels is not None
    assert [position // 20 for position in positions] == dataset.labels.tolist()
    assert np.bincount(dataset.labels, minlength=3).min() >= 5
    np.testing.assert_array_equal(
        everything(open_dataset(class_folder, RGB8, limit=30, seed=4)), sample
    )
    other = open_dataset(class_folder, RGB8, limit=30, seed=5)
    assert not np.array_equal(everything(other), sample)


def test_a_uniform_sample_takes_every_image_equally_often(tmp_path: Path) -> None:
    images = np.arange(20, dtype=np.float32)[:, None, None, None] * np.ones(
        (1, 3, 8, 8), np.float32
    )
    np.save(tmp_path / "x.npy", images)
    counts = np.zeros(20)
    for seed in range(400):
        taken = everything(open_dataset(tmp_path / "x.npy", RGB8, limit=5, seed=seed))
        counts[taken[:, 0, 0, 0].astype(int)] += 1
    # binomial(400, 1/4): mean 100, standard deviation 8.7; 4.5 of them on either side
    assert counts.min() > 60
    assert counts.max() < 140


def test_a_sample_does_not_depend_on_the_order_of_the_file_system(tmp_path: Path) -> None:
    images = pixels(30, 8, 8, 3)
    for folder, order in (("a", range(30)), ("b", reversed(range(30)))):
        for number in order:
            save(tmp_path / folder / f"{number:02}.png", images[number])
    a, b = (everything(open_dataset(tmp_path / name, RGB8, limit=9)) for name in "ab")
    np.testing.assert_array_equal(a, b)


def test_asking_for_all_images_keeps_their_order(class_folder: Path) -> None:
    np.testing.assert_array_equal(
        everything(open_dataset(class_folder, RGB8, limit=60, seed=9)),
        everything(open_dataset(class_folder, RGB8)),
    )


def test_more_images_than_there_are(class_folder: Path) -> None:
    with pytest.raises(DataError, match="got 60 images, expected 61"):
        open_dataset(class_folder, RGB8, limit=61)


@pytest.mark.parametrize("limit", [0, -3])
def test_a_limit_must_be_positive(class_folder: Path, limit: int) -> None:
    with pytest.raises(ConfigError, match=f"got {limit}, expected at least 1"):
        open_dataset(class_folder, RGB8, limit=limit)


def test_a_batch_size_must_be_positive(class_folder: Path) -> None:
    with pytest.raises(ConfigError, match="batch size: got 0"):
        next(open_dataset(class_folder, RGB8).batches(0))


# --- digest ------------------------------------------------------------------------------------


@pytest.mark.parametrize("stride", [2, 3, 7])
def test_a_data_set_is_parted(class_folder: Path, stride: int) -> None:
    dataset = open_dataset(class_folder, RGB8)
    (x,) = dataset.batches(dataset.length)
    others, taken = dataset.parted(stride)
    index = np.arange(dataset.length) % stride == stride - 1
    for part, wanted in ((others, x[~index]), (taken, x[index])):
        assert part.length == len(wanted)
        np.testing.assert_array_equal(np.concatenate(list(part.batches(3))), wanted)
    assert others.labels is not None
    assert dataset.labels is not None
    np.testing.assert_array_equal(others.labels, dataset.labels[~index])


def test_arrays_are_parted_after_they_are_sampled(tmp_path: Path) -> None:
    x = np.random.default_rng(0).random((40, 3, 8, 8)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    dataset = open_dataset(tmp_path / "x.npy", RGB8, limit=20, seed=1)
    (sampled,) = dataset.batches(20)
    wanted = sampled[np.arange(20) % 4 != 3], sampled[3::4]
    for part, images in zip(dataset.parted(4), wanted, strict=True):
        np.testing.assert_array_equal(np.concatenate(list(part.batches(2))), images)
        assert part.labels is None
        assert part.digest() == hashlib.sha256(images.tobytes()).hexdigest()


@pytest.mark.parametrize("stride", [0, 1, 1000])
def test_a_part_is_not_empty(class_folder: Path, stride: int) -> None:
    with pytest.raises(ConfigError, match="stride"):
        open_dataset(class_folder, RGB8).parted(stride)


def test_the_digest_of_a_folder_follows_the_pixels_taken(class_folder: Path) -> None:
    digest = open_dataset(class_folder, RGB8).digest()
    moved = class_folder.rename(class_folder.with_name("moved"))
    assert open_dataset(moved, RGB8).digest() == digest
    assert open_dataset(moved, RGB8, limit=30).digest() != digest
    save(moved / "cat" / "05.png", pixels(8, 8, 3))
    assert open_dataset(moved, RGB8).digest() != digest


def test_the_digest_of_arrays_follows_what_is_taken(tmp_path: Path) -> None:
    def digest(x: np.ndarray, **options: int) -> str:
        np.savez(tmp_path / "a.npz", x=x)
        return open_dataset(tmp_path / "a.npz", RGB8, **options).digest()

    x = pixels(600, 3, 8, 8)
    changed = x.copy()
    changed[-1, 0, 0, 0] ^= 1
    all_different = [x, changed, x[:-1], x.astype(np.float32), x.transpose(0, 1, 3, 2)]
    assert len({digest(array) for array in all_different}) == 5
    assert digest(x, limit=9) == digest(x, limit=9) != digest(x, limit=9, seed=1)
    assert digest(x, limit=600) == digest(x)


@needs_shared
def test_real_images_have_the_labels_of_their_folders() -> None:
    preprocess = Preprocess(3, 32, 32, MEAN, STD)
    dataset = open_dataset(SHARED / "cifar10" / "calib", preprocess, labels=True)
    assert dataset.length == 1024
    assert dataset.labels is not None
    names = sorted(path.name for path in (SHARED / "cifar10" / "calib").iterdir())
    sizes = [len(list((SHARED / "cifar10" / "calib" / name).iterdir())) for name in names]
    assert np.bincount(dataset.labels).tolist() == sizes
    first = next(dataset.batches(1))[0]
    path = min((SHARED / "cifar10" / "calib" / names[0]).iterdir())
    with Image.open(path) as image:
        np.testing.assert_array_equal(first, normalized(np.asarray(image)[None], preprocess)[0])


# --- sizes -------------------------------------------------------------------------------------


def triangle_resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bilinear with antialiasing in float64: triangle filter as wide as the scale; (H, W, C)."""

    def weights(old: int, new: int) -> np.ndarray:
        scale = max(old / new, 1.0)
        centres = (np.arange(new) + 0.5) * old / new
        distance = np.abs(np.arange(old)[None] + 0.5 - centres[:, None]) / scale
        kernel = np.maximum(1 - distance, 0)
        return kernel / kernel.sum(axis=1, keepdims=True)

    rows, columns = weights(image.shape[0], height), weights(image.shape[1], width)
    return np.einsum("yh,hwc,xw->yxc", rows, image.astype(np.float64), columns)


@pytest.mark.parametrize(
    "size", [(16, 16), (24, 40), (5, 4), (8, 8)], ids=["half", "any", "up", "same"]
)
def test_stretch_is_bilinear_with_antialiasing(tmp_path: Path, size: tuple[int, int]) -> None:
    image = pixels(*size, 3)
    save(tmp_path / "a.png", image)
    found = everything(open_dataset(tmp_path, Preprocess(3, 8, 8, (0,) * 3, (1,) * 3, "stretch")))
    expected = triangle_resize(image, 8, 8).transpose(2, 0, 1)
    # PIL rounds to 8 bits after each of the two directions
    np.testing.assert_allclose(found[0] * 255, expected, atol=1.01)


def test_crop_of_an_image_at_the_covering_size_is_its_centre() -> None:
    image = pixels(36, 50, 3)  # floor(32 / 0.875) = 36
    found = resized(Image.fromarray(image), 32, 32, "crop")
    np.testing.assert_array_equal(np.asarray(found), image[2:34, 9:41])


@pytest.mark.parametrize(
    ("height", "width", "scaled"),
    [(72, 100, (36, 50)), (100, 72, (50, 36)), (90, 90, (36, 36)), (20, 11, (65, 36))],
)
def test_crop_scales_the_shorter_side(height: int, width: int, scaled: tuple[int, int]) -> None:
    image = pixels(height, width, 3)
    whole = triangle_resize(image, *scaled)
    top, left = round((scaled[0] - 32) / 2), round((scaled[1] - 32) / 2)
    found = np.asarray(resized(Image.fromarray(image), 32, 32, "crop"))
    np.testing.assert_allclose(found, whole[top : top + 32, left : left + 32], atol=1.01)


def test_crop_to_a_wide_target_covers_it() -> None:
    found = resized(Image.fromarray(np.full((40, 40, 3), 200, np.uint8)), 16, 64, "crop")
    assert found.size == (64, 16)
    assert (np.asarray(found) == 200).all()  # no border was made up


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("size", "scaled", "corner"),
    [
        ((48, 64), (24, 32), (4, 0)),
        ((64, 48), (32, 24), (0, 4)),
        ((10, 13), (25, 32), (3, 0)),  # 24.6; a border of 7 is 3 above and 4 below
        ((9, 32), (9, 32), (11, 0)),
        ((32, 32), (32, 32), (0, 0)),
        ((2, 300), (1, 32), (15, 0)),
    ],
)
def test_letterbox_scales_to_fit_and_pads_with_grey(
    tmp_path: Path,
    size: tuple[int, int],
    scaled: tuple[int, int],
    corner: tuple[int, int],
    channels: int,
) -> None:
    image = pixels(*size, 3) if channels == 3 else pixels(*size)
    save(tmp_path / "a.png", image)
    preprocess = Preprocess(channels, 32, 32, (0,) * channels, (1,) * channels, "letterbox")
    found = np.rint(everything(open_dataset(tmp_path, preprocess))[0] * 255)
    expected = np.full((channels, 32, 32), 114.0)
    (top, left), (height, width) = corner, scaled
    inside = triangle_resize(image.reshape(*size, channels), height, width).transpose(2, 0, 1)
    expected[:, top : top + height, left : left + width] = inside
    np.testing.assert_allclose(found, expected, atol=1.01)
    border = np.ones((32, 32), bool)
    border[top : top + height, left : left + width] = False
    assert (found[:, border] == 114).all()
    exact = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
    pillow = np.asarray(exact).reshape(height, width, channels).transpose(2, 0, 1)
    np.testing.assert_array_equal(found[:, top : top + height, left : left + width], pillow)


@pytest.mark.parametrize(
    ("size", "rule"), [((16, 16), "stretch"), ((16, 20), "crop")], ids=["same aspect", "other"]
)
def test_images_of_one_other_size_are_fitted_with_a_note(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, size: tuple[int, int], rule: str
) -> None:
    for name in "abc":
        save(tmp_path / f"{name}.png", pixels(*size, 3))
    with caplog.at_level(logging.WARNING):
        found = everything(open_dataset(tmp_path, RGB8))
    assert f"all images are {size[0]}x{size[1]}, the net takes 8x8" in caplog.text
    assert f"'{rule}'" in caplog.text
    explicit = Preprocess(3, 8, 8, MEAN, STD, "crop" if rule == "crop" else "stretch")
    np.testing.assert_array_equal(found, everything(open_dataset(tmp_path, explicit)))


def test_images_of_mixed_sizes_are_refused_by_name_and_number(tmp_path: Path) -> None:
    for name, size in (("a", (8, 8)), ("b", (8, 8)), ("c", (8, 9)), ("d", (7, 8))):
        save(tmp_path / f"{name}.png", pixels(*size, 3))
    expected = (
        r"images of 3 sizes: 8x8 \(2 images, e.g. a.png\), 8x9 \(1 images, e.g. c.png\), "
        r"7x8 \(1 images, e.g. d.png\); the net takes 8x8 .* resize=.crop., resize=.stretch. or "
        r"resize=.letterbox."
    )
    with pytest.raises(DataError, match=expected):
        open_dataset(tmp_path, RGB8)


@pytest.mark.parametrize("resize", ["crop", "stretch", "letterbox"])
def test_mixed_sizes_are_resized_when_asked(tmp_path: Path, resize: str) -> None:
    for name, size in (("a", (9, 30)), ("b", (40, 8)), ("c", (3, 3))):
        save(tmp_path / f"{name}.jpg", pixels(*size, 3))
    found = everything(open_dataset(tmp_path, Preprocess(3, 8, 8, MEAN, STD, resize)))
    assert found.shape == (3, 3, 8, 8)


# --- channels ----------------------------------------------------------------------------------


def test_gray_and_transparent_images_become_rgb(tmp_path: Path) -> None:
    gray, rgba = pixels(8, 8), pixels(8, 8, 4)
    save(tmp_path / "a.png", gray)
    save(tmp_path / "b.png", rgba)
    expected = normalized(np.stack([np.stack([gray] * 3, axis=2), rgba[..., :3]]), RGB8)
    np.testing.assert_array_equal(everything(open_dataset(tmp_path, RGB8)), expected)


def test_a_palette_with_transparency_becomes_rgb(tmp_path: Path) -> None:
    image = Image.fromarray(pixels(8, 8, 3)).convert("P")
    image.save(tmp_path / "a.png", transparency=bytes(range(256)))
    expected = normalized(np.asarray(image.convert("RGB"))[None], RGB8)
    np.testing.assert_array_equal(everything(open_dataset(tmp_path, RGB8)), expected)


def test_a_net_of_one_channel_gets_gray(tmp_path: Path) -> None:
    gray = pixels(8, 8)
    save(tmp_path / "a.png", gray)
    save(tmp_path / "b.png", np.stack([gray] * 3, axis=2))
    preprocess = Preprocess(1, 8, 8, (0.5,), (0.25,))
    expected = normalized(np.stack([gray, gray])[..., None], preprocess)
    np.testing.assert_array_equal(everything(open_dataset(tmp_path, preprocess)), expected)


def test_a_net_of_two_channels_has_no_image_files(tmp_path: Path) -> None:
    save(tmp_path / "a.png", pixels(8, 8, 3))
    with pytest.raises(DataError, match=r"image files have 1 or 3 channels, the net takes 2"):
        open_dataset(tmp_path, Preprocess.plain(2, 8, 8))


def test_sixteen_bits_a_channel_are_refused_not_clipped(tmp_path: Path) -> None:
    Image.fromarray(np.full((8, 8), 40000, np.uint16)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"a.png \(pixel type I;16, expected 8 bits a channel\)"):
        open_dataset(tmp_path, RGB8)


# --- damage ------------------------------------------------------------------------------------


def test_what_is_no_image_is_named_and_counted_before_any_work(tmp_path: Path) -> None:
    for number in range(4):
        save(tmp_path / f"good{number}.png", pixels(8, 8, 3))
    for number in range(7):
        (tmp_path / f"bad{number}.jpg").write_bytes(b"" if number == 0 else b"not a JPEG")
    with pytest.raises(DataError) as caught:
        open_dataset(tmp_path, RGB8)
    message = str(caught.value)
    assert (
        "7 of 11 images cannot be read: bad0.jpg (empty file), bad1.jpg (not an image)" in message
    )
    assert "bad4.jpg" in message
    assert "bad5.jpg" not in message
    assert "\n" not in message


@pytest.mark.parametrize("size", [8, 160], ids=["serial", "threads"])
@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_truncated_images_are_named_and_counted_over_the_whole_folder(
    tmp_path: Path, suffix: str, size: int
) -> None:
    for number in range(9):
        save(tmp_path / f"{number}{suffix}", pixels(size, size, 3))
    for number in (1, 8):
        path = tmp_path / f"{number}{suffix}"
        path.write_bytes(path.read_bytes()[: -(size * size // 3)])
    dataset = open_dataset(tmp_path, Preprocess(3, size, size, MEAN, STD))
    expected = rf"2 of 9 images cannot be read: 1{suffix} \(.*\), 8{suffix} \(.*\); repair"
    with pytest.raises(DataError, match=expected):
        next(dataset.batches(4))


def test_missing_and_empty_places(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere: does not exist"):
        open_dataset(tmp_path / "nowhere", RGB8)
    with pytest.raises(DataError, match=r"no images found; expected files ending in .bmp .*\.webp"):
        open_dataset(tmp_path, RGB8)
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(DataError, match=r"a.txt: not usable as data; expected a folder"):
        open_dataset(tmp_path / "a.txt", RGB8)


def test_images_beside_class_folders_are_ambiguous(class_folder: Path) -> None:
    save(class_folder / "stray.png", pixels(8, 8, 3))
    with pytest.raises(DataError, match="1 images beside sub-folders with 60 images"):
        open_dataset(class_folder, RGB8)


def test_labels_that_are_not_there(tmp_path: Path) -> None:
    save(tmp_path / "flat" / "a.png", pixels(8, 8, 3))
    np.savez(tmp_path / "a.npz", x=pixels(2, 3, 8, 8))
    for path in (tmp_path / "flat", tmp_path / "a.npz"):
        with pytest.raises(DataError, match="no labels; expected one sub-folder for each class"):
            open_dataset(path, RGB8, labels=True)


# --- arrays ------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_uint8_arrays_are_raw_pixels(tmp_path: Path, suffix: str) -> None:
    x = pixels(7, 3, 8, 8)
    path = tmp_path / f"a{suffix}"
    np.save(path, x) if suffix == ".npy" else np.savez_compressed(path, x=x)
    expected = normalized(x.transpose(0, 2, 3, 1), RGB8)
    np.testing.assert_array_equal(everything(open_dataset(path, RGB8)), expected)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", ">f4"])
def test_float_arrays_are_ready_for_the_network(tmp_path: Path, dtype: str) -> None:
    x = RNG.standard_normal((7, 3, 8, 8)).astype(dtype)
    np.savez(tmp_path / "a.npz", x=x, y=np.arange(7, dtype=np.int32))
    dataset = open_dataset(tmp_path / "a.npz", RGB8, labels=True)
    found = everything(dataset)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, x.astype(np.float32))
    assert dataset.labels is not None
    assert dataset.labels.tolist() == list(range(7))


def test_a_sample_of_arrays_keeps_labels_with_images(tmp_path: Path) -> None:
    y = np.arange(50)
    np.savez(tmp_path / "a.npz", x=np.float32(y)[:, None, None, None] * np.ones((3, 8, 8)), y=y)
    dataset = open_dataset(tmp_path / "a.npz", RGB8, limit=17, seed=3)
    assert dataset.labels is not None
    assert everything(dataset, 5)[:, 0, 0, 0].tolist() == dataset.labels.tolist()
    assert len(set(dataset.labels.tolist())) == 17


def test_a_batch_may_be_changed_without_changing_the_data(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.ones((4, 3, 8, 8), np.float32))
    dataset = open_dataset(tmp_path / "a.npy", RGB8)
    for batch in dataset.batches(4):
        batch += 1
    assert everything(dataset).max() == 1


def npz_bytes(**arrays: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, allow_pickle=True, **arrays)
    return stream.getvalue()


FLOATS = np.zeros((4, 3, 8, 8), np.float32)
NAN = np.where(np.arange(4)[:, None, None, None] == 2, np.nan, FLOATS)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (npz_bytes(images=FLOATS, z=FLOATS), r"holds images, z; expected an array named x"),
        (npz_bytes(), r"holds nothing; expected an array named x"),
        (npz_bytes(x=FLOATS[0]), r"shape \(3, 8, 8\), expected \(N, 3, 8, 8\)"),
        (npz_bytes(x=FLOATS[:0]), r"got 0 images"),
        (
            npz_bytes(x=FLOATS[..., :7]),
            r"shape \(4, 3, 8, 7\), expected .*; arrays are not resized",
        ),
        (npz_bytes(x=FLOATS[:, :1]), r"1 channels in an array \(4, 1, 8, 8\), expected"),
        (npz_bytes(x=FLOATS.transpose(0, 2, 1, 3)), r"8 channels in an array \(4, 8, 3, 8\)"),
        (npz_bytes(x=FLOATS.astype(np.int64)), r"int64, expected uint8 pixels or network-ready"),
        (npz_bytes(x=FLOATS.astype(bool)), r"bool, expected uint8"),
        (npz_bytes(x=NAN), r"1 of 4 images hold NaN or infinity in float32, first at index 2"),
        (npz_bytes(x=FLOATS.astype(np.float64) + 1e39), r"4 of 4 images hold NaN or infinity"),
        (npz_bytes(x=FLOATS.astype(object)), r"not a readable array file \(Object arrays cannot"),
        (npz_bytes(x=FLOATS, y=np.zeros(3, int)), r"y has shape \(3,\), expected \(4,\)"),
        (npz_bytes(x=FLOATS, y=np.zeros((4, 10))), r"y has shape \(4, 10\), expected \(4,\)"),
        (npz_bytes(x=FLOATS, y=np.zeros(4)), r"y is float64"),
        (npz_bytes(x=FLOATS, y=np.arange(4) - 1), r"y is int64 or negative"),
        (npz_bytes(x=FLOATS)[:2000], r"not a readable array file"),
        (b"", r"not a readable array file"),
        (b"text", r"not a readable array file"),
    ],
)
def test_arrays_that_cannot_be_used(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.npz"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        open_dataset(path, RGB8)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_a_damaged_member_of_an_npz(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    path.write_bytes(npz_bytes(x=pixels(4, 3, 8, 8)))
    with zipfile.ZipFile(path) as archive:
        offset = archive.getinfo("x.npy").header_offset + 400
    content = bytearray(path.read_bytes())
    content[offset] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"not a readable array file \(Bad CRC-32"):
        open_dataset(path, RGB8)


@pytest.mark.parametrize("keep", [0, 50, 300], ids=["empty", "half a header", "half the data"])
def test_a_truncated_npy(tmp_path: Path, keep: int) -> None:
    np.save(tmp_path / "a.npy", FLOATS)
    (tmp_path / "a.npy").write_bytes((tmp_path / "a.npy").read_bytes()[:keep])
    with pytest.raises(DataError, match="not a readable array file"):
        open_dataset(tmp_path / "a.npy", RGB8)


def test_nan_outside_the_sample_does_not_matter(tmp_path: Path) -> None:
    x = np.zeros((40, 3, 8, 8), np.float32)
    np.save(tmp_path / "x.npy", x)
    taken = open_dataset(tmp_path / "x.npy", RGB8, limit=5, seed=1).source._taken  # type: ignore
    x[[i for i in range(40) if i not in taken]] = np.nan
    np.save(tmp_path / "x.npy", x)
    assert open_dataset(tmp_path / "x.npy", RGB8, limit=5, seed=1).length == 5
