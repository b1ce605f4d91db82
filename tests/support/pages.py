"""README, CONTRIBUTING and docs/ as data: their blocks, commands, inline code and links.

A comment in the line before a block says how the tests treat it:

    <!-- not run: REASON -->     a block that is not run; its commands must still parse
    <!-- file: NAME -->          a block that is a file which later blocks read
"""

import re
import shlex
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).resolve().parents[2]
GENERATED = ("commands.md", "lint.md")

_BLOCK = re.compile(
    r"(?:<!-- (?P<note>.+?) -->\n)?```(?P<language>\w*)\n(?P<text>.*?)```\n", re.DOTALL
)
_PUNCTUATION = set("();<>|&")


class Block(NamedTuple):
    language: str
    text: str
    skipped: str | None  # why it is not run
    file: str | None  # under which name it is saved


class Page(NamedTuple):
    path: Path
    text: str

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def blocks(self) -> list[Block]:
        blocks = []
        for match in _BLOCK.finditer(self.text):
            kind, _, value = (match["note"] or "").partition(": ")
            assert kind in ("", "not run", "file"), f"{self.name}: {match['note']}"
            skipped, file = (value if kind == name else None for name in ("not run", "file"))
            blocks.append(Block(match["language"], match["text"], skipped, file))
        return blocks

    @property
    def prose(self) -> str:
        """The text without its blocks."""
        return _BLOCK.sub("", self.text)

    @property
    def spans(self) -> list[str]:
        """Inline code."""
        return re.findall(r"(?<!`)`([^`\n]+)`(?!`)", self.prose)

    @property
    def links(self) -> list[tuple[str, str]]:
        """Text and target of every link and picture."""
        return re.findall(r"\[([^]]*)\]\(([^)\s]+)\)", self.prose)

    @property
    def anchors(self) -> set[str]:
        """The anchors that GitHub generates from the headings."""
        titles = re.findall(r"^#+ (.+)$", self.prose, re.MULTILINE)
        return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def pages() -> list[Page]:
    paths = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md"]
    paths += sorted((REPOSITORY / "docs").glob("*.md"))
    return [Page(path, path.read_text()) for path in paths]


def commands(text: str) -> Iterator[list[str]]:
    """Yield the words of every simple command of a bash text.

    >>> list(commands("make demo && reptrt lint \\\\\\n  'a b.onnx' > out  # why"))
    [['make', 'demo'], ['reptrt', 'lint', 'a b.onnx'], ['out']]
    """
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        for is_separator, words in groupby(lexer, key=lambda word: set(word) <= _PUNCTUATION):
            if not is_separator:
                yield list(words)
