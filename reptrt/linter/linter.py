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
    """Check whether TensorRT accepts a Q/DQ model (a file or in memory), and will run it fast.

    Raises:
        ArtifactError: the file cannot be read.
    """
    with G_LOGGER.suppress(G_LOGGER.ERROR):  # it warns on stdout of every FP8 or BF16 constant
        net = net_from_model(proto_of(model))
        return _report(label_of(model), net, RULES)


def lint_net(net: Net, rules: Sequence[Rule] = RULES) -> LintReport:
    """Check a Q/DQ graph, which is not changed; the bodies of If and Loop are not checked."""
    return _report(None, net, rules)


def _report(file: str | None, net: Net, rules: Sequence[Rule]) -> LintReport:
    view = View(net)
    findings: list[Finding] = [finding for rule in rules for finding in rule.findings(view)]
    findings.sort(key=lambda finding: (SEVERITIES.index(finding.severity), finding.rule))
    return LintReport(
        file=file,
        findings=tuple(findings),
        layers=len(view.weighted),
        int8_layers=sum(layer.is_int8 for layer in view.weighted),
    )
