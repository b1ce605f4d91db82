"""Export: every kind of source becomes one fused ONNX file, proved equal by onnxruntime."""

import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from torch import nn

from reptrt.core.artifacts import read_sidecar, sha256_of
from reptrt.core.errors import (
    ArtifactError,
    CheckpointError,
    ConfigError,
    ReptrtError,
    RewriteError,
)
from reptrt.exporter.fuse import fuse
from reptrt.exporter.prove import probe_images
from reptrt.graph.net import Net, net_from_model
from reptrt.graph.preprocess import Preprocess, read_preprocess
from reptrt.graph.provenance import read_provenance
from reptrt.pipeline import ExportOptions, ExportReport, export
from reptrt.rewrite.contract import RewriteReport
from reptrt.sources.models import build
from reptrt.sources.options import ArchitectureOptions
from reptrt.sources.source import Source
from tests.support.helpers import ort_run
from tests.support.onnx_nets import Builder, basic_block, plain_chain

SIZE = (3, 16, 16)
SMALL = ExportOptions(input_size=SIZE)
ARCHITECTURES = {
    "repvgg": ArchitectureOptions(
        blocks=(2, 1), widths=(4, 8, 8), strides=(2, 1, 2), num_classes=5
    ),
    "mobileone": ArchitectureOptions(
        blocks=(2, 1), widths=(8, 8), strides=(1, 2), branches=2, num_classes=5
    ),
}
CONVS = {"repvgg": 4, "mobileone": 7}  # after fusion: stem, then one a block, or two (DW, PW)


def trained(name: str, seed: int = 0) -> nn.Module:
    """A small train-form net whose batch norms have statistics that matter."""
    torch.manual_seed(seed)
    module = build(name, ARCHITECTURES[name], deploy=False)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.normal_(part.bias, std=0.2)
            nn.init.normal_(part.running_mean, std=0.2)
            nn.init.uniform_(part.running_var, 0.5, 2.0)
    return module.eval()


def images(count: int = 2, seed: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, *SIZE)).astype(np.float32)


def ops(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(str(path)).graph.node]


def assert_is_the_net(path: Path, module: nn.Module, batch: int = 2) -> None:
    """The file computes what torch computes, in onnxruntime."""
    x = images(batch)
    with torch.no_grad():
        expected = module(torch.from_numpy(x)).numpy()
    model = onnx.load(str(path))
    (got,) = ort_run(model, {model.graph.input[0].name: x}).values()
    # float32 sums of a few hundred terms in another order, over a handful of layers
    np.testing.assert_allclose(got, expected, rtol=0, atol=3e-5 * np.abs(expected).max())


def assert_fused(path: Path, name: str) -> None:
    found = ops(path)
    assert found.count("Conv") == CONVS[name]
    assert not {"Add", "BatchNormalization", "Identity"} & set(found)


def checkpoint(tmp_path: Path, module: nn.Module) -> Path:
    torch.save(module.state_dict(), tmp_path / "weights.pt")
    return tmp_path / "weights.pt"


def by_torch(module: nn.Module, path: Path, exporter: str) -> Path:
    """Export as any user would, with the exporter's own defaults."""
    example = torch.zeros(2, *SIZE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if exporter == "classic":
            torch.onnx.export(module, (example,), str(path), dynamo=False)
        else:
            torch.onnx.export(module, (example,), str(path), dynamo=True, verbose=False)
    return path


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_a_checkpoint_becomes_one_fused_file(tmp_path: Path, name: str) -> None:
    module = trained(name)
    weights, output = checkpoint(tmp_path, module), tmp_path / "M.onnx"
    report = export(Source(name, weights, ARCHITECTURES[name]), output, SMALL)
    assert_fused(output, name)
    for batch in (1, 2, 5):  # the batch is free
        assert_is_the_net(output, module, batch)
    assert report.path == output
    assert report.sha256 == sha256_of(output)
    sidecar = read_sidecar(output)
    assert sidecar is not None
    assert sidecar.artifact == "float-onnx"
    assert sidecar.parents == {"weights.pt": sha256_of(weights)}
    deploy = build(name, ARCHITECTURES[name], deploy=True)
    assert report.num_parameters == sum(p.numel() for p in deploy.parameters())


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_the_deploy_form_gives_the_same_net(tmp_path: Path, name: str) -> None:
    """A checkpoint that was fused elsewhere, here by copying our own fused weights."""
    module = trained(name)
    train = tmp_path / "train.onnx"
    export(Source(name, checkpoint(tmp_path, module), ARCHITECTURES[name]), train, SMALL)
    values = {t.name: numpy_helper.to_array(t) for t in onnx.load(str(train)).graph.initializer}
    deploy = build(name, ARCHITECTURES[name], deploy=True).eval()
    state = {}
    for key in deploy.state_dict():
        kind = "rbr_reparam" if name == "repvgg" else "reparam_conv"
        state[key] = torch.from_numpy(values[key.replace(f".{kind}", "")].copy())
    torch.save(state, tmp_path / "deploy.pt")
    output = tmp_path / "M.onnx"
    export(Source(name, tmp_path / "deploy.pt", ARCHITECTURES[name]), output, SMALL)
    assert_fused(output, name)
    assert_is_the_net(output, module)


@pytest.mark.slow
@pytest.mark.parametrize("exporter", ["classic", "dynamo"])
@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_a_file_that_torch_exported_without_us(tmp_path: Path, name: str, exporter: str) -> None:
    """Default options: the classic exporter folds batch norms, both fix the batch."""
    module = trained(name)
    source = by_torch(module, tmp_path / "train.onnx", exporter)
    assert ops(source).count("Add") > 0  # the branches are there
    report = export(Source(str(source)), tmp_path / "M.onnx", ExportOptions())
    assert_fused(tmp_path / "M.onnx", name)
    assert_is_the_net(tmp_path / "M.onnx", module)
    assert len(report.proof.blocks) == len(read_provenance(net_from_model(onnx.load(report.path))))


def random_architecture(name: str, seed: int) -> ArchitectureOptions:
    rng = np.random.default_rng(seed)
    stages = int(rng.integers(1, 4))
    blocks = tuple(int(n) for n in rng.integers(1, 3, stages))
    if name == "repvgg":
        widths = tuple(int(n) for n in rng.choice([4, 8, 12], stages + 1))
        strides = tuple(int(n) for n in rng.integers(1, 3, stages + 1))
        groups = int(rng.choice([1, 2, 4]))
        return ArchitectureOptions(
            blocks=blocks, widths=widths, strides=strides, groups=groups, num_classes=3
        )
    return ArchitectureOptions(
        blocks=blocks,
        widths=tuple(int(n) for n in rng.choice([4, 8, 12], stages)),
        strides=tuple(int(n) for n in rng.integers(1, 3, stages)),
        branches=int(rng.integers(1, 4)),
        num_classes=3,
    )


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_random_nets_that_torch_exported_without_us(
    tmp_path: Path, name: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ARCHITECTURES, name, random_architecture(name, seed))
    module = trained(name, seed)
    source = by_torch(module, tmp_path / "train.onnx", "classic")
    export(Source(str(source)), tmp_path / "M.onnx", ExportOptions())
    assert not {"Add", "BatchNormalization", "Identity"} & set(ops(tmp_path / "M.onnx"))
    deploy = build(name, ARCHITECTURES[name], deploy=True)
    convs = sum(isinstance(part, nn.Conv2d) for part in deploy.modules())
    assert ops(tmp_path / "M.onnx").count("Conv") == convs
    assert_is_the_net(tmp_path / "M.onnx", module)


def test_a_file_with_external_data(tmp_path: Path) -> None:
    module = trained("repvgg")
    model = onnx.load(str(by_torch(module, tmp_path / "train.onnx", "classic")))
    (tmp_path / "ext").mkdir()
    source = tmp_path / "ext" / "train.onnx"
    onnx.save_model(model, str(source), save_as_external_data=True, location="w", size_threshold=0)
    export(Source(str(source)), tmp_path / "M.onnx", ExportOptions())
    (tmp_path / "ext" / "w").unlink()
    assert_is_the_net(tmp_path / "M.onnx", module)
    with pytest.raises(ArtifactError, match=r"train\.onnx: .*stored in"):
        export(Source(str(source)), tmp_path / "again.onnx", ExportOptions())


def test_mean_and_std_of_pixels_up_to_255_are_refused(tmp_path: Path) -> None:
    options = ExportOptions(input_size=SIZE, mean=(123.7, 116.3, 103.5), std=(58.4, 57.1, 57.4))
    source = Source("repvgg", architecture=ARCHITECTURES["repvgg"])
    with pytest.raises(ConfigError, match=r"mean: got \(123.7, .* pixels 0..1: divide both by 255"):
        export(source, tmp_path / "M.onnx", options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mean", "std", "warning"),
    [
        ((0.0,) * 3, (1.0,) * 3, None),
        ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), None),
        ((104 / 255, 117 / 255, 123 / 255), (1 / 255,) * 3, None),  # pixels 0..255 inside
        ((-1.0,) * 3, (0.5,) * 3, None),
        ((104.0, 117.0, 123.0), (1.0,) * 3, "mean (104.0, 117.0, 123.0) is above 1, the largest"),
        ((0.5,) * 3, (255.0,) * 3, "std (255.0, 255.0, 255.0) is above 1, the whole range"),
    ],
)
def test_mean_and_std_that_are_hardly_meant_are_reported(
    mean: tuple[float, ...],
    std: tuple[float, ...],
    warning: str | None,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    source = Source("repvgg", architecture=ARCHITECTURES["repvgg"])
    export(source, tmp_path / "M.onnx", ExportOptions(input_size=SIZE, mean=mean, std=std))
    warnings = [record.getMessage() for record in caplog.records if "above 1" in record.message]
    assert len(warnings) == (warning is not None)
    assert warning is None or warnings[0].startswith(warning)


def test_an_exported_file_is_a_source_again(tmp_path: Path) -> None:
    output, again = tmp_path / "M.onnx", tmp_path / "again.onnx"
    options = ExportOptions(input_size=SIZE, mean=(0.1, 0.2, 0.3), std=(0.25, 0.5, 1.0))
    export(Source("repvgg", architecture=ARCHITECTURES["repvgg"]), output, options)
    report = export(Source(str(output)), again, ExportOptions())
    assert report.proof.blocks == ()
    assert report.proof.overall.max_difference == 0
    first, second = (onnx.load(str(path)) for path in (output, again))
    assert first.graph.initializer == second.graph.initializer
    assert read_preprocess(net_from_model(second)) == Preprocess(
        *SIZE, mean=(0.1, 0.2, 0.3), std=(0.25, 0.5, 1.0)
    )
    names = [set(read_provenance(net_from_model(model))) for model in (first, second)]
    assert names[0] == names[1] != set()


def test_the_proof_is_what_onnxruntime_finds(tmp_path: Path) -> None:
    module = trained("repvgg")
    source = by_torch(module, tmp_path / "train.onnx", "classic")
    report = export(Source(str(source)), tmp_path / "M.onnx", ExportOptions())
    x = probe_images(Preprocess.plain(*SIZE), 2)
    before, after = onnx.load(str(source)), onnx.load(str(tmp_path / "M.onnx"))
    name = before.graph.input[0].name
    (expected,), (got,) = (ort_run(m, {name: x}).values() for m in (before, after))
    overall = report.proof.overall
    assert overall.max_difference == pytest.approx(float(np.abs(got - expected).max()), rel=0.5)
    assert overall.max_value == pytest.approx(float(np.abs(expected).max()), rel=1e-4)
    assert 0 < max(block.relative for block in report.proof.blocks) < 1e-5
    json.dumps(report.to_dict())


def test_past_the_tolerance_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fuse_wrongly(model: onnx.ModelProto, preprocess: Preprocess) -> tuple[Net, RewriteReport]:
        net, report = fuse(model, preprocess)
        weight = next(node for node in net.graph.nodes if node.op == "Conv").inputs[1]
        weight.values = weight.values * np.float32(1.001)
        return net, report

    monkeypatch.setattr("reptrt.pipeline.exporting.fuse", fuse_wrongly)
    source = Source("repvgg", architecture=ARCHITECTURES["repvgg"])
    with pytest.raises(RewriteError, match=r"largest difference is .*at most 1e-04 .*tolerance"):
        export(source, tmp_path / "M.onnx", SMALL)
    assert list(tmp_path.iterdir()) == []
    export(source, tmp_path / "M.onnx", replace(SMALL, tolerance=0.01))


_EXPORT_TWICE = """
import sys
from pathlib import Path
from tests.pipeline.test_export import ARCHITECTURES, SMALL, Source, export
for name, architecture in ARCHITECTURES.items():
    export(Source(name, architecture=architecture), Path(sys.argv[1]) / f"{name}.onnx", SMALL)
"""


@pytest.mark.slow
def test_two_processes_write_the_same_bytes(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    folders = [tmp_path / "a", tmp_path / "b"]
    running = []
    for i, folder in enumerate(folders):
        folder.mkdir()
        command = [sys.executable, "-c", _EXPORT_TWICE, str(folder)]
        environment = {"PYTHONHASHSEED": str(i), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin"}
        running.append(subprocess.Popen(command, cwd=root, env=environment))
    assert [process.wait() for process in running] == [0, 0]
    for name in ARCHITECTURES:
        first, second = ((folder / f"{name}.onnx").read_bytes() for folder in folders)
        assert first == second


# Sources that are code ---------------------------------------------------------------------------

FACTORY = """
from torch import nn

def make():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())

def broken():
    raise KeyError("no such config")

def leaves():
    raise SystemExit(2)

def number():
    return 3

def talks():
    print("building")
    return make()

constant = 5
"""


@pytest.fixture(autouse=True)
def same_path_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Importing a factory makes the modules beside it importable; only for the test."""
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.fixture
def factories(tmp_path: Path) -> Path:
    (tmp_path / "nets_of_a_test.py").write_text(FACTORY)
    return tmp_path / "nets_of_a_test.py"


def exported(name: str, output: Path) -> ExportReport:
    return export(Source(name), output, SMALL)


def test_a_factory_in_a_file_with_a_module_beside_it(tmp_path: Path, factories: Path) -> None:
    main = tmp_path / "main_of_a_test.py"
    main.write_text(
        "from dataclasses import dataclass\n"
        "from nets_of_a_test import make as inner\n"
        "@dataclass\nclass Config:\n    n: int = 3\n"
        "def make():\n    return inner()\n"
    )
    exported(f"{main}:make", tmp_path / "M.onnx")
    assert ops(tmp_path / "M.onnx") == ["Conv", "Relu"]
    assert {t.name for t in onnx.load(str(tmp_path / "M.onnx")).graph.initializer} == {
        "0.weight",
        "0.bias",
    }


def test_a_factory_in_a_file_with_the_name_of_a_module(tmp_path: Path) -> None:
    (tmp_path / "json.py").write_text(FACTORY)
    exported(f"{tmp_path / 'json.py'}:make", tmp_path / "M.onnx")
    assert sys.modules["json"] is json
    assert ops(tmp_path / "M.onnx") == ["Conv", "Relu"]
    assert read_sidecar(tmp_path / "M.onnx") is not None


def test_a_factory_in_a_package_of_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "package_of_a_test"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "nets.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    exported("package_of_a_test.nets:make", tmp_path / "M.onnx")
    assert ops(tmp_path / "M.onnx") == ["Conv", "Relu"]


def test_a_factory_takes_weights_and_is_set_to_eval_mode(tmp_path: Path, factories: Path) -> None:
    torch.manual_seed(1)
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    with torch.no_grad():
        module(torch.randn(8, *SIZE))  # moves the statistics
    source = Source(f"{factories}:make", checkpoint(tmp_path, module))
    export(source, tmp_path / "M.onnx", SMALL)
    assert_is_the_net(tmp_path / "M.onnx", module.eval())


def test_what_a_factory_prints_does_not_go_to_stdout(
    tmp_path: Path, factories: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exported(f"{factories}:talks", tmp_path / "M.onnx")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "building" in captured.err


@pytest.mark.parametrize(
    ("attribute", "message"),
    [
        ("broken", r"broken: the factory raised KeyError: 'no such config'"),
        ("leaves", r"leaves: the factory raised SystemExit: 2"),
        ("number", r"number: the factory returned int, expected torch\.nn\.Module"),
        ("constant", r"has no callable named 'constant'; expected a factory"),
        ("missing", r"has no callable named 'missing'; expected a factory"),
        ("", r"has no callable named ''"),
    ],
    ids=lambda value: value if str(value).isidentifier() else "",
)
def test_factories_that_do_not_work(
    tmp_path: Path, factories: Path, attribute: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        exported(f"{factories}:{attribute}", tmp_path / "M.onnx")
    assert not (tmp_path / "M.onnx").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import nothing_of_that_name", r"cannot be imported \(ModuleNotFoundError: .*nothing_of"),
        ("def make(:", r"cannot be imported \(SyntaxError"),
        ("import sys; sys.exit('usage: x')", r"cannot be imported \(SystemExit: usage: x\)"),
    ],
    ids=["import error", "syntax error", "exits"],
)
def test_files_that_cannot_be_imported(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "broken_of_a_test.py").write_text(text)
    with pytest.raises(ConfigError, match=message):
        exported(f"{tmp_path}/broken_of_a_test.py:make", tmp_path / "M.onnx")


def test_names_that_lead_nowhere(tmp_path: Path, factories: Path) -> None:
    for name, message in {
        f"{tmp_path}/nowhere.py:make": r"nowhere\.py: no such file",
        "no_such_package.nets:make": r"no_such_package\.nets: cannot be imported",
        str(factories): r"expected a zoo name, timm:NAME, FILE\.py:FACTORY",
        "repvg": r"repvg.*repvgg",
        f"{tmp_path}/no.onnx": r"no\.onnx does not exist",
    }.items():
        with pytest.raises(ReptrtError, match=message):
            exported(name, tmp_path / "M.onnx")


def test_options_that_a_source_cannot_take(tmp_path: Path, factories: Path) -> None:
    with pytest.raises(ConfigError, match=r"called without arguments, got num_classes"):
        export(
            Source(f"{factories}:make", architecture=ArchitectureOptions(num_classes=3)),
            tmp_path / "M.onnx",
            SMALL,
        )
    with pytest.raises(ConfigError, match=r"an ONNX file holds its .*got weights; leave it out"):
        Source("m.onnx", weights=Path("w.pt"))
    with pytest.raises(ConfigError, match=r"an ONNX file holds its .*got blocks; leave it out"):
        Source("m.onnx", architecture=ArchitectureOptions(blocks=(1,)))


class TwoInputs(nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x + y


@pytest.mark.slow
def test_a_net_that_cannot_be_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reptrt.pipeline.exporting.module_from_source", lambda _: TwoInputs())
    with pytest.raises(ConfigError, match=r"TwoInputs: cannot be exported with input \(2, 3, 16"):
        exported("anything", tmp_path / "M.onnx")


@pytest.mark.parametrize(
    ("dtype", "named"),
    [(torch.float16, "Half"), (torch.bfloat16, "BFloat16"), (torch.float64, "double")],
    ids=str,
)
def test_a_net_that_casts_inside_forward_is_refused_by_the_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, named: str
) -> None:
    class Casts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x.to(dtype))

    monkeypatch.setattr("reptrt.pipeline.exporting.module_from_source", lambda _: Casts())
    with pytest.raises(ConfigError, match=f"(?i)forward casts to {named}: leave the casts and"):
        exported("anything", tmp_path / "M.onnx")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_in_a_forward_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    class Autocast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", dtype=dtype):
                return self.conv(x).float()

    monkeypatch.setattr("reptrt.pipeline.exporting.module_from_source", lambda _: Autocast())
    named = str(dtype).removeprefix("torch.")
    message = rf"1 layers in {named}, the first is /conv/Conv.*leave the casts and autocast out"
    with pytest.raises(ConfigError, match=message):
        exported("anything", tmp_path / "M.onnx")


@pytest.mark.slow
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_of_a_factory_that_are_no_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: float
) -> None:
    module = trained("repvgg")
    with torch.no_grad():
        module.get_parameter("stage1.0.rbr_dense.conv.weight")[0, 0, 0, 0] = bad
        module.get_parameter("linear.bias")[1] = bad
    monkeypatch.setattr("reptrt.pipeline.exporting.module_from_source", lambda _: module)
    message = r"2 constants hold NaN or Inf \(stage1\.0\.rbr_dense\.conv\.weight, linear\.bias\)"
    with pytest.raises(ArtifactError, match=message):
        exported("anything", tmp_path / "M.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_with_nan_is_refused(tmp_path: Path) -> None:
    module = trained("repvgg")
    with torch.no_grad():
        module.get_parameter("linear.bias")[1] = float("nan")
    source = Source("repvgg", checkpoint(tmp_path, module), ARCHITECTURES["repvgg"])
    with pytest.raises(CheckpointError, match=r"1 of \d+ tensors hold NaN or Inf.*linear\.bias"):
        export(source, tmp_path / "M.onnx", SMALL)


# Files that somebody else exported ---------------------------------------------------------------


def save(model: onnx.ModelProto, path: Path) -> Path:
    onnx.save(model, str(path))
    return path


def change_input(**dims: int) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        shape = model.graph.input[0].type.tensor_type.shape
        for index, value in dims.items():
            axis = shape.dim[int(index[1:])]
            axis.Clear()
            if value:
                axis.dim_value = value

    return change


def nan_weight(model: onnx.ModelProto) -> None:
    values = numpy_helper.to_array(model.graph.initializer[0]).copy()
    values.flat[3] = np.nan
    model.graph.initializer[0].CopyFrom(
        numpy_helper.from_array(values, model.graph.initializer[0].name)
    )


def second_input(model: onnx.ModelProto) -> None:
    model.graph.input.append(helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1]))
    model.graph.node[0].input[0] = "brighter"
    model.graph.node.insert(0, helper.make_node("Add", ["x", "y"], ["brighter"]))


def train_mode(model: onnx.ModelProto) -> None:
    inputs, outputs = ["c1"] + ["c1.bias"] * 4, ["normed", "mean", "var"]
    norm = helper.make_node("BatchNormalization", inputs, outputs, "bn", training_mode=1)
    model.graph.node[1].input[0] = "normed"
    model.graph.node.insert(1, norm)


def quantize_input(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.float32(1), "s"))
    model.graph.node.insert(0, helper.make_node("QuantizeLinear", ["x", "s"], ["xq"], "q0"))


REFUSED: dict[str, tuple[Callable[[onnx.ModelProto], None], str]] = {
    "nan": (nan_weight, r"1 constants hold NaN or Inf \(c1\.weight\)"),
    "two inputs": (second_input, r"has 2 inputs and reads x, y; expected one image batch"),
    "train mode": (train_mode, r"bn .*training mode.*net\.eval"),
    "quantized": (quantize_input, r"already quantized \(QuantizeLinear q0, 1 in all\)"),
    "free height": (change_input(_2=0), r"H of input x is not fixed; give input_size CxHxW"),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_files_that_are_refused(tmp_path: Path, name: str) -> None:
    change, message = REFUSED[name]
    model = plain_chain()
    change(model)
    with pytest.raises(ReptrtError, match=message):
        export(Source(str(save(model, tmp_path / "m.onnx"))), tmp_path / "o.onnx", ExportOptions())
    assert not (tmp_path / "o.onnx").exists()


def test_infinity_where_it_means_something_is_kept(tmp_path: Path) -> None:
    b = Builder(size=16)
    y = b.node("Max", [b.conv("x", 4, "c"), b.constant("least", np.float32(-np.inf))], "max")
    b.channels[y] = 4
    source = save(b.model(b.head(y)), tmp_path / "m.onnx")
    exported_report = export(Source(str(source)), tmp_path / "o.onnx", ExportOptions())
    assert exported_report.proof.overall.relative < 1e-5


def test_input_size_for_a_file(tmp_path: Path) -> None:
    free = plain_chain(size=16)
    change_input(_2=0, _3=0)(free)
    source = save(free, tmp_path / "free.onnx")
    export(Source(str(source)), tmp_path / "o.onnx", ExportOptions(input_size=SIZE))
    assert read_preprocess(net_from_model(onnx.load(str(tmp_path / "o.onnx")))).height == 16
    fixed = save(plain_chain(size=16), tmp_path / "fixed.onnx")
    with pytest.raises(ConfigError, match=r"input x has H = 16, input_size says 32; leave it"):
        export(Source(str(fixed)), tmp_path / "o2.onnx", ExportOptions(input_size=(3, 32, 32)))


@pytest.mark.parametrize("opset", [11, 13, 17, 20])
def test_the_opset_is_raised_where_it_is_lower(tmp_path: Path, opset: int) -> None:
    b = Builder(size=16)
    y = b.relu(b.conv("x", 4, "c"))
    b.head(y)
    model = b.model("head", opset=opset)
    source = save(model, tmp_path / "m.onnx")
    export(Source(str(source)), tmp_path / "o.onnx", ExportOptions())
    written = onnx.load(str(tmp_path / "o.onnx"))
    assert written.opset_import[0].version == max(opset, 19)
    x = images()
    np.testing.assert_allclose(
        ort_run(written, {"x": x})["head"], ort_run(model, {"x": x})["head"], rtol=1e-5, atol=1e-6
    )


def test_a_fixed_batch_stays(tmp_path: Path) -> None:
    b = Builder(size=16)
    model = b.model(b.head(b.relu(b.conv("x", 4, "c"))), batch=1)
    export(Source(str(save(model, tmp_path / "m.onnx"))), tmp_path / "o.onnx", ExportOptions())
    written = onnx.load(str(tmp_path / "o.onnx"))
    assert written.graph.input[0].type.tensor_type.shape.dim[0].dim_value == 1


def test_a_source_is_never_overwritten(tmp_path: Path) -> None:
    source = save(plain_chain(), tmp_path / "m.onnx")
    before = source.read_bytes()
    (tmp_path / "link.onnx").symlink_to(source)
    for target in (source, tmp_path / "link.onnx"):
        with pytest.raises(ArtifactError, match=r"is the file it would be made from; give another"):
            export(Source(str(source)), target, ExportOptions())
    assert source.read_bytes() == before


def test_a_source_that_was_changed_after_it_was_written(tmp_path: Path) -> None:
    output = tmp_path / "M.onnx"
    export(Source("repvgg", architecture=ARCHITECTURES["repvgg"]), output, SMALL)
    output.write_bytes(output.read_bytes() + b"\0")
    with pytest.raises(ArtifactError, match=r"M\.onnx: sha256 is"):
        export(Source(str(output)), tmp_path / "o.onnx", ExportOptions())


def test_what_is_left_is_named_in_output_json_and_sidecar(tmp_path: Path) -> None:
    """Two batch norms behind activations, and one before a convolution that pads."""
    b = Builder(size=16)
    y = "x"
    for name in ("n1", "n2", "n3"):
        y = b.relu(b.conv(y, 4, f"{name}.conv")) if name != "n3" else y
        b.constant(f"{name}.var", np.full(4, 0.5, np.float32))
        statistics = [b.parameter(f"{name}.{kind}", 4) for kind in ("gamma", "beta", "mean")]
        y = b.node("BatchNormalization", [y, *statistics, f"{name}.var"], name)
        y = b.node("Sigmoid", [y], f"{name}.sigmoid") if name != "n3" else y
    source = save(b.model(b.head(b.conv(y, 4, "last"))), tmp_path / "m.onnx")
    report = export(Source(str(source)), tmp_path / "o.onnx", ExportOptions())
    reasons = {skip.node: skip.reason for skip in report.skipped}
    border = "a convolution pads with zeros where the bias before it would have to continue"
    assert reasons == {"n1": "no layer next to it", "n2": "no layer next to it", "n3": border}
    entries = [{"node": node, "reason": reason} for node, reason in reasons.items()]
    assert json.loads(json.dumps(report.to_dict()))["skipped"] == entries
    sidecar = read_sidecar(tmp_path / "o.onnx")
    assert sidecar is not None
    assert sidecar.details["skipped"] == entries
    lines = [line.split("left alone: ") for line in report.to_lines() if "left alone" in line]
    assert [(node.strip(), reason) for node, reason in lines] == [
        ("n1 and 1 more", "no layer next to it"),
        ("n3", border),
    ]


def test_a_residual_net_is_left_as_it_is(tmp_path: Path) -> None:
    source = save(basic_block(downsample=True), tmp_path / "m.onnx")
    report = export(Source(str(source)), tmp_path / "o.onnx", ExportOptions())
    assert report.proof.blocks == ()
    assert sorted(ops(tmp_path / "o.onnx")) == sorted(ops(source))
