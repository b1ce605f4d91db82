"""Damaged inputs: one line and exit 1, nothing left behind, whatever the command.

Random damage is done in `tests.support.fuzzing`, in a process of its own. What it has
found so far has a test of its own here.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper

from reptrt.core.artifacts import read_sidecar, sidecar_path, write_artifact
from reptrt.core.errors import ArtifactError, DataError, EngineError, ReptrtError
from reptrt.data.dataset import open_dataset
from reptrt.execute.runner import OrtRunner
from reptrt.graph.affines import read_affines
from reptrt.graph.net import Net, net_from_model, read_model
from reptrt.graph.preprocess import Preprocess, read_preprocess
from reptrt.graph.provenance import read_provenance
from reptrt.graph.recentred import read_recentred
from reptrt.graph.splits import read_splits
from reptrt.pipeline import CalibrateOptions, ExportOptions, Source, calibrate, export
from reptrt.trt.input import read_buildable
from tests.support import fuzzing
from tests.support.onnx_nets import Builder, plain_chain
from tests.support.qdq_nets import images, quantized
from tests.support.small_run import make_run, refused, reptrt, write_data, write_factory

ROOT = Path(__file__).resolve().parents[1]
CASES = {  # of each kind
    "checkpoint": 30,
    "arrays": 30,
    "images": 25,
    "onnx_bytes": 60,
    "onnx_graph": 80,
    "other_kind": 40,
    "engine": 30,
    "sidecar": 30,
    "record": 25,
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one of everything, made by the first process that needs it."""
    return tmp_path_factory.mktemp("fuzz")


def fuzz(folder: Path, *arguments: object) -> list[str]:
    """Run cases in another process; return what went wrong, a crash included."""
    lines, log = folder / "lines", folder / "log"
    command = [sys.executable, "-m", "tests.support.fuzzing", str(folder), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
    with lines.open("wb") as third, log.open("wb") as rest:
        script = 'exec 3>&1 1>&2; exec "$@"'
        done = subprocess.run(
            ["/bin/sh", "-c", script, "sh", *command],
            cwd=ROOT,
            env=environment,
            stdout=third,
            stderr=rest,
        )
    said = [json.loads(line) for line in lines.read_text().splitlines()]
    problems = [f"{one['case']}: {problem}" for one in said for problem in one.get("problems", [])]
    if done.returncode or not said or "finished" not in said[-1]:
        last = said[-1] if said else "nothing was run"
        problems.append(f"exit status {done.returncode} after {last}: {log.read_text()[-2000:]}")
    return problems


@pytest.mark.slow
def test_damaged_inputs_are_one_line_and_leave_nothing(inputs: Path) -> None:
    kinds = [f"{kind}={number}" for kind, number in CASES.items()]
    assert fuzz(inputs, 0, *kinds) == []


def test_every_kind_is_there() -> None:
    assert CASES.keys() == fuzzing.KINDS.keys()


# What was found so far ---------------------------------------------------------------------------


def save(model: onnx.ModelProto, path: Path) -> Path:
    path.write_bytes(model.SerializeToString())
    return path


READERS: dict[str, Callable[[Net], object]] = {
    "preprocess": read_preprocess,
    "provenance": read_provenance,
    "splits": read_splits,
    "affines": read_affines,
    "recentred": read_recentred,
}


@pytest.mark.parametrize("text", ["", "no JSON", "5", '["a"]', '{"a": 1}', '{"a": [{"b": 2}]}'])
@pytest.mark.parametrize("key", list(READERS))
def test_metadata_that_reptrt_did_not_write(tmp_path: Path, key: str, text: str) -> None:
    model = plain_chain()
    helper.set_model_props(model, {f"reptrt.{key}": text})
    with pytest.raises(ArtifactError, match=rf"metadata reptrt\.{key}: not what reptrt wrote \("):
        READERS[key](net_from_model(read_model(save(model, tmp_path / "m.onnx"))))


@pytest.mark.parametrize("size", [0, -3, "8", None])
def test_a_stored_size_that_is_none(size: object) -> None:
    model = plain_chain()
    stored = {"channels": 3, "height": size, "width": 8, "mean": [0] * 3, "std": [1] * 3}
    helper.set_model_props(model, {"reptrt.preprocess": json.dumps(stored)})
    with pytest.raises(ArtifactError, match=r"height: got .*, expected"):
        read_preprocess(net_from_model(model))


def fewer_values(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].dims[0] -= 1


def unknown_type(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.elem_type = 99


def constant_of_unknown_type(model: onnx.ModelProto) -> None:
    constant = onnx.TensorProto(name="unused", dims=[1], data_type=65, raw_data=b"1234")
    node = helper.make_node("Constant", [], ["unused"], value=constant)
    model.graph.node.insert(0, node)


@pytest.mark.parametrize("change", [fewer_values, unknown_type, constant_of_unknown_type])
def test_what_the_checker_of_onnx_lets_pass(
    tmp_path: Path, change: Callable[[onnx.ModelProto], None]
) -> None:
    model = plain_chain()
    change(model)
    onnx.checker.check_model(model)
    with pytest.raises(ArtifactError, match=r"m\.onnx: not a readable ONNX file \("):
        read_model(save(model, tmp_path / "m.onnx"))


@pytest.mark.parametrize("text", [b"c1.relu", b"c1.weight", b"net"], ids=bytes.decode)
def test_a_text_that_cannot_be_decoded(tmp_path: Path, text: bytes) -> None:
    content = plain_chain().SerializeToString()
    damaged = content.replace(text, b"\xff" + text[1:])
    assert damaged != content
    (tmp_path / "m.onnx").write_bytes(damaged)
    with pytest.raises(ArtifactError, match=r"m\.onnx: not a readable ONNX file \(.*not UTF-8"):
        read_model(tmp_path / "m.onnx")


def test_a_negative_size_is_a_free_one(tmp_path: Path) -> None:
    model = plain_chain()
    size = model.graph.input[0].type.tensor_type.shape.dim[0]
    size.dim_value = -1
    read = read_model(save(model, tmp_path / "m.onnx"))
    assert not read.graph.input[0].type.tensor_type.shape.dim[0].HasField("dim_value")
    export(Source(str(tmp_path / "m.onnx")), tmp_path / "o.onnx", ExportOptions())


def test_an_npy_whose_header_does_not_end(tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    np.save(path, np.zeros((2, 3, 8, 8), np.uint8))
    content = path.read_bytes()
    path.write_bytes(content.replace(b"(2, 3", b"((2,3"))
    with pytest.raises(DataError, match=r"x\.npy: not a readable array file \("):
        open_dataset(path, Preprocess.plain(3, 8, 8))


@pytest.mark.parametrize("name", ["artifact", "sha256", "parents", "options", "details"])
def test_a_sidecar_with_a_field_of_another_kind(tmp_path: Path, name: str) -> None:
    path = tmp_path / "m.onnx"
    write_artifact(path, b"x", artifact="float-onnx", parents={}, options={})
    content = json.loads(sidecar_path(path).read_text())
    sidecar_path(path).write_text(json.dumps(content | {name: 5}))
    with pytest.raises(ArtifactError, match=rf"not a sidecar .*\({name} is 5, expected a"):
        read_sidecar(path)


def test_no_memory_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise MemoryError("Unable to allocate\n179 GiB")

    monkeypatch.setattr("reptrt.pipeline.export", full)
    line = refused("export", save(plain_chain(), tmp_path / "m.onnx"), "-o", tmp_path / "o.onnx")
    assert line == "error: not enough memory (Unable to allocate 179 GiB)"


def test_no_memory_on_the_device_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.\nTried to allocate 179 GiB")

    model = save(plain_chain(), tmp_path / "m.onnx")
    monkeypatch.setattr("reptrt.pipeline.calibrate", full)
    data = write_images(tmp_path)
    line = refused("calibrate", model, "--data", data, "-n", 8, "-o", tmp_path / "o.onnx")
    assert line == (
        "error: the memory of the device is used up; end other programs that use it, or give "
        "--device cpu"
    )


def set_constant(model: onnx.ModelProto, name: str, value: np.ndarray) -> None:
    for constant in model.graph.initializer:
        if constant.name == name:
            constant.CopyFrom(numpy_helper.from_array(value, name))


def test_a_net_that_overflows_is_refused_without_a_warning(tmp_path: Path) -> None:
    model = plain_chain()
    set_constant(model, "c1.bias", np.full(8, 3e38, np.float32))
    set_constant(model, "c2.bias", np.full(8, 3e38, np.float32))
    with pytest.raises(ReptrtError, match=r"the largest difference is nan"):
        export(Source(str(save(model, tmp_path / "m.onnx"))), tmp_path / "o.onnx", ExportOptions())


def test_a_layer_that_torch_cannot_run_is_named(tmp_path: Path) -> None:
    model = plain_chain()
    set_constant(model, "c2.weight", np.zeros(576, np.float32))
    arguments = save(model, tmp_path / "m.onnx"), write_images(tmp_path), tmp_path / "o.onnx"
    with pytest.raises(ReptrtError, match=r"node c2 \(Conv\): cannot run on shapes"):
        calibrate(*arguments, CalibrateOptions(images=8))


def write_images(folder: Path) -> Path:
    x = np.random.default_rng(0).integers(0, 256, (8, 3, 8, 8), dtype=np.uint8)
    np.savez(folder / "x.npz", x=x)
    return folder / "x.npz"


def test_constants_that_do_not_fit_each_other(tmp_path: Path) -> None:
    """onnxruntime loads such a file; the preparations for it cannot."""
    model = quantized(plain_chain(), images())
    for name in ("c1.bias", "c1.weight.scale"):
        set_constant(model, name, np.full(5, 1.0, np.float32))
    with pytest.raises(
        ArtifactError, match=r"m\.onnx: the constants of a layer do not fit each other \("
    ):
        OrtRunner(save(model, tmp_path / "m.onnx"), threads=1)


@pytest.mark.parametrize("scale", [0.0, 3e38])
def test_scales_beyond_reason_are_no_warning(tmp_path: Path, scale: float) -> None:
    model = quantized(plain_chain(), images())
    set_constant(model, "x.scale", np.float32(scale))
    path = save(model, tmp_path / "m.onnx")
    result = reptrt("eval", path, "--data", write_images(tmp_path), "--threads", 1)
    assert len(result.stderr.splitlines()) <= 1


def test_a_scale_without_a_number(tmp_path: Path) -> None:
    model = quantized(plain_chain(), images())
    first = save(model, tmp_path / "a.onnx")
    set_constant(model, "c1.relu.scale", np.zeros(0, np.float32))
    line = refused("diff", first, save(model, tmp_path / "b.onnx"))
    assert line.endswith("tensor c1.relu: its scale is empty, expected a number")


def test_an_input_that_ends_tensorrt(tmp_path: Path) -> None:
    b = Builder()
    model = b.model(b.head(b.relu(b.conv("x", 4, "c1"))), batch=10**9)
    with pytest.raises(EngineError, match=r"input x is \[1000000000, 3, 8, 8\], expected at most"):
        read_buildable(save(model, tmp_path / "m.onnx"))


@pytest.mark.slow
def test_a_record_whose_options_are_something_else(tmp_path: Path) -> None:
    run = make_run(write_factory(tmp_path), write_data(tmp_path / "x.npz"), tmp_path / "run")
    content = json.loads((run / "run.json").read_text())
    content["options"]["calibrate"] = "x"
    (run / "run.json").write_text(json.dumps(content))
    assert reptrt("report", run).exit_code == 0
    assert "a file is not what reptrt writes (TypeError" in (run / "report.html").read_text()


def test_pads_that_do_not_fit_the_kernel(tmp_path: Path) -> None:
    model = plain_chain()
    (pads,) = [a for a in model.graph.node[2].attribute if a.name == "pads"]
    pads.CopyFrom(helper.make_attribute("pads", [1, 1]))
    arguments = save(model, tmp_path / "m.onnx"), write_images(tmp_path), tmp_path / "o.onnx"
    options = CalibrateOptions(images=8, split="coarse-fine")
    with pytest.raises(ArtifactError, match=r"m\.onnx: its nodes do not fit .*pads has incorrect"):
        calibrate(*arguments, options)


@pytest.mark.parametrize("error", [ValueError, RuntimeError])
def test_a_good_file_is_not_blamed_for_a_bug(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def bug(*arguments: object) -> None:
        raise error("a bug")

    monkeypatch.setattr("reptrt.pipeline.preparing.place", bug)
    arguments = (
        save(plain_chain(), tmp_path / "m.onnx"),
        write_images(tmp_path),
        tmp_path / "o.onnx",
    )
    with pytest.raises(error, match=r"^a bug$"):
        calibrate(*arguments, CalibrateOptions(images=8))
