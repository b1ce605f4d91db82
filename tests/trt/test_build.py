"""Engine builds: real ones through tensorrt-rtx, API use of the others through recorded names."""

import importlib.util
import json
import logging
import re
import signal
import subprocess
import sys
import threading
from dataclasses import asdict

import numpy as np
import onnx
import pytest
from onnx import helper

from reptrt.core.artifacts import read_sidecar, sha256_of, sidecar_path, write_artifact
from reptrt.core.errors import ArtifactError, ConfigError, EngineError
from reptrt.graph.preprocess import Preprocess
from reptrt.trt import binding, driver
from reptrt.trt.build import TensorInfo, build_engine
from reptrt.trt.details import read_engine_record
from reptrt.trt.driver import Gpu
from reptrt.trt.options import BuildOptions, parse_shapes
from reptrt.trt.rtx_plan import layers_of_plan
from tests.support.fake_tensorrt import API, FULL_RELEASES, FakeTensorrt
from tests.support.qdq_graphs import model_of, qdq_model, save

needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed"
)
no_gpu = pytest.mark.skipif(
    isinstance(driver.find_gpu(), Gpu), reason="states what happens without a GPU"
)
RTX = BuildOptions(backend="tensorrt-rtx", targets=("sm89",))


@pytest.fixture
def source(tmp_path):
    return save(qdq_model(), tmp_path / "net.int8.onnx")


@pytest.fixture
def output(tmp_path):
    return tmp_path / "net.engine"


def files(folder):
    return {path.name for path in folder.iterdir()}


# --- real builds -----------------------------------------------------------------------------


@needs_rtx
@pytest.mark.parametrize("target", ["sm80", "sm86", "sm89", "sm120"])
def test_builds_int8_for_every_target(source, output, target):
    summary = build_engine(source, output, BuildOptions("tensorrt-rtx", targets=(target,)))

    assert output.stat().st_size == summary.details.size_bytes > 0
    assert summary.sha256 == sha256_of(output)
    assert summary.details.targets == (target,)
    assert summary.details.int8_layers == ("conv0", "conv1")
    assert summary.details.inputs == (TensorInfo("input", (-1, 3, 8, 8), "FLOAT"),)
    assert summary.details.outputs == (TensorInfo("logits", (-1, 16, 1, 1), "FLOAT"),)
    assert summary.to_dict()["profile"] == {"input": "1x3x8x8:8x3x8x8:64x3x8x8"}
    json.dumps(summary.to_dict())


@needs_rtx
def test_several_targets_in_one_engine(source, output):
    targets = ("sm80", "sm86", "sm89", "sm120")
    summary = build_engine(source, output, BuildOptions("tensorrt-rtx", targets=targets))
    assert summary.details.targets == targets


@needs_rtx
def test_a_build_can_be_repeated(source, tmp_path):
    """The bytes may differ (names of temporaries in the plan); what is built does not."""
    found = []
    for name in "ab":
        path = tmp_path / f"{name}.engine"
        build_engine(source, path, RTX)
        sidecar = json.loads(sidecar_path(path).read_text())
        del sidecar["sha256"]
        launches = [(x.name, x.precision, x.origin) for x in layers_of_plan(path.read_bytes(), "")]
        found.append((sidecar, launches))
    assert found[0] == found[1]


@needs_rtx
def test_sidecar_says_what_was_built_and_from_what(source, output):
    options = BuildOptions(
        backend="tensorrt-rtx", targets=("sm89",), shapes=parse_shapes("1:2:4"), workspace_mib=64
    )
    summary = build_engine(source, output, options)
    sidecar = read_sidecar(output)

    assert sidecar is not None
    assert sidecar.artifact == "engine"
    assert sidecar.parents == {source.name: sha256_of(source)}
    assert sidecar.options["shapes"] == "1:2:4"
    assert sidecar.options["workspace_mib"] == 64
    assert "tensorrt-rtx" in sidecar.versions
    assert sidecar.details["backend"] == "tensorrt-rtx"
    assert sidecar.details["backend_version"] == summary.details.backend_version
    assert sidecar.details["profile"] == {"input": "1x3x8x8:2x3x8x8:4x3x8x8"}
    assert sidecar.details["int8_layers"] == ["conv0", "conv1"]
    assert sidecar.details["num_layers"] == summary.details.num_layers > 2


@needs_rtx
def test_preprocessing_travels_with_the_engine(tmp_path, output):
    model = qdq_model()
    preprocess = Preprocess(3, 8, 8, (0.1, 0.2, 0.3), (1.0, 1.0, 1.0), "crop")
    stored = json.dumps(asdict(preprocess))
    helper.set_model_props(model, {"reptrt.preprocess": stored})
    build_engine(save(model, tmp_path / "m.onnx"), output, RTX)
    assert read_sidecar(output).details["preprocess"] == json.loads(stored)
    assert read_engine_record(output).details.preprocess == preprocess


@needs_rtx
def test_damaged_preprocessing_is_found_before_the_build(tmp_path, output):
    model = qdq_model()
    helper.set_model_props(model, {"reptrt.preprocess": json.dumps({"mean": [0.5]})})
    path = save(model, tmp_path / "m.onnx")
    assert_refused(path, output, RTX, ArtifactError, "metadata reptrt.preprocess: not what reptrt")


@needs_rtx
def test_a_fixed_batch_needs_no_profile(tmp_path, output):
    summary = build_engine(save(qdq_model(batch=4), tmp_path / "m.onnx"), output, RTX)
    assert summary.details.profile == {}
    assert summary.details.inputs[0].shape == (4, 3, 8, 8)


@needs_rtx
def test_only_layers_with_both_sides_quantized_are_planned_int8(tmp_path, output):
    model = qdq_model()
    conv1 = next(node for node in model.graph.node if node.name == "conv1")
    conv1.input[0] = "r0"  # past its Q/DQ
    summary = build_engine(save(model, tmp_path / "m.onnx"), output, RTX)
    assert summary.details.int8_layers == ("conv0",)


@needs_rtx
def test_log_line_has_seconds_and_size(source, output, caplog):
    caplog.set_level(logging.INFO, "reptrt")
    build_engine(source, output, RTX)
    expected = (
        rf"build-engine  {output}  tensorrt-rtx 1\.\S+  sm89  \d+ layers, 2 planned INT8, "
        r"rest fp16 \(\d+ nodes converted\)  [\d.]+ MiB  [\d.]+ s"
    )
    assert re.fullmatch(expected, caplog.messages[-1])


@needs_rtx
def test_options_without_effect_are_said(source, output, tmp_path, caplog):
    options = BuildOptions("tensorrt-rtx", timing_cache=tmp_path / "t", optimization_level=5)
    summary = build_engine(source, output, options)
    assert summary.details.without_effect == ("timing_cache", "optimization_level")
    assert not (tmp_path / "t").exists()
    warned = [r.message for r in caplog.records if r.levelno == logging.WARNING]
    assert [line.split(":")[0] for line in warned] == [
        "option timing_cache has no effect",
        "option optimization_level has no effect",
    ]


# --- what is refused: one line, nothing written ----------------------------------------------


def assert_refused(source, output, options, error, expected):
    before = files(output.parent)
    with pytest.raises(error, match=expected) as caught:
        build_engine(source, output, options)
    assert "\n" not in str(caught.value)
    assert files(output.parent) == before


def one_node(op, **attributes):
    node = helper.make_node(op, ["input"], ["y"], name="the_node", **attributes)
    return model_of([node], ["N", 3, 8, 8], ["N", 3, 8, 8])


def runtime_scale():
    model = qdq_model()
    largest = helper.make_node("ReduceMax", ["input"], ["largest"], name="max", keepdims=0)
    model.graph.node[0].input[1] = "largest"
    model.graph.node.insert(0, largest)
    return model


def q_linear_conv():
    codes, scale = ["s", "zero"], {"s": np.float32(0.1), "zero": np.int8(0)}
    nodes = [
        helper.make_node("QuantizeLinear", ["input", *codes], ["q"], name="q"),
        helper.make_node("QLinearConv", ["q", *codes, "w", *codes, *codes], ["c"], name="qconv"),
        helper.make_node("DequantizeLinear", ["c", *codes], ["y"], name="dq"),
    ]
    weight = {"w": np.ones((4, 3, 3, 3), np.int8)}
    return model_of(nodes, ["N", 3, 8, 8], ["N", 4, 6, 6], scale | weight)


@needs_rtx
@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (qdq_model(zero_point=np.int8(3)), r"node q0 \(QuantizeLinear\): .*zero point"),
        (qdq_model(zero_point=np.uint8(128)), r"node q0 \(QuantizeLinear\): its codes are UINT8"),
        (qdq_model(zero_point=np.uint8(0)), r"node q0 \(QuantizeLinear\): its codes are UINT8"),
        (qdq_model(zero_point=None), r"node q0 \(QuantizeLinear\): its codes are UINT8"),
        (runtime_scale(), r"node q0 \(QuantizeLinear\): its scale is computed at run time"),
        (q_linear_conv(), r"node qconv \(QLinearConv\): the operator is not supported"),
        (one_node("StringNormalizer"), r"node the_node \(StringNormalizer\)"),
    ],
    ids=["zero point", "uint8 128", "uint8 0", "no zero point", "scale", "QLinearConv", "operator"],
)
def test_graphs_that_tensorrt_cannot_take(tmp_path, output, model, expected, monkeypatch):
    monkeypatch.setattr(onnx.checker, "check_model", lambda *args, **kwargs: None)
    assert_refused(save(model, tmp_path / "m.onnx"), output, RTX, EngineError, expected)


@needs_rtx
def test_a_scale_computed_from_constants_builds(tmp_path, output):
    model = qdq_model()
    half = helper.make_node("Add", ["scale", "scale"], ["sum"], name="add")
    model.graph.node[0].input[1] = "sum"
    model.graph.node.insert(0, half)
    assert build_engine(save(model, tmp_path / "m.onnx"), output, RTX).path == output


@needs_rtx
def test_the_builders_own_reason_is_quoted(source, output):
    options = BuildOptions("tensorrt-rtx", targets=("sm89",), workspace_mib=1)
    expected = r"built no engine: .*workspace limit.*; workspace_mib: 1 MiB may be too small"
    assert_refused(source, output, options, EngineError, expected)
    assert_refused(source, output, options, EngineError, expected)  # heard a second time too


@needs_rtx
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"targets": ("sm90",)}, r"targets='sm90': .* builds for sm75, sm80, .*sm120, sm121 only"),
        ({"version_compatible": True}, "version_compatible: .*backend='tensorrt'"),
        ({"hardware_compatible": "ampere+"}, "hardware_compatible: .*targets instead"),
        ({"shapes": parse_shapes("1x3x9x9")}, r"shapes=.* does not fit input input"),
    ],
    ids=["target", "version", "hardware", "shapes"],
)
def test_options_that_rtx_cannot_follow(source, output, options, expected):
    assert_refused(source, output, BuildOptions("tensorrt-rtx", **options), ConfigError, expected)


@needs_rtx
@no_gpu
@pytest.mark.parametrize("option", ["refit", "strip_plan"])
def test_rtx_refits_only_with_a_driver(source, output, option):
    options = BuildOptions("tensorrt-rtx", **{option: True})
    assert_refused(source, output, options, ConfigError, "only on a machine with an NVIDIA driver")


@needs_rtx
def test_pinned_tactics_need_a_backend_that_measures(source, output, tmp_path):
    options = BuildOptions("tensorrt-rtx", timing_cache=tmp_path / "t", pinned_tactics=True)
    assert_refused(source, output, options, ConfigError, "pinned_tactics: .*measures no tactics")


@needs_rtx
def test_a_simulation_is_refused(tmp_path, output):
    model = qdq_model()
    helper.set_model_props(model, {"reptrt.simulation": "activations of 6 bits"})
    path = save(model, tmp_path / "m.onnx")
    expected = r"a simulation, no engine can run it \(activations of 6 bits\)"
    assert_refused(path, output, RTX, EngineError, expected)


@needs_rtx
def test_paths_are_checked_before_the_build(source, tmp_path):
    missing = tmp_path / "none"
    with pytest.raises(ArtifactError, match=r"folder .*none does not exist"):
        build_engine(source, missing / "m.engine", RTX)
    with pytest.raises(ArtifactError, match="is a folder, expected a file name"):
        build_engine(source, tmp_path, RTX)
    with pytest.raises(ArtifactError, match="is the file it would be made from"):
        build_engine(source, source, RTX)
    with pytest.raises(ArtifactError, match=r"nothere\.onnx does not exist"):
        build_engine(tmp_path / "nothere.onnx", tmp_path / "m.engine", RTX)
    options = BuildOptions("tensorrt-rtx", timing_cache=missing / "cache")
    with pytest.raises(ArtifactError, match=r"cache: folder .*none does not exist"):
        build_engine(source, tmp_path / "m.engine", options)


@needs_rtx
def test_truncated_onnx(source, output):
    source.write_bytes(source.read_bytes()[:-100])
    assert_refused(source, output, RTX, ArtifactError, "not a readable ONNX file")


@needs_rtx
def test_a_changed_onnx_is_not_built(source, output, tmp_path):
    content = source.read_bytes()
    path = tmp_path / "m.onnx"
    write_artifact(path, content, artifact="int8-onnx", parents={}, options={})
    path.write_bytes(save(qdq_model(channels=8), tmp_path / "other.onnx").read_bytes())
    assert_refused(path, output, RTX, ArtifactError, "its sidecar says")


@needs_rtx
def test_ctrl_c_ends_the_build_and_leaves_nothing(source, output, monkeypatch):
    make_monitor = binding.make_monitor
    stopped = []

    def pressing_ctrl_c(backend, stop):
        monitor = make_monitor(backend, stop)

        class Pressing(type(monitor)):
            def step_complete(self, phase_name, step):
                if not stopped:
                    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
                    stopped.append(stop.wait(timeout=20))
                return super().step_complete(phase_name, step)

        return Pressing()

    monkeypatch.setattr(binding, "make_monitor", pressing_ctrl_c)
    before = files(output.parent)
    with pytest.raises(KeyboardInterrupt):
        build_engine(source, output, RTX)
    assert stopped == [True]
    assert files(output.parent) == before
    assert not [t for t in threading.enumerate() if t.name.startswith("build-engine")]


_PRESSES_CTRL_C = """
import signal, threading
from reptrt.trt import binding
from reptrt.cli import main

make_monitor = binding.make_monitor

def pressing(backend, stop):
    monitor = make_monitor(backend, stop)

    class Pressing(type(monitor)):
        def step_complete(self, phase_name, step):
            if not stop.is_set():
                signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
                stop.wait(20)
            return super().step_complete(phase_name, step)

    return Pressing()

binding.make_monitor = pressing
main()
"""


@needs_rtx
def test_ctrl_c_on_the_command_line_is_one_line_and_exit_130(source, output):
    before = files(output.parent)
    command = ["build-engine", str(source), "-o", str(output), "--backend", "tensorrt-rtx"]
    done = subprocess.run(
        [sys.executable, "-c", _PRESSES_CTRL_C, *command],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "Aborted! No file is half-written.\n"
    assert files(output.parent) == before


@needs_rtx
@no_gpu
def test_rtx_builds_for_the_current_gpu_only_where_there_is_one(source, output):
    options = BuildOptions("tensorrt-rtx", targets=("current",))
    expected = "targets='current': there is no GPU to build for "
    assert_refused(source, output, options, ConfigError, expected)


@pytest.mark.parametrize("release", [r for r in API if "rtx" in r])
def test_the_current_gpu_is_named_in_the_sidecar(release, source, output, monkeypatch):
    fake = FakeTensorrt(release)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", fake)
    monkeypatch.setattr(driver, "find_gpu", lambda: Gpu("NVIDIA L4", "sm89", (13, 0)))
    options = BuildOptions("tensorrt-rtx", targets=("current",))
    summary = build_engine(source, output, options)
    assert fake.called("IBuilderConfig.num_compute_capabilities") == [(1,)]
    current = fake.ComputeCapability.CURRENT
    assert fake.called("IBuilderConfig.set_compute_capability") == [(current, 0)]
    assert summary.details.targets == ("sm89",)


@pytest.mark.parametrize("release", [r for r in API if "rtx" in r])
def test_rtx_refuses_a_gpu_that_it_does_not_run_on(release, source, output, monkeypatch):
    """It would build such an engine without a word, and call it invalid when it is loaded."""
    fake = FakeTensorrt(release)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", fake)
    monkeypatch.setattr(driver, "find_gpu", lambda: Gpu("NVIDIA H100", "sm90", (13, 0)))
    current = BuildOptions("tensorrt-rtx", targets=("current",))
    expected = (
        r"targets='current': tensorrt-rtx .* does not run on this GPU \(NVIDIA H100, sm90\), only "
        r"on sm75, sm80, .*; use backend='tensorrt' here, or name the GPU that will run the engine"
    )
    assert_refused(source, output, current, ConfigError, expected)
    named = BuildOptions("tensorrt-rtx", targets=("sm90",))
    expected = r"targets='sm90': .* builds for sm75, sm80, "
    assert_refused(source, output, named, ConfigError, expected)
    assert not fake.called("Builder.build_serialized_network")


# --- tensorrt 10.12+, 11.x: calls by the names that their bindings have -------------------------


@pytest.fixture(params=FULL_RELEASES)
def fake(request, monkeypatch):
    module = FakeTensorrt(request.param)
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    gpu = Gpu("NVIDIA GeForce RTX 4090", "sm89", (12, 8))
    monkeypatch.setattr(driver, "find_gpu", lambda: gpu)
    return module


def test_tensorrt_build_is_strongly_typed_with_a_profile(fake, source, output):
    summary = build_engine(source, output, BuildOptions(shapes=parse_shapes("1:2:4")))

    strong = 1 << int(fake.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    assert fake.called("Builder.create_network") == [(strong,)]
    assert fake.called("IOptimizationProfile.set_shape") == [
        ("input", (1, 3, 8, 8), (2, 3, 8, 8), (4, 3, 8, 8))
    ]
    assert len(fake.called("IBuilderConfig.add_optimization_profile")) == 1
    detailed = fake.ProfilingVerbosity.DETAILED
    assert fake.called("IBuilderConfig.profiling_verbosity") == [(detailed,)]
    assert fake.flags() == set()
    assert summary.details.backend == "tensorrt"
    assert summary.details.targets == ("sm89",)
    assert summary.details.device_memory_bytes == 4096
    assert output.read_bytes()[:4] == b"ftrt"


def test_tensorrt_options_reach_the_builder(fake, source, output):
    options = BuildOptions(
        targets=("sm80", "sm120"),
        workspace_mib=256,
        version_compatible=True,
        hardware_compatible="ampere+",
        refit=True,
        strip_plan=True,
        optimization_level=5,
    )
    build_engine(source, output, options)
    assert fake.flags() == {"VERSION_COMPATIBLE", "REFIT", "STRIP_PLAN"}
    workspace = fake.MemoryPoolType.WORKSPACE
    assert fake.called("IBuilderConfig.set_memory_pool_limit") == [(workspace, 256 << 20)]
    level = fake.HardwareCompatibilityLevel.AMPERE_PLUS
    assert fake.called("IBuilderConfig.hardware_compatibility_level") == [(level,)]
    assert fake.called("IBuilderConfig.builder_optimization_level") == [(5,)]
    assert fake.called("Runtime.engine_host_code_allowed") == [(True,)]


def test_tensorrt_builds_for_its_own_gpu_only(fake, source, output):
    build_engine(source, output, BuildOptions(targets=("sm89",)))
    expected = r"targets='sm80': .*GPU of this machine \(NVIDIA .* 4090, sm89\) only; .*rtx"
    with pytest.raises(ConfigError, match=expected):
        build_engine(source, output, BuildOptions(targets=("sm80",)))
    turing = BuildOptions(targets=("sm75",), hardware_compatible="ampere+")
    with pytest.raises(ConfigError, match="targets='sm75'"):
        build_engine(source, output, turing)


@pytest.mark.slow
def test_the_current_gpu_is_that_of_tensorrt_anyway(fake, source, output):
    assert build_engine(source, output, BuildOptions(targets=("current",))).details.targets == (
        "sm89",
    )


def test_ampere_engines_need_an_ampere_gpu(fake, source, output, monkeypatch):
    monkeypatch.setattr(driver, "find_gpu", lambda: Gpu("Tesla T4", "sm75", (12, 8)))
    options = BuildOptions(hardware_compatible="ampere+")
    with pytest.raises(ConfigError, match=r"Tesla T4 is sm75, before sm80"):
        build_engine(source, output, options)


def test_tensorrt_without_a_gpu(fake, source, output, monkeypatch):
    def no_builder(logger):
        raise TypeError("pybind11::init(): factory function returned nullptr")

    monkeypatch.setattr(fake, "Builder", no_builder)
    monkeypatch.setattr(driver, "find_gpu", lambda: "no NVIDIA driver on this machine")
    options = BuildOptions(backend="tensorrt")
    expected = r"tensorrt 1\d\S* does not start: no NVIDIA driver on this machine; .*tensorrt-rtx"
    assert_refused(source, output, options, EngineError, expected)


def test_a_driver_too_old_to_build_with(fake, source, output, monkeypatch):
    def no_builder(logger):
        said = "CUDA initialization failure with error: 35. Please check your CUDA installation"
        logger.log(fake.ILogger.Severity.ERROR, said)
        raise TypeError("pybind11::init(): factory function returned nullptr")

    monkeypatch.setattr(fake, "Builder", no_builder)
    expected = (
        r"tensorrt 1\d\S* does not start: CUDA .* error: 35\. .*; update the NVIDIA driver, or"
    )
    assert_refused(source, output, BuildOptions(), EngineError, expected)


def test_timing_cache_is_written_and_extended(fake, source, output, tmp_path):
    cache = tmp_path / "timing.cache"
    options = BuildOptions(timing_cache=cache)
    build_engine(source, output, options)
    assert json.loads(cache.read_text()) == {"gpu": "gpu0", "keys": ["conv"]}
    assert fake.flags() == {"EDITABLE_TIMING_CACHE"}

    cache.write_text(json.dumps({"gpu": "gpu0", "keys": ["of another net"]}))
    build_engine(source, output, options)
    assert json.loads(cache.read_text())["keys"] == ["conv", "of another net"]


def test_pinned_tactics_come_from_the_cache_only(fake, source, output, tmp_path):
    cache = tmp_path / "timing.cache"
    pinned = BuildOptions(timing_cache=cache, pinned_tactics=True)
    expected = r"no timing of conv.*; pinned_tactics: build once without it"
    assert_refused(source, output, pinned, EngineError, expected)

    build_engine(source, output, BuildOptions(timing_cache=cache))
    written = cache.read_bytes()
    build_engine(source, output, pinned)
    assert fake.flags() == {"EDITABLE_TIMING_CACHE", "ERROR_ON_TIMING_CACHE_MISS"}
    assert cache.read_bytes() == written


@pytest.mark.parametrize("content", [b"garbage", b'{"gpu": "other", "keys": []}'])
def test_a_timing_cache_of_something_else_is_refused(fake, source, output, tmp_path, content):
    cache = tmp_path / "timing.cache"
    cache.write_bytes(content)
    options = BuildOptions(timing_cache=cache)
    assert_refused(source, output, options, EngineError, r"timing\.cache: not a timing cache of")
    assert cache.read_bytes() == content


def test_cancelled_build_raises_the_interrupt_not_an_error(fake, source, output, monkeypatch):
    def interrupted(backend, stop):
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        stop.wait(20)
        return make_monitor(backend, stop)

    make_monitor = binding.make_monitor
    monkeypatch.setattr(binding, "make_monitor", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build_engine(source, output, BuildOptions())
    assert not output.exists()
