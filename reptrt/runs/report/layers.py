"""Sections layer by layer: weight ranges, noise, decisions, learned units."""

import math
from collections.abc import Mapping

from markupsafe import Markup

from reptrt.core.errors import ArtifactError
from reptrt.runs.report.charts import Scale, axis, change, scale_of, strips
from reptrt.runs.report.content import JsonObject, RunContent
from reptrt.runs.report.page import (
    Block,
    Cell,
    Column,
    Legend,
    Section,
    Table,
    Text,
    decibels,
    number,
    percent,
)
from reptrt.runs.report.ranges import PARTS, LayerRanges, Range, weight_ranges
from reptrt.runs.report.results import BEFORE_AFTER

_CODES = Scale(0.5, 128.0, is_log=True)
_CODE_TICKS = (0.5, 2, 8, 32, 128)


def ranges(run: RunContent) -> Section:
    """Return the weight range of every convolution, by the parts that its branches set."""
    title = "Weight ranges before and after the splits"
    if run.float_onnx.value is None or run.int8_onnx.value is None:
        return Section("weights", title, absent=run.float_onnx.reason or run.int8_onnx.reason)
    bits = run.manifest.options["calibrate"]["weight_bits"]
    try:
        found = weight_ranges(run.float_onnx.value, run.int8_onnx.value, bits)
    except ArtifactError as err:
        return Section("weights", title, absent=str(err))
    if not found:
        return Section("weights", title, absent="the net has no convolution with a centre tap")
    text = (
        "A bar reaches from the 5th to the 95th percentile over output channels of the largest "
        "INT8 code in that part of the kernel, the gap in it is the median. A code below 0.5 is "
        "rounded to 0: what lies at the left end is lost. Branches: the median over channels of "
        "the largest weight that each brings into the fused kernel, in float."
    )
    legend = Legend(
        (
            ("around", "taps around the centre (k x k branches)"),
            ("centre", "centre tap (1x1 branches; in depthwise layers the identity too)"),
            ("identity", "diagonal of the centre tap (identity branch)"),
        )
    )
    ticks = axis(_CODES, _CODE_TICKS)
    columns = (
        Column("layer", "name"),
        Column("codes of the fused kernel", "chart", ticks),
        Column("split", "text"),
        Column("codes in the INT8 file", "chart", ticks),
        Column("largest weight of each branch", "words"),
    )
    rows = tuple(_range_row(layer) for layer in found)
    return Section("weights", title, (Text(text), legend, Table("Convolutions", columns, rows)))


def noise(run: RunContent) -> Section:
    """Return what quantized weights and a quantized input cost at each layer's output."""
    found = run.diagnosis.value
    title = "Signal to noise of each layer"
    if found is None:
        return Section("noise", title, absent=run.diagnosis.reason)
    keys = ("bits_left", "weight_sqnr_db", "activation_sqnr_db")
    scales = [
        scale_of(layer[side][key] for layer in found["layers"] for side in ("before", "after"))
        for key in keys
    ]
    titles = (f"bits left of {found['weight_bits']}", "weights dB", "activations dB")
    columns = [Column("layer", "name"), Column("range set by", "text"), Column("split", "text")]
    for name in titles:
        columns += [Column(name, "chart"), Column("before"), Column("after")]
    rows = tuple(_noise_row(layer, keys, scales) for layer in found["layers"])
    text = (
        f"Measured on {found['layer_images']} calibration images, before and after equalization, "
        "splits and code ranges, rounding to nearest. Weights, activations: SQNR of the layer's "
        "output with that alone quantized. Bits left: for the values beside what sets the range."
    )
    blocks: tuple[Block, ...] = (
        *(Text(sentence) for sentence in found["reading"]),
        _corners(found),
        Text(text),
        BEFORE_AFTER,
        Table("Layers", tuple(columns), rows),
    )
    return Section("noise", title, blocks)


def decisions(run: RunContent) -> Section:
    """Return what auto decided for each layer, and what it costs."""
    found, title = run.calibrate.value, "Decisions and their costs"
    if found is None:
        return Section("decisions", title, absent=run.calibrate.reason)
    text = (
        f"Chosen in all: {percent(found['overhead'])} more multiply-accumulates than the net's "
        f"own. {found['equalized']} tensors were given equal channel ranges, which costs nothing. "
    )
    mode = run.manifest.options["calibrate"]["split"]
    if not found["decisions"]:
        text += f"Splits were not chosen: --split {mode} was given. "
    full = [choice["tensor"] for choice in found["ranges"] if choice["full"]]
    text += f"{len(full)} of {len(found['tensors'])} activations take all codes (full range)."
    if in_float := sorted({*found.get("excluded", ()), *found.get("float_nodes", ())}):
        text += f" On request these nodes stay in float: {', '.join(in_float)}."
    blocks: list[Block] = [Text(text)]
    if found["decisions"]:
        blocks.append(_decisions(found["decisions"]))
    elif found["splits"]:
        rows = tuple((split["layer"], split["form"]) for split in found["splits"])
        columns = (Column("layer", "name"), Column("split", "text"))
        blocks.append(Table("Layers that were split", columns, rows))
    if left_whole := () if found["decisions"] else found.get("left_whole", ()):
        rows = tuple((skip["node"], skip["reason"]) for skip in left_whole)
        columns = (Column("layer", "name"), Column("why", "words"))
        blocks.append(Table("Layers that were left whole", columns, rows))
    if full:
        blocks.append(Text(f"Full range: {', '.join(full)}."))
    return Section("decisions", title, tuple(blocks))


def learned(run: RunContent) -> Section:
    """Return what learning did, unit by unit."""
    title = "Learned units"
    if run.calibrate.value is None:
        return Section("learned", title, absent=run.calibrate.reason)
    found = run.calibrate.value["learned"]
    if found is None:
        recipe = run.manifest.options["calibrate"]["recipe"]
        return Section("learned", title, absent=f"nothing was learned (recipe {recipe})")
    units = found["units"]
    scale = scale_of((u[key] for u in units for key in ("nearest", "learned")), is_log=True)
    columns = (
        Column("unit", "name"),
        Column("layers"),
        Column("error", "chart"),
        Column("nearest"),
        Column("learned"),
        Column("kept", "text"),
        Column("codes changed"),
        Column("seconds"),
    )
    rows = tuple(_unit_row(unit, scale) for unit in units)
    text = (
        f"Error of the unit's output relative to the float net's, on {found['held_out']} "
        "calibration images that nothing was learned from. The better of the two is kept."
    )
    legend = Legend((("before", "nearest"), ("after", "learned")))
    return Section("learned", title, (Text(text), legend, Table("Units", columns, rows)))


def _range_row(layer: LayerRanges) -> tuple[Cell, ...]:
    branches = ", ".join(f"{kind} {r.median:.3g}" for kind, r in layer.branches.items())
    return (
        layer.layer,
        _strips(layer.before, f"{layer.layer}, fused"),
        "-" if layer.form == "none" else layer.form,
        _strips(layer.after, f"{layer.layer}, INT8") if layer.after else "left in float",
        branches or "not recorded",
    )


def _strips(known: Mapping[str, Range], label: str) -> Markup:
    kinds = {"identity": "identity", "1x1": "centre", "around": "around"}
    rows = [(kinds[part], _triple(known.get(part))) for part in reversed(PARTS)]
    words = [f"{part} {known[part].median:.3g}" for part in reversed(PARTS) if part in known]
    return strips(_CODES, rows, f"{label}: median codes {', '.join(words)}")


def _triple(found: Range | None) -> tuple[float, float, float] | None:
    """Return the ends of a bar; None where nothing is there at all."""
    return None if found is None or found.high == 0 else (found.low, found.median, found.high)


def _noise_row(layer: JsonObject, keys: tuple[str, ...], scales: list[Scale]) -> tuple[Cell, ...]:
    parts = layer["parts"]
    source = "-"
    if parts:
        source = f"{parts[0]['kind']} {100 * parts[0]['share']:.0f} %"
        source += " (read off the kernel)" if layer["source"] == "kernel" else ""
    form = "-" if layer["form"] == "none" else layer["form"]
    cells: list[Cell] = [layer["layer"], source, form]
    for key, scale in zip(keys, scales, strict=True):
        before, after = layer["before"][key], layer["after"][key]
        texts = decibels(before), decibels(after)
        label = f"{layer['layer']}: {texts[0]} to {texts[1]}"
        cells += [change(scale, before, after, label), *texts]
    return tuple(cells)


def _corners(found: JsonObject) -> Table:
    rows = tuple(
        (
            f"{corner['name']}, {'as the run was asked' if corner['prepared'] else 'plain'}",
            decibels(corner["sqnr_db"]),
            percent(corner["agreement"]),
        )
        for corner in found["corners"]
    )
    columns = (Column("net", "name"), Column("SQNR dB"), Column("agreement"))
    return Table(f"On the {found['images']} calibration images", columns, rows)


def _decisions(found: list[JsonObject]) -> Table:
    forms = ("none", "identity", "coarse-fine")
    columns = (
        Column("layer", "name"),
        Column("chosen", "text"),
        Column("costs, MACs"),
        *(Column(f"noise, {'whole' if form == 'none' else form}") for form in forms),
        Column("why", "words"),
    )
    rows = []
    for decision in found:
        options = {option["form"]: option for option in decision["options"]}
        noises = (_relative(decision, options.get(form)) for form in forms)
        chosen = decision["form"]
        cost = f"{options[chosen]['extra_macs']:,}"
        name = "whole" if chosen == "none" else chosen
        rows.append((decision["layer"], name, cost, *noises, decision["reason"]))
    return Table("Weight noise of each form, relative to activation noise", columns, tuple(rows))


def _relative(decision: JsonObject, option: JsonObject | None) -> str:
    if option is None or not decision["activation_noise"]:
        return "-"
    return number(option["weight_noise"] / decision["activation_noise"], 3)


def _unit_row(unit: JsonObject, scale: Scale) -> tuple[Cell, ...]:
    before, after = unit["nearest"], unit["learned"]
    known = [value if value > 0 and math.isfinite(value) else None for value in (before, after)]
    label = f"{unit['unit']}: {number(before)} to {number(after)}"
    return (
        unit["unit"],
        str(len(unit["layers"])),
        change(scale, known[0], known[1], label),
        percent(before),
        percent(after),
        unit["kept"],
        f"{unit['changed_codes']:,}",
        f"{unit['seconds']:.1f}",
    )
