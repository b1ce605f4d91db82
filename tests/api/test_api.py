"""From a module in memory to numbers, without a file; and what is no input, in one line."""

import copy
import json
import pickle
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import reptrt
from reptrt.core.artifacts import read_sidecar, sha256_of
from reptrt.core.errors import ArtifactError, ConfigError, DataError, ReptrtError
from reptrt.pipeline import CalibrateOptions, calibrate, export
from reptrt.pipeline.options import ExportOptions
from reptrt.sources.source import Source

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (96, 3, 16, 16), dtype=np.uint8)
LABELS = RNG.integers(0, 5, 96)
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
FLOATS = (PIXELS / np.float32(255) - np.float32(MEAN)[:, None, None]) / np.float32(STD)[
    :, None, None
]


class Block(nn.Module):
    """A RepVGG block: 3 x 3, 1 x 1 and identity, each with a batch norm."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.dense = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.dense_bn = nn.BatchNorm2d(outputs)
        self.point = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
        self.point_bn = nn.BatchNorm2d(outputs)
        self.same_bn = nn.BatchNorm2d(inputs) if inputs == outputs and stride == 1 else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.dense_bn(self.dense(x)) + self.point_bn(self.point(x))
        return torch.relu(y if self.same_bn is None else y + self.same_bn(x))


def rep_net() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        *(Block(3, 16), Block(16, 16), Block(16, 24, 2)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 5)),
    )
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return net


@pytest.fixture(scope="module")
def module() -> nn.Module:
    return rep_net()


@pytest.fixture(scope="module")
def net(module: nn.Module) -> Any:
    return reptrt.export(module, input_size=(3, 16, 16), mean=MEAN, std=STD)


@pytest.fixture(scope="module")
def int8(net: Any) -> Any:
    return reptrt.calibrate(net, PIXELS)


# A module in memory ------------------------------------------------------------------------------


def test_a_module_is_exported_and_left_as_it_was(module: nn.Module) -> None:
    module.train()
    before = copy.deepcopy(module.state_dict())
    net = reptrt.export(module, input_size=(3, 16, 16), mean=MEAN, std=STD)
    assert module.training
    assert all(module_.training for module_ in module.modules())
    assert all(p.requires_grad for p in module.parameters())
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name])
    expected = copy.deepcopy(module).eval()(torch.from_numpy(FLOATS)).detach().numpy()
    assert np.allclose(net(PIXELS), expected, atol=1e-5)
    assert np.allclose(net(FLOATS), expected, atol=1e-5)
    assert len(net.report.proof.blocks) == 3


def test_wrappers_and_half_precision_are_undone(module: nn.Module, net: Any) -> None:
    for wrapped in (nn.DataParallel(module), torch.compile(module, backend="eager")):
        again = reptrt.export(wrapped, input_size=(3, 16, 16), mean=MEAN, std=STD)  # type: ignore[arg-type]
        assert again.sha256 == net.sha256
    half = reptrt.export(rep_net().half(), input_size=(3, 16, 16))
    assert half(FLOATS).dtype == np.float32


def test_a_module_has_a_file_s_bytes(module: nn.Module, net: Any, tmp_path: Path) -> None:
    """What the path form writes of the same module, through a factory."""
    torch.save(module.state_dict(), tmp_path / "w.pt")
    (tmp_path / "factory.py").write_text(
        "from tests.api.test_api import rep_net\n\ndef make():\n    return rep_net()\n"
    )
    options = ExportOptions(input_size=(3, 16, 16), mean=MEAN, std=STD)
    source = Source(f"{tmp_path / 'factory.py'}:make", tmp_path / "w.pt")
    assert export(source, tmp_path / "a.onnx", options).sha256 == net.sha256


class Lazy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.LazyConv2d(4, 3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Lazy, "Lazy: lazy layers have no weights yet"),
        (lambda: nn.Conv2d(3, 4, 3, device="meta"), "Conv2d: is on the meta device"),
        (
            lambda: nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False)),
            "Sequential: 0 normalizes by the statistics of each batch, in eval mode too",
        ),
    ],
)
def test_modules_that_cannot_be_deployed(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        reptrt.export(make(), input_size=(3, 16, 16))


# Values and files --------------------------------------------------------------------------------


def test_a_value_saves_what_the_path_form_writes(net: Any, int8: Any, tmp_path: Path) -> None:
    net.save(tmp_path / "a.onnx")
    np.savez(tmp_path / "images.npz", x=PIXELS)
    options = CalibrateOptions(images=96)
    report = calibrate(tmp_path / "a.onnx", tmp_path / "images.npz", tmp_path / "b.onnx", options)
    path = int8.save(tmp_path / "c.onnx")
    assert path == tmp_path / "c.onnx"
    assert report.sha256 == int8.sha256 == int8.report.sha256 == sha256_of(path)
    written, saved = read_sidecar(tmp_path / "b.onnx"), read_sidecar(path)
    assert written is not None
    assert saved is not None
    assert (written.options, written.details) == (saved.options, saved.details)
    assert list(written.parents.values()) == list(saved.parents.values())
    assert saved.parents == {net.name: net.sha256, "data": saved.parents["data"]}


def test_it_is_not_saved_into_a_missing_folder(net: Any, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"folder .*missing does not exist"):
        net.save(tmp_path / "missing" / "a.onnx")


def test_files_and_values_mix(net: Any, int8: Any, tmp_path: Path) -> None:
    file = net.save(tmp_path / "a.onnx")
    saved = int8.save(tmp_path / "b.onnx")
    report = reptrt.evaluate([file, int8, str(saved)], (PIXELS, LABELS))
    first, second, third = report.results
    assert (first.file, second.file, third.file) == (str(file), int8.name, str(saved))
    assert (second.sqnr_db, second.top1) == (third.sqnr_db, third.top1)
    assert first.identical
    timed = reptrt.bench([int8, saved], baseline=net, min_seconds=0.01, warmup_seconds=0.01)
    assert [row.file for row in timed.results] == [net.name, int8.name, str(saved)]
    assert timed.baseline == net.name
    assert reptrt.lint(int8).findings == reptrt.lint(saved).findings
    assert reptrt.inspect(int8).layers == reptrt.inspect(saved).layers


def test_a_file_is_loaded_as_a_value(net: Any, int8: Any, tmp_path: Path) -> None:
    path = int8.save(tmp_path / "a.int8.onnx")
    loaded = reptrt.load(path)
    assert repr(loaded).startswith("<Loaded a.int8.onnx: 3x16x16, 4 layers, ")
    assert np.array_equal(loaded(PIXELS), int8(PIXELS))
    again = pickle.loads(pickle.dumps(loaded))  # after a call: the session is left behind
    assert np.array_equal(again(PIXELS[:2]), int8(PIXELS[:2]))
    copied = loaded.save(tmp_path / "b.onnx")
    first, second = read_sidecar(path), read_sidecar(copied)
    assert first is not None
    assert first == second
    (tmp_path / "b.onnx.json").unlink()
    assert reptrt.load(copied).origin.artifact == "int8-onnx"
    float_file = net.save(tmp_path / "net.onnx")
    (tmp_path / "net.onnx.json").unlink()
    plain = reptrt.load(float_file)
    assert plain.origin.artifact == "float-onnx"
    again = reptrt.calibrate(plain, PIXELS, options=replace(reptrt.PLAIN_INT8, images=96))
    assert again.report.splits == ()
    for value in (loaded, net, int8):
        assert repr(value).replace("<", "&lt;").replace(">", "&gt;") in value._repr_html_()
    assert "<table>" in int8._repr_html_()


def test_a_node_without_inputs_is_no_branch() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            noisy: torch.Tensor = self.conv(x) + torch.rand(1)
            return noisy

    assert "RandomUniform" in [
        node.op_type for node in reptrt.export(Noisy(), input_size=(3, 16, 16)).proto.graph.node
    ]


def test_labels_may_be_a_list(net: Any) -> None:
    as_list, as_array = (reptrt.evaluate(net, (PIXELS, y)) for y in (LABELS.tolist(), LABELS))
    assert as_list.results[0].top1 == as_array.results[0].top1


def test_models_of_one_name_are_told_apart(net: Any) -> None:
    other = reptrt.export(rep_net(), input_size=(3, 16, 16), mean=MEAN, std=STD, name=net.name)
    report = reptrt.evaluate([net, other], PIXELS)
    assert [result.file for result in report.results] == [net.name, f"{net.name}_1"]


# Running -----------------------------------------------------------------------------------------


def test_a_tensor_gives_a_tensor(int8: Any) -> None:
    output = int8(torch.from_numpy(PIXELS))
    assert isinstance(output, torch.Tensor)
    assert np.array_equal(output.numpy(), int8(PIXELS))
    assert np.array_equal(int8(PIXELS[:1]), int8(PIXELS.transpose(0, 2, 3, 1)[:1]))


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.conv(x)
        return y, y.mean((2, 3))


def test_several_outputs_are_a_tuple() -> None:
    maps, means = reptrt.export(TwoHeads(), input_size=(3, 16, 16))(PIXELS[:3])
    assert (maps.shape, means.shape) == ((3, 4, 16, 16), (3, 4))


# Options and images ------------------------------------------------------------------------------


def test_keywords_are_options(net: Any) -> None:
    changes: dict[str, Any] = {"split": "none", "percentile": np.float64(99.5), "images": 64}
    made = reptrt.calibrate(net, PIXELS, threshold="percentile", **changes)
    assert made.origin.options["threshold"] == {"rule": "percentile", "percentile": 99.5}
    assert made.origin.options["split"] == "none"
    assert made.report.images == 64
    again = reptrt.calibrate(net, PIXELS, options=CalibrateOptions(images=64), max_overhead=0)
    assert (again.origin.options["images"], again.origin.options["max_overhead"]) == (64, 0)


def test_a_loader_gives_what_its_array_gives(net: Any, int8: Any) -> None:
    tensors = TensorDataset(torch.from_numpy(PIXELS), torch.from_numpy(LABELS))
    assert reptrt.calibrate(net, DataLoader(tensors, batch_size=17)).sha256 == int8.sha256
    assert reptrt.calibrate(net, (PIXELS, LABELS)).sha256 == int8.sha256
    assert reptrt.calibrate(net, torch.from_numpy(FLOATS)).report.images == 96


def test_only_as_many_images_are_read_as_are_used(net: Any) -> None:
    read = []

    def batches() -> Any:
        for start in range(0, 96, 16):
            read.append(start)
            yield PIXELS[start : start + 16]

    assert reptrt.calibrate(net, batches(), images=32).report.images == 32
    assert read == [0, 16]


def test_task_any_compares_no_classes(net: Any, int8: Any) -> None:
    result = reptrt.evaluate([net, int8], (PIXELS, LABELS), task="any").results[1]
    assert (result.top1, result.top5, result.agreement) == (None, None, None)
    assert result.sqnr_db is not None


def test_diagnose_takes_the_calibrated_net(net: Any, int8: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("tempfile.mkdtemp", None)  # nothing is written
    found = reptrt.diagnose(net, PIXELS, calibrated=int8, layer_images=32)
    assert (found.images, found.layer_images) == (96, 32)
    assert found.corners[3].sqnr_db == pytest.approx(
        reptrt.evaluate([net, int8], PIXELS).results[1].sqnr_db, abs=0.5
    )


def test_the_ladder_of_a_module(module: nn.Module, monkeypatch: Any) -> None:
    monkeypatch.setattr("tempfile.mkdtemp", None)  # nothing is written
    climbed = reptrt.ladder(
        module, (PIXELS, LABELS), PIXELS, input_size=(3, 16, 16), mean=MEAN, std=STD, split="none"
    )
    assert climbed.rungs[0].name == "train-form"
    assert climbed.rungs[0].top1 is not None
    assert [rung.runs_in for rung in climbed.rungs][-2:] == ["onnxruntime", "tensorrt"]


def test_results_print_and_convert(net: Any, int8: Any) -> None:
    for result in (
        net.report,
        int8.report,
        reptrt.evaluate([net, int8], PIXELS),
        reptrt.bench([net, int8], min_seconds=0.01, warmup_seconds=0.01),
        reptrt.lint(int8),
        reptrt.inspect(int8),
    ):
        assert len(str(result).splitlines()) > 2
        assert "<table>" in result._repr_html_()
        json.dumps(result.to_dict())
    assert "Sequential int8 fast" in repr(int8)
    assert len(repr(int8)) < 100


def test_the_default_number_of_images_is_all_of_fewer(net: Any, int8: Any, tmp_path: Path) -> None:
    np.savez(tmp_path / "images.npz", x=PIXELS)
    np.save(tmp_path / "images.npy", PIXELS)
    for name in ("images.npz", "images.npy"):
        assert reptrt.calibrate(net, tmp_path / name).sha256 == int8.sha256
    with pytest.raises(DataError, match=r"got 96 images, expected 97; .* or lower images"):
        reptrt.calibrate(net, tmp_path / "images.npz", images=97)


def test_arrays_and_tensors_are_tuples(module: nn.Module, net: Any) -> None:
    again = reptrt.export(
        module,
        input_size=torch.Size((3, 16, 16)),
        mean=np.array(MEAN),
        std=torch.tensor(STD, dtype=torch.float64),
    )
    assert again.sha256 == net.sha256


def test_what_a_call_reads_is_not_overwritten(net: Any, tmp_path: Path) -> None:
    np.save(tmp_path / "images.npy", PIXELS)
    data = (tmp_path / "images.npy").rename(tmp_path / "images.npy.onnx")
    model = net.save(tmp_path / "a.onnx")
    for output in (data, model):
        with pytest.raises(ArtifactError, match="is the file it would be made from"):
            calibrate(model, data, output, CalibrateOptions(images=8))
    with pytest.raises(ArtifactError, match=r"expected a name that ends in \.onnx"):
        calibrate(model, data, tmp_path / "b.npz", CalibrateOptions(images=8))
    with pytest.raises(ArtifactError, match=r"expected a name that ends in \.onnx"):
        export(Source(str(model)), tmp_path / "b.npz", ExportOptions())
    with pytest.raises(ArtifactError, match=r"expected a name that ends in \.engine or \.plan"):
        reptrt.build_engine(net, model)
    with pytest.raises(ArtifactError, match="is the file it would be made from"):
        reptrt.build_engine(model, tmp_path / "a.engine", timing_cache=model)


def scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        module: nn.Module = torch.jit.script(nn.Sequential(nn.Conv2d(3, 4, 3)).eval())  # type: ignore[no-untyped-call]
    return module


# What is no input --------------------------------------------------------------------------------

WRONG: dict[str, Callable[[Any, nn.Module], Any]] = {
    "net: got the torch module Sequential, expected": lambda n, m: reptrt.calibrate(m, PIXELS),
    "nets[1]: got the torch module Sequential": lambda n, m: reptrt.bench([n, m]),
    "net: got int, expected the path of an ONNX file": lambda n, m: reptrt.lint(3),  # type: ignore[arg-type]
    "nets: got dict, expected a network or a list": lambda n, m: reptrt.evaluate({"a": n}, PIXELS),
    "nets: got no networks": lambda n, m: reptrt.bench([]),
    "reference: got the torch module": lambda n, m: reptrt.evaluate(n, PIXELS, reference=m),
    "data: got a dict, expected an array": lambda n, m: reptrt.calibrate(n, {"x": PIXELS}),
    "data: batch 0: labels are a str, expected class indices": lambda n, m: reptrt.evaluate(
        n, [(PIXELS, "labels")]
    ),
    "data: images have shape (96, 3, 16, 8), expected (N, 3, 16, 16)": lambda n, m: (
        reptrt.calibrate(n, PIXELS[..., :8])
    ),
    "data: got 96 images, expected 97": lambda n, m: reptrt.calibrate(n, PIXELS, images=97),
    "source: got Sequential, which is exported already": lambda n, m: reptrt.export(n),
    "source: got int, expected a torch module": lambda n, m: reptrt.export(3),  # type: ignore[arg-type]
    "source: got a module in memory, expected": lambda n, m: reptrt.run(m, "d", "o"),  # type: ignore[arg-type]
    "input_size: got None, expected (C, H, W)": lambda n, m: reptrt.export(m),
    "weights: Sequential has its own": lambda n, m: reptrt.export(m, weights="w.pt"),
    "widths: Sequential has its own": lambda n, m: reptrt.export(m, widths=(1, 2)),
    "max_overhed: there is no such parameter; did you mean max_overhead?": lambda n, m: (
        reptrt.calibrate(n, PIXELS, max_overhed=0)
    ),
    "treshold: there is no such parameter; did you mean threshold?": lambda n, m: reptrt.run(
        "repvgg", "d", "o", treshold="mse"
    ),
    "max_overhead: got 'a', expected": lambda n, m: reptrt.calibrate(n, PIXELS, max_overhead="a"),
    "max_overhead: got -1.0, expected 0 or more": lambda n, m: reptrt.calibrate(
        n, PIXELS, max_overhead=-1
    ),
    "recipe: got 'slow', expected one of fast, balanced": lambda n, m: reptrt.calibrate(
        n, PIXELS, recipe="slow"
    ),
    "task: got 'detection', expected one of classify, detect, segment, any": lambda n, m: (
        reptrt.evaluate(n, PIXELS, task="detection")
    ),
    "shapes: got 'a:b', expected MIN:OPT:MAX": lambda n, m: reptrt.build_engine(
        n, "a.engine", shapes="a:b"
    ),
    "output: got int, expected a path": lambda n, m: reptrt.build_engine(n, 3),  # type: ignore[arg-type]
    "calibrated: got str, expected what reptrt.calibrate": lambda n, m: reptrt.diagnose(
        n,
        PIXELS,
        calibrated="a.onnx",  # type: ignore[arg-type]
    ),
    "calib_data: got None, expected images": lambda n, m: reptrt.ladder(m, PIXELS),
    # Types and bounds of options
    "options: got dict, expected CalibrateOptions": lambda n, m: reptrt.calibrate(
        n,
        PIXELS,
        options={},  # type: ignore[arg-type]
    ),
    "options: got ExportOptions, expected BuildOptions": lambda n, m: reptrt.build_engine(
        n,
        "a.engine",
        options=ExportOptions(),  # type: ignore[arg-type]
    ),
    "options: got int, expected EvaluateOptions": lambda n, m: reptrt.evaluate(
        n,
        PIXELS,
        options=3,  # type: ignore[arg-type]
    ),
    "options: got int, expected RunOptions": lambda n, m: reptrt.ladder(m, options=1),  # type: ignore[arg-type]
    "opset: got 99, expected 13 to 20": lambda n, m: reptrt.export(m, opset=99),
    "tolerance: got -1.0, expected 0 or more": lambda n, m: reptrt.export(m, tolerance=-1),
    "percentile: got 30.0, expected 50 to 100": lambda n, m: reptrt.calibrate(
        n, PIXELS, percentile=30
    ),
    "seed: got -1, expected 0 or more": lambda n, m: reptrt.evaluate(n, PIXELS, seed=-1),
    "layer_images: got 'x', expected": lambda n, m: reptrt.diagnose(
        n,
        PIXELS,
        layer_images="x",  # type: ignore[arg-type]
    ),
    "name: got 3, expected a value of type str": lambda n, m: reptrt.calibrate(n, PIXELS, name=3),  # type: ignore[arg-type]
    "input_size: got (3, -1, 16), expected positive": lambda n, m: reptrt.export(
        m, input_size=(3, -1, 16)
    ),
    "input_size: got 16, expected a tuple of 3 integers": lambda n, m: reptrt.export(
        m, input_size=16
    ),
    "input_size: got '3x16x16', expected a tuple of": lambda n, m: reptrt.export(
        m, input_size="3x16x16"
    ),
    "mean: got 0.5, expected a tuple of numbers": lambda n, m: reptrt.export(m, mean=0.5),
    "targets: got 'sm89', expected a tuple of texts": lambda n, m: reptrt.build_engine(
        n, "a.engine", targets="sm89"
    ),
    "learn: got dict, expected LearnOptions": lambda n, m: reptrt.calibrate(
        n, PIXELS, learn={"iterations": 3}
    ),
    "learn: got ExportOptions, expected": lambda n, m: reptrt.calibrate(
        n, PIXELS, learn=ExportOptions()
    ),
    "iterations: nothing is learned with recipe='fast'": lambda n, m: reptrt.calibrate(
        n, PIXELS, iterations=5
    ),
    "batches: there is no such parameter": lambda n, m: reptrt.ladder(
        m, PIXELS, PIXELS, batches=(1,)
    ),
    "device: got cuda, ": lambda n, m: reptrt.bench(n, device="cuda"),
    # Modules, images and labels
    "RecursiveScriptModule: is a TorchScript module": lambda n, m: reptrt.export(
        scripted(), input_size=(3, 16, 16)
    ),
    "Sequential: is empty, expected a network": lambda n, m: reptrt.export(
        nn.Sequential(), input_size=(3, 16, 16)
    ),
    "weights.pt: a checkpoint needs a network; give": lambda n, m: reptrt.export("weights.pt"),
    "data: got a tensor of layout torch.sparse_coo": lambda n, m: reptrt.calibrate(
        n, torch.from_numpy(FLOATS).to_sparse()
    ),
    "data: labels are a NoneType, expected class": lambda n, m: reptrt.evaluate(n, (PIXELS, None)),
    "data: labels is float64": lambda n, m: reptrt.evaluate(n, (PIXELS, LABELS + 0.5)),
    "data: batch 0: shape (3, 16, 16), expected (N, C, H, W); stack": lambda n, m: reptrt.calibrate(
        n, list(PIXELS)
    ),
    "Sequential int8 fast: is already quantized": lambda n, m: reptrt.calibrate(
        reptrt.calibrate(n, PIXELS), PIXELS
    ),
    "nowhere: not the folder of a run": lambda n, m: reptrt.report("nowhere"),
    "tests: is a folder, expected an ONNX file": lambda n, m: reptrt.lint("tests"),
    "path: got int, expected a path": lambda n, m: reptrt.load(3),  # type: ignore[arg-type]
    "a.plan: is a TensorRT engine, expected an ONNX": lambda n, m: reptrt.load("a.plan"),
    # Files that would be overwritten, and engines in place of networks
    "path: got NoneType, expected a path": lambda n, m: n.save(None),
    "images.npz: expected a name that ends in .onnx for a network": lambda n, m: n.save(
        "images.npz"
    ),
    "a.onnx: expected a name that ends in .engine or .plan for an engine": lambda n, m: (
        reptrt.build_engine(n, "a.onnx")
    ),
    "a.plan: is a TensorRT engine, expected an ONNX file": lambda n, m: reptrt.lint("a.plan"),
    "a.engine: is a TensorRT engine, expected an ONNX file": lambda n, m: reptrt.build_engine(
        "a.engine", "b.engine"
    ),
    "nope.onnx does not exist; check the path": lambda n, m: reptrt.lint("nope.onnx"),
}


@pytest.mark.parametrize("message", WRONG)
def test_what_cannot_be_used_is_named_in_one_line(
    message: str, net: Any, module: nn.Module
) -> None:
    with pytest.raises(ReptrtError) as caught:
        WRONG[message](net, module)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, ConfigError | DataError | ArtifactError)


def test_a_loaded_network_tells_its_preprocessing(net: Any, tmp_path: Path) -> None:
    preprocess = reptrt.load(net.save(tmp_path / "net.onnx")).preprocess
    assert (preprocess.mean, preprocess.std) == (MEAN, STD)
    assert preprocess == net.preprocess
