import itertools

import numpy as np
import pytest

from reptrt.core.errors import ConfigError, DataError
from reptrt.search.judging import parts, wilson
from reptrt.search.options import TuneOptions, seconds_from


def test_the_two_parts_share_no_image() -> None:
    tuning, confirming = parts(101, None, seed=0)
    assert sorted([*tuning, *confirming]) == list(range(101))
    assert len(tuning) == 50
    assert parts(101, None, seed=0) == (tuning, confirming)
    assert parts(101, None, seed=1) != (tuning, confirming)
    few = parts(101, 20, seed=0)
    assert [len(part) for part in few] == [10, 10]
    assert not set(few[0]) & set(few[1])


def test_too_few_images_are_refused() -> None:
    with pytest.raises(DataError, match=r"eval_data: got 1 images, expected 2 or more"):
        parts(1, None, seed=0)
    with pytest.raises(DataError, match=r"got 10 images, expected 20.* lower eval_limit"):
        parts(10, 20, seed=0)


@pytest.mark.parametrize(("count", "total"), list(itertools.product([0, 1, 7, 20], [20, 100])))
def test_wilson_ends_are_the_shares_that_are_196_deviations_away(count: int, total: int) -> None:
    share = count / total
    for end in wilson(count, total):
        if 1e-9 < end < 1 - 1e-9:
            deviation = np.sqrt(end * (1 - end) / total)
            assert abs(share - end) == pytest.approx(1.96 * deviation, rel=1e-9)


def test_budgets_are_durations() -> None:
    assert [seconds_from(text) for text in ("90s", "10m", "2h", "5")] == [90, 600, 7200, 5]
    with pytest.raises(ConfigError, match=r"budget: got 'soon', expected a duration: 90s, 10m"):
        seconds_from("soon")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"metric": "map"}, r"metric='map': is not measured with task='classify'"),
        ({"metric": "sqnr"}, r"min_sqnr: got None with metric='sqnr'"),
        ({"min_sqnr": 30.0}, r"min_sqnr: got 30.0 with metric='top1'"),
        ({"budget": 0.0}, r"budget: got 0.0, expected seconds above 0"),
        ({"bits": (8,)}, r"bits: got \(8,\), expected 2 to 7"),
        ({"float_layers": (0,)}, r"float_layers: got \(0,\), expected 1 or more"),
        ({"eval_limit": 1}, r"eval_limit: got 1, expected 2 or more"),
        ({"max_drop": -1.0}, r"max_drop: got -1.0, expected 0 or more"),
    ],
)
def test_options_that_cannot_work_are_refused(given: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        TuneOptions(**given)  # type: ignore[arg-type]


def test_the_metric_follows_the_task() -> None:
    assert TuneOptions().measure == "top1"
    assert TuneOptions(task="detect").measure == "map"
    assert TuneOptions(task="any", min_sqnr=30.0).limit == -30.0
