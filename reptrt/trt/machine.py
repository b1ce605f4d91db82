"""The machine while something is timed: its clocks, its load, and what slows its GPU down.

A value that cannot be read is None, never an error: a virtual machine hides its clocks, and the GPU
is only read where ``nvidia-ml-py`` is installed.
"""

import contextlib
import importlib
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reptrt.trt import driver
from reptrt.trt.driver import Gpu

_CLOCK_CHANGE = 0.05  # relative; smaller changes are noise of reading the clock
_BUSY = 0.5  # load average per core above which other programs matter
_REASONS = {  # bits of NVML's clocks event reasons that slow a GPU down
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x20: "temperature (software)",
    0x40: "temperature (hardware)",
    0x80: "power brake",
}


@dataclass(frozen=True, slots=True)
class GpuState:
    """What NVML says of a GPU at one moment; None is not readable."""

    sm_mhz: float | None = None
    memory_mhz: float | None = None
    temperature_c: float | None = None
    power_w: float | None = None
    held_back_by: tuple[str, ...] | None = None  # (): it runs as fast as it is asked to
    unknown: str | None = None  # why nothing could be read


@dataclass(frozen=True, slots=True)
class Conditions:
    """A machine at one moment; None is not readable."""

    cpu_mhz: float | None  # mean over the cores
    load_average: float | None  # processes that want a core, mean of the last minute
    gpu: GpuState | None  # None: no GPU is used


def read_conditions(*, gpu: bool) -> Conditions:
    """Read the state of this machine, and of its GPU if asked for."""
    state = read_gpu(driver.find_gpu()) if gpu else None
    return Conditions(read_cpu_mhz(Path("/")), _load_average(), state)


def read_cpu_mhz(root: Path) -> float | None:
    """Return the mean clock of the cores: as the kernel sets it, else as it last measured it."""
    clocks = []
    for path in root.glob("sys/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_cur_freq"):
        with contextlib.suppress(OSError, ValueError):
            clocks.append(float(path.read_text()) / 1e3)
    if not clocks:
        with contextlib.suppress(OSError, ValueError):
            for line in (root / "proc/cpuinfo").read_text().splitlines():
                if line.startswith("cpu MHz"):
                    clocks.append(float(line.partition(":")[2]))
    return sum(clocks) / len(clocks) if clocks else None


def read_gpu(gpu: Gpu | str) -> GpuState:
    """Return what NVML says of a GPU.

    Args:
        gpu: the GPU, or why there is none.
    """
    if not isinstance(gpu, Gpu):
        return GpuState(unknown=gpu)
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        return GpuState(unknown="nvidia-ml-py is not installed: pip install 'reptrt[gpu]'")
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as err:
        return GpuState(unknown=f"NVML does not start ({err})")
    try:
        return _state(nvml, _handle(nvml, gpu))
    except nvml.NVMLError as err:
        return GpuState(unknown=f"NVML does not show {gpu.name} ({err})")
    finally:
        nvml.nvmlShutdown()


def _handle(nvml: Any, gpu: Gpu) -> Any:
    """Return NVML's handle of a GPU: the one with its bus id, or the first if that is not known."""
    if gpu.bus_id:
        return nvml.nvmlDeviceGetHandleByPciBusId(gpu.bus_id)
    return nvml.nvmlDeviceGetHandleByIndex(0)


def _state(nvml: Any, handle: Any) -> GpuState:
    def read(function: Callable[..., int], *args: int) -> int | None:
        try:
            return function(handle, *args)
        except nvml.NVMLError:
            return None

    milliwatts = read(nvml.nvmlDeviceGetPowerUsage)
    # Drivers before 535 know the reasons by this name only; later ones know it too.
    bits = read(nvml.nvmlDeviceGetCurrentClocksThrottleReasons)
    return GpuState(
        sm_mhz=read(nvml.nvmlDeviceGetClockInfo, nvml.NVML_CLOCK_SM),
        memory_mhz=read(nvml.nvmlDeviceGetClockInfo, nvml.NVML_CLOCK_MEM),
        temperature_c=read(nvml.nvmlDeviceGetTemperature, nvml.NVML_TEMPERATURE_GPU),
        power_w=None if milliwatts is None else milliwatts / 1e3,
        held_back_by=None if bits is None else _held_back_by(bits),
    )


def _held_back_by(bits: int) -> tuple[str, ...]:
    return tuple(reason for bit, reason in _REASONS.items() if bits & bit)


def remarks(before: Conditions, after: Conditions, cores: int) -> tuple[str, ...]:
    """Return what may have disturbed a measurement, or is unknown, a line each.

    Args:
        before: the machine after warming up.
        after: the machine right after the last run.
        cores: CPU cores that this process may use.
    """
    lines = []
    if before.load_average is not None and before.load_average > _BUSY * cores:
        lines.append(
            f"other programs ran: load average {before.load_average:.1f} on {cores} cores before"
        )
    lines += _clock_remark("CPU", before.cpu_mhz, after.cpu_mhz)
    if before.gpu is not None and after.gpu is not None:
        lines += _clock_remark("GPU", before.gpu.sm_mhz, after.gpu.sm_mhz)
        unknown = before.gpu.unknown or after.gpu.unknown
        if unknown:
            lines.append(f"clocks and throttling of the GPU are unknown: {unknown}")
        held = (*(before.gpu.held_back_by or ()), *(after.gpu.held_back_by or ()))
        if held:
            lines.append(f"the GPU was held back: {', '.join(dict.fromkeys(held))}")
    return tuple(lines)


def cpu_name() -> str:
    """Return the processor's name as the operating system gives it."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def may_saturate() -> bool:
    """Return whether sums of UINT8 times INT8 may saturate: on x86 that is not known to have VNNI.

    Such processors add two products in 16 bits, into which 2 * 255 * 127 does not fit.
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    return not {"avx512_vnni", "avx_vnni"} & set((_cpuinfo("flags") or "").split())


def _cpuinfo(field: str) -> str | None:
    """Return a field of /proc/cpuinfo for the first core; None if there is none."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.partition(":")[0].strip() == field:
                return line.partition(":")[2].strip()
    return None


def _load_average() -> float | None:
    with contextlib.suppress(OSError, AttributeError):  # Windows has no load average
        return os.getloadavg()[0]
    return None


def _clock_remark(clock: str, before: float | None, after: float | None) -> list[str]:
    if not before or not after or abs(after / before - 1) < _CLOCK_CHANGE:
        return []
    return [f"the {clock} clock changed from {before:.0f} to {after:.0f} MHz"]
