"""tools/ablate_abc.py on a net of a few layers: what each row asks for, and the table."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from click.testing import CliRunner

from reptrt.judge.evaluate import evaluate
from reptrt.judge.options import EvaluateOptions
from reptrt.pipeline import CalibrateOptions, calibrate
from reptrt.quantize.reconstruct.options import LearnOptions
from tests.support.helpers import load_tool
from tests.support.learned_nets import rep_net, write_images, write_net

COUNT = 48
TINY = ("--seeds", "1", "--iterations", "10", "--bits", "5", "--splits", "none")

tool = load_tool("ablate_abc")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ablate")
    write_net(folder / "tiny.onnx", rep_net(2))
    write_images(folder / "d.npz", COUNT)
    return folder


class Line(NamedTuple):
    """One line of the table."""

    net: str
    bits: int
    split: str
    row: str
    sqnr: float
    spread: float
    agreed: float


class Calls:
    """What the tool calibrated with and on, and what it judged on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.options: list[CalibrateOptions] = []
        self.images: list[np.ndarray] = []
        self.judged: list[np.ndarray] = []
        monkeypatch.setattr(tool, "calibrate", self.calibrate)
        monkeypatch.setattr(tool, "evaluate", self.evaluate)

    def calibrate(self, net: Path, data: Path, output: Path, options: CalibrateOptions) -> Any:
        self.options.append(options)
        self.images.append(np.load(data)["x"])
        return calibrate(net, data, output, options)

    def evaluate(self, files: list[Path], data: Path, options: EvaluateOptions) -> Any:
        self.judged.append(np.load(data)["x"])
        return evaluate(files, data, options)


def table(folder: Path, *arguments: str) -> list[Line]:
    """Return the lines of the table below its head."""
    command = [str(folder / "tiny.onnx"), "--data", str(folder / "d.npz"), *arguments]
    done = CliRunner().invoke(tool.main, command, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    head, *lines = done.output.splitlines()
    assert head.split() == ["net", "bits", "split", "learned", "SQNR", "dB", "spread", "agr.", "%"]
    cells = re.compile(r"(\S+) +(\d) (none|auto) +(\S.*?) +([\d.]+) +([\d.]+) +([\d.]+)")
    found = [cells.fullmatch(line) for line in lines]
    return [
        Line(m[1], int(m[2]), m[3], m[4], *map(float, m.groups()[4:]))
        for m in found
        if m is not None
    ]


def test_two_rows(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(monkeypatch)
    nearest, learned = table(made, *TINY, "--rows", "nearest;rounding, MAE")
    assert nearest[:4] == ("tiny", 5, "none", "nearest")
    assert learned[:4] == ("tiny", 5, "none", "rounding, MAE")
    for line in (nearest, learned):
        assert 5 < line.sqnr < 60
        assert line.spread == 0  # of one seed
        assert 50 < line.agreed <= 100
    assert nearest.sqnr != learned.sqnr
    plain = CalibrateOptions(images=COUNT // 2, split="none", weight_bits=5, activation_bits=5)
    assert calls.options == [
        replace(plain, rounding="nearest"),
        replace(plain, learn=LearnOptions(affine=False, steps=False, iterations=10)),
    ]
    for calibrating, judging in zip(calls.images, calls.judged, strict=True):
        assert calibrating.shape == judging.shape == (COUNT // 2, 3, 6, 6)
        images = {image.tobytes() for image in (*calibrating, *judging)}
        assert len(images) == COUNT  # no image calibrates and judges


@pytest.mark.slow
def test_seeds_bits_and_splits_reach_the_calibration(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = Calls(monkeypatch)
    asked = ("--seeds", "2", "--bits", "8,6", "--splits", "none,auto", "--rows", "nearest")
    lines = table(made, *asked)
    found = [(o.weight_bits, o.activation_bits, o.split, o.seed) for o in calls.options]
    assert found == [(b, b, s, seed) for b in (8, 6) for s in ("none", "auto") for seed in (0, 1)]
    assert not np.array_equal(*calls.images[:2])
    assert [line[1:3] for line in lines] == [(b, s) for b in (8, 6) for s in ("none", "auto")]
    assert all(line.spread > 0 for line in lines)  # the seeds differ
    whole = {line.bits: line.sqnr for line in lines if line.split == "none"}
    assert whole[8] > whole[6] + 1


def test_the_rows_differ_by_what_they_say() -> None:
    rows = tool.ROWS
    assert rows["nearest"] is None
    learned = {name: row for name, row in rows.items() if row is not None}
    assert len(set(learned.values())) == len(learned) == len(rows) - 1
    parts = {name: (row.rounding, row.affine, row.steps) for name, row in learned.items()}
    assert parts["rounding, MSE"] == parts["rounding, MAE"] == (True, False, False)
    assert parts["+ QPRep"] == (True, True, False)
    assert parts["+ steps"] == (True, True, True)
    assert learned["rounding, MSE"].loss != learned["rounding, MAE"].loss
    assert [name for name, row in learned.items() if row.stage_weight] == [
        "+ stage",
        "+ stage / 10",
    ]


def test_a_row_that_is_not_there(made: Path) -> None:
    command = [str(made / "tiny.onnx"), "--data", str(made / "d.npz"), "--rows", "nearest;best"]
    done = CliRunner().invoke(tool.main, command)
    assert done.exit_code == 2
    assert "--rows: got ['best'], expected rows of ['nearest'" in done.output
