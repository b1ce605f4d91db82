import itertools

import numpy as np
import pytest

from reptrt.search.halving import Point, front, halve, rungs


def random_points(seed: int, count: int = 12) -> list[Point]:
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 6, (count, 2))
    return [Point(f"p{i}", float(cost), float(loss)) for i, (cost, loss) in enumerate(values)]


def beats(a: Point, b: Point) -> bool:
    no_worse = a.cost <= b.cost and a.loss <= b.loss
    return no_worse and (a.cost < b.cost or a.loss < b.loss)


@pytest.mark.parametrize("seed", range(20))
def test_the_front_is_what_no_other_beats(seed: int) -> None:
    points = random_points(seed)
    unbeaten = {p[1:] for p in points if not any(beats(q, p) for q in points)}
    found = front(points)
    assert {p[1:] for p in found} == unbeaten
    assert len(found) == len(unbeaten)  # one of those that are equal
    assert found == sorted(found, key=lambda p: p.cost)


@pytest.mark.parametrize("seed", range(20))
def test_half_go_on_and_the_front_first(seed: int) -> None:
    points = random_points(seed)
    kept = halve(points)
    assert len(kept) == 6
    ahead = {p.name for p in front(points)}
    assert ahead <= set(kept) or set(kept) <= ahead


def test_the_cheapest_goes_on_though_it_loses_most() -> None:
    points = [Point("cheap", 1.0, 9.0), Point("a", 2.0, 3.0), Point("b", 2.1, 3.1)]
    assert set(halve(points)) == {"cheap", "a"}
    assert halve([Point("alone", 1.0, 1.0)]) == ["alone"]
    assert halve([]) == []


@pytest.mark.parametrize("total", [1, 2, 63, 64, 65, 300, 5000])
def test_rungs_rise_to_all_images(total: int) -> None:
    sizes = rungs(total)
    assert sizes[-1] == total
    assert all(a < b for a, b in itertools.pairwise(sizes))
    assert sizes[0] >= min(64, total)
