"""A run as one HTML file: the numbers are those of its JSON files, and nothing is loaded."""

import html
import json
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from PIL import Image

from reptrt.core.artifacts import sha256_of
from reptrt.data.dataset import open_dataset
from reptrt.graph.net import net_from_model, read_model
from reptrt.graph.preprocess import read_preprocess
from reptrt.runs.report import write_report
from reptrt.runs.report.charts import HistogramView, Scale, histogram, scale_of
from reptrt.runs.report.environment import clipped
from reptrt.runs.report.ranges import weight_ranges
from tests.support.pages import REPOSITORY
from tests.support.small_run import make_run, refused, reptrt, write_data, write_factory

pytestmark = pytest.mark.slow

VOID = {"meta", "link", "br", "img", "hr", "input"}
EVIL = '<img src="http://x.test/a" onerror=alert(1)>&amp;"\''
SECTIONS = (
    *("accuracy", "latency", "weights", "noise", "activations", "decisions", "learned"),
    "environment",
)


class Tree(HTMLParser):
    """Checks that every tag is closed in order, and collects tags, ids, attributes and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: list[str] = []
        self.cells: list[list[str]] = []  # of every table row, as text
        self.section = ""
        self.rows: dict[str, list[list[str]]] = {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag == "section":
            self.section = dict(attrs)["id"] or ""
        rows = self.rows.setdefault(self.section, [])
        if tag == "tr":
            rows.append([])
        if tag in ("td", "th"):
            rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        rows = self.rows.get(self.section)
        if rows and rows[-1] and {"td", "th"} & set(self.open) and "svg" not in self.open:
            rows[-1][-1] += data.strip()

    @property
    def text(self) -> str:
        """All text, with single spaces."""
        return " ".join(" ".join(self.texts).split())

    def row(self, section: str, first: str, cells: int = 2) -> list[str]:
        """Return the last row of a section that begins with a text and has so many cells."""
        rows = [row for row in self.rows[section] if len(row) >= cells and row[0] == first]
        return rows[-1]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run and its ladder; not to be changed."""
    folder = tmp_path_factory.mktemp("made")
    run = make_run(write_factory(folder), write_data(folder / "data.npz"), folder / "run")
    assert reptrt("ladder", run).exit_code == 0
    write_report(run)
    return run


@pytest.fixture
def copied(made: Path, tmp_path: Path) -> Path:
    """The run in a folder of its own, free to be changed."""
    return shutil.copytree(made, tmp_path / "copied")


def content(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text()))


def edit(folder: Path, name: str, change: dict[str, Any]) -> None:
    """Change a JSON file of a run, and its record if it has one."""
    path = folder / name
    path.write_text(json.dumps(content(path) | change))
    record = content(folder / "run.json")
    for stage in record["stages"].values():
        if stage["file"] == name:
            stage["sha256"] = sha256_of(path)
    (folder / "run.json").write_text(json.dumps(record))


def tree_of(folder: Path) -> Tree:
    return Tree(write_report(folder).path.read_text())


def absent(folder: Path) -> dict[str, str]:
    return {s.id: s.absent for s in write_report(folder).sections if s.absent is not None}


# The page ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_it_is_well_formed_and_every_link_leads_to_a_section(made: Path) -> None:
    page = Tree((made / "report.html").read_text())
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert ids == list(SECTIONS)
    targets = [value for tag, name, value in page.attributes if (tag, name) == ("a", "href")]
    assert targets == [f"#{name}" for name in SECTIONS]
    charts = [value for _, name, value in page.attributes if (name, value) == ("role", "img")]
    labels = [value for tag, name, value in page.attributes if (tag, name) == ("svg", "aria-label")]
    assert len(charts) == len(labels) > 20
    assert all(labels)


def test_it_loads_nothing(made: Path) -> None:
    text = (made / "report.html").read_text()
    page = Tree(text)
    assert not re.search(r"https?:|url\(|@import|//|\bsrc=", text)
    assert not {"script", "link", "img", "iframe", "object", "image", "use"} & set(page.tags)
    assert "default-src 'none'" in text
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]


def test_nothing_says_where_it_was_made(made: Path) -> None:
    assert str(made.parent) not in (made / "report.html").read_text()


def test_the_same_folder_gives_the_same_bytes_wherever_it_is(made: Path, copied: Path) -> None:
    first = write_report(made)
    assert write_report(made).sha256 == first.sha256 == sha256_of(first.path)
    assert write_report(copied).sha256 == first.sha256


def test_a_run_ends_with_it(made: Path) -> None:
    assert (made / "report.html").stat().st_size > 10_000
    before = {path.name: sha256_of(path) for path in made.iterdir() if path.name != "report.html"}
    write_report(made)
    after = {path.name: sha256_of(path) for path in made.iterdir() if path.name != "report.html"}
    assert after == before


# The numbers -------------------------------------------------------------------------------------


def test_accuracy_is_that_of_the_ladder(made: Path) -> None:
    ladder, page = content(made / "ladder.json"), tree_of(made)
    rows = [row for row in page.rows["accuracy"] if row][1:]
    assert [row[0] for row in rows] == [rung["name"] for rung in ladder["rungs"]]
    last = next(r for r in reversed(ladder["rungs"]) if r["runs_in"] == "onnxruntime")
    row = page.row("accuracy", last["name"])
    assert row[2] == f"{100 * last['top1']:.2f} %"
    assert row[4] == f"{last['from_first']['sqnr_db']:.2f}"
    assert row[9] == f"{100 * last['from_before']['agreement']:.2f} %"


def test_without_a_ladder_accuracy_is_what_was_judged(copied: Path) -> None:
    (copied / "ladder.json").unlink()
    page = tree_of(copied)
    for result in content(copied / "eval.json")["results"]:
        row = page.row("accuracy", result["file"])
        assert row[1:3] == [str(result["images"]), f"{100 * result['top1']:.2f} %"]
        sqnr = result["sqnr_db"]
        assert row[5] == ("-" if sqnr is None else f"{sqnr:.2f}")
    assert "it was not computed; run reptrt ladder RUN_DIR" in page.text


def test_a_ladder_of_other_files_is_not_shown(copied: Path) -> None:
    judged = content(copied / "ladder.json")["files"]
    edit(copied, "ladder.json", {"files": judged | {"int8.onnx": "0" * 64}})
    assert "ladder.json is about other files or images" in tree_of(copied).text


def test_latency_is_that_of_bench(made: Path) -> None:
    page = tree_of(made)
    for result in content(made / "bench.json")["results"]:
        row = page.row("latency", result["file"])
        assert row[3] == f"{result['median_ms']:.3f}"
        assert row[4] == f"{result['median_low_ms']:.3f} - {result['median_high_ms']:.3f}"
        assert row[8] == f"{result['ratio']:.3f}"
        assert row[9] == f"{result['ratio_low']:.3f} - {result['ratio_high']:.3f}"


def test_noise_is_that_of_the_diagnosis(made: Path) -> None:
    page = tree_of(made)
    found = content(made / "diagnosis.json")
    for layer in found["layers"]:
        row = page.row("noise", layer["layer"])
        for at, key in ((4, "bits_left"), (7, "weight_sqnr_db"), (10, "activation_sqnr_db")):
            for offset, side in enumerate(("before", "after")):
                value = layer[side][key]
                assert row[at + offset] == ("-" if value is None else f"{value:.2f}")
    for sentence in found["reading"]:
        assert sentence in page.text


def test_thresholds_and_decisions_are_those_of_calibration(made: Path) -> None:
    page, found = tree_of(made), content(made / "calibrate.json")
    assert found["tensors"]
    for tensor in found["tensors"]:
        kept = f"up to {tensor['maximum']:.4g}, kept {tensor['amax']:.4g} "
        assert kept in page.text
        assert f"step {tensor['scale']:.4g}" in page.text
    assert f"{100 * found['overhead']:.2f} % more multiply-accumulates" in page.text
    for decision in found["decisions"]:
        row = page.row("decisions", decision["layer"])
        option = next(o for o in decision["options"] if o["form"] == decision["form"])
        whole = next(o for o in decision["options"] if o["form"] == "none")
        assert row[1] == decision["form"].replace("none", "whole")
        assert row[2] == f"{option['extra_macs']:,}"
        assert row[3] == f"{whole['weight_noise'] / decision['activation_noise']:.3g}"
        assert row[6] == decision["reason"]


def test_layers_left_whole_under_an_explicit_form_are_there_with_the_reason(copied: Path) -> None:
    split = content(copied / "calibrate.json")["splits"][:1]
    left = [{"node": "stem & co", "reason": "stride: no position"}]
    edit(copied, "calibrate.json", {"decisions": [], "splits": split, "left_whole": left})
    page = Tree(write_report(copied).path.read_text())
    assert page.row("decisions", "stem & co") == ["stem & co", "stride: no position"]
    edit(copied, "calibrate.json", {"left_whole": []})
    assert "Layers that were left whole" not in Tree(write_report(copied).path.read_text()).text


def test_what_export_left_unfused_is_there_once_for_each_reason(copied: Path) -> None:
    assert "that export left" not in tree_of(copied).text
    skipped = [{"node": f"norm{i}", "reason": "no layer next to it"} for i in range(3)]
    edit(copied, "float.onnx.json", {"details": {"skipped": skipped}})
    row = tree_of(copied).row("decisions", "norm0 and 2 more")
    assert row == ["norm0 and 2 more", "no layer next to it"]


def test_hashes_versions_and_options_are_those_of_the_record(made: Path) -> None:
    page, record = tree_of(made), content(made / "run.json")
    for name, stage in record["stages"].items():
        row = page.row("environment", name, cells=5)
        assert (row[1], row[3], row[4]) == (stage["file"], "as recorded", stage["sha256"])
    for name, version in record["versions"].items():
        assert page.row("environment", name) == [name, version]
    assert page.row("environment", "calibration images")[2] == record["data"]["sha256"]
    assert page.row("environment", "calibrate.images")[1] == "32"


def test_learned_units(copied: Path) -> None:
    unit = {"unit": "a & b", "layers": ["a", "b"], "start": 0.02, "learned": 0.005}
    unit |= {"kept": "learned", "changed_codes": 1234, "seconds": 1.25}
    learned = {"units": [unit], "storage": "float32", "held_out": 64}
    edit(copied, "calibrate.json", {"learned": learned})
    row = tree_of(copied).row("learned", "a & b")
    assert [*row[:2], *row[3:]] == ["a & b", "2", "2.00 %", "0.50 %", "learned", "1,234", "1.2"]


# Where the numbers come from ---------------------------------------------------------------------


def test_histograms_count_what_the_net_saw(made: Path) -> None:
    data, model = made.parent / "data.npz", read_model(made / "float.onnx")
    dataset = open_dataset(data, read_preprocess(net_from_model(model)), limit=32, seed=0)
    x = np.abs(np.concatenate(list(dataset.batches(32))))
    tensors = content(made / "calibrate.json")["tensors"]
    tensor = next(t for t in tensors if t["tensor"] == model.graph.input[0].name)
    bins = tensor["bins"]
    assert 32 <= len(bins) <= 64
    edges = np.arange(len(bins) + 1) * tensor["bin_width"]
    assert bins == np.histogram(x[x > 0], edges)[0].tolist()
    for tensor in tensors:
        assert len(tensor["bins"]) * tensor["bin_width"] >= tensor["maximum"]


def test_the_clipped_share_is_counted_beyond_half_a_step() -> None:
    values = np.linspace(0.0, 8.0, 80_001)[1:]
    counts = np.histogram(values, np.arange(65) / 8)[0].tolist()
    tensor = {"bins": counts, "bin_width": 0.125, "maximum": 8.0, "zeros": 0.5}
    found = clipped(tensor | {"amax": 6.3, "scale": 0.1})
    assert found == pytest.approx((values > 6.35).mean() / 2, abs=1e-5)
    assert clipped(tensor | {"amax": 8.0, "scale": 0.1}) == 0.0


def test_weight_ranges_against_the_files(made: Path) -> None:
    layers = {x.layer: x for x in weight_ranges(made / "float.onnx", made / "int8.onnx", 8)}
    fused, quantized = (
        {
            node.name: arrays[next(name for name in node.input if name in arrays)]
            for node in model.graph.node
            if node.op_type in ("Conv", "DequantizeLinear")
            and any(name in arrays for name in node.input)
        }
        for model in (onnx.load(made / "float.onnx"), onnx.load(made / "int8.onnx"))
        for arrays in [{t.name: numpy_helper.to_array(t) for t in model.graph.initializer}]
    )
    assert layers.keys() == {name for name, weight in fused.items() if weight.ndim == 4}
    splits = {s["layer"]: s["main"] for s in content(made / "calibrate.json")["splits"]}
    for name, layer in layers.items():
        weight = np.abs(fused[name])
        codes = 127 * weight / weight.max(axis=(1, 2, 3), keepdims=True)
        check(layer.before, codes)
        check(layer.after, np.abs(quantized[f"{splits.get(name, name)}.weight.dequantize"] * 1.0))
    rep = [layer for layer in layers.values() if layer.branches]
    assert {"3x3", "1x1", "identity"} == set(rep[0].branches)
    assert rep[0].branches["identity"].median == pytest.approx(1.0)


def check(ranges: Mapping[str, Any], codes: np.ndarray) -> None:
    """Compare the ranges of a kernel's parts with loops over its channels."""
    found: dict[str, list[float]] = {"identity": [], "1x1": [], "around": []}
    for channel, kernel in enumerate(codes):
        if not kernel.any():
            continue
        diagonal, centre = channel % kernel.shape[0], kernel.copy()
        found["identity"].append(kernel[diagonal, 1, 1])
        found["1x1"].append(np.delete(centre[:, 1, 1], diagonal).max(initial=0.0))
        centre[:, 1, 1] = 0
        found["around"].append(centre.max())
    if codes.shape[0] != codes.shape[1]:  # no identity fits
        found["1x1"] = list(codes[:, :, 1, 1].max(axis=1))
        del found["identity"]
    assert ranges.keys() == found.keys()
    for part, values in found.items():
        triple = (ranges[part].low, ranges[part].median, ranges[part].high)
        assert triple == pytest.approx(np.percentile(values, (5, 50, 95)), rel=1e-5), part


def test_scales() -> None:
    assert scale_of([3.0, None, 10.0]).percent(10.5) == pytest.approx(100)
    assert scale_of([]).percent(0) == 0
    log = scale_of([0.02, 0.005, 0.0], is_log=True)
    assert (log.low, log.high) == (pytest.approx(1e-3), pytest.approx(0.1))
    assert log.percent(0.01) == pytest.approx(50)
    assert Scale(0.5, 128.0, is_log=True).percent(0.0) == 0


def test_a_histogram_has_a_bar_for_each_bin_and_marks_what_is_clipped() -> None:
    chart = str(histogram(HistogramView([5, 0, 3, 1], 1.0, amax=2.0, end=4.0), "a < b"))
    assert chart.count('<rect class="after"') == 1
    assert chart.count('<rect class="clipped"') == 2
    assert 'class="threshold" x1="50.00%"' in chart
    assert 'aria-label="a &lt; b"' in chart


# Names and parts that are not as expected --------------------------------------------------------


def test_names_are_escaped(copied: Path) -> None:
    found = content(copied / "calibrate.json")
    found["tensors"][0]["tensor"] = EVIL
    found["decisions"][0]["layer"] = EVIL
    assert found["ranges"][0]["full"]
    found["ranges"][0]["tensor"] = EVIL
    edit(copied, "calibrate.json", found)
    layers = content(copied / "diagnosis.json")["layers"]
    edit(copied, "diagnosis.json", {"layers": [{**layers[0], "layer": EVIL}, *layers[1:]]})
    rungs = content(copied / "ladder.json")["rungs"]
    edit(copied, "ladder.json", {"rungs": [{**rungs[0], "name": EVIL}, *rungs[1:]]})
    edit(copied, "run.json", {"source": {**content(copied / "run.json")["source"], "name": EVIL}})
    text = write_report(copied).path.read_text()
    page = Tree(text)
    assert EVIL not in text
    assert html.escape(EVIL).replace("&#x27;", "&#39;").replace("&quot;", "&#34;") in text
    assert "img" not in page.tags
    assert page.row("noise", EVIL)
    assert page.row("decisions", EVIL)


@pytest.mark.parametrize(
    ("file", "sections", "reason"),
    [
        ("calibrate.json", ("activations", "decisions", "learned"), "calibrate.json is missing"),
        ("diagnosis.json", ("noise",), "diagnosis.json is gone; make it again"),
        ("bench.json", ("latency",), "bench.json is gone"),
        ("int8.onnx", ("weights", "activations", "decisions"), "int8.onnx is gone"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_part_that_is_gone(
    copied: Path, file: str, sections: tuple[str, ...], reason: str
) -> None:
    (copied / file).unlink()
    found = absent(copied)
    for section in sections:
        assert reason in found[section]
    assert reason in Tree((copied / "report.html").read_text()).text


def test_a_part_that_was_changed(copied: Path) -> None:
    (copied / "bench.json").write_text("{}")
    assert "bench.json was changed after the run" in absent(copied)["latency"]
    assert "bench.json: changed after the run." in tree_of(copied).text


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[1]", "calibrate.json is not what reptrt writes"),
        ("{", "calibrate.json cannot be read"),
        ('{"sha256": "0"}', "calibrate.json belongs to another int8.onnx"),
    ],
    ids=["list", "broken", "other"],
)
def test_a_file_that_reptrt_did_not_write(copied: Path, text: str, reason: str) -> None:
    (copied / "calibrate.json").write_text(text)
    assert reason in absent(copied)["activations"]


def test_a_field_that_is_missing_takes_its_section_alone(copied: Path) -> None:
    sha256 = content(copied / "calibrate.json")["sha256"]
    (copied / "calibrate.json").write_text(json.dumps({"sha256": sha256, "learned": None}))
    found = absent(copied)
    assert "a file is not what reptrt writes (KeyError" in found["activations"]
    assert "nothing was learned (recipe fast)" in found["learned"]
    assert "weights" not in found


def test_a_run_that_was_stopped(copied: Path) -> None:
    record = content(copied / "run.json")
    del record["stages"]["bench"], record["stages"]["diagnose"]
    (copied / "run.json").write_text(json.dumps(record | {"finished": False}))
    assert absent(copied)["latency"] == "the run was stopped before the stage bench"
    assert "The run was stopped." in tree_of(copied).text


@pytest.mark.slow
def test_a_run_without_diagnosis_and_what_an_earlier_one_left(tmp_path: Path) -> None:
    source, data = write_factory(tmp_path), write_data(tmp_path / "data.npz")
    run = make_run(source, data, tmp_path / "run")
    assert "noise" not in absent(run)
    make_run(source, data, run, "--no-diagnose")
    assert absent(run)["noise"] == "the run did not include the stage diagnose"


def test_why_a_stage_was_skipped(copied: Path) -> None:
    record = content(copied / "run.json")
    record["stages"].pop("diagnose")
    (copied / "run.json").write_text(json.dumps(record))
    stage = {"name": "diagnose", "file": "diagnosis.json", "state": "skipped: a <reason>"}
    (copied / "report.json").write_text(json.dumps({"stages": [stage]}))
    assert absent(copied)["noise"] == "the run skipped it: a <reason>"


# The command line --------------------------------------------------------------------------------


def test_the_command(copied: Path, tmp_path: Path) -> None:
    result = reptrt("report", copied)
    assert result.exit_code == 0
    assert f"report  {copied / 'report.html'}" in result.stdout
    assert "Learned units: not here: nothing was learned" in result.stdout
    result = reptrt("report", copied, "-o", tmp_path / "r.html", "--json", "-")
    found = json.loads(result.stdout)
    assert found["sha256"] == sha256_of(tmp_path / "r.html") == sha256_of(copied / "report.html")
    assert [section["id"] for section in found["sections"]] == list(SECTIONS)


def test_what_is_refused(copied: Path, tmp_path: Path) -> None:
    assert re.search(r"not the folder of a run, it has no run\.json", refused("report", tmp_path))
    assert re.search(
        r"int8\.onnx: is the file it would be made from",
        refused("report", copied, "-o", copied / "int8.onnx"),
    )
    missing = tmp_path / "no" / "r.html"
    assert "create it first" in refused("report", copied, "-o", missing)
    edit(copied, "run.json", {"format": 99})
    assert re.search(r"not the record of a run in format 1", refused("report", copied))


# How it looks ------------------------------------------------------------------------------------

CSS = (REPOSITORY / "reptrt/runs/report/report.css").read_text()


def themes() -> Iterator[dict[str, str]]:
    """Yield the colours of the light, the dark and the printed page."""
    blocks = re.findall(r":root \{(.*?)\}", CSS, re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        yield dict(re.findall(r"--([a-z]+): (#[0-9a-f]{6})", block))


def contrast(one: str, other: str) -> float:
    """Return the contrast ratio of two colours as WCAG 2 defines it."""
    luminances = []
    for colour in (one, other):
        channels = np.array([int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)])
        linear = np.where(
            channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4
        )
        luminances.append(float(linear @ [0.2126, 0.7152, 0.0722]))
    low, high = sorted(luminances)
    return (high + 0.05) / (low + 0.05)


def test_text_and_marks_stand_out_in_every_theme() -> None:
    for theme in themes():
        for ground in ("page", "panel"):
            for name in ("text", "soft", "link", "warn"):
                assert contrast(theme[name], theme[ground]) >= 4.5, (name, ground)
            marks = ("before", "after", "identity", "centre", "around", "clipped", "threshold")
            for name in marks:
                assert contrast(theme[name], theme[ground]) >= 3.0, (name, ground)


def test_every_class_has_a_style_and_the_files_are_packaged(made: Path) -> None:
    page = Tree((made / "report.html").read_text())
    names = {n for _, name, value in page.attributes if name == "class" for n in value.split()}
    unstyled = {name for name in names if f".{name}" not in CSS} - {"name"}
    assert unstyled == set()
    declared = re.search(
        r'"reptrt\.runs\.report" = \[(.+)\]', (REPOSITORY / "pyproject.toml").read_text()
    )
    assert declared is not None
    patterns = re.findall(r'"(.+?)"', declared[1])
    for path in (REPOSITORY / "reptrt/runs/report").iterdir():
        known = path.suffix == ".py" or path.is_dir()
        assert known or any(fnmatch(path.name, pattern) for pattern in patterns), path.name


BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
in_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
DARK, LIGHT = "--blink-settings=preferredColorScheme=0", "--blink-settings=preferredColorScheme=1"
_MEASURE = """onload = () => {
  const page = document.getElementById("page").contentDocument;
  const charts = [...page.querySelectorAll("svg.chart")];
  const failed = charts.filter(chart => !chart.getBoundingClientRect().width);
  document.getElementById("found").textContent = JSON.stringify({
    width: page.documentElement.scrollWidth, view: page.documentElement.clientWidth,
    charts: charts.length, flat: failed.length,
    small: Math.min(...[...page.querySelectorAll("p, td, th, span")].map(
      e => parseFloat(getComputedStyle(e).fontSize)))
  });
}"""


def browse(profile: Path, page: Path, *options: str) -> str:
    """Open a page in a headless browser; return its final document."""
    assert BROWSER is not None
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars")
    done = subprocess.run(
        [BROWSER, *flags, f"--user-data-dir={profile}", *options, page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@in_browser
@pytest.mark.parametrize("width", [390, 1200], ids=["phone", "desktop"])
def test_it_fits_the_screen(made: Path, tmp_path: Path, width: int) -> None:
    """Only tables are wider than a phone, and they scroll by themselves."""
    inner = html.escape((made / "report.html").read_text(), quote=True)
    outer = tmp_path / "outer.html"
    outer.write_text(
        f'<iframe id="page" width="{width}" height="800" srcdoc="{inner}"></iframe>'
        f'<p id="found"></p><script>{_MEASURE}</script>'
    )
    document = browse(tmp_path / "profile", outer, "--dump-dom")
    line = re.search(r'<p id="found">(\{.*?\})</p>', document)
    assert line is not None
    found = json.loads(html.unescape(line[1]))
    assert found["width"] <= found["view"] <= width
    assert found["charts"] > 20
    assert found["flat"] == 0
    assert found["small"] >= 11


@in_browser
@pytest.mark.parametrize(("scheme", "index"), [(LIGHT, 0), (DARK, 1)], ids=["light", "dark"])
def test_a_screenshot_has_the_colours_of_its_theme(
    made: Path, tmp_path: Path, scheme: str, index: int
) -> None:
    picture = tmp_path / "shot.png"
    options = ("--window-size=1000,1400", f"--screenshot={picture}", scheme)
    browse(tmp_path / "profile", made / "report.html", *options)
    theme = list(themes())[index]
    pixels = np.asarray(Image.open(picture).convert("RGB")).reshape(-1, 3)
    ground, text = (
        [int(theme[name][at : at + 2], 16) for at in (1, 3, 5)] for name in ("page", "text")
    )
    share = (pixels == ground).all(axis=1).mean()
    assert 0.5 < share < 0.99
    assert (pixels == text).all(axis=1).any()


@in_browser
def test_it_can_be_printed(made: Path, tmp_path: Path) -> None:
    paper = tmp_path / "report.pdf"
    browse(tmp_path / "profile", made / "report.html", f"--print-to-pdf={paper}", DARK)
    printed = paper.read_bytes()
    assert printed.startswith(b"%PDF")
    assert 2 <= len(re.findall(rb"/Type\s*/Page\b", printed)) <= 20
