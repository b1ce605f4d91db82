"""Write the pages of docs/ that are generated from the code (`make docs`).

    docs/commands.md   every command with its options, from click
    docs/lint.md       every lint rule, from the rule table and the docstrings of its checks
    docs/kernel.svg    README's picture: the weights of one layer of the demo net, in INT8 codes
    docs/tradeoff.svg  accuracy over latency of all tools, from docs/rivals_a0.json
    docs/results.md    the table between its markers, from docs/rivals_a0.json

docs/rivals_a0.json is what tools/compare_rivals.py measured; nothing is measured here.

tests/house/test_docs.py generates them again and fails if a page differs.
"""

import inspect
import json
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from pathlib import Path

import click
import numpy as np
import numpy.typing as npt
from tradeoff import tradeoff_picture

from reptrt.cli import main as reptrt
from reptrt.core.artifacts import write_bytes
from reptrt.core.grid import Grid, channel_amax, scale_from_amax
from reptrt.demo import digits
from reptrt.graph.net import net_from_model, read_model, weighted_nodes
from reptrt.linter.rules import RULES
from reptrt.pipeline import ExportOptions, Source, export
from reptrt.rewrite.split_identity import diagonal_of, without_diagonal

DOCS = Path(__file__).resolve().parents[1] / "docs"

_RIVALS = DOCS / "rivals_a0.json"
_BEGIN = "<!-- rivals of RepVGG-A0, written by make docs -->"
_END = "<!-- end of the rivals of RepVGG-A0 -->"

_ORDER = ("export", "calibrate", "lint", "build-engine", "inspect", "eval", "bench", "package")
# The commands whose page describes their JSON, with the module whose docstring describes it.
_JSON = {"eval": "reptrt.judge.evaluate", "bench": "reptrt.judge.bench_report"}
_JSON_STARTS = "The JSON form of a report:"

_COMMANDS = """\
# Commands

<!-- Made from the code by `make docs`; do not edit. -->

Results go to stdout, progress and logs to stderr (`reptrt -v COMMAND` logs more). The exit status
is 0 after success; 1 after an error, with one line on stderr that says where, what was given, what
was expected and what to do; 2 for a command line that cannot be parsed; 130 after Ctrl-C. Every
command has the option `--json F`; `-` writes the JSON to stdout in place of the text. Files are
written whole or not at all, and each has a sidecar `FILE.json` that says what it was made from
([architecture](architecture.md)). `--data` is a folder of images (flat, or with a sub-folder for
each class), an `.npz` with an array `x` (N, C, H, W) and optionally classes `y`, or an `.npy`.
"""

_LINT = """\
# Lint rules

<!-- Made from the code by `make docs`; do not edit. -->

`reptrt lint FILE.onnx` checks a Q/DQ graph of any tool against these rules. An error is something
that TensorRT refuses or computes differently, a warning costs speed or accuracy, an info may be
useful. The rules QDQ0xx are about what TensorRT accepts as Q and DQ nodes, QDQ1xx about their
placement, QDQ2xx about layers that run in float or are too narrow, QDQ3xx about numbers. An id is
never reused for another rule.
"""


def commands_page() -> str:
    """Return docs/commands.md: every command of the command line."""
    parent = click.Context(reptrt, info_name="reptrt")
    names = sorted(reptrt.commands, key=lambda name: (_rank(name), name))
    summary = ["| command | |", "|---|---|"]
    for name in names:
        first, *_ = (reptrt.commands[name].help or "").split("\n\n")
        summary.append(f"| [`{name}`](#{name}) | {_one_line(first)} |")
    sections = [
        _command(name, click.Context(reptrt.commands[name], parent, name)) for name in names
    ]
    return "\n".join([_COMMANDS, *summary, "", *sections])


def _rank(name: str) -> int:
    return _ORDER.index(name) if name in _ORDER else len(_ORDER)


def _command(name: str, context: click.Context) -> str:
    command = context.command
    usage = " ".join(["reptrt", name, *command.collect_usage_pieces(context)])
    lines = [
        f"## {name}",
        "",
        "```text",
        usage,
        "```",
        "",
        inspect.cleandoc(command.help or ""),
        "",
    ]
    lines += ["| option | |", "|---|---|"]
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if isinstance(parameter, click.Option) and record is not None and "--help" not in record[0]:
            option, meaning = (_one_line(text).replace("|", r"\|") for text in record)
            lines.append(f"| `{option}` | {meaning} |")
    if name in _JSON:
        documentation = inspect.cleandoc(import_module(_JSON[name]).__doc__ or "")
        _, start, form = documentation.partition(_JSON_STARTS)
        lines += ["", start + form]
    return "\n".join([*lines, ""])


def _one_line(text: str) -> str:
    return " ".join(text.split())


def lint_page() -> str:
    """Return docs/lint.md: every rule, its reason, and how to fix a graph that breaks it."""
    lines = [_LINT, "| id | name | severity |", "|---|---|---|"]
    for rule in RULES:
        lines.append(
            f"| [{rule.id}](#{rule.id.lower()}-{rule.name}) | {rule.name} | {rule.severity} |"
        )
    for rule in RULES:
        lines += [
            "",
            f"## {rule.id} {rule.name}",
            "",
            f"{rule.severity.capitalize()}. {rule.doc}",
            "",
        ]
        lines += [f"- Cost: {rule.cost}.", f"- Mend: {rule.mend}."]
    return "\n".join([*lines, ""])


_LAYER = "stage1.1"  # of the demo net
_WIDTH, _LEFT, _RIGHT = 760, 190, 740  # of the picture, and of its axis, in px
_ROW, _PANEL = 26, 118  # px per bar and per panel
_LOWEST, _HIGHEST = 0.1, 200.0  # codes at the ends of the axis
_STYLE = """\
  <style>
    text { font: 13px sans-serif; fill: #57606a }
    .title { font-weight: bold }
    .tap { fill: #bf8700 } .centre { fill: #1f6feb } .around { fill: #cf222e }
    .axis { stroke: #8c959f; stroke-width: 1 } .lost { fill: #8c959f; fill-opacity: 0.2 }
    .median { stroke: #ffffff; stroke-width: 2 }
    @media (prefers-color-scheme: dark) {
      text { fill: #adbac7 }
      .tap { fill: #d29922 } .centre { fill: #58a6ff } .around { fill: #ff7b72 }
      .median { stroke: #0d1117 }
    }
  </style>"""

FloatArray = npt.NDArray[np.floating]


def kernel_picture() -> str:
    """Return docs/kernel.svg: |weight| / step of one layer, fused and with the identity split off.

    A bar extends from the 5th to the 95th percentile of a group of taps; its tick is the median.
    """
    weight = _demo_weight(_LAYER)
    rest = without_diagonal(weight, diagonal_of(weight))
    height = 2 * _PANEL + 44
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" '
        f'width="{_WIDTH}" height="{height}" role="img">',
        f"  <title>Weights of layer {_LAYER} of the demo net in INT8 codes, before and after the "
        "identity is split off</title>",
        _STYLE,
        f'  <rect class="lost" x="{_LEFT}" y="28" width="{_x(0.5) - _LEFT}" '
        f'height="{2 * _PANEL - 24}"/>',
        *_panel("One fused 3x3 kernel: the identity sets the step", weight, 0),
        *_panel("Identity split off, added as d * x: the step fits the rest", rest, _PANEL),
        *_axis(2 * _PANEL + 8),
        "</svg>",
    ]
    return "\n".join([*lines, ""])


def _demo_weight(layer: str) -> FloatArray:
    """Return the fused kernel (O, I, 3, 3) of a layer of the demo net."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "digits.onnx")
        source = Source("repvgg", digits.WEIGHTS, digits.ARCHITECTURE)
        export(source, path, ExportOptions(digits.INPUT_SIZE, digits.MEAN, digits.STD))
        net = net_from_model(read_model(path))
    node = next(node for node in weighted_nodes(net.graph) if node.name == layer)
    return np.asarray(node.inputs[1].values, dtype=np.float64)


def _panel(title: str, weight: FloatArray, top: int) -> Iterator[str]:
    """Yield the bars of one kernel."""
    yield f'  <text class="title" x="12" y="{top + 20}">{title}</text>'
    for row, (kind, (label, values)) in enumerate(_groups(weight).items()):
        y = top + 34 + row * _ROW
        yield f'  <text x="{_LEFT - 10}" y="{y + 13}" text-anchor="end">{label}</text>'
        low, middle, high = np.percentile(values, (5, 50, 95))
        if not middle:
            yield f'  <text x="{_x(0.6)}" y="{y + 13}">not in the kernel any more</text>'
            continue
        left, width, median = _x(low), max(_x(high) - _x(low), 4), _x(middle)
        yield f'  <rect class="{kind}" x="{left}" y="{y}" width="{width}" height="17"/>'
        yield f'  <line class="median" x1="{median}" x2="{median}" y1="{y}" y2="{y + 17}"/>'


def _groups(weight: FloatArray) -> Mapping[str, tuple[str, FloatArray]]:
    """Return |weight| in steps of its output channel, by position in the kernel."""
    step = scale_from_amax(channel_amax(weight, 0), Grid.weight(8))
    codes = np.abs(weight) / step[:, None, None, None]
    is_diagonal = np.eye(len(weight), dtype=bool)
    is_centre = np.zeros((3, 3), dtype=bool)
    is_centre[1, 1] = True
    centre = codes[:, :, 1, 1]
    return {
        "tap": ("identity", centre[is_diagonal]),
        "centre": ("rest of the centre tap", centre[~is_diagonal]),
        "around": ("eight taps around", codes[:, :, ~is_centre].ravel()),
    }


def _axis(y: int) -> Iterator[str]:
    yield f'  <line class="axis" x1="{_LEFT}" x2="{_RIGHT}" y1="{y}" y2="{y}"/>'
    for codes in (0.1, 1, 10, 127):
        yield f'  <line class="axis" x1="{_x(codes)}" x2="{_x(codes)}" y1="{y}" y2="{y + 5}"/>'
        yield f'  <text x="{_x(codes)}" y="{y + 20}" text-anchor="middle">{codes}</text>'
    yield f'  <text x="12" y="{y + 20}">|weight| in INT8 codes</text>'
    yield f'  <text x="{_LEFT + 6}" y="{y - 6}">rounded to 0</text>'


def _x(codes: float) -> int:
    """Return the x coordinate for a number of codes; the axis is logarithmic."""
    share = math.log(max(codes, _LOWEST) / _LOWEST) / math.log(_HIGHEST / _LOWEST)
    return round(_LEFT + share * (_RIGHT - _LEFT))


def rivals_picture() -> str:
    """Return docs/tradeoff.svg."""
    return tradeoff_picture(_RIVALS, "RepVGG-A0 on Tiny ImageNet")


def results_page() -> str:
    """Return docs/results.md with the table of rivals that the stored results give."""
    before, rest = (DOCS / "results.md").read_text().split(_BEGIN)
    _, after = rest.split(_END)
    found = json.loads(_RIVALS.read_text())
    of_net = found["nets"][0]
    judged = f"{found['limit']:,} of the" if found["limit"] else "all"
    says = (
        f"RepVGG-A0 at 3 x 64 x 64, float {100 * of_net['float']['accuracy']:.2f} %, "
        f"{of_net['float']['kib']:.0f} KiB; {found['images']} calibration images, {judged} test "
        "images:"
    )
    return before + "\n".join([_BEGIN, says, "", *of_net["table"], _END]) + after


PAGES: Mapping[str, Callable[[], str]] = {
    "commands.md": commands_page,
    "lint.md": lint_page,
    "kernel.svg": kernel_picture,
    "tradeoff.svg": rivals_picture,
    "results.md": results_page,
}


def main() -> None:
    """Write every page."""
    for name, make in PAGES.items():
        write_bytes(DOCS / name, make().encode())
        print(DOCS / name)


if __name__ == "__main__":
    main()
