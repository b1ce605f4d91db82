"""Compare two runs, or two ONNX files: options, inputs, files, scales and codes, results."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from reptrt.core.artifacts import Sidecar, read_sidecar, sha256_of
from reptrt.core.errors import ArtifactError, ConfigError
from reptrt.core.result import Result
from reptrt.graph.model import proto_of
from reptrt.graph.net import Net, net_from_model
from reptrt.runs.compare import Change, Comparison, WeightChange, changes, compare_nets, ratio_text
from reptrt.runs.manifest import STAGES, Manifest, check_made, read_finished, read_json
from reptrt.runs.run import FLOAT_FILE, INT8_FILE

_SHOWN = 20  # rows of a table for people; the JSON has all
_METRICS = ("top1", "top5", "map", "map50", "miou", "agreement", "sqnr_db")
_WEIGHT_TITLES = ("differ", "max difference", "of the bias", "ratio of scales")


@dataclass(frozen=True, slots=True)
class ResultPair:
    """One measured number in A and in B."""

    file: str
    metric: str
    a: float | None
    b: float | None


@dataclass(frozen=True, slots=True, repr=False)
class DiffReport(Result):
    """Everything that differs between A and B; empty where nothing does."""

    a: str
    b: str
    options: tuple[Change, ...]
    inputs: tuple[Change, ...]  # sha256 of source files and images
    versions: tuple[Change, ...]  # packages and machine
    hashes: tuple[Change, ...]  # sha256 of what was made
    models: tuple[Comparison, ...]
    results: tuple[ResultPair, ...]  # of eval and bench, equal ones too

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return asdict(self)

    def to_tables(self) -> list[Table]:
        """Return the differences as tables for people."""
        tables = [
            _table("options", ("A", "B"), [(c.name, _text(c.a), _text(c.b)) for c in self.options]),
            _table("inputs (sha256)", ("A", "B"), [_short(change) for change in self.inputs]),
            _table(
                "versions", ("A", "B"), [(c.name, _text(c.a), _text(c.b)) for c in self.versions]
            ),
            _table("files (sha256)", ("A", "B"), [_short(change) for change in self.hashes]),
        ]
        for model in self.models:
            tables += _model_tables(model)
        rows = [(f"{r.file} {r.metric}", _text(r.a), _text(r.b)) for r in self.results]
        tables.append(_table("results", ("A", "B"), rows, len(rows)))
        return [table for table in tables if table.row_count]

    def to_lines(self) -> list[str]:
        """Return the lines of each pair of models, and the verdict."""
        lines = [line for model in self.models for line in model.to_lines()]
        same = not (self.options or self.inputs or self.versions or self.hashes)
        return [*lines, f"diff  {self.a}  {self.b}  {'the same' if same else 'different'}"]


def diff(a: Path, b: Path) -> DiffReport:
    """Compare two folders of finished runs, or two ONNX files.

    Raises:
        ConfigError: one is a folder and the other a file.
        ArtifactError: a record or a file cannot be read, or was changed after it was written.
    """
    for path in (a, b):
        if not path.exists():
            raise ArtifactError(f"{path}: does not exist; expected the folder of a run or .onnx")
    if a.is_dir() != b.is_dir():
        folder, file = (a, b) if a.is_dir() else (b, a)
        raise ConfigError(
            f"{folder} is a folder, {file} a file: expected two folders of runs, or two .onnx files"
        )
    return _diff_runs(a, b) if a.is_dir() else _diff_files(a, b)


def _diff_runs(a: Path, b: Path) -> DiffReport:
    run_a, run_b = read_finished(a), read_finished(b)
    check_made(a, run_a)
    check_made(b, run_b)
    return DiffReport(
        a=str(a),
        b=str(b),
        options=changes(_asked(run_a), _asked(run_b)),
        inputs=changes(_inputs(run_a), _inputs(run_b)),
        versions=changes({**run_a.versions, **run_a.machine}, {**run_b.versions, **run_b.machine}),
        hashes=changes(_made(run_a), _made(run_b)),
        models=tuple(
            compare_nets(_net(a / name), _net(b / name), name) for name in (FLOAT_FILE, INT8_FILE)
        ),
        results=(*_eval_results(a, b), *_bench_results(a, b)),
    )


def _diff_files(a: Path, b: Path) -> DiffReport:
    origin_a, origin_b = read_sidecar(a), read_sidecar(b)
    if origin_a is None or origin_b is None:
        origin_a = origin_b = Sidecar("", "")
    return DiffReport(
        a=str(a),
        b=str(b),
        options=changes(origin_a.options, origin_b.options),
        inputs=changes(origin_a.parents, origin_b.parents),
        versions=changes(origin_a.versions, origin_b.versions),
        hashes=changes({"sha256": sha256_of(a)}, {"sha256": sha256_of(b)}),
        models=(compare_nets(_net(a), _net(b), "net"),),
        results=(),
    )


def _net(path: Path) -> Net:
    return net_from_model(proto_of(path))


def _asked(manifest: Manifest) -> dict[str, Any]:
    return {"source": manifest.source, **manifest.options}


def _inputs(manifest: Manifest) -> dict[str, str]:
    files = {f"source file {i}": f.sha256 for i, f in enumerate(manifest.source_files, start=1)}
    images = {"data": manifest.data.sha256, "eval data": manifest.eval_data.sha256}
    if manifest.annotations is not None:
        images["annotations"] = manifest.annotations.sha256
    return {**files, **images}


def _made(manifest: Manifest) -> dict[str, str]:
    stages = [manifest.stages[name] for name in STAGES if name in manifest.stages]
    return {stage.file: stage.sha256 for stage in stages if stage.file != "bench.json"}


def _eval_results(a: Path, b: Path) -> Iterator[ResultPair]:
    rows = [_by_file(folder / "eval.json", ("file",)) for folder in (a, b)]
    for key in dict.fromkeys([*rows[0], *rows[1]]):
        for metric in _METRICS:
            value_a, value_b = (by_file.get(key, {}).get(metric) for by_file in rows)
            if value_a is not None or value_b is not None:
                yield ResultPair(key[0], metric, value_a, value_b)


def _bench_results(a: Path, b: Path) -> Iterator[ResultPair]:
    rows = [_by_file(folder / "bench.json", ("file", "batch")) for folder in (a, b)]
    for key in dict.fromkeys([*rows[0], *rows[1]]):
        value_a, value_b = (by_file.get(key, {}).get("median_ms") for by_file in rows)
        yield ResultPair(key[0], f"median ms, batch {key[1]}", value_a, value_b)


def _by_file(path: Path, keys: tuple[str, ...]) -> dict[tuple[Any, ...], dict[str, Any]]:
    rows = read_json(path, "results of a run")["results"]
    return {tuple(row[key] for key in keys): row for row in rows}


def _model_tables(model: Comparison) -> list[Table]:
    scales = [(s.tensor, f"{s.a:.4g}", f"{s.b:.4g}", ratio_text(s.ratio)) for s in model.scales]
    weights = [_weight_row(change) for change in model.weights]
    splits = [(change.name, _text(change.a), _text(change.b)) for change in model.splits]
    return [
        _table(f"{model.file}: scales of activations", ("A", "B", "ratio"), scales),
        _table(f"{model.file}: weights", _WEIGHT_TITLES, weights),
        _table(f"{model.file}: splits", ("A", "B"), splits),
    ]


def _weight_row(change: WeightChange) -> tuple[str, ...]:
    if change.differing is None:
        return (
            change.layer,
            f"{change.form_a} | {change.form_b}",
            "",
            "",
            ratio_text(change.scale_ratio),
        )
    return (
        change.layer,
        f"{change.differing} of {change.total}",
        _text(change.max_difference),
        _text(change.bias_difference),
        ratio_text(change.scale_ratio),
    )


def _table(
    title: str, columns: Sequence[str], rows: Sequence[tuple[str, ...]], shown: int = _SHOWN
) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column(title, overflow="fold")
    for column in columns:
        table.add_column(column, justify="right", overflow="fold")
    for row in rows[:shown]:
        table.add_row(*row)
    if len(rows) > shown:
        table.add_row(f"{len(rows) - shown} more, in the JSON")
    return table


def _short(change: Change) -> tuple[str, str, str]:
    """Return the name of a change of sha256 and the first twelve digits of both."""
    return change.name, _text(change.a)[:12], _text(change.b)[:12]


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
