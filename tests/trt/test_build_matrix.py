"""Engines for every net, way of quantizing, and type of the rest: built without a GPU.

Four nets (two published architectures at 3x224x224 with random weights, two trained ones), INT8
plain, split in every form, and learned, rest in FP32 and FP16, batch 1 to 64, for SM80, SM86, SM89
and SM120 in one file each; and what the linter says of every graph.
"""

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import onnx
import pytest

from reptrt.core.artifacts import read_sidecar
from reptrt.core.choices import HighPrecision
from reptrt.graph.intent import planned_int8
from reptrt.graph.net import net_from_model
from reptrt.graph.splits import read_splits
from reptrt.linter import LintReport, lint_net
from reptrt.pipeline import CalibrateOptions, ExportOptions, Source, calibrate, export
from reptrt.quantize.reconstruct.options import LearnOptions
from reptrt.sources.options import ArchitectureOptions
from reptrt.trt.audit import compare
from reptrt.trt.build import build_engine
from reptrt.trt.input import read_buildable, with_rest
from reptrt.trt.inspect import Inspection
from reptrt.trt.options import BuildOptions, parse_shapes
from reptrt.trt.rtx_plan import layers_of_plan
from tests.support.helpers import SHARED, needs_shared

pytestmark = [
    needs_shared,
    pytest.mark.skipif(
        importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed"
    ),
]
TARGETS = ("sm80", "sm86", "sm89", "sm120")
RESTS: tuple[HighPrecision, ...] = ("fp32", "fp16")


@dataclass(frozen=True)
class Case:
    """A net and the share of it that is INT8."""

    source: Source
    export: ExportOptions
    layers: int  # convolutions and the classifier, fused


def trained(name: str, **architecture: object) -> Source:
    options = ArchitectureOptions(num_classes=10, **architecture)  # type: ignore[arg-type]
    return Source(name, SHARED / "zoo" / f"{name}_cifar10.pt", options)


REPVGG = trained(
    "repvgg", widths=(32, 32, 64, 128, 256), blocks=(2, 4, 14, 1), strides=(2, 1, 2, 2, 1)
)
MOBILEONE = trained(
    "mobileone", widths=(32, 64, 128, 256), blocks=(2, 4, 6, 1), strides=(1, 2, 2, 1), branches=2
)
LARGE = ExportOptions(input_size=(3, 224, 224), resize="stretch")
SMALL = ExportOptions(input_size=(3, 32, 32))
NETS = {
    "repvgg_a0": Case(Source("repvgg_a0"), LARGE, 23),
    "mobileone_s0": Case(Source("mobileone_s0"), LARGE, 44),
    "repvgg_cifar10": Case(REPVGG, SMALL, 23),
    "mobileone_cifar10": Case(MOBILEONE, SMALL, 28),
}

PLAIN = CalibrateOptions(
    images=16, recipe="fast", split="none", equalize=False, full_range=False, correct_bias=False
)
SPLIT = replace(PLAIN, equalize=True)
WAYS: dict[str, CalibrateOptions] = {
    "plain": PLAIN,
    "coarse-fine": replace(SPLIT, split="coarse-fine"),
    "identity": replace(SPLIT, split="identity"),
    "identity-scalar": replace(SPLIT, split="identity-scalar"),
    "identity, int8": replace(SPLIT, split="identity", split_precision="int8"),
    "coarse-fine, int8": replace(PLAIN, split="coarse-fine", split_precision="int8"),
    # All there is, learned in few steps: engines do not differ by how good the codes are.
    "learned": CalibrateOptions(images=16, learn=LearnOptions(iterations=2, batch=8)),
}


PAIRS = [  # INT8 summands pay where there is an identity; random weights have none
    (name, way)
    for name, case in NETS.items()
    for way, options in WAYS.items()
    if options.split_precision == "float" or case.source.weights is not None
]


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """Return a function: net, way -> its INT8 file; what they share is made once."""
    folder = tmp_path_factory.mktemp("matrix")

    @functools.cache
    def floats(name: str) -> Path:
        path = folder / f"{name}.onnx"
        export(NETS[name].source, path, NETS[name].export)
        return path

    @functools.cache
    def quantized(name: str, options: CalibrateOptions) -> Path:
        path = folder / f"{name}.{len(list(folder.iterdir()))}.onnx"
        calibrate(floats(name), SHARED / "cifar10" / "calib", path, options)
        return path

    return lambda name, way: quantized(name, WAYS[way])


def lint_of(model: onnx.ModelProto) -> LintReport:
    return lint_net(net_from_model(model))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "way"), PAIRS)
def test_every_engine_builds_and_every_graph_is_clean(
    name: str, way: str, files: Callable[[str, str], Path], tmp_path: Path
) -> None:
    path = files(name, way)
    file = read_buildable(path).proto
    splits = read_splits(net_from_model(file))
    if WAYS[way].parts.split != "auto":
        assert bool(splits) == (WAYS[way].parts.split != "none")
    int8 = NETS[name].layers + sum(split.form == "coarse-fine" for split in splits)
    for rest in RESTS:
        model, done = with_rest(file, rest)
        assert done.state == {"fp32": "fp32", "fp16": "converted"}[rest]

        report = lint_of(model)
        # INT8 summands, a form for CPUs, keep TensorRT from adding in the layer's kernel. No other
        # warning is accepted. Infos: the ends of the net are narrow; split layers are added in
        # float; an FP32 rest; and what stays FP32 in an FP16 rest because FP16 cannot hold it.
        for_cpus = WAYS[way].split_precision == "int8"
        warnings = {f.rule for f in report.findings if f.severity != "info"}
        assert warnings == ({"QDQ103"} if for_cpus else set())
        allowed = {"QDQ204"} | ({"QDQ112"} if splits else set()) | warnings
        allowed |= {"QDQ205"} if rest == "fp32" or done.left_fp32 else set()
        assert {f.rule for f in report.findings} <= allowed
        assert report.int8_layers == report.layers == int8

        engine = tmp_path / f"{rest}.engine"
        options = BuildOptions(
            "tensorrt-rtx", targets=TARGETS, shapes=parse_shapes("1:8:64"), high_precision=rest
        )
        summary = build_engine(path, engine, options)
        assert summary.details.targets == TARGETS
        assert summary.details.rest == done
        assert summary.details.int8_layers == planned_int8(file)
        assert len(summary.details.int8_layers) == int8
        (profile,) = summary.to_dict()["profile"].values()
        assert [part.partition("x")[0] for part in profile.split(":")] == ["1", "8", "64"]
        assert {t.dtype for t in (*summary.details.inputs, *summary.details.outputs)} == {"FLOAT"}
        launches = layers_of_plan(engine.read_bytes(), str(engine))
        found = Inspection(engine, "engine", "", (), (), launches, None)
        assert compare(found, summary.details.int8_layers).misses == ()
        sidecar = read_sidecar(engine)
        assert sidecar is not None
        assert sidecar.details["targets"] == list(TARGETS)
