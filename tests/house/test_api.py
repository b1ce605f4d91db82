"""The public names, their signatures, and what a user's type checker sees of them."""

import inspect
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import reptrt
from reptrt.core.errors import ConfigError
from reptrt.core.keywords import changed, parameters
from reptrt.judge.options import BenchOptions, EvaluateOptions
from reptrt.judge.predict.options import PredictOptions
from reptrt.pipeline import CalibrateOptions, ExportOptions
from reptrt.search.options import TuneOptions
from reptrt.sweeping.options import SweepOptions
from reptrt.trt.options import BuildOptions, PackageOptions
from tests.house.test_imports import HEAVY, python
from tests.support.pages import REPOSITORY

SIGNATURES = {  # parameters before those that are fields of options
    "bench": "nets, *, baseline, options",
    "build_engine": "net, output, *, options",
    "calibrate": "net, data, *, name, options",
    "diagnose": "net, data, *, calibrated, layer_images, options",
    "evaluate": "nets, data, *, reference, options",
    "export": "source, *, weights, name, options",
    "inspect": "net",
    "ladder": "source, data, calib_data, *, weights, options",
    "lint": "net",
    "load": "path",
    "package": "net, output, *, options",
    "predict": "net, images, output, *, options",
    "rank_layers": "net, data, eval_data, *, options",
    "report": "folder, output",
    "run": "source, data, output, *, eval_data, weights, options",
    "sweep": "file, output, *, options",
    "tune": "net, data, eval_data, output, *, options",
}
CHANGES = {
    "bench": BenchOptions,
    "build_engine": BuildOptions,
    "calibrate": CalibrateOptions,
    "diagnose": CalibrateOptions,
    "evaluate": EvaluateOptions,
    "export": ExportOptions,
    "package": PackageOptions,
    "predict": PredictOptions,
    "sweep": SweepOptions,
    "tune": TuneOptions,
}


def test_public_names_are_a_contract() -> None:
    assert sorted(reptrt.__all__) == sorted(["__version__", "PLAIN_INT8", *SIGNATURES])
    assert dir(reptrt) == sorted(reptrt.__all__)
    with pytest.raises(AttributeError, match="module 'reptrt' has no attribute 'exprot'"):
        reptrt.exprot  # type: ignore[attr-defined]  # noqa: B018


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_a_contract(name: str) -> None:
    parameters = list(inspect.signature(getattr(reptrt, name)).parameters.values())
    own = SIGNATURES[name].replace("*, ", "").split(", ")
    assert [parameter.name for parameter in parameters[: len(own)]] == own
    positional = SIGNATURES[name].partition(", *")[0].split(", ")
    for parameter in parameters:
        assert (parameter.kind is parameter.KEYWORD_ONLY) == (parameter.name not in positional)


@pytest.mark.parametrize("name", CHANGES)
def test_fields_of_options_are_keyword_arguments(name: str) -> None:
    function = getattr(reptrt, name)
    shown = inspect.signature(function).parameters
    for item in fields(CHANGES[name]):
        assert item.name in shown
        assert f"    {item.name}: " in function.__doc__
    assert not any(p.kind is p.VAR_KEYWORD for p in shown.values())


def test_nested_options_are_keyword_arguments_too() -> None:
    shown = inspect.signature(reptrt.calibrate).parameters
    assert (shown["threshold"].default, shown["percentile"].default) == (None, 99.99)
    assert {"input_size", "recipe", "targets", "eval_limit", "widths"} <= set(
        inspect.signature(reptrt.run).parameters
    )


def test_options_are_listed_in_wrapped_lines() -> None:
    text = reptrt.calibrate.__doc__ or ""
    options = text.partition("\nOptions:\n")[2].splitlines()
    assert max(map(len, options)) <= 100
    entries = re.split(r"\n    (?=\w+: )", "\n" + "\n".join(options))[1:]
    assert len(entries) > 20
    assert {" ".join(entry.split()).lower().count("default: ") for entry in entries} == {1}


@pytest.mark.parametrize(
    "kind", [BenchOptions, BuildOptions, CalibrateOptions, EvaluateOptions, ExportOptions]
)
def test_bounds_of_fields_hold_in_python(kind: type) -> None:
    for name, parameter in parameters(kind).items():
        description = parameter.description
        for bound, step in (
            (description and description.minimum, -1),
            (description and description.maximum, 1),
        ):
            if bound is not None:
                with pytest.raises(ConfigError, match=f"{name}: got "):
                    changed(kind(), {name: bound + step})


def test_every_function_is_documented() -> None:
    for name in SIGNATURES:
        assert "Raises:" in (getattr(reptrt, name).__doc__ or ""), name


def test_the_import_loads_nothing_heavy() -> None:
    done = python(
        "import sys, reptrt; dir(reptrt); "
        f"print(sorted(set({(*HEAVY, 'rich', 'click')!r}) & set(sys.modules)))"
    )
    assert done.stdout.strip() == "[]"


USER_PROGRAM = """
from pathlib import Path

import numpy as np
import torch
from torch import nn

import reptrt


def main(model: nn.Module, loader: torch.utils.data.DataLoader[torch.Tensor]) -> float:
    net = reptrt.export(model, input_size=(3, 32, 32))
    int8 = reptrt.calibrate(net, loader, recipe="fast", max_overhead=0)
    path: Path = int8.save("a.onnx")
    logits = int8(np.zeros((1, 3, 32, 32), np.float32))
    result = reptrt.evaluate([net, int8, path, "b.onnx"], loader).results[0]
    reptrt.bench([net, path], batches=(1, 8)).to_dict()
    assert not reptrt.lint(int8).has_errors
    reptrt.build_engine(int8, "a.engine", shapes="1:8:64")
    print(int8.report.margin, logits)
    return result.top1 or 0.0
"""


def mypy(program: str, folder: Path) -> subprocess.CompletedProcess[str]:
    (folder / "program.py").write_text(program)
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent"]
    return subprocess.run(
        [*command, "--cache-dir", str(folder / "cache"), str(folder / "program.py")],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},  # mypy does not see editable installs
        timeout=600,
    )


@pytest.mark.slow
def test_a_users_program_type_checks_and_mistakes_are_found(tmp_path: Path) -> None:
    """One test, because mypy reads everything once and then has it in its cache."""
    done = mypy(USER_PROGRAM, tmp_path)
    assert done.returncode == 0, done.stdout
    wrong = {
        "import reptrt\nreptrt.exprot('a')\n": 'has no attribute "exprot"',
        "import reptrt\nreptrt.calibrate(1, 'data')\n": "incompatible type",
        "import reptrt\nx: int = reptrt.lint('a.onnx').layers + ''\n": "Unsupported operand",
    }
    for program, message in wrong.items():
        done = mypy(program, tmp_path)
        assert message in done.stdout, program
