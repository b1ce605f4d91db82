"""Apply all rules to a graph."""

from collections.abc import Sequence
from pathlib import Path

from onnx_graphsurgeon.logger import G_LOGGER

from reptrt.graph.model import Model, label_of, proto_of
from reptrt.graph.net import Net, net_from_model
from reptrt.linter.report import SEVERITIES, Finding, LintReport
from reptrt.linter.rule import Rule
from reptrt.linter.rules import RULES
from reptrt.linter.view import View


def lint(model: Path | Model) -> LintReport:
    """Check a Q/DQ ONNX file, or a model in memory, for what TensorRT takes and what it runs fast.

    Raises:
        ArtifactError: the file cannot be read.
    """
    with G_LOGGER.suppress(G_LOGGER.ERROR):  # it warns on stdout of every FP8 or BF16 constant
        net = net_from_model(proto_of(model))
        return _report(label_of(model), net, RULES)


def lint_net(net: Net, rules: Sequence[Rule] = RULES) -> LintReport:
    """Check a Q/DQ graph; it is not changed. Subgraphs of If and Loop are not looked into."""
    return _report(None, net, rules)


def _report(file: str | None, net: Net, rules: Sequence[Rule]) -> LintReport:
    view = View(net)
    found: list[Finding] = [finding for rule in rules for finding in rule.findings(view)]
    found.sort(key=lambda finding: (SEVERITIES.index(finding.severity), finding.rule))
    return LintReport(
        file=file,
        findings=tuple(found),
        layers=len(view.weighted),
        int8_layers=sum(layer.is_int8 for layer in view.weighted),
    )
