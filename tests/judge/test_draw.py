"""Pictures: text can be read and stays inside, in colours that all people can tell apart."""

import itertools

import numpy as np
import pytest
from PIL import Image

from reptrt.judge.predict.draw import PALETTE, Bar, Mark, colour_of, draw_boxes, draw_classes

_GREY = (128, 128, 128)


def _text_heights(picture: Image.Image, colour: tuple[int, int, int]) -> list[int]:
    """Return the heights of the runs of rows that a filled label covers in its first column."""
    column = np.asarray(picture)[:, 2]
    rows = (column == colour).all(axis=1)
    return [len(list(run)) for filled, run in itertools.groupby(rows) if filled]


@pytest.mark.parametrize("size", [(8, 8), (32, 20), (640, 480), (3000, 2000)], ids=str)
def test_text_can_be_read_at_any_size(size: tuple[int, int]) -> None:
    box = (0, size[1] / 2, size[0] / 2, size[1])
    picture = draw_boxes(Image.new("RGB", size, _GREY), [Mark(box, "gamma 0.91", 0)])
    assert max(picture.size) >= min(max(size), 640) * 0.75
    tallest = max(_text_heights(picture, PALETTE[0]))
    assert tallest >= 14
    assert tallest >= 0.02 * picture.height


def test_labels_stay_inside_and_apart() -> None:
    """Boxes in the corners, and two boxes in one place: every label is whole."""
    size = (640, 480)
    corners = [(0, 0, 60, 40), (600, 0, 640, 40), (0, 450, 60, 480), (600, 450, 640, 480)]
    marks = [Mark(box, "a long name 0.50", index) for index, box in enumerate(corners)]
    marks += [Mark((200, 200, 300, 300), "a long name 0.50", index) for index in (4,)]
    marks += [Mark((210, 210, 310, 310), "a long name 0.50", 5)]
    picture = np.asarray(draw_boxes(Image.new("RGB", size, _GREY), marks))
    areas = [int((picture == colour_of(mark.index)).all(axis=2).sum()) for mark in marks]
    outlines = [2 * 2 * sum((m.box[2] - m.box[0], m.box[3] - m.box[1])) for m in marks]
    labels = [area - line for area, line in zip(areas, outlines, strict=True)]
    assert min(labels) > 0.6 * max(labels)


def test_colours_belong_to_classes() -> None:
    assert [colour_of(index) for index in range(7)] == list(PALETTE)
    assert len({colour_of(index) for index in range(21)}) == 21
    assert colour_of(21) == colour_of(0)
    for first, second in itertools.combinations(PALETTE, 2):
        for weights in ((0.57, 0.43, 0.0, 0.0, 0.24, 0.76), (0.63, 0.37, 0.0, 0.0, 0.3, 0.7)):
            seen = [
                (weights[0] * r + weights[1] * g, weights[4] * g + weights[5] * b)
                for r, g, b in (first, second)
            ]
            assert np.abs(np.subtract(*seen)).max() > 20  # red-green blindness, crudely


def test_a_box_without_area_or_beyond_the_image() -> None:
    image = Image.new("L", (100, 100))
    marks = [Mark((50, 50, 50, 50), "point", 0), Mark((-20, -20, 300, 300), "all", 1)]
    assert draw_boxes(image, marks).size == (600, 600)
    assert draw_boxes(image, []).getcolors() == [(360000, (0, 0, 0))]


def test_bars_are_as_long_as_their_parts() -> None:
    bars = [Bar("cat 75 %", 0.75, 0), Bar("dog 25 %", 0.25, 1), Bar("cow 0 %", 0.0, 2)]
    picture = np.asarray(draw_classes(Image.new("RGB", (320, 320), _GREY), bars))
    rows = picture[640:]
    light = [tuple((side + 255) // 2 for side in PALETTE[index]) for index in range(2)]
    lengths = [int((rows == colour).all(axis=2).sum(axis=1).max()) for colour in light]
    assert lengths[0] == pytest.approx(480, abs=2)
    assert 100 < lengths[1] <= 160  # letters stand on it


def test_long_names_widen_the_list() -> None:
    sheet = draw_classes(Image.new("RGB", (16, 16)), [Bar("a" * 200, 1.0, 0)])
    assert sheet.width > 640


def test_images_of_any_mode() -> None:
    palette = Image.new("P", (640, 640))
    palette.info["transparency"] = b"\x00"
    for image in (palette, Image.new("RGBA", (640, 640)), Image.new("1", (640, 640))):
        assert draw_boxes(image, [Mark((9, 9, 99, 99), "x", 3)]).mode == "RGB"
