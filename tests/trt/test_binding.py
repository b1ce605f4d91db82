"""The loader: which TensorRT it takes, what it says when there is none, what it detects."""

import re
import subprocess
import sys

import pytest

from reptrt.core.errors import ConfigError, MissingDependencyError
from reptrt.trt import driver
from reptrt.trt.binding import load
from reptrt.trt.driver import Gpu
from tests.support.fake_tensorrt import API, FakeTensorrt

RTX_RELEASES = [release for release in API if release.startswith("tensorrt-rtx")]
GPU = Gpu("Fake GPU", "sm89", (12, 8))


def install(monkeypatch, tensorrt=None, tensorrt_rtx=None, gpu=GPU):
    """Make exactly these modules importable; None blocks one."""
    monkeypatch.setitem(sys.modules, "tensorrt", tensorrt)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", tensorrt_rtx)
    monkeypatch.setattr(driver, "find_gpu", lambda: gpu)


@pytest.mark.parametrize("release", API, ids=str)
def test_features_of_every_release(monkeypatch, release):
    fake = FakeTensorrt(release)
    install(monkeypatch, **{fake.__name__: fake})

    backend = load("auto")

    rtx = "rtx" in release
    assert backend.name == ("tensorrt-rtx" if rtx else "tensorrt")
    assert backend.label == f"{backend.name} {fake.__version__}"
    assert backend.features.builds_without_gpu is rtx
    assert backend.features.timing_cache is not rtx
    assert backend.features.pinned_tactics is not rtx
    assert backend.features.version_compatible is not rtx
    assert backend.features.cuda_graph_strategy is rtx
    assert backend.features.engine_validity is rtx
    assert ("sm89" in backend.features.targets) is rtx
    assert ("ampere+" in backend.features.hardware_compatibility) is not rtx


def test_targets_are_in_numeric_order(monkeypatch):
    install(monkeypatch, tensorrt_rtx=FakeTensorrt("tensorrt-rtx-1.7.1.116"))
    assert load().features.targets == ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121")


@pytest.mark.parametrize(
    ("gpu", "expected"),
    [(GPU, "tensorrt"), ("no NVIDIA driver", "tensorrt-rtx")],
    ids=["gpu", "no gpu"],
)
def test_auto_takes_tensorrt_only_where_it_can_build(monkeypatch, gpu, expected):
    full, rtx = FakeTensorrt("tensorrt-11.4.0.106"), FakeTensorrt("tensorrt-rtx-1.7.1.116")
    install(monkeypatch, full, rtx, gpu)
    assert load("auto").name == expected
    assert load("tensorrt").name == "tensorrt"
    assert load("tensorrt-rtx").name == "tensorrt-rtx"


def test_auto_takes_the_other_when_one_is_too_old(monkeypatch):
    old = FakeTensorrt("tensorrt-10.12.0.36")
    old.__version__ = "10.11.0.33"
    install(monkeypatch, old, FakeTensorrt("tensorrt-rtx-1.4.0.76"))
    assert load("auto").name == "tensorrt-rtx"


def test_without_any_it_says_what_to_install(monkeypatch):
    install(monkeypatch)
    with pytest.raises(MissingDependencyError) as caught:
        load("auto")
    assert re.fullmatch(
        r"no TensorRT \(tensorrt is not installed; tensorrt_rtx is not installed\): pip install "
        r"'reptrt\[gpu\]' on a machine with an NVIDIA GPU, or pip install 'reptrt\[rtx\]' .*",
        str(caught.value),
    )


def test_too_old_is_said_with_both_versions(monkeypatch):
    old = FakeTensorrt("tensorrt-10.12.0.36")
    old.__version__ = "10.9.0.34"
    install(monkeypatch, old)
    expected = r"tensorrt 10\.9\.0\.34 is too old, expected 10\.12 or newer.*pip install"
    with pytest.raises(MissingDependencyError, match=expected):
        load("tensorrt")


def test_bindings_without_their_libraries(monkeypatch, tmp_path):
    (tmp_path / "tensorrt.py").write_text(
        "raise ImportError('libnvinfer.so.11: cannot open shared object file')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    with pytest.raises(MissingDependencyError, match=r"its libraries are not: libnvinfer\.so\.11"):
        load("tensorrt")


def test_a_module_of_that_name_which_is_not_tensorrt(monkeypatch, tmp_path):
    (tmp_path / "tensorrt.py").write_text("__version__ = '99.0'\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    with pytest.raises(MissingDependencyError, match="not a complete TensorRT"):
        load("tensorrt")
    monkeypatch.delitem(sys.modules, "tensorrt")


def test_unknown_backend_names_the_known_ones():
    with pytest.raises(
        ConfigError, match=r"got 'trt', expected one of auto, tensorrt, tensorrt-rtx"
    ):
        load("trt")


def test_importing_the_loader_imports_no_tensorrt():
    found = "[m for m in sys.modules if m.startswith('tensorrt')]"
    code = f"import sys, reptrt.trt.binding; print({found})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
