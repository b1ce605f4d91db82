"""The findings of the linter, as a table, as lines and as JSON."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from rich.table import Table

from reptrt.core.result import Result

Severity = Literal["error", "warning", "info"]
SEVERITIES: tuple[Severity, ...] = get_args(Severity)  # worst first

_NAMED = 3  # texts that a cell of the table shows before it counts


@dataclass(frozen=True, slots=True)
class Finding:
    """One place at which a rule is broken.

    Severity error: TensorRT refuses the graph or computes something else. Warning: it costs speed
    or accuracy. Info: worth knowing.
    """

    rule: str  # stable id: "QDQ001"
    name: str  # "non-zero-zero-point"
    severity: Severity
    node: str  # name of the node
    got: str
    expected: str
    cost: str  # why it matters
    mend: str  # what to do


@dataclass(frozen=True, slots=True, repr=False)
class LintReport(Result):
    """All findings of one graph, worst first, then by rule, then in the order of the graph."""

    file: str | None  # the path of the file or the name of the model; None: a bare graph
    findings: tuple[Finding, ...]
    layers: int  # convolutions and matrix products with a constant weight
    int8_layers: int  # of these, with INT8 input and weight

    def count(self, severity: Severity) -> int:
        """Return the number of findings of a severity."""
        return sum(finding.severity == severity for finding in self.findings)

    @property
    def has_errors(self) -> bool:
        """Whether TensorRT refuses the graph or computes something else."""
        return self.count("error") > 0

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return {
            "file": self.file,
            "layers": self.layers,
            "int8_layers": self.int8_layers,
            "errors": self.count("error"),
            "warnings": self.count("warning"),
            "infos": self.count("info"),
            "findings": [asdict(finding) for finding in self.findings],
        }

    def to_table(self) -> Table:
        """Return the findings as a table for people: one row a rule, with the number of places."""
        table = Table(box=None, pad_edge=False)
        for title in ("rule", "severity", "where", "got", "expected"):
            table.add_column(title, overflow="fold")
        for rule in dict.fromkeys(finding.rule for finding in self.findings):
            same = [finding for finding in self.findings if finding.rule == rule]
            table.add_row(
                f"{rule} {same[0].name}",
                same[0].severity if len(same) == 1 else f"{same[0].severity} x {len(same)}",
                _some([finding.node for finding in same]),
                _some([finding.got for finding in same]),
                _some([finding.expected for finding in same]),
            )
        return table

    def to_lines(self) -> list[str]:
        """Return one line for each broken rule (cost and remedy), then the totals."""
        broken = {finding.rule: finding for finding in self.findings}
        file = self.file or "graph"
        return [
            *(f"{finding.rule}: {finding.cost}. {finding.mend}." for finding in broken.values()),
            f"lint  {file}  {self.count('error')} errors  {self.count('warning')} warnings  "
            f"{self.count('info')} infos  {self.int8_layers} of {self.layers} layers INT8",
        ]


def _some(texts: Iterable[str]) -> str:
    """Return the first few distinct texts and the number of the others."""
    different = list(dict.fromkeys(texts))
    named = "; ".join(different[:_NAMED])
    return named if len(different) <= _NAMED else f"{named}; {len(different) - _NAMED} more"
