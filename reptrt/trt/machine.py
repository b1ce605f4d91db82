"""The state of a machine while something is timed: clocks, load, what holds a GPU back.

Everything here may be unreadable (a virtual machine hides its clocks, a container its nvidia-smi):
then it is None, never an error.
"""

import contextlib
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from reptrt.trt import driver
from reptrt.trt.driver import Gpu

# Runs nvidia-smi with these arguments; returns what it printed, None if it failed.
Ask = Callable[[Sequence[str]], str | None]

_TIMEOUT_S = 10.0
_CLOCK_CHANGE = 0.05  # of the clock itself: less is noise of reading it
_BUSY = 0.5  # load average per core above which other programs matter
_REASONS = {  # bits of NVML's clocks event reasons that mean: slower than it could be
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x20: "temperature (software)",
    0x40: "temperature (hardware)",
    0x80: "power brake",
}
_FIELDS = ("pci.bus_id", "clocks.sm", "clocks.mem", "temperature.gpu", "power.draw")
_REASON_FIELDS = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")  # new, old name


@dataclass(frozen=True, slots=True)
class GpuState:
    """What nvidia-smi says of a GPU at one moment."""

    sm_mhz: float | None
    memory_mhz: float | None
    temperature_c: float | None
    power_w: float | None
    held_back_by: tuple[str, ...] | None  # (): it runs as fast as it is asked to


@dataclass(frozen=True, slots=True)
class Conditions:
    """A machine at one moment; None is not readable."""

    cpu_mhz: float | None  # mean over the cores
    load_average: float | None  # processes that want a core, mean of the last minute
    gpu: GpuState | None  # also None where no GPU is used


def read_conditions(*, gpu: bool) -> Conditions:
    """Read the state of this machine; that of its GPU only if asked for."""
    state = read_gpu(driver.find_gpu(), ask_nvidia_smi) if gpu else None
    return Conditions(read_cpu_mhz(Path("/")), _load_average(), state)


def read_cpu_mhz(root: Path) -> float | None:
    """Return the mean clock of the cores: as the kernel sets it, else as it last measured it."""
    found = []
    for path in root.glob("sys/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_cur_freq"):
        with contextlib.suppress(OSError, ValueError):
            found.append(float(path.read_text()) / 1e3)
    if not found:
        with contextlib.suppress(OSError, ValueError):
            for line in (root / "proc/cpuinfo").read_text().splitlines():
                if line.startswith("cpu MHz"):
                    found.append(float(line.partition(":")[2]))
    return sum(found) / len(found) if found else None


def read_gpu(gpu: Gpu | str, ask: Ask) -> GpuState | None:
    """Return what nvidia-smi says of a GPU; None if there is none, or no nvidia-smi."""
    if not isinstance(gpu, Gpu):
        return None
    for reasons in _REASON_FIELDS:
        fields = ",".join((*_FIELDS, reasons))
        answer = ask([f"--query-gpu={fields}", "--format=csv,noheader,nounits"])
        row = None if answer is None else _row(answer, gpu)
        if row is not None:
            sm_mhz, memory_mhz, celsius, watts = (_number(cell) for cell in row[1:-1])
            return GpuState(sm_mhz, memory_mhz, celsius, watts, _held_back_by(row[-1]))
    return None


def ask_nvidia_smi(arguments: Sequence[str]) -> str | None:
    """Run nvidia-smi; return what it printed, None if it is missing or failed."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    try:
        done = subprocess.run(
            [program, *arguments], capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def remarks(before: Conditions, after: Conditions, cores: int) -> tuple[str, ...]:
    """Return what may have disturbed a measurement between two moments, a line each.

    Args:
        before: when everything was warm.
        after: right after the last run.
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
        held = (*(before.gpu.held_back_by or ()), *(after.gpu.held_back_by or ()))
        if held:
            lines.append(f"the GPU was held back: {', '.join(dict.fromkeys(held))}")
    return tuple(lines)


def cpu_name() -> str:
    """Return the processor's name as the operating system gives it."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def may_saturate() -> bool:
    """Whether sums of UINT8 times INT8 may saturate: x86 without VNNI, or not known to have it.

    Such processors add two products in 16 bits, which 255 * 127 * 2 does not fit.
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    return not {"avx512_vnni", "avx_vnni"} & set((_cpuinfo("flags") or "").split())


def _cpuinfo(field: str) -> str | None:
    """Return what the kernel says of the first core; None where it does not."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.partition(":")[0].strip() == field:
                return line.partition(":")[2].strip()
    return None


def _load_average() -> float | None:
    with contextlib.suppress(OSError, AttributeError):  # no such thing on Windows
        return os.getloadavg()[0]
    return None


def _clock_remark(what: str, before: float | None, after: float | None) -> list[str]:
    if not before or not after or abs(after / before - 1) < _CLOCK_CHANGE:
        return []
    return [f"the {what} clock changed from {before:.0f} to {after:.0f} MHz"]


def _row(answer: str, gpu: Gpu) -> list[str] | None:
    """Return the cells of a GPU: the row with its bus id, or the only row."""
    rows = [[cell.strip() for cell in line.split(",")] for line in answer.splitlines() if line]
    rows = [row for row in rows if len(row) == len(_FIELDS) + 1]
    short = gpu.bus_id.lower()[-len("01:00.0") :]  # the domain has 4 digits there and 8 here
    same = [row for row in rows if short and row[0].lower().endswith(short)]
    return (same or rows)[0] if same or len(rows) == 1 else None


def _number(cell: str) -> float | None:
    """Return a number; None for ``[N/A]`` and the like."""
    try:
        return float(cell)
    except ValueError:
        return None


def _held_back_by(cell: str) -> tuple[str, ...] | None:
    try:
        bits = int(cell, 16)
    except ValueError:
        return None
    return tuple(reason for bit, reason in _REASONS.items() if bits & bit)
