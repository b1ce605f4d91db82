"""Runs of detectors: mAP in the record, the ladder, replay and diff."""

import base64
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from reptrt.judge.evaluate import evaluate
from reptrt.judge.options import EvaluateOptions
from tests.judge.test_ranking import write_detection
from tests.support.small_run import refused
from tests.support.small_run import reptrt as ran

FAST = ("-n", 16, "--no-diagnose", "--batch", 1, "--bench-seconds", 0.01, "--split", "none")
TASK = ("--task", "detect", "--boxes", "xyxy", "--clip")


LOW = 0.04  # the scores of the small net are about 0.05


@pytest.fixture(scope="module", autouse=True)
def boxes_with_low_scores() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("reptrt.runs.detections.CONFIDENCE", LOW)
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A finished run, its source and its images."""
    folder = tmp_path_factory.mktemp("detection")
    source, data = write_detection(folder)
    result = ran("run", source, "--data", data, *TASK, *FAST, "-o", folder / "run")
    assert result.exit_code == 0, result.output
    assert "mAP" in result.output
    return folder / "run", source, data


@pytest.mark.slow
def test_a_run_records_what_the_task_read_and_found(made: tuple[Path, Path, Path]) -> None:
    folder, _, data = made
    record = json.loads((folder / "run.json").read_text())
    assert record["annotations"]["path"] == str(data.parent / "instances_val.json")
    assert record["options"]["task"] == "detect"
    judged = json.loads((folder / "eval.json").read_text())["results"]
    files = [folder / "float.onnx", folder / "int8.onnx"]
    options = EvaluateOptions(task="detect", boxes="xyxy", clip=True)
    expected = evaluate(files, data, options).results
    assert [row["map"] for row in judged] == [row.measures["map"] for row in expected]
    assert judged[1]["map_change"]["low"] <= judged[1]["map_change"]["high"]


@pytest.mark.slow
def test_the_ladder_gives_every_rung_its_map(made: tuple[Path, Path, Path]) -> None:
    folder, source, data = made
    result = ran("ladder", folder, "--json", folder.parent / "l.json")
    assert result.exit_code == 0, result.output
    assert "step: mAP" in result.output
    ladder = json.loads((folder.parent / "l.json").read_text())
    assert ladder["measure"] == "mAP"
    judged = json.loads((folder / "eval.json").read_text())["results"]
    rungs = [rung for rung in ladder["rungs"] if rung["not_run"] is None]
    assert rungs[0]["score"] == pytest.approx(judged[0]["map"], abs=1e-6)
    last = rungs[-1]
    assert last["score"] == pytest.approx(judged[1]["map"], abs=1e-9)
    assert last["from_first"]["score_change"] == pytest.approx(last["score"] - rungs[0]["score"])
    steps = [rung["from_before"]["score_change"] for rung in rungs[1:]]
    assert sum(steps) == pytest.approx(last["from_first"]["score_change"])
    assert all(rung["top1"] is None for rung in rungs)
    direct = ran("ladder", source, "--data", data, "--calib-data", data, *TASK, "-n", 16)
    assert direct.exit_code == 0, direct.output
    assert "mAP" in direct.output


@pytest.mark.slow
def test_replay_and_diff_know_the_annotations(made: tuple[Path, Path, Path]) -> None:
    folder, source, data = made
    assert ran("replay", folder).exit_code == 0
    other = folder.parent / "other"
    result = ran("run", source, "--data", data, *TASK, *FAST, "-o", other, "--threshold", "max")
    assert result.exit_code == 0, result.output
    report = ran("diff", folder, other)
    assert "int8.onnx map " in report.output
    path = data.parent / "instances_val.json"
    kept = path.read_text()
    try:
        path.write_text(kept.replace('"c0"', '"zero"'))
        line = refused("replay", folder)
        assert "instances_val.json: has changed since the run" in line
    finally:
        path.write_text(kept)


@pytest.mark.slow
def test_bad_annotations_are_refused_before_any_work(
    made: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    _, source, data = made
    (tmp_path / "no.json").write_text("{}")
    asked = ("--annotations", tmp_path / "no.json", "-o", tmp_path / "run")
    line = refused("run", source, "--data", data, *TASK, *FAST, *asked)
    assert "no.json" in line
    assert not list((tmp_path / "run").glob("*.onnx"))


@pytest.mark.slow
def test_the_report_shows_boxes_curves_and_classes(made: tuple[Path, Path, Path]) -> None:
    folder, _, data = made
    page = (folder / "report.html").read_text()
    shown = json.loads((folder / "detections.json").read_text())
    judged = json.loads((folder / "eval.json").read_text())["results"]
    assert "img-src data:" in page.split("</head>")[0]
    assert page.count('href="data:image/jpeg;base64,') == 2 * len(shown["pictures"]) == 12
    section = page[page.index('<section id="detections">') :].split("</section>")[0]
    boxes = sum(len(boxes) for of in shown["results"] for boxes in of["boxes"])
    assert section.count('<rect class="box ') == section.count('<text class="box"') == boxes > 0
    for name in ("c0", "c1", "c2"):
        before, after = (row["classes"][name] for row in judged)
        if before is not None:
            assert f"{100 * before:.2f}</td>" in section
            assert f"{100 * (after - before):+.2f}</td>" in section
    for element in re.findall(r"<svg.*?</svg>", section, re.DOTALL):
        ElementTree.fromstring(element)
    assert f"{100 * judged[1]['map']:.2f}</b>" in page  # the tile
    assert "<script" not in page
    assert sorted(Path(data).iterdir())[0].name in section


@pytest.mark.slow
def test_curves_and_boxes_are_those_of_the_task(made: tuple[Path, Path, Path]) -> None:
    folder, _, data = made
    shown = json.loads((folder / "detections.json").read_text())
    files = [folder / "float.onnx", folder / "int8.onnx"]
    options = EvaluateOptions(task="detect", boxes="xyxy", clip=True)
    for result, of in zip(evaluate(files, data, options).results, shown["results"], strict=True):
        areas = [np.mean(curve) for curve in of["curves"] if curve is not None]
        assert np.mean(areas) == pytest.approx(result.measures["map50"], abs=1e-3)
        found = {
            name: [s for s in of_image.scores if s >= LOW]
            for name, of_image in zip(
                result.findings.files, result.findings.detections, strict=True
            )
        }
        for image, boxes in zip(shown["pictures"], of["boxes"], strict=True):
            assert [box[5] for box in boxes] == pytest.approx(found[image["name"]], abs=1e-3)
    jpeg = Image.open(io.BytesIO(base64.b64decode(shown["pictures"][0]["jpeg"])))
    assert jpeg.size == (shown["pictures"][0]["width"], shown["pictures"][0]["height"])
