"""tools/rank_measures.py: ranks, parts of a folder, and the files that it compares."""

import json
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

from tests.support.helpers import load_tool

tool = load_tool("rank_measures")


@pytest.mark.parametrize("seed", range(5))
def test_the_rank_correlation_with_ties(seed: int) -> None:
    first, second = np.random.default_rng(seed).integers(0, 6, (2, 15)).astype(float)
    expected = scipy.stats.spearmanr(first, second).statistic
    assert tool.spearman(first, second) == pytest.approx(expected, abs=1e-12)


def test_images_that_judge_do_not_calibrate(tmp_path: Path) -> None:
    (tmp_path / "all").mkdir()
    for index in range(10):
        (tmp_path / "all" / f"{index}.png").write_bytes(bytes([index]))
    folders = tool._divided(tmp_path / "all", tmp_path, (4, 5), seed=0)
    names = [{path.name for path in folder.iterdir()} for folder in folders]
    assert [len(part) for part in names] == [4, 5]
    assert names[0].isdisjoint(names[1])
    images = [{"id": index, "file_name": f"{index}.png"} for index in range(10)]
    objects = [{"id": index, "image_id": index % 10} for index in range(30)]
    coco = {"images": images, "annotations": objects, "categories": []}
    (tmp_path / "coco.json").write_text(json.dumps(coco))
    tool._part_of(tmp_path / "coco.json", folders[1])
    part = json.loads((folders[1] / "annotations.json").read_text())
    assert {image["file_name"] for image in part["images"]} == names[1]
    assert len(part["annotations"]) == 15
    assert {f"{one['image_id']}.png" for one in part["annotations"]} == names[1]


def test_at_least_twelve_files_are_compared() -> None:
    assert len(tool.FILES) >= 12
    assert len(set(map(repr, tool.FILES.values()))) == len(tool.FILES)


def test_the_tables() -> None:
    rows = {
        "worse": {"map": 0.2, "outputs": 3e-5, "heads": 4e-3},
        "best": {"map": 0.4, "outputs": 2e-5, "heads": 1e-3},
        "good": {"map": 0.3, "outputs": 1e-5, "heads": 2e-3},
        "bad": {"map": 0.1, "outputs": 4e-5, "heads": 5e-3},
    }
    lines = tool.table(rows)
    assert [line.split(" | ")[0] for line in lines[2:6]] == ["| best", "| good", "| worse", "| bad"]
    assert lines[2] == "| best | 40.0 | 2.0 | 1.00 |"
    assert lines[-2:] == ["| all | 0.80 | 1.00 |", "| better half | -1.00 | 1.00 |"]


def test_a_stopped_run_goes_on_and_another_one_starts_anew(tmp_path: Path) -> None:
    path, asked = tmp_path / "rows.json", {"net": "abc", "seed": 0}
    assert tool._kept(None, asked) == tool._kept(path, asked) == {}
    path.write_text(json.dumps({**asked, "rows": {"fast": {"map": 0.5}}}))
    assert tool._kept(path, asked) == {"fast": {"map": 0.5}}
    assert tool._kept(path, {**asked, "seed": 1}) == {}
