"""Engine files: what is said of a bad one before TensorRT gets to see it."""

import importlib.util
import sys

import pytest

from reptrt.core.artifacts import write_artifact
from reptrt.core.errors import ArtifactError, EngineError
from reptrt.trt import driver
from reptrt.trt.build import build_engine
from reptrt.trt.driver import Gpu
from reptrt.trt.file import open_engine, read_header
from reptrt.trt.options import BuildOptions
from tests.support.engines import write_fake_engine
from tests.support.fake_tensorrt import API, FakeTensorrt, plan_of
from tests.support.qdq_graphs import qdq_model, save

needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed"
)
ADA = Gpu("NVIDIA GeForce RTX 4090", "sm89", (12, 8))


def install(monkeypatch, release, gpu=ADA):
    fake = FakeTensorrt(release)
    monkeypatch.setitem(sys.modules, fake.__name__, fake)
    monkeypatch.setattr(driver, "find_gpu", lambda: gpu)
    return fake


def engine_of(fake, path, **options):
    """Write an engine with the sidecar that build-engine writes."""
    return write_fake_engine(path, plan_of(fake), options=BuildOptions(**options))


@pytest.fixture(scope="module")
def real_engine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engine")
    source = save(qdq_model(), folder / "net.onnx")
    build_engine(source, folder / "net.engine", BuildOptions("tensorrt-rtx", targets=("sm89",)))
    return folder / "net.engine"


@needs_rtx
def test_header_of_a_real_engine(real_engine):
    import tensorrt_rtx

    header = read_header(real_engine)
    assert header.label == f"tensorrt-rtx {tensorrt_rtx.__version__}"
    assert header.size == real_engine.stat().st_size


@needs_rtx
@pytest.mark.parametrize("keep", [28, 1000, -1], ids=["header", "start", "all but one byte"])
def test_truncated_engine(real_engine, tmp_path, keep):
    path = tmp_path / "cut.engine"
    path.write_bytes(real_engine.read_bytes()[:keep])
    with pytest.raises(
        EngineError, match=r"cut\.engine: \d+ bytes, its header says \d+: truncated"
    ):
        read_header(path)


@needs_rtx
def test_an_engine_that_changed_after_it_was_written(real_engine, tmp_path):
    path = tmp_path / "net.engine"
    content = bytearray(real_engine.read_bytes())
    write_artifact(path, bytes(content), artifact="engine", parents={}, options={})
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match="its sidecar says"), open_engine(path):
        pass


@pytest.mark.parametrize(
    ("content", "error", "expected"),
    [
        (b"", EngineError, r"not a TensorRT engine \(it starts with b''"),
        (b"\x08\x08\x12\x07pytorch", EngineError, "not a TensorRT engine"),
        (b"ftrt", EngineError, "not a TensorRT engine"),
        (None, ArtifactError, "does not exist; check the path"),
    ],
    ids=["empty", "onnx", "four bytes", "missing"],
)
def test_files_that_are_no_engines(tmp_path, content, error, expected):
    path = tmp_path / "m.engine"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(error, match=expected):
        read_header(path)


@pytest.mark.parametrize("release", API, ids=str)
def test_engines_of_every_release_open(monkeypatch, tmp_path, release):
    fake = install(monkeypatch, release)
    with open_engine(engine_of(fake, tmp_path / "m.engine")) as opened:
        assert opened.backend.label == opened.header.label == release.replace("-1", " 1", 1)
    assert not fake.called("Runtime.engine_host_code_allowed")


def test_without_a_gpu_nothing_of_tensorrt_is_touched(monkeypatch, tmp_path):
    fake = install(monkeypatch, "tensorrt-11.4.0.106", gpu="no NVIDIA driver on this machine")
    path = engine_of(fake, tmp_path / "m.engine")
    expected = r"m\.engine: using an engine needs an NVIDIA GPU: no NVIDIA driver on this machine"
    with pytest.raises(EngineError, match=expected), open_engine(path):
        pass
    assert fake.calls == []


def test_an_engine_of_another_version(monkeypatch, tmp_path):
    path = engine_of(FakeTensorrt("tensorrt-10.12.0.36"), tmp_path / "m.engine")
    install(monkeypatch, "tensorrt-10.16.1.11")
    expected = (
        r"built by tensorrt 10\.12\.0\.36, this is tensorrt 10\.16\.1\.11; build it again here, "
        "or version compatible there"
    )
    with pytest.raises(EngineError, match=expected), open_engine(path):
        pass


@pytest.mark.parametrize(
    ("built", "here", "runs"),
    [
        ("tensorrt-10.12.0.36", "tensorrt-10.16.1.11", True),
        ("tensorrt-10.16.1.11", "tensorrt-10.12.0.36", False),
        ("tensorrt-10.12.0.36", "tensorrt-11.4.0.106", False),
    ],
    ids=["later", "earlier", "next major"],
)
def test_version_compatible_engines(monkeypatch, tmp_path, built, here, runs):
    path = engine_of(FakeTensorrt(built), tmp_path / "m.engine", version_compatible=True)
    fake = install(monkeypatch, here)
    if runs:
        with open_engine(path):
            pass
        assert fake.called("Runtime.engine_host_code_allowed") == [(True,)]
    else:
        with pytest.raises(EngineError, match="build it again here"), open_engine(path):
            pass


@pytest.mark.parametrize(
    ("built", "here", "opens"),
    [
        ("tensorrt-10.12.0.36", "tensorrt-10.16.1.11", True),
        ("tensorrt-10.16.1.11", "tensorrt-10.12.0.36", False),
        ("tensorrt-10.12.0.36", "tensorrt-11.4.0.106", False),
    ],
    ids=["later: TensorRT decides", "earlier", "next major"],
)
def test_another_version_without_a_sidecar(monkeypatch, tmp_path, built, here, opens):
    path = tmp_path / "m.engine"
    path.write_bytes(plan_of(FakeTensorrt(built)))
    fake = install(monkeypatch, here)
    if opens:
        with open_engine(path):
            pass
    else:
        expected = rf"built by {built.replace('-', ' ', 1)}, this is {here.replace('-', ' ', 1)}; "
        with pytest.raises(EngineError, match=expected), open_engine(path):
            pass
    assert bool(fake.called("Runtime.deserialize_cuda_engine")) == opens


@pytest.mark.parametrize(
    ("target", "options", "runs"),
    [
        ("sm89", {}, True),
        ("sm86", {}, False),
        ("sm86", {"hardware_compatible": "ampere+"}, True),
        ("sm75", {"hardware_compatible": "ampere+"}, False),
        ("sm86", {"hardware_compatible": "same-compute-capability"}, False),
    ],
    ids=["same", "other", "ampere+", "before ampere", "same capability only"],
)
def test_an_engine_of_another_gpu(monkeypatch, tmp_path, target, options, runs):
    fake = install(monkeypatch, "tensorrt-11.4.0.106", Gpu("This GPU", target, (12, 8)))
    path = engine_of(fake, tmp_path / "m.engine", **options)
    if runs:
        with open_engine(path):
            pass
    else:
        expected = rf"built for .*, this GPU \(This GPU\) is {target}; build it again"
        with pytest.raises(EngineError, match=expected), open_engine(path):
            pass


@pytest.mark.parametrize(
    ("target", "advice"),
    [
        ("sm89", "build it again for target sm89"),
        ("sm90", r"runs on sm75, sm80, .*, sm121 only: build it here with backend tensorrt"),
    ],
)
def test_what_tensorrt_rtx_calls_invalid_is_said_in_words(monkeypatch, tmp_path, target, advice):
    gpu = Gpu("This GPU", target, (12, 8))
    fake = install(monkeypatch, "tensorrt-rtx-1.7.1.116", gpu)
    fake.validity = ("INVALID", 2 | 4)
    path = engine_of(fake, tmp_path / "m.engine")
    expected = "not built for this GPU, the NVIDIA driver is too old; .*" + advice
    with pytest.raises(EngineError, match=expected), open_engine(path):
        pass
    assert not fake.called("Runtime.deserialize_cuda_engine")


@pytest.mark.parametrize("release", API, ids=str)
def test_the_reason_of_a_refusal_is_quoted(monkeypatch, tmp_path, release):
    fake = install(monkeypatch, release)
    fake.refuses_engine = "Error Code 1: Serialization (Serialization assertion failed)"
    path = tmp_path / "m.engine"
    path.write_bytes(plan_of(fake))
    with (
        pytest.raises(EngineError, match=r"refuses this engine.*assertion failed"),
        open_engine(path),
    ):
        pass


def test_a_driver_too_old_for_tensorrt(monkeypatch, tmp_path):
    fake = install(monkeypatch, "tensorrt-11.4.0.106")

    def no_runtime(logger):
        severity = fake.ILogger.Severity
        logger.log(severity.ERROR, "CUDA initialization failure with error: 35")
        raise TypeError("pybind11::init(): factory function returned nullptr")

    monkeypatch.setattr(fake, "Runtime", no_runtime)
    path = tmp_path / "m.engine"
    path.write_bytes(plan_of(fake))
    expected = "does not start: CUDA initialization failure with error: 35; update the NVIDIA"
    with pytest.raises(EngineError, match=expected), open_engine(path):
        pass
