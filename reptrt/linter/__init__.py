"""A linter of Q/DQ graphs for TensorRT; needs neither TensorRT nor a GPU.

    lint(path) -> LintReport of Findings: rule, node, what was got and expected, cost, remedy

A new rule is a function in the file of its topic and one entry in the table of `rules.py`:

    codes.py      QDQ0xx  codes, scales and zero points themselves
    contract.py   QDQ0xx  axes, operators, types, opset: what TensorRT refuses
    fusion.py     QDQ1xx  pairs that keep a layer from fusing with its neighbours, or are missing
    pairs.py      QDQ1xx  pairs that cost a pass or a rounding and win nothing
    coverage.py   QDQ2xx  what runs in float, or is too narrow for INT8
    accuracy.py   QDQ3xx  numbers that lose accuracy for nothing
    rules.py      the table: id, name, severity, function, cost, remedy
    view.py       facts about a graph that several rules ask for; questions about one node or tensor
                  are in `reptrt.graph.queries`
    rule.py, linter.py, report.py   what a rule is, how all are applied, what comes out

The function takes a `View` and yields a `Defect` for every place; its docstring is the rule's
documentation (`Rule.doc`, docs/lint.md). tests/linter/test_rules.py asks for a graph that breaks
the rule, and tests with TensorRT itself whether an error is one.
"""

from reptrt.linter.linter import lint, lint_net
from reptrt.linter.report import Finding, LintReport, Severity
from reptrt.linter.rule import Rule
from reptrt.linter.rules import RULES

__all__ = ["RULES", "Finding", "LintReport", "Rule", "Severity", "lint", "lint_net"]
