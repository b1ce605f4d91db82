"""README's command blocks are run, in order, in one folder; what cannot run here says why.

A comment in the line before a fence speaks about the block:

    <!-- not run: REASON -->     a bash block that is skipped
    <!-- file: NAME -->          a block that is a file which later commands read
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from reptrt.artifacts import read_sidecar
from reptrt.demo import digits

REPOSITORY = Path(__file__).resolve().parents[1]
README = (REPOSITORY / "README.md").read_text()
REASONS = {"installs into .venv", "installs", "needs a GPU"}
BLOCK = re.compile(
    r"(?:<!-- (?P<note>.+?) -->\n)?```(?P<language>\w*)\n(?P<text>.*?)```", re.DOTALL
)


class Block(NamedTuple):
    language: str
    text: str
    skipped: str | None  # why it is not run
    file: str | None  # under which name it is saved


def blocks() -> list[Block]:
    found = []
    for match in BLOCK.finditer(README):
        kind, _, value = (match["note"] or "").partition(": ")
        assert kind in ("", "not run", "file"), match["note"]
        skipped, file = (value if kind == name else None for name in ("not run", "file"))
        found.append(Block(match["language"], match["text"], skipped, file))
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the repository and `make demo` leave."""
    path = tmp_path_factory.mktemp("readme")
    (path / "reptrt/demo").mkdir(parents=True)
    shutil.copy(digits.WEIGHTS, path / "reptrt/demo")
    (path / "build/demo").mkdir(parents=True)
    digits.write_arrays(path / "build/demo")
    return path


def test_every_block_is_accounted_for() -> None:
    fences = len(re.findall(r"^```", README, re.MULTILINE))
    assert fences == 2 * len(blocks())
    assert {block.language for block in blocks()} == {"bash", "python", "text"}
    assert {block.skipped for block in blocks() if block.skipped} <= REASONS
    run = [block for block in blocks() if block.language == "bash" and not block.skipped]
    skipped = [block for block in blocks() if block.skipped]
    assert (len(run), len(skipped)) == (7, 3)
    for command in ("export", "calibrate", "lint", "eval", "bench", "build-engine", "run"):
        assert any(f"reptrt {command} " in block.text for block in run), command


@pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed"
)
def test_the_commands_run_in_order(folder: Path) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for block in blocks():
        if block.file:
            (folder / block.file).write_text(block.text)
        elif block.language == "bash" and not block.skipped:
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", block.text],
                cwd=folder,
                env={**os.environ, "PATH": path},
                capture_output=True,
                text=True,
                timeout=300,
                stdin=subprocess.DEVNULL,
            )
            assert done.returncode == 0, f"{block.text}\n{done.stderr}"
            assert done.stdout
    for name in (
        "digits.onnx",
        "my_net.onnx",
        "digits.int8.onnx",
        "digits.engine",
        "my_run/int8.onnx",
    ):
        assert read_sidecar(folder / name) is not None


def test_links_point_to_files() -> None:
    targets = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert targets
    for target in targets:
        assert (REPOSITORY / target).exists(), target


def test_the_export_command_is_the_demo_net() -> None:
    command = next(block.text for block in blocks() if "digits_repvgg.pt" in block.text)
    for option in ("widths", "blocks", "strides"):
        listed = ",".join(map(str, getattr(digits.ARCHITECTURE, option)))
        assert f"--{option} {listed} " in command
    assert f"--mean {digits.MEAN[0]} --std {digits.STD[0]} " in command
