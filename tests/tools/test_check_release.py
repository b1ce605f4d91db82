import sys
import zipfile
from pathlib import Path

import pytest

from tests.support.helpers import load_tool

check_release = load_tool("check_release")


def test_lower_bounds_are_those_of_the_dependencies_and_extras_that_apply() -> None:
    requires = [
        "click>=8.1",
        "numpy",
        'onnxruntime>=1.18; extra == "cpu"',
        'tensorrt>=10.12; extra == "gpu"',
        'tomli>=2; python_version < "3.11"',
    ]
    newer = ["click==8.1", "onnxruntime==1.18"]
    assert check_release.lower_bounds(requires, ("cpu",), "3.11.7") == newer
    assert check_release.lower_bounds(requires, ("cpu",), "3.10.13") == [*newer, "tomli==2"]


def test_a_wheel_is_searched_for_what_it_lacks_and_has_too_much(tmp_path: Path) -> None:
    wheel = tmp_path / "reptrt-1.0-py3-none-any.whl"
    good = ["reptrt/py.typed", "reptrt/a.pt", "reptrt/a.css", "reptrt/a.j2"]
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in [*good, "reptrt-1.0.dist-info/METADATA"]:
            archive.writestr(name, "")
    assert check_release.defects_of(wheel) == []
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in [*good[1:], "tests/test_a.py"]:
            archive.writestr(name, "")
    assert check_release.defects_of(wheel) == [
        "no file reptrt/py.typed",
        "tests/test_a.py is not part of the package",
    ]


def test_a_step_that_fails_says_what_it_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    failing = [sys.executable, "-c", "raise SystemExit('out of paper')"]
    step = check_release.attempt("here", "print", failing, tmp_path)
    assert step.problem is not None
    assert "out of paper" in step.problem
    printed = capsys.readouterr().out
    assert "FAILED  here" in printed
    assert check_release.attempt("here", "x", [sys.executable, "-c", ""], tmp_path).problem is None


@pytest.mark.slow
def test_the_wheel_that_is_built_has_what_the_package_needs(tmp_path: Path) -> None:
    assert check_release.defects_of(check_release.built(tmp_path, "--no-isolation")) == []
