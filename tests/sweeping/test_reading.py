"""What a TOML file says, and what is refused in one line before anything starts."""

import re
from pathlib import Path
from typing import Any

import pytest

from reptrt.core.errors import ReptrtError
from reptrt.pipeline.options import PLAIN_INT8
from reptrt.sweeping.reading import read_sheet, sheet_from
from tests.support.small_run import refused, write_data, write_factory
from tests.sweeping.sheets import write_sheet

NET = {"source": "net_of_a_small_run.py:make"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sheet")
    write_factory(path)
    write_data(path / "x.npz")
    (path / "empty").mkdir()
    return path


def sheet(folder: Path, net: dict[str, Any] | None = None, **content: Any) -> Any:
    whole = {"data": "x.npz", "nets": {"a": {**NET, **(net or {})}}, **content}
    return sheet_from(whole, folder, "s.toml")


def test_trials_are_targets_times_recipes_times_variants(folder: Path) -> None:
    (net,) = sheet(
        folder,
        targets=["tensorrt", "onnxruntime"],
        recipes=["plain", "accurate"],
        variants={"none": {"split": "none"}, "much": {"max_overhead": 0.3}},
    ).nets
    names = [trial.name for trial in net.trials]
    assert len(names) == len(set(names)) == 8
    assert names[0] == "a/tensorrt/plain/none"
    assert names[-1] == "a/onnxruntime/accurate/much"
    last = net.trials[-1].options
    assert (last.target, last.recipe, last.max_overhead) == ("onnxruntime", "accurate", 0.3)
    assert net.trials[0].options.correct_bias is PLAIN_INT8.correct_bias is False


def test_the_later_options_win(folder: Path) -> None:
    (net,) = sheet(
        folder,
        {"calibrate": {"seed": 2, "images": 9}, "eval": {"limit": 5}},
        calibrate={"seed": 1, "percentile": 99.0, "max_overhead": 0.2},
        variants={"v": {"images": 7}},
        eval={"limit": 30, "task": "any"},
    ).nets
    options = net.trials[0].options
    assert (options.seed, options.images, options.max_overhead) == (2, 7, 0.2)
    assert options.threshold.percentile == 99.0
    assert (net.judging.limit, net.judging.task) == (5, "any")


def test_as_many_images_as_there_are_by_default(folder: Path) -> None:
    (net,) = sheet(folder).nets
    assert net.trials[0].options.images == 40
    assert net.eval_data == net.data == folder.resolve() / "x.npz"


def test_paths_start_from_the_file(folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    path = write_sheet(folder, f'data = "x.npz"\n[nets.a]\nsource = "{NET["source"]}"\n')
    monkeypatch.chdir(tmp_path)
    (net,) = read_sheet(path).nets
    assert net.source.name == f"{folder.resolve()}/{NET['source']}"


def test_engines_are_built_where_they_are_asked_for(folder: Path) -> None:
    wanted = {"shapes": "1:8:64", "accelerators": ["A100", "H100"], "placement": {"cpus": 2}}
    (net,) = sheet(folder, engine=wanted).nets
    assert net.engine is not None
    assert net.engine.accelerators == ("A100", "H100")
    assert (net.engine.placement.gpus, net.engine.placement.cpus) == (1, 2)
    assert str(net.engine.options.shapes) == "1:8:64"
    assert sheet(folder, {"engine": False}, engine=wanted).nets[0].engine is None
    assert sheet(folder).nets[0].engine is None


WRONG: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "key": ({}, {"recipe": ["fast"]}, r"s.toml: unknown key 'recipe'; did you mean recipes\?"),
    "net key": ({"wieghts": "w"}, {}, r"\[nets.a\]: unknown key 'wieghts'; did you mean weights"),
    "option": ({"calibrate": {"max_overhed": 1}}, {}, r"max_overhed.*did you mean max_overhead"),
    "kind": ({"calibrate": {"images": "many"}}, {}, r"images: got 'many', expected .* int"),
    "bound": ({"calibrate": {"weight_bits": 9}}, {}, r"a/tensorrt/fast: weight_bits: got 9"),
    "pair": ({"calibrate": {"iterations": 5}}, {}, r"iterations: nothing is learned with recipe="),
    "axis": ({"calibrate": {"recipe": "fast"}}, {}, r"recipe: is given by the list recipes"),
    "recipe": ({}, {"recipes": ["quick"]}, r"recipes: got 'quick', expected of plain, fast, "),
    "target": ({"targets": []}, {}, r"targets: got \[\], expected a list"),
    "variant": ({"variants": ["w"]}, {"variants": {"v": {}}}, r"got 'w', expected of v"),
    "source": ({"source": "repvgg_z9"}, {}, r"architecture 'repvgg_z9' is not known; did you mean"),
    "no source": ({"source": None}, {}, r"source: got None, expected a zoo name"),
    "factory": ({"source": "no.py:make"}, {}, r"no.py: no such file"),
    "onnx": ({"source": "no.onnx"}, {}, r"no.onnx: no such file"),
    "weights": ({"weights": "no.pt"}, {}, r"no.pt: no such file"),
    "architecture": ({"architecture": {"widths": "w"}}, {}, r"widths: got 'w'"),
    "seed": ({"seed": -1}, {}, r"seed: got -1"),
    "data": ({"data": "none"}, {}, r"data: .*none: (does not exist|.*expected a folder)"),
    "empty": ({"eval_data": "empty"}, {}, r"eval_data: .*empty"),
    "no data": ({}, {"data": None}, r"\[nets.a\]: data: is missing"),
    "task": ({"eval": {"task": "clasify"}}, {}, r"\[eval\]: task: got 'clasify'"),
    "annotations": ({"eval": {"annotations": "no.json"}}, {}, r"annotations: .*no.json"),
    "costs": ({"calibrate": {"costs": "no.json"}}, {}, r"costs: .*no.json: does not exist"),
    "placement": ({"placement": {"gpu": 1}}, {}, r"\[placement\]: gpu: .*did you mean gpus"),
    "engine": ({"engine": {"shapes": "8:1:64"}}, {}, r"engine: shapes='8x?.*MIN <= OPT <= MAX"),
    "GPUs": ({"engine": {"accelerators": [3]}}, {}, r"accelerators: got \[3\], expected a list"),
    "nets": ({}, {"nets": {}}, r"s.toml: there are no nets; add a table \[nets.NAME\]"),
    "name": ({}, {"nets": {"a/b": NET}}, r"a name may hold"),
    "table": ({}, {"nets": {"a": 3}}, r"\[nets.a\]: got 3, expected a table"),
    "tables": ({}, {"nets": 3}, r"s.toml: nets: got 3, expected a table"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_done_is_refused_in_one_line(name: str, folder: Path) -> None:
    net, content, message = WRONG[name]
    with pytest.raises(ReptrtError, match=message) as caught:
        sheet(folder, net, **content)
    assert len(str(caught.value).splitlines()) == 1


def test_a_file_that_is_no_toml_is_refused(folder: Path, tmp_path: Path) -> None:
    wrong = write_sheet(tmp_path, "nets = [")
    line = refused("sweep", wrong, "-o", tmp_path / "out")
    assert re.match(r"error: .*sweep.toml: not a TOML file \(", line)
    line = refused("sweep", tmp_path / "none.toml", "-o", tmp_path / "out")
    assert re.match(r"error: .*none.toml: cannot be read \(No such file", line)
    assert not (tmp_path / "out").exists()
