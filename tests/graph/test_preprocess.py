import numpy as np
import pytest

from reptrt.core.choices import Resize
from reptrt.graph.preprocess import Fit, fit_of, letterbox_of

RNG = np.random.default_rng(0)


def nearest_size(side: int, numerator: int, denominator: int) -> int:
    """The integer nearest to side * numerator / denominator, by search; halves to the even one."""
    candidates = range(1, side * numerator // denominator + 3)
    return min(candidates, key=lambda n: (abs(n * denominator - side * numerator), n % 2, n))


def searched_letterbox(image: tuple[int, int], target: tuple[int, int]) -> Fit:
    """The letterbox without fractions: try both sides as the tight one, keep the one that fits."""
    (h, w), (height, width) = image, target
    if height * w <= width * h:
        scaled = height, nearest_size(w, height, h)
    else:
        scaled = nearest_size(h, width, w), width
    borders = [big - small for big, small in zip(target, scaled, strict=True)]
    corner = [next(n for n in range(b + 1) if n + 1 > b - n - 1) for b in borders]
    return Fit(h, w, *scaled, *corner)


def test_a_letterbox_is_what_a_search_finds() -> None:
    for _ in range(2000):
        h, w, height, width = (int(size) for size in RNG.integers(1, 400, 4))
        assert letterbox_of(h, w, height, width) == searched_letterbox((h, w), (height, width))


@pytest.mark.parametrize(
    ("image", "target", "scaled", "corner"),
    [
        ((480, 640), (320, 320), (240, 320), (40, 0)),
        ((640, 480), (320, 320), (320, 240), (0, 40)),
        ((427, 640), (640, 640), (427, 640), (106, 0)),  # a border of 213
        ((101, 640), (320, 320), (50, 320), (135, 0)),  # 50.5
        ((103, 640), (320, 320), (52, 320), (134, 0)),  # 51.5
        ((3, 2), (6, 8), (6, 4), (0, 2)),
    ],
)
def test_letterboxes_by_hand(
    image: tuple[int, int],
    target: tuple[int, int],
    scaled: tuple[int, int],
    corner: tuple[int, int],
) -> None:
    assert letterbox_of(*image, *target) == Fit(*image, *scaled, *corner)


@pytest.mark.parametrize("resize", ["none", "stretch", "crop", "letterbox"])
def test_boxes_come_back(resize: Resize) -> None:
    fit = fit_of(resize, 333, 517, 320, 256)
    boxes = RNG.random((4, 7, 4)) * 500
    np.testing.assert_allclose(fit.boxes_in_image(fit.boxes_in_input(boxes)), boxes, atol=1e-9)
    np.testing.assert_allclose(
        fit.boxes_in_input([0, 0, 517, 333]),
        [fit.left, fit.top, fit.left + fit.scaled_width, fit.top + fit.scaled_height],
    )


def test_a_box_follows_what_it_frames() -> None:
    """By hand: scaled by 1.5, with 15 rows of border above."""
    fit = letterbox_of(40, 60, 90, 90)
    np.testing.assert_array_equal(fit.boxes_in_input([10, 20, 30, 36]), [15, 45, 45, 69])
    np.testing.assert_array_equal(fit.boxes_in_image([15, 45, 45, 69]), [10, 20, 30, 36])
