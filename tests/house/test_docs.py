"""The documentation is true: its blocks run, its commands parse, its links lead somewhere.

The blocks of a page run in order in one folder, which holds what the repository and `make demo`
leave, and the files that the page shows. `tests.support.pages` says how a block is marked.
"""

import contextlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from reptrt.cli import main
from reptrt.core.artifacts import read_sidecar
from reptrt.core.errors import ReptrtError
from reptrt.demo import comparison, detector, digits
from reptrt.linter.rules import RULES
from tests.support.helpers import load_tool
from tests.support.pages import GENERATED, REPOSITORY, Block, Page, commands, pages

PAGES = pages()
BY_HAND = [page for page in PAGES if page.name not in GENERATED]
REASONS = {
    "installs",
    "installs into .venv",
    "needs a GPU",
    "needs a fresh clone",
    "needs a trained detector and its images",
    "needs the trained net and Tiny ImageNet",
    "needs the trained nets and CIFAR-10",
    "needs your images",
}
LEAVES = {  # page -> files that its blocks must have left, each with its sidecar
    "README.md": ("digits.onnx", "my_net.onnx", "digits.int8.onnx", "digits.engine"),
    "python.md": ("net.onnx", "net.int8.onnx", "net.engine"),
    "tutorial.md": ("a0.onnx", "a0.int8.onnx", "a0.engine"),
    "tutorial_detect.md": ("detector.onnx", "detector.int8.onnx", "detector.engine"),
}
NOT_RUN_HERE = {"package", "replay"}  # named in the text: one needs a GPU's engine, one is slow
SAYS = {"rep.ort.onnx || echo": "QDQ008"}  # command -> what its block must have said
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
by_hand = pytest.mark.parametrize("page", BY_HAND, ids=lambda page: page.name)


def is_run(block: Block) -> bool:
    return block.language in ("bash", "python") and not block.skipped and not block.file


make_docs = load_tool("make_docs")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make demo` leaves."""
    path = tmp_path_factory.mktemp("demo")
    comparison.write_files(path, digits.write_arrays(path)["train"])
    return path


@pytest.fixture
def folder(tmp_path: Path, demo: Path) -> Iterator[Path]:
    """A folder with what the repository and `make demo` leave; gone after the test."""
    path = tmp_path / "clone"
    (path / "reptrt/demo").mkdir(parents=True)
    for weights in (digits.WEIGHTS, detector.WEIGHTS):
        shutil.copy(weights, path / "reptrt/demo")
    shutil.copytree(REPOSITORY / "tests/data/lint", path / "tests/data/lint")
    shutil.copytree(demo, path / "build/demo")
    yield path
    shutil.rmtree(path)


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed"
)
@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if any(is_run(block) for block in page.blocks)],
    ids=lambda page: page.name,
)
def test_the_blocks_run_in_order(page: Page, folder: Path) -> None:
    for block in page.blocks:
        if block.file:
            (folder / block.file).write_text(block.text)
    for block in filter(is_run, page.blocks):
        done = run(block, folder)
        assert done.returncode == 0, f"{page.name}:\n{block.text}\n{done.stderr}"
        for command, words in SAYS.items():
            assert command not in block.text or words in done.stdout
    for name in LEAVES.get(page.name, ()):
        assert read_sidecar(folder / name) is not None, name


def run(block: Block, folder: Path) -> subprocess.CompletedProcess[str]:
    shell = ["bash", "-euo", "pipefail", "-c"] if block.language == "bash" else ["python", "-c"]
    return subprocess.run(
        [*shell, block.text],
        cwd=folder,
        env={
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(REPOSITORY),  # the folder's reptrt/ holds the demo's weights only
        },
        capture_output=True,
        text=True,
        timeout=300,
        stdin=subprocess.DEVNULL,
    )


@each_page
def test_every_block_is_accounted_for(page: Page) -> None:
    assert len(re.findall(r"^```", page.text, re.MULTILINE)) == 2 * len(page.blocks)
    assert {block.language for block in page.blocks} <= {"bash", "python", "text"}
    assert {block.skipped for block in page.blocks if block.skipped} <= REASONS


@pytest.mark.parametrize("command", sorted(set(main.commands) - NOT_RUN_HERE))
def test_each_command_is_shown_and_run(command: str) -> None:
    shown = [block.text for page in BY_HAND for block in page.blocks if is_run(block)]
    found = any(words[:2] == ["reptrt", command] for text in shown for words in commands(text))
    assert found, f"no block of README or docs/ runs reptrt {command}; show how it is used"


def test_every_module_has_its_place_in_the_architecture() -> None:
    page = next(page for page in PAGES if page.name == "architecture.md")
    for path in (REPOSITORY / "reptrt").iterdir():
        name = path.name + "/" * path.is_dir()
        if not name.startswith(("_", ".")) and (path.is_dir() or path.suffix == ".py"):
            named = any(span.startswith(name) for span in page.spans)
            assert named, f"docs/architecture.md does not say where {name} belongs: add it"


@by_hand
def test_the_commands_parse(page: Page) -> None:
    for block in page.blocks:
        lines = block.text if block.language == "bash" else ""
        if block.language == "text":
            lines = "\n".join(re.findall(r"^reptrt [a-z].*$", block.text, re.MULTILINE))
        for words in commands(lines):
            if words[0] == "reptrt":
                parse(words[1:])
            elif words[0] == "make":
                check_targets(words[1:])
            elif words[0] == "python" and words[1].endswith(".py") and "/" in words[1]:
                assert (REPOSITORY / words[1]).is_file(), words


def parse(words: list[str]) -> None:
    """Parse a command line of reptrt without running it; a usage error is raised."""
    while words and words[0] in ("-v", "--verbose"):
        words = words[1:]
    if words in (["--help"], ["--version"]):
        return
    parent = click.Context(main, info_name="reptrt")
    assert words[0] in main.commands, f"no command {words[0]!r}"
    with contextlib.suppress(ReptrtError, click.exceptions.Exit):  # no such file, or --help
        main.commands[words[0]].make_context(words[0], list(words[1:]), parent)


def check_targets(words: list[str]) -> None:
    phony = re.search(r"^\.PHONY: (.+)$", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    assert phony is not None
    for word in words:
        assert "=" in word or word in phony[1].split(), f"make {word}"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("lint a.onnx --fast", "no such option"),
        ("calibrate a.onnx --data d -o b.onnx --split some", "is not one of"),
        ("calibrate a.onnx -o b.onnx", "missing parameter: data"),
        ("lint a.onnx b.onnx", "unexpected extra argument"),
    ],
    ids=["option", "choice", "missing", "argument"],
)
def test_what_does_not_parse_is_found(line: str, message: str) -> None:
    with pytest.raises(click.UsageError, match=f"(?i){message}"):
        parse(line.split())


@by_hand
def test_inline_code_is_true(page: Page) -> None:
    """Commands, options, targets, files and modules that a page names are there."""
    files = {block.file for page in PAGES for block in page.blocks if block.file}
    for span in page.spans:
        words = span.split()
        options = re.findall(r"(?<!\S)--[a-z][a-z-]*", span)
        if words[0] == "reptrt" and words[1:] and not words[1].startswith("-"):
            if words[1].isupper():
                continue
            known = known_options(words[1])
            assert set(options) <= known, f"{page.name}: `{span}`"
        elif words[0] in main.commands and options:
            assert set(options) <= known_options(words[0]), f"{page.name}: `{span}`"
        elif words[0].startswith("--"):
            known = {option for name in main.commands for option in known_options(name)}
            assert set(options) <= known, f"{page.name}: `{span}`"
        elif words[0] == "make" and words[1:]:
            check_targets(words[1:])
        elif re.fullmatch(r"[\w./-]+\.(py|md|toml|svg|yaml)", span) and span not in files:
            places = (REPOSITORY, REPOSITORY / "reptrt", REPOSITORY / "docs")
            assert any((place / span).is_file() for place in places), f"{page.name}: `{span}`"
        elif re.fullmatch(r"reptrt(\.\w+)+", span):
            check_module(span)


def known_options(command: str) -> set[str]:
    assert command in main.commands, f"reptrt {command}"
    parameters = main.commands[command].params
    return {"--help"} | {o for p in parameters for o in (*p.opts, *p.secondary_opts)}


def check_module(name: str) -> None:
    parent, _, attribute = name.rpartition(".")
    if importlib.util.find_spec(parent) is not None and importlib.util.find_spec(name) is None:
        assert hasattr(importlib.import_module(parent), attribute), name


@each_page
def test_links_lead_somewhere(page: Page) -> None:
    by_path = {other.path: other for other in PAGES}
    for text, target in page.links:
        thread = re.fullmatch(
            r"https://github\.com/([\w.-]+/[\w.-]+)/(?:issues|pull)/(\d+)", target
        )
        if thread:
            assert text == f"{thread[1]}#{thread[2]}"
        elif not target.startswith("http"):
            name, _, anchor = target.partition("#")
            path = (page.path.parent / name).resolve() if name else page.path
            assert path.exists(), f"{page.name}: {target}"
            assert not anchor or anchor in by_path[path].anchors, f"{page.name}: {target}"


@by_hand
def test_lint_rules_that_are_named_exist(page: Page) -> None:
    assert set(re.findall(r"QDQ\d{3}", page.text)) <= {rule.id for rule in RULES}


@each_page
def test_pages_speak_to_strangers(page: Page) -> None:
    """Nothing that only this project's own machines have."""
    for word in ("../shared", "/work/", "/tmp/"):
        assert word not in page.text


@pytest.mark.parametrize("name", make_docs.PAGES)
def test_generated_pages_are_current(name: str) -> None:
    stored = (REPOSITORY / "docs" / name).read_text()
    current = stored == make_docs.PAGES[name]()
    assert current, f"docs/{name} is not what the code says any more: run `make docs`, commit it"


@pytest.mark.parametrize("command", sorted(main.commands))
def test_every_option_says_what_it_is(command: str) -> None:
    for parameter in main.commands[command].params:
        if isinstance(parameter, click.Option):
            assert parameter.help, f"reptrt {command} {parameter.opts[0]}: no help text"


def test_the_tutorial_exports_the_demo_detector() -> None:
    page = next(page for page in PAGES if page.name == "tutorial_detect.md")
    command = next(block.text for block in page.blocks if "digits_yolov6.pt" in block.text)
    for option in ("widths", "blocks"):
        listed = ",".join(map(str, getattr(detector.ARCHITECTURE, option)))
        assert f"--{option} {listed} " in command
    assert f"--input-size {'x'.join(map(str, detector.INPUT_SIZE))} " in command


def test_readme_exports_the_demo_net() -> None:
    readme = next(page for page in PAGES if page.name == "README.md")
    command = next(block.text for block in readme.blocks if "digits_repvgg.pt" in block.text)
    for option in ("widths", "blocks", "strides"):
        listed = ",".join(map(str, getattr(digits.ARCHITECTURE, option)))
        assert f"--{option} {listed} " in command
    assert f"--mean {digits.MEAN[0]} --std {digits.STD[0]} " in command
