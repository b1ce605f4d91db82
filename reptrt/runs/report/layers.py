"""Sections with one row for each layer: weight ranges, noise, decisions, learned units."""

import math
from collections.abc import Mapping

from markupsafe import Markup

from reptrt.core.artifacts import read_sidecar
from reptrt.core.errors import ArtifactError
from reptrt.rewrite.contract import Skipped, by_reason
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
    """Return the weight ranges of every convolution, one for each part of its kernel."""
    title = "Weight ranges before and after the splits"
    if run.float_onnx.value is None or run.int8_onnx.value is None:
        return Section("weights", title, absent=run.float_onnx.reason or run.int8_onnx.reason)
    bits = run.manifest.options["calibrate"]["weight_bits"]
    try:
        layers = weight_ranges(run.float_onnx.value, run.int8_onnx.value, bits)
    except ArtifactError as err:
        return Section("weights", title, absent=str(err))
    if not layers:
        return Section("weights", title, absent="the net has no convolution with a centre tap")
    text = (
        "For each output channel, the largest INT8 code in a part of the kernel is taken. A bar "
        "reaches from the 5th to the 95th percentile of these over the channels; the gap in it is "
        "the median. Weights whose code is below 0.5 are rounded to 0, so a part at the left end "
        "is lost. The last column has, for each branch, the median over channels of the largest "
        "float weight that the branch adds to the fused kernel."
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
    rows = tuple(_range_row(layer) for layer in layers)
    return Section("weights", title, (Text(text), legend, Table("Convolutions", columns, rows)))


def noise(run: RunContent) -> Section:
    """Return the noise that quantized weights and a quantized input add to each layer's output."""
    diagnosis, title = run.diagnosis.value, "Signal to noise of each layer"
    if diagnosis is None:
        return Section("noise", title, absent=run.diagnosis.reason)
    keys = ("bits_left", "weight_sqnr_db", "activation_sqnr_db")
    scales = [
        scale_of(layer[side][key] for layer in diagnosis["layers"] for side in ("before", "after"))
        for key in keys
    ]
    titles = (f"bits left of {diagnosis['weight_bits']}", "weights dB", "activations dB")
    columns = [Column("layer", "name"), Column("range set by", "text"), Column("split", "text")]
    for name in titles:
        columns += [Column(name, "chart"), Column("before"), Column("after")]
    rows = tuple(_noise_row(layer, keys, scales) for layer in diagnosis["layers"])
    text = (
        f"Measured on {diagnosis['layer_images']} calibration images with rounding to nearest: "
        "before means without equalization, splits and full ranges, after means with them. The "
        "columns weights and activations give the SQNR of the layer's output when only its weights "
        "or only its input is quantized. Bits left are those that remain for the other weights "
        "once the largest ones have set the scale."
    )
    blocks: tuple[Block, ...] = (
        *(Text(sentence) for sentence in diagnosis["reading"]),
        _corners(diagnosis),
        Text(text),
        BEFORE_AFTER,
        Table("Layers", tuple(columns), rows),
    )
    return Section("noise", title, blocks)


def decisions(run: RunContent) -> Section:
    """Return the form chosen for each layer, with its cost and noise."""
    calibration, title = run.calibrate.value, "Decisions and their costs"
    if calibration is None:
        return Section("decisions", title, absent=run.calibrate.reason)
    text = (
        f"All splits together cost {percent(calibration['overhead'])} more multiply-accumulates "
        f"than the net without splits. The channels of {calibration['equalized']} activations "
        "were equalized, which costs nothing at run time. "
    )
    mode = run.manifest.options["calibrate"]["split"]
    decisions = calibration["decisions"]
    if not decisions:
        text += f"No layer was decided on its own, because split is {mode} for all. "
    full = [choice["tensor"] for choice in calibration["ranges"] if choice["full"]]
    text += f"{len(full)} of {len(calibration['tensors'])} activations use all 256 codes."
    if in_float := sorted({*calibration.get("excluded", ()), *calibration.get("float_nodes", ())}):
        text += f" On request these nodes stay in float: {', '.join(in_float)}."
    if dead := calibration.get("dead"):
        text += f" These tensors are 0 on all images, so they have no scale: {', '.join(dead)}."
        if idle := calibration["idle"]:
            text += f" The layers that read them stay in float: {', '.join(idle)}."
    blocks: list[Block] = [Text(text)]
    if decisions:
        blocks.append(_decisions(decisions))
    elif calibration["splits"]:
        rows = tuple((split["layer"], split["form"]) for split in calibration["splits"])
        columns = (Column("layer", "name"), Column("split", "text"))
        blocks.append(Table("Layers that were split", columns, rows))
    if left_whole := () if decisions else calibration.get("left_whole", ()):
        rows = tuple((skip["node"], skip["reason"]) for skip in left_whole)
        columns = (Column("layer", "name"), Column("why", "words"))
        blocks.append(Table("Layers that were left whole", columns, rows))
    if choice := calibration.get("in_float"):
        blocks.append(_in_float(choice))
    if full:
        blocks.append(Text(f"Activations that use all 256 codes: {', '.join(full)}."))
    if left_unfused := _left_unfused(run):
        rows = tuple((skip.node, skip.reason) for skip in by_reason(left_unfused))
        columns = (Column("node", "name"), Column("why", "words"))
        title_of_table = "Batch norms, scalings and sums of branches that export left"
        blocks.append(Table(title_of_table, columns, rows))
    return Section("decisions", title, tuple(blocks))


def _left_unfused(run: RunContent) -> list[Skipped]:
    """Return what the sidecar of the float file says was left alone."""
    sidecar = None if run.float_onnx.value is None else read_sidecar(run.float_onnx.value)
    entries = () if sidecar is None else sidecar.details.get("skipped", ())
    return [Skipped(entry["node"], entry["reason"]) for entry in entries]


def learned(run: RunContent) -> Section:
    """Return the error of each learned unit before and after learning."""
    title = "Learned units"
    if run.calibrate.value is None:
        return Section("learned", title, absent=run.calibrate.reason)
    learning = run.calibrate.value["learned"]
    if learning is None:
        recipe = run.manifest.options["calibrate"]["recipe"]
        return Section("learned", title, absent=f"nothing was learned (recipe {recipe})")
    units = learning["units"]
    scale = scale_of((u[key] for u in units for key in ("start", "learned")), is_log=True)
    columns = (
        Column("unit", "name"),
        Column("layers"),
        Column("error", "chart"),
        Column("start"),
        Column("learned"),
        Column("kept", "text"),
        Column("codes changed"),
        Column("seconds"),
    )
    rows = tuple(_unit_row(unit, scale) for unit in units)
    text = (
        f"The relative error of the unit's output against the float net, on {learning['held_out']} "
        "calibration images that were held out from learning. The best is kept: the start, "
        "corrected weights, or learned ones."
    )
    legend = Legend((("before", "start"), ("after", "learned")))
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


def _strips(ranges: Mapping[str, Range], label: str) -> Markup:
    kinds = {"identity": "identity", "1x1": "centre", "around": "around"}
    rows = [(kinds[part], _triple(ranges.get(part))) for part in reversed(PARTS)]
    words = [f"{part} {ranges[part].median:.3g}" for part in reversed(PARTS) if part in ranges]
    return strips(_CODES, rows, f"{label}: median codes {', '.join(words)}")


def _triple(codes: Range | None) -> tuple[float, float, float] | None:
    """Return the low end, middle and high end of a bar; None if the part is empty."""
    return None if codes is None or codes.high == 0 else (codes.low, codes.median, codes.high)


def _noise_row(layer: JsonObject, keys: tuple[str, ...], scales: list[Scale]) -> tuple[Cell, ...]:
    parts = layer["parts"]
    source = "-"
    if parts:
        source = f"{parts[0]['kind']} {100 * parts[0]['share']:.0f} %"
        source += " (estimated from the kernel)" if layer["source"] == "kernel" else ""
    form = "-" if layer["form"] == "none" else layer["form"]
    cells: list[Cell] = [layer["layer"], source, form]
    for key, scale in zip(keys, scales, strict=True):
        before, after = layer["before"][key], layer["after"][key]
        texts = decibels(before), decibels(after)
        label = f"{layer['layer']}: {texts[0]} to {texts[1]}"
        cells += [change(scale, before, after, label), *texts]
    return tuple(cells)


def _in_float(choice: JsonObject) -> Table:
    """Return the layers that were to stay in float if that pays, with what they cost and bring."""
    numbers = ("of all errors alone", "error that float removes", "of the work", "of the bytes")
    columns = (Column("layer", "name"), Column("stays", "text"), *map(Column, numbers))
    rows = tuple(
        (
            decision["layer"],
            "in float" if decision["kept"] else "INT8",
            percent(decision["alone"]),
            "not tried" if decision["gain"] is None else percent(decision["gain"]),
            percent(decision["price"]["macs"]),
            percent(decision["price"]["moved"]),
        )
        for decision in choice["decisions"]
    )
    title = (
        f"At most {choice['most']} layers were to stay in float: the error of the outputs falls by "
        f"{percent(choice['gain'])} or more on {choice['images']} held-out images"
    )
    return Table(title, columns, rows)


def _corners(diagnosis: JsonObject) -> Table:
    rows = tuple(
        (
            f"{corner['name']}, {'with splits and ranges' if corner['prepared'] else 'plain'}",
            decibels(corner["sqnr_db"]),
            percent(corner["agreement"]),
        )
        for corner in diagnosis["corners"]
    )
    columns = (Column("net", "name"), Column("SQNR dB"), Column("agreement"))
    return Table(f"On {diagnosis['images']} calibration images", columns, rows)


def _decisions(decisions: list[JsonObject]) -> Table:
    forms = ("none", "identity", "coarse-fine")
    columns = (
        Column("layer", "name"),
        Column("chosen", "text"),
        Column("extra MACs"),
        *(Column(f"noise, {'whole' if form == 'none' else form}") for form in forms),
        Column("why", "words"),
    )
    rows = []
    for decision in decisions:
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
    before, after = unit["start"], unit["learned"]
    shown = [value if value > 0 and math.isfinite(value) else None for value in (before, after)]
    label = f"{unit['unit']}: {number(before)} to {number(after)}"
    return (
        unit["unit"],
        str(len(unit["layers"])),
        change(scale, shown[0], shown[1], label),
        percent(before),
        percent(after),
        unit["kept"],
        f"{unit['changed_codes']:,}",
        f"{unit['seconds']:.1f}",
    )
