"""make installs once, and again when what is asked for has changed."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A clone where `make test` has installed everything an hour ago."""
    for name in ("Makefile", "pyproject.toml", "constraints-dev.txt"):
        shutil.copy(REPOSITORY / name, tmp_path)
        os.utime(tmp_path / name, (1_000_000, 1_000_000))
    (tmp_path / ".venv/bin").mkdir(parents=True)
    for name in ("bin/python", ".demo", ".dev"):
        (tmp_path / ".venv" / name).touch()
    return tmp_path


def make(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    return subprocess.run(
        ["make", *args], cwd=folder, env=env, capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize("target", ["demo", "check", "test"])
def test_nothing_is_installed_twice(folder: Path, target: str) -> None:
    done = make(folder, "-n", target)
    assert done.returncode == 0, done.stderr
    assert "pip" not in done.stdout


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints-dev.txt"])
@pytest.mark.parametrize(("target", "extras"), [("demo", "cpu,rtx,demo"), ("test", "demo,dev")])
def test_a_change_installs_again(folder: Path, name: str, target: str, extras: str) -> None:
    os.utime(folder / name, (9_000_000_000, 9_000_000_000))
    done = make(folder, "-n", target)
    assert "pip install" in done.stdout
    assert "-c constraints-dev.txt" in done.stdout
    assert f"{extras}]" in done.stdout


def test_constraints_can_be_lifted(folder: Path) -> None:
    os.utime(folder / "pyproject.toml", (9_000_000_000, 9_000_000_000))
    done = make(folder, "-n", "demo", "CONSTRAINTS=")
    assert "pip install" in done.stdout
    assert "-c constraints" not in done.stdout


def test_the_environment_comes_first(folder: Path) -> None:
    shutil.rmtree(folder / ".venv")
    commands = make(folder, "-n", "test").stdout
    assert commands.index("-m venv") < commands.index("pip install") < commands.index("pytest")


def test_an_old_python_is_one_clear_line(folder: Path) -> None:
    shutil.rmtree(folder / ".venv")
    old = folder / "python-old"
    old.write_text(
        "#!/bin/sh\nexec python3 - <<END\nimport sys\nsys.version_info = (3, 9)\n"
        'code = """$2"""\nexec(code)\nEND\n'
    )
    old.chmod(0o755)
    done = make(folder, "demo", f"PYTHON={old}")
    assert done.returncode != 0
    assert "python-old is 3.9, reptrt needs 3.10 or newer" in done.stderr
    assert not (folder / ".venv").exists()


def test_workers_share_the_cores(folder: Path) -> None:
    (folder / ".venv/bin/python").write_text('#!/bin/sh\necho "threads $OMP_NUM_THREADS"\n')
    (folder / ".venv/bin/python").chmod(0o755)
    for tool in ("ruff", "mypy", "lint-imports"):
        (folder / ".venv/bin" / tool).symlink_to("/bin/true")
    assert "threads 1\n" in make(folder, "test", "JOBS=1000").stdout
    assert f"threads {os.cpu_count()}\n" in make(folder, "test", "JOBS=1").stdout


def test_ci_runs_the_suite() -> None:
    script = REPOSITORY / ".ci/run"
    assert os.access(script, os.X_OK)
    assert script.read_text().splitlines()[-1].endswith("make --no-print-directory test")


def test_hooks_are_the_tools_of_make_check() -> None:
    config = (REPOSITORY / ".pre-commit-config.yaml").read_text()
    makefile = (REPOSITORY / "Makefile").read_text()
    entries = re.findall(r"entry: \.venv/bin/(.+)", config)
    assert config.count("entry:") == len(entries) == 4
    for entry in entries:
        tool, *arguments = entry.split()
        assert f"$(BIN)/{tool}" in makefile
        for path in (word for word in arguments if word.endswith(".py")):
            assert (REPOSITORY / path).is_file()
