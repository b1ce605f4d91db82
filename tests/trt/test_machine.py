"""Clocks, load and throttling: read where they can be, None where not."""

import sys
import types
from pathlib import Path

import pytest

from reptrt.trt import driver
from reptrt.trt.driver import Gpu
from reptrt.trt.machine import (
    Conditions,
    GpuState,
    read_conditions,
    read_cpu_mhz,
    read_gpu,
    remarks,
)

GPU = Gpu("NVIDIA A10", "sm86", (12, 8), "0000:01:00.0")


class FakeNvml(types.ModuleType):
    """``pynvml`` of a machine with two GPUs, by the names that nvidia-ml-py has."""

    class NVMLError(Exception):
        pass

    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0

    def __init__(self, bits: int = 4, unsupported: str = "", init: str = "") -> None:
        super().__init__("pynvml")
        self.bits, self.unsupported, self.init = bits, unsupported, init
        self.open = 0

    def nvmlInit(self) -> None:  # noqa: N802
        if self.init:
            raise self.NVMLError(self.init)
        self.open += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.open -= 1

    def nvmlDeviceGetHandleByPciBusId(self, bus_id: str) -> str:  # noqa: N802
        if bus_id not in ("0000:01:00.0", "0000:02:00.0"):
            raise self.NVMLError("Not Found")
        return bus_id

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:  # noqa: N802
        return ("0000:01:00.0", "0000:02:00.0")[index]

    def _answer(self, name: str, handle: str, value: int) -> int:
        if self.unsupported in (name, "all"):
            raise self.NVMLError("Not Supported")
        return value if handle == "0000:01:00.0" else 1

    def nvmlDeviceGetClockInfo(self, handle: str, kind: int) -> int:  # noqa: N802
        return self._answer("clock", handle, {1: 1695, 2: 6251}[kind])

    def nvmlDeviceGetTemperature(self, handle: str, sensor: int) -> int:  # noqa: N802
        return self._answer("temperature", handle, 61)

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:  # noqa: N802
        return self._answer("power", handle, 148_200)

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: str) -> int:  # noqa: N802
        return self._answer("reasons", handle, self.bits)


def install(monkeypatch: pytest.MonkeyPatch, nvml: FakeNvml | None) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", nvml)


def test_this_machine_gives_numbers_or_none() -> None:
    found = read_conditions(gpu=False)
    assert found.gpu is None
    assert found.cpu_mhz is None or 100 < found.cpu_mhz < 10_000
    assert found.load_average is None or found.load_average >= 0


def test_the_clock_of_sysfs_comes_first(tmp_path: Path) -> None:
    assert read_cpu_mhz(tmp_path) is None
    (tmp_path / "proc").mkdir()
    lines = "processor : 0\ncpu MHz\t\t: 2600.5\n\nprocessor : 1\ncpu MHz\t\t: 2400.5\n"
    (tmp_path / "proc/cpuinfo").write_text(lines)
    assert read_cpu_mhz(tmp_path) == 2500.5
    for core, khz in enumerate(["3000000\n", "2000000\n", "unknown"]):
        folder = tmp_path / f"sys/devices/system/cpu/cpu{core}/cpufreq"
        folder.mkdir(parents=True)
        (folder / "scaling_cur_freq").write_text(khz)
    assert read_cpu_mhz(tmp_path) == 2500.0


@pytest.mark.parametrize("bus_id", ["0000:01:00.0", ""], ids=["by bus id", "the first"])
def test_the_state_of_a_gpu(monkeypatch: pytest.MonkeyPatch, bus_id: str) -> None:
    nvml = FakeNvml()
    install(monkeypatch, nvml)
    gpu = Gpu("NVIDIA A10", "sm86", (12, 8), bus_id)
    assert read_gpu(gpu) == GpuState(1695, 6251, 61, 148.2, ("power cap",))
    assert nvml.open == 0


@pytest.mark.parametrize(
    ("bits", "expected"),
    [
        (0x00, ()),
        (0x01, ()),  # idle
        (0x02, ()),  # clocks as an application asked for them
        (0x68, ("hardware slowdown", "temperature (software)", "temperature (hardware)")),
    ],
)
def test_reasons(monkeypatch: pytest.MonkeyPatch, bits: int, expected: tuple[str, ...]) -> None:
    install(monkeypatch, FakeNvml(bits))
    assert read_gpu(GPU).held_back_by == expected


@pytest.mark.parametrize(
    ("unsupported", "expected"),
    [
        ("clock", GpuState(None, None, 61, 148.2, ("power cap",))),
        ("temperature", GpuState(1695, 6251, None, 148.2, ("power cap",))),
        ("power", GpuState(1695, 6251, 61, None, ("power cap",))),
        ("reasons", GpuState(1695, 6251, 61, 148.2, None)),
        ("all", GpuState()),
    ],
)
def test_what_is_not_supported_is_none(
    monkeypatch: pytest.MonkeyPatch, unsupported: str, expected: GpuState
) -> None:
    install(monkeypatch, FakeNvml(unsupported=unsupported))
    assert read_gpu(GPU) == expected


def test_what_is_unknown_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_gpu("no NVIDIA driver") == GpuState(unknown="no NVIDIA driver")
    install(monkeypatch, None)
    assert "nvidia-ml-py is not installed: pip install" in (read_gpu(GPU).unknown or "")
    install(monkeypatch, FakeNvml(init="NVML Shared Library Not Found"))
    expected = "NVML does not start (NVML Shared Library Not Found)"
    assert read_gpu(GPU) == GpuState(unknown=expected)
    nvml = FakeNvml()
    install(monkeypatch, nvml)
    elsewhere = Gpu("NVIDIA L4", "sm89", (12, 8), "0000:09:00.0")
    assert read_gpu(elsewhere) == GpuState(unknown="NVML does not show NVIDIA L4 (Not Found)")
    assert nvml.open == 0


def test_the_fake_has_the_names_of_nvidia_ml_py() -> None:
    pynvml = pytest.importorskip("pynvml")
    names = [name for name in dir(FakeNvml) if name.lower().startswith("nvml")]
    assert len(names) > 9
    assert [name for name in names if not hasattr(pynvml, name)] == []


def test_a_machine_without_a_gpu_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "find_gpu", lambda: GPU)
    pynvml = pytest.importorskip("pynvml")
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        found = read_conditions(gpu=True).gpu
        assert found is not None
        assert (found.unknown or "").startswith("NVML does not start (")
    else:
        pytest.skip("this machine has NVML")


def state(sm_mhz: float, *held: str) -> GpuState:
    return GpuState(sm_mhz, None, None, None, held)


def test_remarks_name_what_disturbs() -> None:
    before = Conditions(3000, 1.6, state(1900, "power cap"))
    after = Conditions(2000, 2.9, state(1500, "power cap", "power brake"))
    assert remarks(before, after, cores=2) == (
        "other programs ran: load average 1.6 on 2 cores before",
        "the CPU clock changed from 3000 to 2000 MHz",
        "the GPU clock changed from 1900 to 1500 MHz",
        "the GPU was held back: power cap, power brake",
    )


def test_a_quiet_machine_gives_no_remark() -> None:
    quiet = Conditions(3000, 0.2, state(1900))
    assert remarks(quiet, Conditions(2950, 2.0, state(1900)), cores=2) == ()
    nothing = Conditions(None, None, None)
    assert remarks(nothing, nothing, cores=2) == ()


def test_an_unknown_gpu_is_a_remark() -> None:
    blind = Conditions(None, None, GpuState(unknown="nvidia-ml-py is not installed"))
    expected = "clocks and throttling of the GPU are unknown: nvidia-ml-py is not installed"
    assert remarks(blind, blind, cores=2) == (expected,)
