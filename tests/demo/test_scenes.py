"""The pictures of the detection demo: the same each time, with true boxes, in COCO's form."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from reptrt.demo import scenes
from reptrt.demo.digits import Digits, load_digits

COUNT = 20


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("scenes")
    return dict(scenes.write_sets(folder / "new", {"train": 3, "held_out": COUNT}))


def test_a_picture_follows_from_the_seed_and_its_number() -> None:
    digits = load_digits().train
    one, again, next_one, other = (
        scenes.make_scene(digits, *key) for key in ((0, 5), (0, 5), (0, 6), (1, 5))
    )
    np.testing.assert_array_equal(one.pixels, again.pixels)
    np.testing.assert_array_equal(one.boxes, again.boxes)
    for different in (next_one, other):
        assert different.pixels.tobytes() != one.pixels.tobytes()


def test_boxes_enclose_the_digits_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the pixels that change when the digits are not written, up to the digits' edges."""
    ink = np.zeros((1, 1, 8, 8), np.uint8)
    ink[..., 1:7, 2:6] = 255  # a bar with sharp ends: its edges are one of its pixels wide
    bar = Digits(ink, np.array([3]))
    monkeypatch.setattr(scenes, "MOST_DIGITS", 1)
    monkeypatch.setattr(scenes, "_SLANT", 0)
    for index in range(8):
        scene = scenes.make_scene(bar, 0, index)
        with monkeypatch.context() as patch:
            patch.setattr(scenes, "_write_over", lambda rng, place, ink: rng.uniform(size=5))
            empty = scenes.make_scene(bar, 0, index)
        changed = np.abs(scene.pixels.astype(int) - empty.pixels).sum(axis=2) > 60
        rows, columns = (np.flatnonzero(changed.any(axis=axis)) for axis in (1, 0))
        got = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
        edge = (scene.boxes[0, 3] - scene.boxes[0, 1]) / 6
        np.testing.assert_allclose(scene.boxes[0], got, atol=edge)
        assert scene.classes.tolist() == [3]


def test_boxes_lie_in_the_picture_and_hardly_overlap() -> None:
    digits = load_digits().train
    seen = set()
    for index in range(COUNT):
        scene = scenes.make_scene(digits, 0, index)
        height, width = scene.pixels.shape[:2]
        assert (height, width) in scenes.SIZES
        assert 0 < len(scene.boxes) == len(scene.classes) <= 7
        assert (scene.boxes >= 0).all()
        assert (scene.boxes <= [width, height, width, height]).all()
        cover = np.zeros((height, width), int)
        for x1, y1, x2, y2 in scene.boxes.astype(int):
            cover[y1:y2, x1:x2] += 1
        assert (cover > 1).sum() <= 0.1 * (cover > 0).sum()
        seen |= set(scene.classes.tolist())
    assert seen == set(range(10))


def test_sets_are_folders_with_annotations_that_pycocotools_reads(
    sets: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    coco = pytest.importorskip("pycocotools.coco")
    folder = sets["held_out"]
    assert [path.name for path in sorted(folder.iterdir())] == [
        f"{i:04d}.jpg" for i in range(COUNT)
    ]
    read = coco.COCO(folder.with_name("instances_held_out.json"))
    capsys.readouterr()
    assert [entry["name"] for entry in read.loadCats(sorted(read.cats))] == list("0123456789")
    held_out = load_digits().held_out
    for image in read.dataset["images"]:
        scene = scenes.make_scene(held_out, scenes.SEEDS["held_out"], image["id"])
        with Image.open(folder / image["file_name"]) as opened:
            assert opened.size == (image["width"], image["height"])
            noise = np.asarray(opened, float) - scene.pixels
        assert np.abs(noise).mean() < 12  # of JPEG
        found = read.loadAnns(read.getAnnIds(image["id"]))
        np.testing.assert_allclose(
            [box["bbox"] for box in found],
            np.hstack([scene.boxes[:, :2], scene.boxes[:, 2:] - scene.boxes[:, :2]]),
        )
        assert [box["category_id"] - 1 for box in found] == scene.classes.tolist()
        assert all(box["area"] == np.prod(box["bbox"][2:]) for box in found)


def test_the_sets_differ(sets: dict[str, Path]) -> None:
    parts = [
        json.loads(path.with_name(f"instances_{name}.json").read_text())
        for name, path in sets.items()
    ]
    assert [len(part["images"]) for part in parts] == [3, COUNT]
    assert parts[0]["annotations"][0]["bbox"] != parts[1]["annotations"][0]["bbox"]
