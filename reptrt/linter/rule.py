"""A rule as data: its id, its name, its severity and the function that checks a graph."""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from reptrt.linter.report import Finding, Severity
from reptrt.linter.view import View


@dataclass(frozen=True, slots=True)
class Defect:
    """A place at which a rule is broken."""

    node: str
    got: str
    expected: str


@dataclass(frozen=True, slots=True)
class Rule:
    """One requirement or recommendation for Q/DQ graphs in TensorRT."""

    id: str  # stable: never given to another rule
    name: str
    severity: Severity
    check: Callable[[View], Iterator[Defect]]
    cost: str  # of a violation, without a full stop
    mend: str  # the remedy, without a full stop

    @property
    def doc(self) -> str:
        """The rule in full: the docstring of its check."""
        return inspect.getdoc(self.check) or ""

    def findings(self, view: View) -> Iterator[Finding]:
        """Yield a finding for every place where the rule is broken."""
        for defect in self.check(view):
            yield Finding(
                rule=self.id,
                name=self.name,
                severity=self.severity,
                node=defect.node,
                got=defect.got,
                expected=defect.expected,
                cost=self.cost,
                mend=self.mend,
            )
