"""What runs elsewhere is right as far as it can be seen here: workflow, image, issue forms."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import reptrt
from tests.support.pages import REPOSITORY

WORKFLOW = REPOSITORY / ".github/workflows/tests.yml"
DOCKERFILE = (REPOSITORY / "Dockerfile").read_text()
MAKEFILE = (REPOSITORY / "Makefile").read_text()
HADOLINT = shutil.which("hadolint", path=os.pathsep.join([sys.prefix + "/bin", os.environ["PATH"]]))


def loaded(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def test_the_workflow_calls_make_targets_that_exist() -> None:
    steps = [step for job in loaded(WORKFLOW)["jobs"].values() for step in job["steps"]]
    runs = [step["run"] for step in steps if "run" in step]
    targets = [word for run in runs for word in run.split()[1:] if "=" not in word]
    assert {"test", "quick", "release"} <= set(targets)
    assert all(run.startswith("make ") for run in runs), runs
    for target in targets:
        assert re.search(rf"^(?:\w+ )*{target}(?: \w+)*:", MAKEFILE, re.M), target


def test_issue_forms_have_what_a_code_host_asks_for() -> None:
    forms = list((REPOSITORY / ".github/ISSUE_TEMPLATE").glob("*.yml"))
    assert len(forms) == 2
    for form in map(loaded, forms):
        assert form["name"]
        assert form["description"]
        asked = [field for field in form["body"] if field["type"] != "markdown"]
        assert len({field["id"] for field in asked}) == len(asked) > 0
        assert all(field["attributes"]["label"] for field in asked)


def test_the_image_copies_what_exists_and_installs_extras_that_exist() -> None:
    for line in re.findall(r"^COPY (.*) \S+$", DOCKERFILE, re.M):
        for name in line.split():
            assert (REPOSITORY / name).exists(), name
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no tomllib")
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    (extras,) = re.findall(r"/src\[([\w,]+)\]", DOCKERFILE)
    assert set(extras.split(",")) <= set(project["optional-dependencies"])


@pytest.mark.skipif(HADOLINT is None, reason="hadolint is not installed")
def test_the_image_is_linted() -> None:
    assert HADOLINT is not None
    command = [HADOLINT, str(REPOSITORY / "Dockerfile")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_citation_names_this_version() -> None:
    assert loaded(REPOSITORY / "CITATION.cff")["version"] == reptrt.__version__
