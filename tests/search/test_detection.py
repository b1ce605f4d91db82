"""The search on a detector: mAP by the task, with the interval of the paired bootstrap."""

from pathlib import Path

import numpy as np
import pytest

from reptrt.judge.evaluate import evaluate
from reptrt.judge.options import EvaluateOptions
from reptrt.search.options import TuneOptions
from reptrt.search.tuning import tune
from tests.judge.test_ranking import write_detection
from tests.support.small_run import reptrt

pytestmark = pytest.mark.slow


def test_detectors_are_judged_by_map_on_both_parts(tmp_path: Path) -> None:
    source, data = write_detection(tmp_path)
    net = tmp_path / "float.onnx"
    assert reptrt("export", source, "-o", net).exit_code == 0
    options = TuneOptions(task="detect", boxes="xyxy", clip=True, max_drop=100.0, images=16)
    tuned = tune(net, data, data, tmp_path / "search", options)
    assert (tuned.metric, tuned.chosen, tuned.met) == ("map", "plain", True)
    judged, confirmed = tuned.best.judged, tuned.best.confirmed
    assert judged is not None
    assert confirmed is not None
    total = len(list(data.iterdir()))
    assert judged.images + confirmed.images == total
    taken = np.random.default_rng([0, 1]).permutation(total)[total // 2 :]
    judging = EvaluateOptions(task="detect", boxes="xyxy", clip=True)
    report = evaluate([net, tuned.path], data, judging, reference=net, taken=taken.tolist())
    before, after = (result.measures["map"] for result in report.results)
    assert confirmed.value == after
    assert confirmed.loss == pytest.approx(100 * (before - after))
    assert confirmed.low is not None
    assert confirmed.high is not None
    assert confirmed.low <= confirmed.loss <= confirmed.high
