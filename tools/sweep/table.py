"""The page docs/models.md: a table with a row for each net, and the reasons below it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_HEAD = """\
# Models

<!-- Made by tools/sweep_models.py; do not edit. -->

What `reptrt` does with other people's nets: nets of timm in their training form, the detectors of
the zoo, and look-alikes of detectors and segmentation nets, which are written in `tools/sweep/`.
**All weights are random.**
The batch norms' means and variances are measured on noise, calibration has its default options and
32 noise images, and SQNR is measured on 16 others. So the table says what is fused, what runs in
INT8 and what lint finds. A deep net with random weights amplifies any error, so its SQNR is not
what a trained net loses ([Results](results.md) has that): beside it stands what the float net loses
when nothing but its input is rounded to 8 bits.

| column | meaning |
|---|---|
| convs, norms | convolutions and batch norms, as `A -> B` where two numbers differ: after the \
authors' own fusion (`reparameterize_model` of timm, `fuse()` of the detectors) and in our file |
| INT8 | layers with INT8 input and weight, of all convolutions and products with a constant |
| SQNR | in dB, of the INT8 file / of the float net with its input rounded to INT8; the worst \
output, each measured by itself |
| lint | errors / warnings |
| engine | whether TensorRT-RTX builds it |
| seconds | export + calibrate + build-engine |
"""

_YOLOV6 = Path(__file__).with_name("yolov6.md")  # written by hand

_TITLES = ("net", "from", "input", "convs", "norms", "INT8", "SQNR", "lint", "engine", "seconds")
_TIMED = ("export", "calibrate", "build-engine")


def page(
    results: Sequence[Mapping[str, Any]], versions: Mapping[str, str], missing: Sequence[str]
) -> str:
    """Return the page in Markdown.

    Args:
        results: of `measure`, as JSON values.
        versions: name -> version of the packages that the results are from.
        missing: nets of the tool that have not been measured.
    """
    lines = [_HEAD, _row(_TITLES), "|---|---|---|" + "---:|" * (len(_TITLES) - 3)]
    lines += [_row(_cells(result)) for result in results]
    lines += ["", _YOLOV6.read_text(encoding="utf-8"), *_sections(results)]
    shown = ("reptrt", "torch", "onnxruntime", "timm", "tensorrt-rtx")
    names = [f"{name} {versions[name]}" for name in shown if name in versions]
    lines.append(f"Measured with {', '.join(names)} on 2 cores that did other work too.")
    if missing:
        lines += ["", f"Not measured yet: {', '.join(missing)}."]
    return "\n".join(lines) + "\n"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cells(result: Mapping[str, Any]) -> tuple[str, ...]:
    seconds = sum(result["seconds"].get(step, 0.0) for step in _TIMED)
    ratios = [min(result[key].values(), default=None) for key in ("sqnr_db", "input_sqnr_db")]
    warnings = sum(result["warnings"].values())
    layers = result["layers"]
    return (
        result["name"],
        result["family"],
        "x".join(map(str, result["size"])),
        _change(result["convs_theirs"], result["convs"]),
        _change(result["norms_theirs"], result["norms"]),
        "-" if layers is None else f"{result['int8_layers']} of {layers}",
        " / ".join("-" if ratio is None else f"{ratio:.1f}" for ratio in ratios),
        "-" if result["errors"] is None else f"{result['errors']} / {warnings}",
        {True: "yes", False: "no", None: "-"}[result["engine"]],
        f"{seconds:.0f}",
    )


def _change(theirs: int | None, ours: int | None) -> str:
    before, after = ("-" if count is None else str(count) for count in (theirs, ours))
    return before if before == after else f"{before} -> {after}"


def _sections(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what failed, what was left unfused and what lint warns of, each with its nets."""
    failures = {
        f"{step}: {reason}": result["name"]
        for result in results
        for step, reason in result["failed"].items()
    }
    left = _by_key(results, "left")
    warned = _by_key(results, "warnings")
    return [
        *_section("## What does not work", {text: [name] for text, name in failures.items()}),
        *_section("## Left unfused, with the reason that `export` gives", left),
        *_section("## Warnings of lint, by rule ([Lint rules](lint.md))", warned),
    ]


def _by_key(results: Sequence[Mapping[str, Any]], key: str) -> dict[str, list[str]]:
    """Return text -> nets, each with its count."""
    groups: dict[str, list[str]] = {}
    for result in results:
        for text, count in result[key].items():
            groups.setdefault(text, []).append(f"{result['name']} ({count})")
    return dict(sorted(groups.items()))


def _section(title: str, groups: Mapping[str, Sequence[str]]) -> list[str]:
    lines = [f"- {text}: {', '.join(names)}" for text, names in groups.items()]
    return [title, "", *(lines or ["Nothing."]), ""]
