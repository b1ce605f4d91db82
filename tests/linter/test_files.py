"""The linter on graphs that other tools wrote and on our own; its report and its command."""

import json
import re
from pathlib import Path

import onnx
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper

from reptrt.cli import main
from reptrt.core.errors import ArtifactError
from reptrt.core.grid import Grid
from reptrt.graph.net import bytes_from_model, model_from_net, net_from_model, read_model
from reptrt.linter import RULES, lint, lint_net
from reptrt.pipeline import CalibrateOptions, ExportOptions, calibrate, export
from reptrt.rewrite.split_coarse_fine import split_coarse_fine
from reptrt.rewrite.split_identity import split_identity
from reptrt.sources.options import ArchitectureOptions
from reptrt.sources.source import Source
from tests.data.lint.make import cat, rep, res
from tests.support import lint_graphs as graphs
from tests.support.helpers import SHARED, needs_shared
from tests.support.lint_graphs import (
    QdqGraph,
    findings,
    needs_rtx,
    quantized,
    refused_by_rtx,
    rules,
)
from tests.support.onnx_nets import give_identity

DATA = Path(__file__).resolve().parents[1] / "data" / "lint"

# Graphs that other tools wrote; tests/data/lint/README.md says how.

NARROW, FP32_REST, FLOAT_CODES, FLOAT_HEAD = "QDQ204", "QDQ205", "QDQ303", "QDQ206"
FOREIGN = {
    "rep.ort.onnx": {"QDQ001", "QDQ008", "QDQ109", "QDQ301", NARROW, FP32_REST},
    "res.ort.onnx": {"QDQ001", "QDQ008", "QDQ103", "QDQ109", "QDQ301", NARROW, FP32_REST},
    "cat.ort.onnx": {
        *("QDQ001", "QDQ008", "QDQ101", "QDQ105", "QDQ106", "QDQ109", "QDQ113", "QDQ114"),
        "QDQ301",
        *(NARROW, FP32_REST),
    },
    "res.ort_symmetric.onnx": {"QDQ101", "QDQ103", "QDQ109", NARROW, FP32_REST},
    "rep.ort_qoperator.onnx": {"QDQ001", "QDQ009", "QDQ109"},
    "rep.modelopt.onnx": {NARROW, FLOAT_CODES, FLOAT_HEAD},
    "res.modelopt.onnx": {NARROW, FLOAT_CODES, FLOAT_HEAD},
    "cat.modelopt.onnx": {"QDQ105", "QDQ106", NARROW, FLOAT_CODES},
}


def test_all_foreign_graphs_are_listed():
    assert {path.name for path in DATA.glob("*.onnx")} == set(FOREIGN)


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_graphs(name):
    report = lint(DATA / name)
    assert {finding.rule for finding in report.findings} == FOREIGN[name]


@pytest.mark.slow
@needs_rtx
@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_graphs_have_errors_where_tensorrt_refuses_them(name):
    path = DATA / name
    assert refused_by_rtx(read_model(path)) == lint(path).has_errors


def test_each_foreign_defect_is_named_by_its_node():
    nodes = {(f.rule, f.node) for f in lint(DATA / "res.ort_symmetric.onnx").findings}
    relus = {"stem.out", "a1.out", "b1.out", "a.add.out", "b.add.out"}
    assert {node for rule, node in nodes if rule == "QDQ101"} == {
        f"{name}_QuantizeLinear" for name in relus
    }
    sums = {node for rule, node in nodes if rule == "QDQ103"}
    assert sums == {"a2.out_QuantizeLinear", "b2.out_QuantizeLinear"}  # not b.skip: one is enough


# Our own graphs.


ZOO = {
    "repvgg": {
        "widths": (32, 32, 64, 128, 256),
        "blocks": (2, 4, 14, 1),
        "strides": (2, 1, 2, 2, 1),
        "num_classes": 10,
    },
    "mobileone": {
        "widths": (32, 64, 128, 256),
        "blocks": (2, 4, 6, 1),
        "strides": (1, 2, 2, 1),
        "branches": 2,
        "num_classes": 10,
    },
}
LAYERS = {"conv1", "conv2", "a1", "a2", "b2", "left"}
REWRITES = {
    "plain": None,
    "coarse-fine": lambda net: split_coarse_fine(net, LAYERS, grid=Grid.weight(8)),
    "identity": lambda net: split_identity(net, LAYERS, grid=Grid.weight(8)),
    "identity-scalar": lambda net: split_identity(
        give_identity(net, LAYERS), LAYERS, grid=Grid.weight(8), form="identity-scalar"
    ),
}


@pytest.mark.parametrize("rewrite", REWRITES.values(), ids=REWRITES)
@pytest.mark.parametrize(
    "make", [rep, res, lambda: cat(explicit_pad=False)], ids=["rep", "res", "cat"]
)
def test_own_graphs_are_clean(make, rewrite):
    report = findings(quantized(make(), rewrite))
    assert rules(report) == []
    splits = [rule for rule in rules(report, "info") if rule == "QDQ112"]
    assert bool(splits) == (rewrite is not None)
    ends = ["QDQ204", "QDQ204", "QDQ205"]  # first and last layer are narrow; the rest is FP32
    assert rules(report, "info") == splits + ends
    assert report.int8_layers == report.layers


def test_own_graph_with_a_pad_is_clean():
    assert rules(findings(quantized(cat()))) == []


@pytest.mark.slow
@needs_shared
@pytest.mark.parametrize("net", ZOO)
def test_trained_nets_are_clean(net, tmp_path):
    source = Source(net, SHARED / "zoo" / f"{net}_cifar10.pt", ArchitectureOptions(**ZOO[net]))
    export(source, tmp_path / "net.onnx", ExportOptions(input_size=(3, 32, 32)))
    images = SHARED / "cifar10" / "calib"
    path = tmp_path / "net.int8.onnx"
    calibrate(tmp_path / "net.onnx", images, path, CalibrateOptions(images=4, recipe="fast"))
    report = lint(path)
    assert rules(report) == []
    assert set(rules(report, "info")) - {"QDQ112"} == {"QDQ204", "QDQ205"}
    assert report.int8_layers == report.layers > 20


# The report and the command.


def test_rules_are_documented():
    assert len({rule.id for rule in RULES}) == len({rule.name for rule in RULES}) == len(RULES)
    assert [rule.id for rule in RULES] == sorted(rule.id for rule in RULES)
    for rule in RULES:
        assert re.fullmatch(r"QDQ\d{3}", rule.id)
        assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)+|opset|simulation|requantized", rule.name)
        assert rule.doc.splitlines()[0].endswith(".")
        assert not rule.cost.endswith(".")
        assert not rule.mend.endswith(".")


def test_linting_changes_nothing():
    net = net_from_model(read_model(DATA / "cat.modelopt.onnx"))
    before = bytes_from_model(model_from_net(net.copy()))
    order = [node.name for node in net.graph.nodes]
    lint_net(net)
    assert bytes_from_model(model_from_net(net.copy())) == before
    assert [node.name for node in net.graph.nodes] == order


def test_json_holds_every_finding(tmp_path):
    path = tmp_path / "lint.json"
    result = CliRunner().invoke(main, ["lint", str(DATA / "rep.ort.onnx"), "--json", str(path)])
    content = json.loads(path.read_text())
    assert result.exit_code == 1
    assert content == lint(DATA / "rep.ort.onnx").to_dict()
    assert (content["errors"], content["warnings"], content["infos"]) == (11, 5, 3)
    assert (content["layers"], content["int8_layers"]) == (4, 4)
    assert content["findings"][0] == {
        "rule": "QDQ001",
        "name": "non-zero-zero-point",
        "severity": "error",
        "node": "x_QuantizeLinear",
        "got": "zero point -3",
        "expected": "0",
        "cost": "TensorRT quantizes symmetrically: the parser refuses any other zero point",
        "mend": "Quantize symmetrically (onnxruntime: ActivationSymmetric and WeightSymmetric)",
    }


def test_the_table_shows_each_rule_once_with_what_to_do():
    result = CliRunner().invoke(main, ["lint", str(DATA / "rep.ort.onnx")])
    assert result.exit_code == 1
    for rule in FOREIGN["rep.ort.onnx"]:
        assert len(re.findall(f"^{rule} ", result.stdout, re.MULTILINE)) == 1
        assert len(re.findall(f"^{rule}: ", result.stdout, re.MULTILINE)) == 1
    assert "; 4 more" in result.stdout
    assert re.search(r"^QDQ\d+ \S+ +\w+ x \d+ ", result.stdout, re.MULTILINE)
    last = result.stdout.splitlines()[-1]
    assert re.search(r"rep\.ort\.onnx  11 errors  5 warnings  3 infos  4 of 4 layers INT8", last)


def test_warnings_do_not_fail_the_command(tmp_path):
    path = tmp_path / "clean.onnx"
    onnx.save(graphs.clean(), str(path))
    result = CliRunner().invoke(main, ["lint", str(path)])
    assert result.exit_code == 0
    assert result.stdout.strip().endswith("0 errors  0 warnings  0 infos  2 of 2 layers INT8")
    result = CliRunner().invoke(main, ["lint", str(DATA / "cat.modelopt.onnx")])
    assert result.exit_code == 0


def test_json_on_stdout_is_json_alone(tmp_path):
    """onnx-graphsurgeon warns on stdout of FP8 constants; that must not get into the JSON."""
    g = QdqGraph()
    g.constants.append(helper.make_tensor("fp8", TensorProto.FLOAT8E5M2, [], [0.0]))
    path = tmp_path / "fp8.onnx"
    onnx.save(g.model(g.conv(g.qdq("x", 0.05, "fp8"))), str(path))
    result = CliRunner().invoke(main, ["lint", str(path), "--json", "-"])
    assert result.exit_code == 1
    found = json.loads(result.stdout)["findings"]
    assert ("QDQ002", "FLOAT8_E5M2 codes") in [(f["rule"], f["got"]) for f in found]


def test_what_is_no_graph_is_refused(tmp_path):
    path = tmp_path / "net.onnx"
    with pytest.raises(ArtifactError, match="does not exist; check the path"):
        lint(path)
    path.write_bytes(b"not a graph")
    with pytest.raises(ArtifactError, match="not a readable ONNX file"):
        lint(path)
    result = CliRunner().invoke(main, ["lint", str(path)])
    assert result.exit_code == 1
    assert re.fullmatch(r"error: .*net\.onnx: not a readable ONNX file.*\n", result.stderr)


def test_fp8_codes_of_a_convolution_are_no_defect(tmp_path):
    """tensorrt_rtx 1.7.1 builds it for sm89 with weights in fp8_e4m3, and refuses sm86."""
    g = QdqGraph()
    g.constants.append(helper.make_tensor("fp8", TensorProto.FLOAT8E4M3FN, [], [0.0]))
    path = tmp_path / "fp8.onnx"
    onnx.save(g.model(g.conv(g.qdq("x", 0.05, "fp8"))), str(path))
    assert "QDQ002" not in {finding.rule for finding in lint(path).findings}
