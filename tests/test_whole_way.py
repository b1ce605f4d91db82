"""Random rep-nets the whole way: torch -> export -> calibrate -> lint, onnxruntime, torch, eval."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, Phase, given, reject, settings
from hypothesis import strategies as st
from onnx import numpy_helper
from PIL import Image
from torch import nn

from reptrt.core.artifacts import read_sidecar, sha256_of
from reptrt.core.metrics import sqnr_db
from reptrt.execute.runner import OrtRunner
from reptrt.execute.torch_runner import graph_runner
from reptrt.graph.net import net_from_model, read_model
from reptrt.judge.evaluate import evaluate
from reptrt.judge.options import EvaluateOptions
from reptrt.linter import lint
from reptrt.pipeline import CalibrateOptions, ExportOptions, Source, calibrate, export
from reptrt.quantize.calib.options import ThresholdOptions
from tests.support.helpers import ort_run
from tests.support.lint_graphs import rules
from tests.support.random_nets import SIZE, BlockPlan, Plan, plans

IMAGES = 32
CPU = torch.device("cpu")

# Rounding to steps of amax / 127 leaves 53 dB - 20 log10(amax / rms); amax is 3 to 6 rms here. The
# errors of weights and activations of at most five layers add up: 10 dB less. KL clips, and a net
# that ends in a global maximum reads just what was clipped: it shall stay far from noise.
FLOORS_DB = {"max": 30.0, "kl": 12.0}


@dataclass(frozen=True)
class Way:
    """How a net gets into the pipeline and out of it."""

    weights: str | None  # form of the checkpoint; None: the factory has the weights
    data: str  # "npz" | "folder"
    rule: str  # of thresholds

    @property
    def options(self) -> CalibrateOptions:
        threshold = ThresholdOptions(self.rule)  # type: ignore[arg-type]
        return CalibrateOptions(images=IMAGES, recipe="fast", threshold=threshold)


WAYS = st.builds(
    Way,
    st.sampled_from([None, "plain", "wrapped", "data parallel", "safetensors"]),
    st.sampled_from(["npz", "folder"]),
    st.sampled_from(list(FLOORS_DB)),
)


@pytest.fixture(scope="module", autouse=True)
def same_path_afterwards() -> Iterator[None]:
    """Importing a factory makes the modules beside it importable; only for these tests."""
    before = list(sys.path)
    yield
    sys.path[:] = before


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], Path]:
    """The same smooth images with some grain, as arrays and as files, by number of channels."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    found = {}
    for channels in (1, 3):
        coarse = rng.integers(0, 256, (IMAGES, channels, 3, 3))
        smooth = np.kron(coarse, np.ones((1, 1, 3, 3)))[:, :, :SIZE, :SIZE]
        x = (smooth + rng.normal(0, 20, smooth.shape)).clip(0, 255).astype(np.uint8)
        np.savez(folder / f"{channels}.npz", x=x)
        found["npz", channels] = folder / f"{channels}.npz"
        found["folder", channels] = folder / f"{channels}"
        found["folder", channels].mkdir()
        for index, pixels in enumerate(x):
            image = Image.fromarray(pixels[0] if channels == 1 else pixels.transpose(1, 2, 0))
            image.save(folder / f"{channels}" / f"{index:02d}.png")
    return found


def inputs(data: dict[tuple[str, int], Path], plan: Plan) -> np.ndarray:
    """What the net is to see of the images: p / 255, mean 0 and std 1."""
    with np.load(data["npz", plan.channels]) as members:
        return members["x"].astype(np.float32) / np.float32(255)


def source_of(plan: Plan, way: Way, folder: Path) -> Source:
    """A factory of the net, or of the same net with other weights and a checkpoint."""
    net, path = plan.build(), folder / "factory_of_a_random_net.py"
    made = plan if way.weights is None else Plan(**{**vars(plan), "seed": plan.seed + 1})
    path.write_text(
        f"from tests.support.random_nets import *\ndef make():\n    return {made!r}.build()\n"
    )
    if way.weights is None:
        return Source(f"{path}:make")
    checkpoint = folder / ("w.safetensors" if way.weights == "safetensors" else "w.pt")
    if way.weights == "safetensors":
        safetensors.torch.save_file(net.state_dict(), checkpoint)
    elif way.weights == "data parallel":
        torch.save({f"module.{k}": v for k, v in net.state_dict().items()}, checkpoint)
    else:
        state = net.state_dict()
        torch.save({"epoch": 3, "model": state} if way.weights == "wrapped" else state, checkpoint)
    return Source(f"{path}:make", checkpoint)


def is_dead(net: nn.Module, x: np.ndarray) -> bool:
    """Whether some activation is 0 on every image; that is a stated failure of calibration."""
    largest: list[float] = []

    def look(module: nn.Module, given: object, output: torch.Tensor) -> None:
        largest.append(float(output.abs().max()))

    for module in net.modules():
        if not list(module.children()):
            module.register_forward_hook(look)
    with torch.no_grad():
        net(torch.from_numpy(x))
    return min(largest) == 0


# Every property is a function of its own ---------------------------------------------------------


def is_the_net(model: onnx.ModelProto, plan: Plan, x: np.ndarray) -> np.ndarray:
    """The file computes what the train-form net computes in float64; return the logits."""
    with torch.no_grad():
        expected = plan.build().double()(torch.from_numpy(x).double()).numpy()
    for batch in (x, x[:1]):
        (got,) = ort_run(model, {"input": batch}).values()
        # float32 sums of a few hundred terms over five layers
        tolerance = 5e-6 * np.abs(expected).max()
        np.testing.assert_allclose(got, expected[: len(batch)], rtol=0, atol=tolerance)
    return expected


def is_fused(model: onnx.ModelProto, plan: Plan) -> None:
    """Every block is one convolution, and nothing is stored that it does not need."""
    ops = [node.op_type for node in model.graph.node]
    assert ops.count("Conv") == len(plan.blocks) + (plan.head == "1x1")
    assert not {"BatchNormalization", "Identity", "Sum"} & set(ops)
    stored = [numpy_helper.to_array(tensor) for tensor in model.graph.initializer]
    parameters = sum(value.size for value in stored if value.ndim and value.dtype.kind == "f")
    assert parameters == plan.fused_parameters
    before = sum(value.numel() for value in plan.build().parameters())
    assert parameters <= before
    if any(block.norm or len(block.kernels) > 1 for block in plan.blocks):
        assert parameters < before


def is_clean(path: Path, layers: int) -> None:
    """The linter finds no error and no warning, and every layer in INT8."""
    report = lint(path)
    assert rules(report) == [], report
    assert report.int8_layers == report.layers == layers


def is_close(path: Path, expected: np.ndarray, x: np.ndarray, floor: float) -> None:
    """onnxruntime takes the Q/DQ graph as it is, and so does torch; both give the same logits."""
    model = read_model(path)
    (plain,) = ort_run(model, {"input": x}, optimize=False).values()
    (simulated,) = graph_runner(net_from_model(model), CPU).run(x).values()
    with OrtRunner(path, threads=1) as runner:
        (judged,) = runner.run(x).values()
        (single,) = runner.run(x[:1]).values()
    assert np.isfinite(plain).all()
    distance = sqnr_db(expected, plain)
    assert distance > floor
    for other in (simulated, judged):
        # Sums in another order fall on the other side between two codes now and then: that is less
        # than that every value is rounded; 3 dB for a net with few images and fewer values.
        assert sqnr_db(plain, other) > max(35.0, distance - 3.0)
    assert sqnr_db(judged[:1], single) > 35


def has_its_origin(float_file: Path, int8_file: Path, source: Source) -> None:
    """Each file names what it was made from."""
    first, second = read_sidecar(float_file), read_sidecar(int8_file)
    assert first is not None
    assert second is not None
    assert first.parents == {path.name: sha256_of(path) for path in source.files}
    assert second.parents[float_file.name] == first.sha256


def evaluation_agrees(files: list[Path], data: Path, floor: float) -> None:
    """`eval` finds the float file identical to itself and the INT8 file within the floor."""
    reference, judged = evaluate(
        files, data, EvaluateOptions(reference=files[0], threads=1)
    ).results
    assert reference.identical
    assert judged.sqnr_db is not None
    assert judged.sqnr_db > floor
    assert (judged.images, judged.identical) == (IMAGES, False)


@pytest.mark.slow
@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=[HealthCheck.too_slow],
)
@given(plan=plans(), way=WAYS)
def test_random_nets_go_the_whole_way(
    plan: Plan,
    way: Way,
    data: dict[tuple[str, int], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    x, images = inputs(data, plan), data[way.data, plan.channels]
    if is_dead(plan.build(), x):
        reject()
    folder = tmp_path_factory.mktemp("way")
    float_file, int8_file = folder / "m.onnx", folder / "m.int8.onnx"
    source = source_of(plan, way, folder)
    exported = export(source, float_file, ExportOptions(input_size=(plan.channels, SIZE, SIZE)))
    fused = read_model(float_file)
    expected = is_the_net(fused, plan, x)
    is_fused(fused, plan)
    assert 0 <= exported.num_parameters - plan.fused_parameters <= 8  # and shapes of Reshapes
    report = calibrate(float_file, images, int8_file, way.options)
    sides = sum(split.form == "coarse-fine" for split in report.splits)
    layers = len(plan.blocks) + 1 + sides  # a side is a convolution of its own
    assert report.layers == layers
    is_clean(int8_file, layers)
    is_close(int8_file, expected, x, FLOORS_DB[way.rule])
    has_its_origin(float_file, int8_file, source)
    evaluation_agrees([float_file, int8_file], images, FLOORS_DB[way.rule])


LINEAR = BlockPlan(outputs=4, kernels=(3, 1), grouped=(1, 1), activation="none")
SCALINGS = BlockPlan(outputs=4, kernels=(1, 1), grouped=(4, 4), activation="relu")


@pytest.mark.parametrize(
    "block", [LINEAR, SCALINGS], ids=["no activation between blocks", "scalings alone"]
)
def test_blocks_that_no_known_net_has(block: BlockPlan, tmp_path: Path) -> None:
    first = BlockPlan(outputs=4, kernels=(3, 1), grouped=(1, 1), activation=block.activation)
    plan = Plan(1, (first, block), "average", 3, 0)
    source = source_of(plan, Way(None, "npz", "max"), tmp_path)
    export(source, tmp_path / "m.onnx", ExportOptions(input_size=(1, SIZE, SIZE)))
    is_fused(read_model(tmp_path / "m.onnx"), plan)
