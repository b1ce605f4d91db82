"""A linter of Q/DQ graphs for TensorRT; needs neither TensorRT nor a GPU.

    lint(path) -> LintReport of Findings, each with a rule's id, the node, what was got and
    expected, why it costs and how to mend it.

`RULES` holds all rules; the docstring of a rule's check (`Rule.doc`) is its documentation.
"""

from reptrt.linter.linter import lint, lint_net
from reptrt.linter.report import Finding, LintReport, Severity
from reptrt.linter.rule import Rule
from reptrt.linter.rules import RULES

__all__ = ["RULES", "Finding", "LintReport", "Rule", "Severity", "lint", "lint_net"]
