"""Run commands on damaged inputs, in a separate process so that a crash is found too.

    python -m tests.support.fuzzing FOLDER SEED KIND=NUMBER...  3> LINES

makes good inputs in FOLDER. It then damages one of them NUMBER times for each KIND and runs a
command on it. It writes a line of JSON before and after every case: {"case", "problems", ...}.
"""

import contextlib
import copy
import json
import os
import random
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import safetensors.torch
import torch
from click.testing import CliRunner, Result
from onnx import helper, numpy_helper
from PIL import Image

from reptrt.cli import main
from tests.pipeline.test_export import trained

Damage = Callable[[bytes, random.Random], bytes]
ARCHITECTURE = ["--blocks", "2,1", "--widths", "4,8,8", "--strides", "2,1,2", "--num-classes", "5"]
ARCHITECTURE += ["--input-size", "3x16x16"]
IMAGES = 8
BENCH = ["--min-seconds", "0.001", "--warmup-seconds", "0", "--threads", "1"]
RUN = ["-n", "8", "--threads", "1", "--batch", "1", "--bench-seconds", "0.001"]


# Good inputs -------------------------------------------------------------------------------------


def make_inputs(folder: Path) -> None:
    """Write one of everything that a command reads."""
    state = trained("repvgg").state_dict()
    torch.save(state, folder / "new.pt")
    torch.save({"state_dict": state}, folder / "old.pth", _use_new_zipfile_serialization=False)
    safetensors.torch.save_file(state, folder / "w.safetensors")
    x = np.random.default_rng(0).integers(0, 256, (IMAGES, 3, 16, 16), dtype=np.uint8)
    np.savez(folder / "d.npz", x=x, y=np.arange(IMAGES) % 5)
    np.savez_compressed(folder / "z.npz", x=x, y=np.arange(IMAGES) % 5)
    np.save(folder / "d.npy", x)
    for kind in ("png", "jpg"):
        (folder / kind).mkdir()
        for index, pixels in enumerate(x):
            image = Image.fromarray(pixels.transpose(1, 2, 0))
            image.save(folder / kind / f"{index}.{kind}")
    float_file, int8_file = folder / "f.onnx", folder / "q.onnx"
    good("export", "repvgg", "--weights", folder / "new.pt", *ARCHITECTURE, "-o", float_file)
    good("calibrate", float_file, "--data", folder / "d.npz", "-n", IMAGES, "-o", int8_file)
    with contextlib.suppress(ImportError):
        import tensorrt_rtx  # noqa: F401

        good("build-engine", int8_file, "-o", folder / "e.engine", "--backend", "tensorrt-rtx")
    good("run", float_file, "--data", folder / "d.npz", *RUN, "-o", folder / "run")


def good(*arguments: object) -> None:
    """Run a command that must work."""
    result = reptrt(arguments)
    if result.exit_code:
        raise RuntimeError(f"{arguments}: {result.output}") from result.exception


def reptrt(arguments: object) -> Result:
    """Run a command in this process."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments])  # type: ignore[attr-defined]


# Damage ------------------------------------------------------------------------------------------


def flip(content: bytes, rng: random.Random) -> bytes:
    """Flip single bits."""
    damaged = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 16])):
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
    return bytes(damaged)


def cut(content: bytes, rng: random.Random) -> bytes:
    """Cut the end off."""
    return content[: rng.randrange(len(content))]


def blank(content: bytes, rng: random.Random) -> bytes:
    """Overwrite a part with zeros, as after the loss of a disk block."""
    start = rng.randrange(len(content))
    stop = min(len(content), start + rng.choice([1, 8, 64, 512]))
    return content[:start] + bytes(stop - start) + content[stop:]


def shift(content: bytes, rng: random.Random) -> bytes:
    """Insert or remove bytes."""
    at, number = rng.randrange(len(content)), rng.choice([1, 4, 50])
    return content[:at] + rng.choice([rng.randbytes(number) + content[at:], content[at + number :]])


def noise(content: bytes, rng: random.Random) -> bytes:
    """Return random bytes."""
    return rng.randbytes(rng.choice([0, 1, 10, 1000]))


def damage(content: bytes, rng: random.Random) -> bytes:
    """Damage the bytes of a file in one of the ways above."""
    return rng.choice([flip, flip, flip, cut, cut, blank, shift, noise])(content, rng)


def damage_graph(content: bytes, rng: random.Random) -> bytes:
    """Return an ONNX file that can be parsed but has a defect in its graph."""
    model = onnx.load_model_from_string(content)
    ways = [
        lose_node,
        lose_constant,
        misname_input,
        misname_output,
        wrong_attribute,
        lose_attribute,
    ]
    ways += [wrong_type, wrong_size, not_a_number, wrong_metadata, wrong_opset, wrong_input, repeat]
    rng.choice(ways)(model, rng)
    return bytes(model.SerializeToString())


def lose_node(model: onnx.ModelProto, rng: random.Random) -> None:
    model.graph.node.remove(rng.choice(model.graph.node))


def lose_constant(model: onnx.ModelProto, rng: random.Random) -> None:
    model.graph.initializer.remove(rng.choice(model.graph.initializer))


def repeat(model: onnx.ModelProto, rng: random.Random) -> None:
    model.graph.node.append(copy.deepcopy(rng.choice(model.graph.node)))


def misname_input(model: onnx.ModelProto, rng: random.Random) -> None:
    node, constant = rng.choice(model.graph.node), rng.choice(model.graph.initializer)
    node.input[rng.randrange(len(node.input))] = rng.choice(["", "nothing", constant.name])


def misname_output(model: onnx.ModelProto, rng: random.Random) -> None:
    node = rng.choice(model.graph.node)
    node.output[0] = rng.choice(["", "new", model.graph.input[0].name])


def wrong_attribute(model: onnx.ModelProto, rng: random.Random) -> None:
    node = rng.choice([node for node in model.graph.node if node.attribute])
    attribute = rng.choice(node.attribute)
    value = rng.choice([0, -1, 7, [0, 0], [-1, 2], 1.5, "x", 10**12, [10**12] * 2])
    attribute.CopyFrom(helper.make_attribute(attribute.name, value))


def lose_attribute(model: onnx.ModelProto, rng: random.Random) -> None:
    node = rng.choice([node for node in model.graph.node if node.attribute])
    node.attribute.remove(rng.choice(node.attribute))


def wrong_type(model: onnx.ModelProto, rng: random.Random) -> None:
    constant = rng.choice(model.graph.initializer)
    kind = rng.choice([np.float64, np.float16, np.int32, np.uint8, np.int64, np.bool_])
    value = numpy_helper.to_array(constant).astype(kind)
    constant.CopyFrom(numpy_helper.from_array(value, constant.name))


def wrong_size(model: onnx.ModelProto, rng: random.Random) -> None:
    constant = rng.choice(model.graph.initializer)
    constant.dims[:] = [rng.choice([-1, 0, 1, 3, 10**9]) for _ in range(rng.randrange(5))]


def not_a_number(model: onnx.ModelProto, rng: random.Random) -> None:
    floats = [c for c in model.graph.initializer if c.data_type == onnx.TensorProto.FLOAT]
    constant = rng.choice(floats)
    value = numpy_helper.to_array(constant).copy()
    value.reshape(-1)[rng.randrange(value.size)] = rng.choice([np.nan, np.inf, -np.inf, 1e38])
    constant.CopyFrom(numpy_helper.from_array(value, constant.name))


def wrong_metadata(model: onnx.ModelProto, rng: random.Random) -> None:
    entry = rng.choice(model.metadata_props)
    half, text = entry.value[: len(entry.value) // 2], entry.value
    values = ["", "{}", "[]", "5", '{"a": 1}', "no JSON", half, text.replace("[", "{")]
    values += [text.replace("3", "-3"), text.replace("1", '"x"'), text.replace("e", "a")]
    entry.value = rng.choice(values)


def wrong_opset(model: onnx.ModelProto, rng: random.Random) -> None:
    model.opset_import[0].version = rng.choice([0, 1, 5, 7, 12, 99])


def wrong_input(model: onnx.ModelProto, rng: random.Random) -> None:
    kind = model.graph.input[0].type.tensor_type
    if rng.random() < 0.3:
        kind.elem_type = rng.choice([0, 2, 7, 10, 11, 99])
    elif rng.random() < 0.3:
        kind.ClearField("shape")
    else:
        rng.choice(kind.shape.dim).dim_value = rng.choice([0, -1, 1, 5, 10**9])


def damage_json(content: bytes, rng: random.Random) -> bytes:
    """Replace or remove one value of a JSON file."""
    whole = json.loads(content)
    path = rng.choice([path for path in paths_in(whole) if path])
    holder = whole
    for key in path[:-1]:
        holder = holder[key]
    if rng.random() < 0.3:
        del holder[path[-1]]
    else:
        holder[path[-1]] = rng.choice([None, 5, -1, 1e300, "x", "", [], {}, [1], {"a": 1}, True])
    return json.dumps(whole).encode()


def paths_in(content: object) -> Iterator[tuple[str | int, ...]]:
    """Yield the path of every value in JSON content."""
    yield ()
    entries = content.items() if isinstance(content, dict) else []
    entries = enumerate(content[:4]) if isinstance(content, list) else entries
    for key, value in entries:
        for path in paths_in(value):
            yield (key, *path)


# Cases -------------------------------------------------------------------------------------------


class Case:
    """A folder with copies of good inputs, one of them damaged."""

    def __init__(self, inputs: Path, folder: Path, rng: random.Random) -> None:
        self.inputs, self.folder, self.rng = inputs, folder, rng

    def put(self, name: str, change: Damage | None = None) -> Path:
        """Copy an input, damaged by ``change`` if it is not None."""
        content, target = (self.inputs / name).read_bytes(), self.folder / name
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(content if change is None else change(content, self.rng))
        return target

    def choose(self, *commands: list[object]) -> list[object]:
        return self.rng.choice(commands)

    @property
    def output(self) -> list[object]:
        """The option for the output file; half of the time, the file exists already."""
        target = self.folder / "o.onnx"
        if self.rng.random() < 0.5:
            target.write_bytes(b"of before")
        return ["-o", target]


def checkpoint(case: Case) -> list[object]:
    weights = case.put(case.rng.choice(["new.pt", "old.pth", "w.safetensors"]), damage)
    return ["export", "repvgg", "--weights", weights, *ARCHITECTURE, *case.output]


def arrays(case: Case) -> list[object]:
    data = case.put(case.rng.choice(["d.npz", "z.npz", "d.npy"]), damage)
    return on_images(case, data)


def images(case: Case) -> list[object]:
    kind = case.rng.choice(["png", "jpg"])
    for index in range(IMAGES):
        case.put(f"{kind}/{index}.{kind}", damage if index == 3 else None)
    return on_images(case, case.folder / kind)


def on_images(case: Case, data: Path) -> list[object]:
    model = case.put("f.onnx")
    return case.choose(
        ["calibrate", model, "--data", data, "-n", IMAGES, *case.output],
        ["eval", model, "--data", data, "--threads", 1],
    )


def onnx_bytes(case: Case) -> list[object]:
    return on_model(case, case.put(case.rng.choice(["f.onnx", "q.onnx"]), damage))


def onnx_graph(case: Case) -> list[object]:
    return on_model(case, case.put(case.rng.choice(["f.onnx", "q.onnx"]), damage_graph))


def other_kind(case: Case) -> list[object]:
    """Give the INT8 file where a float one is expected, an image for a net, and so on."""
    names = ["q.onnx", "f.onnx", "d.npz", "new.pt", "png/0.png", "e.engine", "run/run.json"]
    name = case.rng.choice([name for name in names if (case.inputs / name).exists()])
    target = case.folder / case.rng.choice(["m.onnx", "m.engine", Path(name).name])
    target.write_bytes((case.inputs / name).read_bytes())
    return on_model(case, target)


def on_model(case: Case, model: Path) -> list[object]:
    data = case.put("d.npz")
    both = ["--data", data, "--calib-data", data]
    commands: list[list[object]] = [
        ["export", model, *case.output],
        ["calibrate", model, "--data", data, "-n", IMAGES, *case.output],
        ["eval", model, "--data", data, "--threads", 1],
        ["lint", model],
        ["inspect", model],
        ["inspect", model, "--audit"],
        ["bench", model, *BENCH],
        ["diff", model, case.inputs / "q.onnx"],
        ["package", model, "-o", case.folder / "repository"],
        ["ladder", model, *both, "-n", IMAGES, "--threads", 1],
    ]
    if (case.inputs / "e.engine").exists():
        commands.append(["build-engine", model, "--backend", "tensorrt-rtx", *case.output])
    return case.choose(*commands)


def engine(case: Case) -> list[object]:
    path, data = case.put("e.engine", damage), case.put("d.npz")
    return case.choose(
        ["inspect", path],
        ["inspect", path, "--plan", case.inputs / "q.onnx"],
        ["eval", path, "--data", data],
        ["bench", path, *BENCH],
        ["package", path, "-o", case.folder / "repository"],
    )


def sidecar(case: Case) -> list[object]:
    name = case.rng.choice(["f.onnx", "q.onnx"])
    case.put(f"{name}.json", damage)
    return on_model(case, case.put(name))


def record(case: Case) -> list[object]:
    """Damage the record of a run, or the report of one of its stages."""
    shutil.copytree(case.inputs / "run", case.folder / "run")
    names = ["run.json"] * 3 + ["calibrate.json", "report.json", "eval.json", "diagnosis.json"]
    case.put(f"run/{case.rng.choice(names)}", case.rng.choice([damage, *[damage_json] * 3]))
    good_run, run = case.inputs / "run", case.folder / "run"
    return case.choose(
        ["report", run, "-o", case.folder / "r.html"],
        ["diff", run, good_run],
        ["diff", good_run, run],
        ["ladder", run, "--limit", 4],
        ["replay", run],
    )


KINDS = {
    make.__name__: make
    for make in (checkpoint, arrays, images, onnx_bytes, onnx_graph, other_kind, engine, sidecar)
} | {"record": record}


# What must hold ----------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every file below a folder, including hidden and temporary files."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def problems_of(
    arguments: list[object], result: Result, before: object, after: object
) -> list[str]:
    """Return what a command did wrong."""
    problems = []
    raised = result.exception
    if raised is not None and not isinstance(raised, SystemExit):
        lines = traceback.format_exception(raised)
        return [f"traceback: {''.join(lines[-3:])}"]
    if result.exit_code not in (0, 1):
        problems.append(f"exit status {result.exit_code}")
    findings = arguments[0] in ("lint", "replay") and not result.stderr  # status 1 is no error
    if result.exit_code == 1 and not findings:
        lines = result.stderr.splitlines()
        notes = lines[:-1] if arguments[0] == "build-engine" else []  # messages of TensorRT
        if lines[len(notes) :] != lines[-1:] or not lines[-1].startswith("error: "):
            problems.append(f"not one line on stderr: {result.stderr}")
        if result.stdout:
            problems.append(f"stdout: {result.stdout}")
    if result.exit_code and after != before:
        problems.append("files were left or changed")
    if any(name.endswith(".part") for name in after):  # type: ignore[attr-defined]
        problems.append("a temporary file was left")
    return problems


def run_case(inputs: Path, folder: Path, kind: str, seed: str) -> dict[str, object]:
    """Run one case in an empty folder."""
    folder.mkdir()
    case = Case(inputs, folder, random.Random(seed))
    arguments = KINDS[kind](case)
    say({"case": seed, "arguments": [str(a) for a in arguments]})
    before = contents(folder)
    result = reptrt(arguments)
    problems = problems_of(arguments, result, before, contents(folder))
    shutil.rmtree(folder)
    return {"case": seed, "exit": result.exit_code, "problems": problems}


def say(content: dict[str, object]) -> None:
    """Write a line without buffering, so that the reader knows in which case a crash happened."""
    os.write(3, (json.dumps(content) + "\n").encode())


def fuzz(folder: Path, seed: str, kinds: dict[str, int]) -> None:
    """Make inputs and run cases."""
    inputs = folder / "inputs"
    if not inputs.exists():
        inputs.mkdir()
        make_inputs(inputs)
    for kind, number in kinds.items():
        if kind == "engine" and not (inputs / "e.engine").exists():
            continue
        for index in range(number):
            say(run_case(inputs, folder / "case", kind, f"{kind} {seed} {index}"))
    say({"finished": True})


if __name__ == "__main__":
    asked = [argument.split("=") for argument in sys.argv[3:]]
    fuzz(Path(sys.argv[1]), sys.argv[2], {kind: int(number) for kind, number in asked})
