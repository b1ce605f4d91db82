"""The command line: bad input is one line on stderr and exit 1, and leaves nothing behind."""

import errno
import json
import os
import pickle
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner, Result
from onnx import helper, numpy_helper
from PIL import Image
from torch import nn

from reptrt.cli import main
from reptrt.core.errors import CalibrationError
from reptrt.sources.models import build
from reptrt.sources.options import ArchitectureOptions
from tests.support.helpers import SHARED, needs_shared
from tests.support.onnx_nets import Builder, plain_chain

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--blocks", "1,1", "--widths", "4,4,8", "--strides", "2,1,2", "--num-classes", "5"]
SMALL += ["--input-size", "3x16x16"]
ARCHITECTURE = ArchitectureOptions(
    blocks=(1, 1), widths=(4, 4, 8), strides=(2, 1, 2), num_classes=5
)


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception  # a traceback, for a user
    return result


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden and temporary ones included."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def refused(folder: Path, *arguments: object) -> str:
    """Run a command that must fail in one line and change nothing in a folder; return the line."""
    before = contents(folder)
    result = run(*arguments)
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    assert contents(folder) == before
    return lines[0]


@pytest.fixture
def module() -> nn.Module:
    torch.manual_seed(0)
    return build("repvgg", ARCHITECTURE, deploy=False).eval()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    onnx.save(plain_chain(), str(tmp_path / "m.onnx"))
    return tmp_path / "m.onnx"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 3, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "data.npz", x=pixels, y=np.arange(20) % 5)
    return tmp_path / "data.npz"


# What works --------------------------------------------------------------------------------------


def test_the_whole_way(tmp_path: Path, module: nn.Module) -> None:
    torch.save(module.state_dict(), tmp_path / "w.pt")
    pixels = np.random.default_rng(0).integers(0, 256, (20, 3, 16, 16), dtype=np.uint8)
    np.savez(tmp_path / "d.npz", x=pixels, y=np.arange(20) % 5)
    float_file, int8_file = tmp_path / "m.onnx", tmp_path / "m.int8.onnx"
    done = run("export", "repvgg", "--weights", tmp_path / "w.pt", *SMALL, "-o", float_file)
    assert done.exit_code == 0, done.stderr
    assert "3 blocks fused" in done.stdout
    assert done.stderr == ""
    done = run("calibrate", float_file, "--data", tmp_path / "d.npz", "-n", 20, "-o", int8_file)
    assert done.exit_code == 0, done.stderr
    assert re.search(r"^images +20$", done.stdout, re.MULTILINE)
    assert done.stderr == ""
    done = run(
        "eval",
        float_file,
        int8_file,
        "--data",
        tmp_path / "d.npz",
        "--json",
        "-",
        "--reference",
        float_file,
    )
    assert done.exit_code == 0, done.stderr
    results = json.loads(done.stdout)["results"]
    assert [result["file"] for result in results] == [str(float_file), str(int8_file)]
    assert results[1]["sqnr_db"] > 15
    names = {"m.onnx", "m.onnx.json", "m.int8.onnx", "m.int8.onnx.json", "w.pt", "d.npz"}
    assert set(contents(tmp_path)) == names


@pytest.mark.parametrize("target", ["-", "report.json"])
def test_json_of_export_and_calibrate(
    tmp_path: Path, model: Path, data: Path, target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run("export", model, "-o", "f.onnx", "--json", target)
    text = done.stdout if target == "-" else (tmp_path / target).read_text()
    report = json.loads(text)
    assert report["path"] == "f.onnx"
    assert report["overall"]["max_difference"] == 0
    done = run("calibrate", "f.onnx", "--data", data, "-n", 20, "-o", "q.onnx", "--json", target)
    text = done.stdout if target == "-" else (tmp_path / target).read_text()
    report = json.loads(text)
    assert {"x", "c1.relu", "c2.relu", "pool"} <= {t["tensor"] for t in report["tensors"]}
    assert report["images"] == 20


def test_what_a_factory_prints_stays_out_of_json(tmp_path: Path) -> None:
    (tmp_path / "prints_of_a_test.py").write_text(
        "from torch import nn\nprint('importing')\n"
        "def make():\n    print('building')\n    return nn.Conv2d(3, 4, 3)\n"
    )
    source = f"{tmp_path / 'prints_of_a_test.py'}:make"
    done = run("export", source, "--input-size", "3x8x8", "-o", tmp_path / "m.onnx", "--json", "-")
    assert json.loads(done.stdout)["num_parameters"] == 4 * 3 * 9 + 4


@pytest.mark.slow
@needs_shared
def test_float_accuracy_is_that_of_the_zoo(tmp_path: Path) -> None:
    """All 10,000 test images; the zoo's README states four digits."""
    files = {}
    for name, more in (
        (
            "repvgg",
            ["--blocks", "2,4,14,1", "--widths", "32,32,64,128,256", "--strides", "2,1,2,2,1"],
        ),
        (
            "mobileone",
            [
                "--blocks",
                "2,4,6,1",
                "--widths",
                "32,64,128,256",
                "--strides",
                "1,2,2,1",
                "--branches",
                "2",
            ],
        ),
    ):
        files[name] = tmp_path / f"{name}.onnx"
        weights = SHARED / "zoo" / f"{name}_cifar10.pt"
        done = run(
            "export",
            name,
            "--weights",
            weights,
            *more,
            "--input-size",
            "3x32x32",
            "--mean",
            "0.4914,0.4822,0.4465",
            "--std",
            "0.2470,0.2435,0.2616",
            "-o",
            files[name],
        )
        assert done.exit_code == 0, done.stderr
    test = SHARED / "cifar10" / "test"
    done = run("eval", *files.values(), "--data", test, "--threads", 1, "--json", "-")
    results = json.loads(done.stdout)["results"]
    assert [result["images"] for result in results] == [10_000, 10_000]
    top1 = {name: result["top1"] for name, result in zip(files, results, strict=True)}
    readme = (SHARED / "zoo" / "README.md").read_text()
    for name in files:
        (line,) = (line for line in readme.splitlines() if f"{name}_cifar10.pt |" in line)
        stated = re.search(r"top-1 (0\.\d+)|\| (0\.\d+) \|$", line)
        assert stated is not None, line
        assert top1[name] == pytest.approx(float(stated[1] or stated[2]), abs=1e-4 + 1e-9)


# Checkpoints -------------------------------------------------------------------------------------


class Marker:
    """Unpickled by the book, it would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (str(self.path),)


def missing(path: Path, module: nn.Module) -> None:
    del path, module


def truncated(path: Path, module: nn.Module) -> None:
    torch.save(module.state_dict(), path)
    path.write_bytes(path.read_bytes()[:-4000])


def text(path: Path, module: nn.Module) -> None:
    del module
    path.write_text("<html>404</html>" * 50)


def folder(path: Path, module: nn.Module) -> None:
    del module
    path.mkdir()


def other_architecture(path: Path, module: nn.Module) -> None:
    del module
    torch.save(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).state_dict(), path)


def whole_model_of_no_weights(path: Path, module: nn.Module) -> None:
    torch.save({"model": nn.Sequential(nn.ReLU()), "epoch": 3}, path)


def with_code(path: Path, module: nn.Module) -> None:
    del module
    path.write_bytes(pickle.dumps({"state_dict": Marker(path.with_name("executed"))}, protocol=2))


def not_a_number(path: Path, module: nn.Module) -> None:
    state = {name: value.clone() for name, value in module.state_dict().items()}
    state["linear.bias"][2] = float("nan")
    state["stage1.0.rbr_1x1.bn.running_var"][0] = float("inf")
    torch.save(state, path)


def of_another_width(path: Path, module: nn.Module) -> None:
    state = {name: value.clone() for name, value in module.state_dict().items()}
    state["linear.weight"] = state["linear.weight"][:, :4]
    torch.save(state, path)


CHECKPOINTS: dict[Callable[[Path, nn.Module], None], str] = {
    missing: "w.pt: does not exist; check the path",
    truncated: "w.pt: not a checkpoint, or a damaged one",
    text: "w.pt: not a checkpoint, or a damaged one",
    folder: "w.pt: cannot be read (Is a directory)",
    other_architecture: "unexpected (0.weight, 0.bias, 1.weight, 1.bias, 1.running_mean, ...)",
    whole_model_of_no_weights: "('model': torch.nn.modules.container.Sequential, 'epoch': int)",
    with_code: "asks for a call of posix.mkdir, which no checkpoint needs; it was not called",
    not_a_number: "2 of 36 tensors hold NaN or Inf",
    of_another_width: "linear.weight: got (5, 4), expected (5, 8)",
}


@pytest.mark.parametrize("make", list(CHECKPOINTS), ids=lambda make: make.__name__)
def test_checkpoints(
    tmp_path: Path, module: nn.Module, make: Callable[[Path, nn.Module], None]
) -> None:
    make(tmp_path / "w.pt", module)
    source = ["export", "repvgg", "--weights", tmp_path / "w.pt", *SMALL]
    line = refused(tmp_path, *source, "-o", tmp_path / "m.onnx")
    assert CHECKPOINTS[make] in line
    assert not (tmp_path / "executed").exists()


def test_whole_pickled_model_is_read_as_data(tmp_path: Path, module: nn.Module) -> None:
    torch.save({"model": module.half(), "epoch": 3}, tmp_path / "w.pt")
    source = ["export", "repvgg", "--weights", tmp_path / "w.pt", *SMALL]
    assert run(*source, "-o", tmp_path / "m.onnx").exit_code == 0


# ONNX files --------------------------------------------------------------------------------------


def not_onnx(path: Path) -> None:
    path.write_text("not a network" * 20)


def cut_off(path: Path) -> None:
    path.write_bytes(plain_chain().SerializeToString()[:-100])


def without_its_data(path: Path) -> None:
    onnx.save_model(
        plain_chain(), str(path), save_as_external_data=True, location="w", size_threshold=0
    )
    path.with_name("w").unlink()


def in_train_mode(path: Path) -> None:
    model = plain_chain()
    names = ["c1", *["c1.bias"] * 4], ["normed", "mean", "var"]
    norm = helper.make_node("BatchNormalization", *names, "bn", training_mode=1)
    model.graph.node[1].input[0] = "normed"
    model.graph.node.insert(1, norm)
    onnx.save(model, str(path))


def with_nan(path: Path) -> None:
    model = plain_chain()
    values = numpy_helper.to_array(model.graph.initializer[2]).copy()
    values.flat[0] = np.nan
    model.graph.initializer[2].CopyFrom(numpy_helper.from_array(values, "c2.weight"))
    onnx.save(model, str(path))


def with_odd_operators(path: Path) -> None:
    b = Builder()
    y = b.node("LRN", [b.relu(b.conv("x", 4, "c1"))], "odd1", size=3)
    y = b.node("LpPool", [y], "odd2", kernel_shape=[2, 2])
    onnx.save(b.model(b.head(b.conv(y, 4, "c2"))), str(path))


def with_a_dead_tensor(path: Path) -> None:
    model = plain_chain()
    dead = numpy_helper.from_array(np.full(8, -1e3, np.float32), "c1.bias")
    model.graph.initializer[1].CopyFrom(dead)
    onnx.save(model, str(path))


def quantized_already(path: Path) -> None:
    model = plain_chain()
    model.graph.initializer.append(numpy_helper.from_array(np.float32(1), "s"))
    model.graph.node.insert(0, helper.make_node("QuantizeLinear", ["x", "s"], ["xq"], "q0"))
    model.graph.node.insert(1, helper.make_node("DequantizeLinear", ["xq", "s"], ["xd"], "d0"))
    model.graph.node[2].input[0] = "xd"
    onnx.save(model, str(path))


ONNX_FILES: dict[Callable[[Path], None], tuple[str, str]] = {
    not_onnx: ("both", "bad.onnx: not a readable ONNX file"),
    cut_off: ("both", "bad.onnx: not a readable ONNX file"),
    without_its_data: ("both", "should be stored in"),
    with_nan: ("both", "1 constants hold NaN or Inf (c2.weight)"),
    quantized_already: ("both", "quantized"),
    in_train_mode: ("export", "batch norm is in training mode"),
    with_odd_operators: ("calibrate", "2 nodes cannot be run: LRN (odd1); LpPool (odd2)"),
    with_a_dead_tensor: ("calibrate", "c1.relu: is 0 on all 20 images"),
}


@pytest.mark.parametrize("make", list(ONNX_FILES), ids=lambda make: make.__name__)
def test_onnx_files(tmp_path: Path, data: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "bad.onnx")
    command, message = ONNX_FILES[make]
    if command in ("export", "both"):
        line = refused(tmp_path, "export", tmp_path / "bad.onnx", "-o", tmp_path / "o.onnx")
        assert message in line
    if command in ("calibrate", "both"):
        source = ["calibrate", tmp_path / "bad.onnx", "--data", data, "-n", 20]
        assert message in refused(tmp_path, *source, "-o", tmp_path / "o.onnx")


def test_a_missing_onnx_file(tmp_path: Path, data: Path) -> None:
    for arguments in (
        ["export", tmp_path / "no.onnx", "-o", tmp_path / "o.onnx"],
        ["calibrate", tmp_path / "no.onnx", "--data", data, "-o", tmp_path / "o.onnx"],
        ["eval", tmp_path / "no.onnx", "--data", data],
    ):
        assert "no.onnx does not exist; check the path" in refused(tmp_path, *arguments)


def test_a_changed_file_with_a_sidecar(tmp_path: Path, model: Path, data: Path) -> None:
    run("export", model, "-o", tmp_path / "f.onnx")
    (tmp_path / "f.onnx").write_bytes(model.read_bytes())
    line = refused(
        tmp_path, "calibrate", tmp_path / "f.onnx", "--data", data, "-o", tmp_path / "o.onnx"
    )
    assert "changed after it was written" in line
    (tmp_path / "f.onnx").unlink()
    line = refused(
        tmp_path, "calibrate", tmp_path / "f.onnx", "--data", data, "-o", tmp_path / "o.onnx"
    )
    assert "f.onnx: cannot be read (No such file" in line


# Images ------------------------------------------------------------------------------------------


def picture(path: Path, size: tuple[int, int] = (8, 8)) -> None:
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", size, (10, 200, 30)).save(path)


def empty(folder: Path) -> Path:
    folder.mkdir()
    return folder


def mixed_sizes(folder: Path) -> Path:
    for i in range(20):
        picture(folder / f"{i:02d}.png", (8, 8) if i % 2 else (8, 9))
    return folder


def unreadable(folder: Path) -> Path:
    for i in range(20):
        picture(folder / f"{i:02d}.png")
    (folder / "03.png").write_bytes(b"")
    (folder / "07.png").write_text("not an image")
    whole = (folder / "09.png").read_bytes()
    (folder / "09.png").write_bytes(whole[: len(whole) // 2])
    return folder


def too_few(folder: Path) -> Path:
    for i in range(5):
        picture(folder / f"{i:02d}.png")
    return folder


def no_folder(folder: Path) -> Path:
    return folder


def without_x(folder: Path) -> Path:
    np.savez(folder.with_suffix(".npz"), images=np.zeros((20, 3, 8, 8), np.uint8))
    return folder.with_suffix(".npz")


def one_channel(folder: Path) -> Path:
    np.savez(folder.with_suffix(".npz"), x=np.zeros((20, 1, 8, 8), np.uint8))
    return folder.with_suffix(".npz")


def not_finite(folder: Path) -> Path:
    x = np.zeros((20, 3, 8, 8), np.float32)
    x[4, 1, 2, 3] = np.nan
    np.savez(folder.with_suffix(".npz"), x=x)
    return folder.with_suffix(".npz")


def not_an_archive(folder: Path) -> Path:
    folder.with_suffix(".npz").write_bytes(b"PK" + bytes(50))
    return folder.with_suffix(".npz")


def pickled(folder: Path) -> Path:
    np.save(folder.with_suffix(".npy"), np.array([{"a": 1}], dtype=object), allow_pickle=True)
    return folder.with_suffix(".npy")


IMAGES: dict[Callable[[Path], Path], str] = {
    empty: "no images found",
    mixed_sizes: "images of 2 sizes: 9x8 (10 images, e.g. 00.png), 8x8 (10 images, e.g. 01.png)",
    unreadable: "of 20 images cannot be read: 03.png (empty file), 07.png (not an image)",
    too_few: "got 5 images, expected 20; add images or lower --images",
    no_folder: "does not exist; expected a folder of images, an .npz or an .npy",
    without_x: "holds images; expected an array named x",
    one_channel: "1 channels in an array (20, 1, 8, 8), expected (N, 3, 8, 8)",
    not_finite: "1 of 20 images hold NaN or infinity in float32, first at index 4",
    not_an_archive: "not a readable array file",
    pickled: "not a readable array file",
}


@pytest.mark.parametrize("make", list(IMAGES), ids=lambda make: make.__name__)
def test_images(tmp_path: Path, model: Path, make: Callable[[Path], Path]) -> None:
    source = make(tmp_path / "images")
    line = refused(
        tmp_path, "calibrate", model, "--data", source, "-n", 20, "-o", tmp_path / "o.onnx"
    )
    assert IMAGES[make] in line


def test_fewer_images_than_the_default_are_all_used(
    tmp_path: Path, model: Path, data: Path
) -> None:
    output = tmp_path / "o.onnx"
    done = run("calibrate", model, "--data", data, "-o", output)
    assert done.exit_code == 0, done.output
    line = f"{data}: fewer images than the default 512, all 20 were used"
    assert line in done.stdout.splitlines()
    given = run("calibrate", model, "--data", data, "-o", output, "-n", 20)
    assert "were used" not in given.stdout
    ladder = ("ladder", model, "--data", data, "--calib-data", data)
    assert line in run(*ladder).stdout.splitlines()


# Where to write ----------------------------------------------------------------------------------


def test_a_missing_output_folder_is_found_before_any_work(
    tmp_path: Path, model: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reptrt.pipeline.calibrating.Model", None)  # must not be reached
    monkeypatch.setattr("reptrt.pipeline.exporting.model_from_file", None)
    for arguments in (
        ["export", model, "-o", tmp_path / "no" / "o.onnx"],
        ["calibrate", model, "--data", data, "-o", tmp_path / "no" / "o.onnx"],
        ["calibrate", model, "--data", data, "-o", tmp_path / "o", "--json", tmp_path / "no" / "j"],
    ):
        assert "no does not exist; create it first" in refused(tmp_path, *arguments)
    arguments = ["calibrate", model, "--data", data, "-o", tmp_path]
    assert "is a folder, expected a file name" in refused(tmp_path, *arguments)


def test_json_does_not_take_the_place_of_a_sidecar(tmp_path: Path, model: Path) -> None:
    target = tmp_path / "o.onnx"
    line = refused(tmp_path, "export", model, "-o", target, "--json", f"{target}.json")
    assert "is the sidecar of o.onnx; give another name" in line


def test_the_input_is_not_overwritten(tmp_path: Path, model: Path, data: Path) -> None:
    assert "give another --output" in refused(tmp_path, "export", model, "-o", model)
    assert "give another --output" in refused(
        tmp_path, "calibrate", model, "--data", data, "-n", 20, "-o", model
    )


def test_a_full_disk(
    tmp_path: Path, model: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Path, content: bytes) -> int:
        with open(self, "wb") as stream:
            stream.write(content[: len(content) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    for arguments in (
        ["export", model, "-o", tmp_path / "o.onnx"],
        ["calibrate", model, "--data", data, "-n", 20, "-o", tmp_path / "o.onnx"],
    ):
        assert "cannot be written (No space left on device)" in refused(tmp_path, *arguments)


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_a_file_that_the_system_does_not_let_grow(tmp_path: Path, model: Path) -> None:
    """A real refusal by the kernel in the middle of a write."""
    before = contents(tmp_path)

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

    command = [sys.executable, "-m", "reptrt", "export", model, "-o", tmp_path / "o.onnx"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, preexec_fn=limit
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "cannot be written (File too large)" in done.stderr
    assert contents(tmp_path) == before


def wait_for_map(pid: int, name: str) -> None:
    """Wait until a process has mapped a file into its memory; 4 s where the system does not say."""
    maps = Path(f"/proc/{pid}/maps")
    if not maps.exists():
        time.sleep(4)
        return
    deadline = time.monotonic() + 60
    while name not in maps.read_text():
        assert time.monotonic() < deadline, f"{name} is not mapped"
        time.sleep(0.1)


@pytest.mark.slow
def test_ctrl_c(tmp_path: Path) -> None:
    b = Builder(size=64)
    y = b.relu(b.conv("x", 16, "c1"))
    onnx.save(b.model(b.head(b.relu(b.conv(y, 16, "c2")))), str(tmp_path / "m.onnx"))
    shape = (40_000, 3, 64, 64)  # a minute's work, in a sparse file
    np.lib.format.open_memmap(tmp_path / "d.npy", "w+", np.uint8, shape).flush()
    arguments = ["m.onnx", "--data", "d.npy", "-n", "40000", "-o", "o.onnx"]
    process = subprocess.Popen(
        [sys.executable, "-m", "reptrt", "-v", "calibrate", *arguments],
        cwd=tmp_path,
        env={**environment(), "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_for_map(process.pid, "d.npy")  # libraries are loaded, images are being read
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert out == ""
    assert err.splitlines()[-1] == "Aborted! No file is half-written."
    assert "Traceback" not in err
    assert {path.name for path in tmp_path.iterdir()} == {"m.onnx", "d.npy"}


# Usage -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ["export"],
        ["export", "repvgg"],
        ["export", "repvgg", "-o", "o.onnx", "--widths", "4,x"],
        ["export", "repvgg", "-o", "o.onnx", "--input-size", "32"],
        ["export", "repvgg", "-o", "o.onnx", "--input-size", "3x0x32"],
        ["export", "repvgg", "-o", "o.onnx", "--opset", "9"],
        ["export", "repvgg", "-o", "o.onnx", "--resize", "zoom"],
        ["export", "repvgg", "-o", "o.onnx", "--nonsense"],
        ["calibrate", "m.onnx", "-o", "o.onnx"],
        ["calibrate", "m.onnx", "--data", "d", "-o", "o.onnx", "--threshold", "median"],
        ["calibrate", "m.onnx", "--data", "d", "-o", "o.onnx", "-n", "many"],
        ["calibrate", "m.onnx", "--data", "d", "-o", "o.onnx", "--percentile", "101"],
        ["nonsense"],
    ],
    ids=lambda arguments: " ".join(arguments[-2:]),
)
def test_usage_errors_exit_2(arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert "Usage:" in result.stderr


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--weight-bits", "9", "--weight-bits: got 9, expected 2..8"),
        ("-n", "0", "--images: got 0, expected 1 or more"),
        ("-n", "-3", "--images: got -3"),
        ("--exclude", "nope", "--exclude nope: matches none of 3 layers"),
        ("--exclude", "(", "not a regular expression"),
        ("--exclude", ".", "no layer to quantize"),
        ("--float", "nope", "--float nope: matches none of "),
        ("--float", "[", "--float [: not a regular expression"),
    ],
)
def test_values_that_cannot_work(
    tmp_path: Path, model: Path, data: Path, option: str, value: str, message: str
) -> None:
    base = ["calibrate", model, "--data", data, "-n", 20, "-o", tmp_path / "o.onnx"]
    assert message in refused(tmp_path, *base, option, value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["repvg", *SMALL], "repvg"),
        (["repvgg", *SMALL, "--mean", "0.5,0.5"], "--mean: got 2 values, expected 3"),
        (["repvgg", *SMALL, "--std", "0,1,1"], "--std: got (0.0, 1.0, 1.0), expected positive"),
        (["repvgg", *SMALL, "--mean", "nan,0,0"], "--mean: got (nan, 0.0, 0.0), expected numbers"),
        (["repvgg", *SMALL, "--widths", "4,4"], "--widths: got 2 entries"),
        (["repvgg", *SMALL, "--widths", "4,-4,8"], "--widths: got 4,-4,8, expected whole numbers"),
        (["m.onnx", "--weights", "w.pt"], "holds its architecture and weights, got --weights"),
        (["m.onnx", "--num-classes", "5"], "got --num-classes; leave it out"),
        (["no_such_module:make"], "no_such_module: cannot be imported"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_sources_that_cannot_work(tmp_path: Path, arguments: list[str], message: str) -> None:
    assert message in refused(tmp_path, "export", *arguments, "-o", tmp_path / "o.onnx")


def test_a_failed_diagnosis_leaves_no_file(
    tmp_path: Path, model: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*arguments: object) -> None:
        raise CalibrationError("nothing to measure")

    monkeypatch.setattr("reptrt.judge.diagnose.diagnose", failing)
    command = ["calibrate", model, "--data", data, "-n", 20, "-o", tmp_path / "o.onnx"]
    assert refused(tmp_path, *command, "--diagnose") == "error: nothing to measure"
    assert run(*command).exit_code == 0


def test_a_failed_diagnosis_keeps_what_was_learned(
    tmp_path: Path, model: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*arguments: object) -> None:
        raise CalibrationError("nothing to measure")

    monkeypatch.setattr("reptrt.judge.diagnose.diagnose", failing)
    command = ["calibrate", model, "--data", data, "-n", 20, "-o", tmp_path / "o.onnx"]
    command += ["--rounding", "learned", "--iterations", 2]
    before = contents(tmp_path)
    assert run(*command, "--diagnose").exit_code == 1
    assert not (tmp_path / "o.onnx").exists()
    assert contents(tmp_path).keys() - before.keys()  # the finished units, for the next call
    assert run(*command).exit_code == 0
    assert contents(tmp_path).keys() - before.keys() == {"o.onnx", "o.onnx.json"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench", "m.onnx", "--batch", "0"], "--batch: got (0,)"),
        (
            ["ladder", "m.onnx", "--data", "data.npz", "--calib-data", "data.npz", "--limit", "0"],
            "--limit: got 0",
        ),
        (
            ["calibrate", "m.onnx", "--data", "data.npz", "-o", "o.onnx", "-n", "0"],
            "--images: got 0",
        ),
        (["build-engine", "m.onnx", "-o", "o.engine", "--workspace", "0"], "--workspace: got 0"),
        (["build-engine", "m.onnx", "-o", "o.engine", "--target", "x"], "--target: got 'x'"),
        (
            ["package", "m.engine", "-o", "repo", "--max-queue-delay", "-1"],
            "--max-queue-delay: got -1",
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_message_names_the_flag_of_its_command(
    tmp_path: Path,
    model: Path,
    data: Path,
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rooms name parameters (batches, eval_limit, workspace_mib); commands print their flags."""
    monkeypatch.chdir(tmp_path)
    assert refused(tmp_path, *arguments).startswith(f"error: {message}")


def test_a_multi_line_reason_becomes_one_line(tmp_path: Path) -> None:
    (tmp_path / "lines_of_a_test.py").write_text(
        "def make():\n    raise ValueError('first\\nsecond\\n\\nthird')\n"
    )
    source = f"{tmp_path / 'lines_of_a_test.py'}:make"
    line = refused(tmp_path, "export", source, "-o", tmp_path / "o.onnx")
    assert line.endswith("the factory raised ValueError: first second third")


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("reptrt.pipeline.exporting.require_folder", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run("export", "repvgg", "-o", tmp_path / "o.onnx")


@pytest.mark.parametrize(
    "command",
    [
        ("lint", "{}"),
        ("inspect", "{}"),
        ("eval", "{}", "--data", "x.npz"),
        ("eval", "n.onnx", "--data", "x.npz", "--reference", "{}"),
        ("bench", "{}"),
        ("calibrate", "{}", "--data", "x.npz", "-o", "out.onnx"),
        ("export", "{}", "-o", "out.onnx"),
        ("build-engine", "{}", "-o", "out.engine"),
        ("diff", "n.onnx", "{}"),
    ],
)
def test_a_file_that_is_not_the_one_of_its_sidecar_is_refused_by_every_command(
    command: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    onnx.save(plain_chain(), "n.onnx")
    np.savez("x.npz", x=np.zeros((4, 3, 8, 8), np.uint8))
    assert run("export", "n.onnx", "-o", "m.onnx").exit_code == 0
    onnx.save(plain_chain(), "m.onnx")
    before = set(tmp_path.iterdir())
    done = run(*(argument.format("m.onnx") for argument in command))
    assert (done.exit_code, done.stdout) == (1, "")
    assert re.fullmatch(r"error: m\.onnx: sha256 is \w+\.\.\., its sidecar says .*\n", done.stderr)
    assert set(tmp_path.iterdir()) == before
