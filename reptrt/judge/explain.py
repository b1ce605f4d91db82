"""Explain why a file is not faster than the baseline, from its timing and its layers.

Three questions are asked in this order. Is there a difference at all? There is none if the
interval of the ratio includes 1. Do the layers that were planned in INT8 run in INT8, and which
float layers and copies are between them? Would faster arithmetic help? It does not help layers with
few multiply-accumulates per byte, which wait for memory, nor small layers, whose launch takes most
of their time.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import onnx

from reptrt.core.artifacts import sha256_of
from reptrt.core.errors import ReptrtError
from reptrt.execute.runner import optimized_nodes
from reptrt.graph.intent import planned_int8
from reptrt.graph.layer_costs import LayerCost, layer_costs
from reptrt.graph.model import Network, is_engine, proto_of, unique_labels
from reptrt.graph.net import net_from_model
from reptrt.graph.splits import read_splits
from reptrt.judge.bench_report import BenchReport, Explanation, Timing
from reptrt.linter import lint_net
from reptrt.quantize.targets import TARGETS
from reptrt.trt.audit import Audit, audit
from reptrt.trt.details import read_engine_record
from reptrt.trt.input import is_half
from reptrt.trt.inspect import inspect_engine

_HELPS = 0.9  # a file with a smaller ratio is clearly faster and is not explained
_NAMED = 3
_FLOAT_OPS = re.compile(r"(Fused)?(Conv|ConvTranspose|Gemm|MatMul)")
_ISLAND_RULES = ("QDQ201", "QDQ202", "QDQ203")  # float layers between INT8 layers

# Data sheets of GPUs with tensor cores give 200 to 350 multiply-accumulates per byte (A100, H100,
# RTX 4090). A CPU core with VNNI computes a few if the byte is in its cache, about 20 if it is in
# memory. A call is a kernel launch on a GPU, an operator on a CPU; orders of magnitude, not
# measured here.
_ROOFLINES = {"gpu": TARGETS["tensorrt"].roofline, "cpu": TARGETS["onnxruntime"].roofline}
_CALL_US = {"gpu": 10.0, "cpu": 5.0}
_WAITING = 0.2  # waiting for memory is reported above this share of the time


@dataclass(frozen=True, slots=True)
class Evidence:
    """The facts about a timed file that can explain its speed."""

    planned: int = 0  # number of layers planned in INT8
    misses: tuple[str, ...] = ()  # planned layers that run in float: name, and reason if known
    split_layers: int = 0  # number of layers that were split into two summands
    islands: tuple[str, ...] = ()  # float layers between INT8 layers
    passes: tuple[str, ...] = ()  # launches of an engine that only move or convert: "12 reformats"
    fp32_rest: bool = False  # layers that are not INT8 are FP32
    calls: int = 0  # operators or launches per run; 0: unknown
    costs: tuple[LayerCost, ...] = ()
    unknown: tuple[str, ...] = ()  # lines that say what could not be examined, and why


def explain_all(report: BenchReport, networks: Sequence[Network] = ()) -> tuple[Explanation, ...]:
    """Explain each file that is not clearly faster than the baseline.

    Args:
        report: the report of `bench`.
        networks: the networks that were timed; models in memory are needed here, files are found
            by their names in the report.
    """
    explanations = []
    named = dict(zip(unique_labels(networks), networks, strict=True))
    for base in (row for row in report.results if row.file == report.baseline):
        for row in report.results:
            if row.batch != base.batch or row.file == base.file or _helps(row):
                continue
            network = named.get(row.file, Path(row.file))
            lines = explain(base, row, evidence(network, row.batch, on_gpu=_on_gpu(row)))
            if lines:
                explanations.append(Explanation(row.file, row.batch, lines))
    return tuple(explanations)


def explain(baseline: Timing, result: Timing, facts: Evidence) -> tuple[str, ...]:
    """Return why a file is not clearly faster than the baseline, the verdict first; () if it is.

    Args:
        baseline: the timing that ratios refer to.
        result: the timing of the file, with its ratio.
        facts: the facts about the file, from `evidence`.
    """
    if result.file == baseline.file or _helps(result):
        return ()
    verdict = _verdict(baseline, result)
    if not facts.planned:
        return (verdict,) if _no_difference(result) else ()
    reasons = [*_float_reasons(facts, result), *_waiting_reasons(facts, result)]
    reasons = reasons or ["the file shows no reason: the INT8 kernels are no faster here"]
    return (verdict, *reasons, *facts.unknown)


def evidence(network: Network, batch: int, *, on_gpu: bool) -> Evidence:
    """Return the facts about a network; ``unknown`` says what cannot be examined."""
    if isinstance(network, Path) and is_engine(network):
        return _engine_evidence(network, batch)
    model = proto_of(network)
    facts = _graph_evidence(model, batch)
    if not facts.planned or on_gpu:
        return facts
    try:
        nodes = optimized_nodes(network)
    except ReptrtError as err:
        return replace(facts, unknown=(f"how onnxruntime runs the file is unknown: {err}",))
    planned = planned_int8(model)
    floats = [name for name, op in nodes if _FLOAT_OPS.fullmatch(op)]
    misses = tuple(name for name in floats if name in planned)
    return replace(facts, misses=misses, fp32_rest=False, calls=len(nodes))


def _graph_evidence(model: onnx.ModelProto, batch: int) -> Evidence:
    planned = planned_int8(model)
    if not planned:
        return Evidence()
    net = net_from_model(model)
    islands = [f for f in lint_net(net).findings if f.rule in _ISLAND_RULES]
    return Evidence(
        planned=len(planned),
        split_layers=len(read_splits(net)),
        islands=tuple(dict.fromkeys(f"{f.node} ({f.rule} {f.name})" for f in islands)),
        fp32_rest=not is_half(model),
        costs=layer_costs(model, batch),
    )


def _engine_evidence(path: Path, batch: int) -> Evidence:
    """Return facts from the audit, and from the ONNX file if it lies beside the engine."""
    record = read_engine_record(path)
    if record is None:
        return Evidence(unknown=("the engine has no sidecar that says what was planned in INT8",))
    facts = Evidence(planned=len(record.details.int8_layers))
    if not facts.planned:
        return facts
    unknown = []
    files = ((path.parent / name, sha256) for name, sha256 in record.parents.items())
    sources = [file for file, sha256 in files if file.is_file() and sha256_of(file) == sha256]
    if sources:
        facts = replace(_graph_evidence(proto_of(sources[0]), batch), planned=facts.planned)
    else:
        unknown.append("the ONNX file that the engine was built from is not beside it")
    facts = replace(facts, fp32_rest=record.details.rest.state == "fp32")
    try:
        checked, layers = audit(path), inspect_engine(path).layers
    except ReptrtError as err:
        unknown.append(f"no audit: {err}")
        return replace(facts, unknown=tuple(unknown))
    return replace(
        facts,
        misses=tuple(f"{miss.layer}: {miss.precision}, {miss.reason}" for miss in checked.misses),
        passes=_passes(checked),
        calls=len(layers),
        unknown=tuple(unknown),
    )


def _passes(checked: Audit) -> tuple[str, ...]:
    counts = {
        "reformats": len(checked.reformats),
        "Q/DQ passes": len(checked.quantization_passes),
        "float outputs that another launch quantizes": len(checked.float_outputs),
    }
    return tuple(f"{count} {kind}" for kind, count in counts.items() if count)


def _helps(result: Timing) -> bool:
    if result.ratio is None or result.ratio_high is None:
        return True
    return result.ratio_high < 1.0 and result.ratio < _HELPS


def _no_difference(result: Timing) -> bool:
    low, high = result.ratio_low, result.ratio_high
    return low is not None and high is not None and low <= 1.0 <= high


def _verdict(baseline: Timing, result: Timing) -> str:
    numbers = (
        f"ratio {result.ratio:.3f} to {baseline.file}, 95 % interval {result.ratio_low:.3f} to "
        f"{result.ratio_high:.3f}"
    )
    if _no_difference(result):
        return f"no difference measurable ({numbers})"
    slower = result.ratio is not None and result.ratio > 1.0
    return f"{'slower' if slower else 'hardly faster'} ({numbers})"


def _float_reasons(facts: Evidence, result: Timing) -> list[str]:
    """Return the reasons that concern layers in float and conversions between INT8 layers."""
    lines = []
    if facts.misses:
        lines.append(
            f"{len(facts.misses)} of {facts.planned} layers planned INT8 run in float: "
            f"{_some(facts.misses)}"
        )
    if facts.split_layers and (facts.misses or facts.passes):
        where = "onnxruntime" if result.runner == "onnxruntime" else "the engine"
        layers = "1 layer is" if facts.split_layers == 1 else f"{facts.split_layers} layers are"
        lines.append(
            f"{layers} split into two summands, which {where} adds in "
            "float: compare with a file that is calibrated with split none"
        )
    if facts.islands:
        lines.append(f"float layers between INT8 layers: {_some(facts.islands)}")
    if facts.passes:
        lines.append(f"launches that only move or convert data: {', '.join(facts.passes)}")
    if facts.fp32_rest and _on_gpu(result):
        lines.append("layers outside INT8 run in FP32: build the engine with high precision fp16")
    return lines


def _waiting_reasons(facts: Evidence, result: Timing) -> list[str]:
    """Return the reasons why faster arithmetic would not help."""
    kind = "gpu" if _on_gpu(result) else "cpu"
    lines = []
    rate = _ROOFLINES[kind].macs_per_byte
    total = sum(cost.time(rate) for cost in facts.costs)
    waiting = [cost for cost in facts.costs if cost.intensity < rate]
    share = sum(cost.time(rate) for cost in waiting) / total if total else 0.0
    if share >= _WAITING:
        waiting.sort(key=lambda cost: cost.bytes_moved, reverse=True)
        lines.append(
            f"{len(waiting)} of {len(facts.costs)} layers wait for memory (fewer than {rate:.0f} "
            f"multiply-accumulates per byte; {100 * share:.0f} % of the time by this estimate): "
            f"{_some([f'{cost.layer} {cost.intensity:.1f}' for cost in waiting])}; faster "
            "arithmetic does not help them, moving fewer bytes does"
        )
    each = 1e3 * result.median_ms / facts.calls if facts.calls else float("inf")
    if each < _CALL_US[kind]:
        calls = "launches" if kind == "gpu" else "operators"
        lines.append(
            f"{facts.calls} {calls} take {each:.1f} us each, little more than the cost of a call: "
            "larger batches help, INT8 does not"
        )
    return lines


def _on_gpu(result: Timing) -> bool:
    return result.device != "cpu"


def _some(texts: Sequence[str]) -> str:
    more = f"; {len(texts) - _NAMED} more" if len(texts) > _NAMED else ""
    return "; ".join(texts[:_NAMED]) + more
