"""Clocks, load and throttling: read where they can be, None where not."""

import subprocess
from pathlib import Path

import pytest

from reptrt.trt import machine
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
ROW = "00000000:01:00.0, 1695, 6251, 61, 148.20, 0x0000000000000004"
OTHER = "00000000:02:00.0, 210, 405, 30, 20.00, 0x0000000000000001"


def answering(*rows: str, unknown: str = "none"):  # type: ignore[no-untyped-def]
    def ask(arguments):  # type: ignore[no-untyped-def]
        return None if unknown in arguments[0] else "".join(f"{row}\n" for row in rows)

    return ask


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


@pytest.mark.parametrize("rows", [(ROW,), (OTHER, ROW)], ids=["one", "two"])
def test_the_row_of_the_gpu_is_taken(rows: tuple[str, ...]) -> None:
    found = read_gpu(GPU, answering(*rows))
    assert found == GpuState(1695.0, 6251.0, 61.0, 148.2, ("power cap",))


def test_an_older_driver_knows_the_older_name() -> None:
    found = read_gpu(GPU, answering(ROW, unknown="clocks_event_reasons"))
    assert found is not None
    assert found.held_back_by == ("power cap",)


@pytest.mark.parametrize(
    ("bits", "expected"),
    [
        ("0x0000000000000000", ()),
        ("0x0000000000000001", ()),  # idle
        ("0x0000000000000002", ()),  # clocks as an application asked for them
        ("0x0000000000000068", ("hardware slowdown", "temperature (software)", "temperature (h")),
        ("[N/A]", None),
    ],
)
def test_reasons(bits: str, expected: tuple[str, ...] | None) -> None:
    found = read_gpu(GPU, answering(ROW.rpartition(",")[0] + f", {bits}"))
    assert found is not None
    if expected is None:
        assert found.held_back_by is None
    else:
        assert found.held_back_by is not None
        assert len(found.held_back_by) == len(expected)
        assert all(a.startswith(b) for a, b in zip(found.held_back_by, expected, strict=True))


def test_what_is_not_available_is_none() -> None:
    found = read_gpu(GPU, answering("00000000:01:00.0, [N/A], 6251, 61, [Not Supported], [N/A]"))
    assert found == GpuState(None, 6251.0, 61.0, None, None)


@pytest.mark.parametrize(
    "ask",
    [lambda _: None, answering(""), answering("No devices were found"), answering(OTHER, OTHER)],
    ids=["no program", "nothing", "other words", "other gpus"],
)
def test_no_answer_is_none(ask) -> None:  # type: ignore[no-untyped-def]
    assert read_gpu(GPU, ask) is None
    assert read_gpu("no NVIDIA driver", ask) is None


def test_nvidia_smi_may_be_missing_fail_or_hang(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.ask_nvidia_smi(["--x"]) is None
    program = tmp_path / "nvidia-smi"
    program.write_text('#!/bin/sh\n[ "$1" = --x ] && echo said "$1"\n')
    program.chmod(0o755)
    assert machine.ask_nvidia_smi(["--x"]) == "said --x\n"
    assert machine.ask_nvidia_smi(["--y"]) is None

    def hanging(*_, **options):  # type: ignore[no-untyped-def]
        raise subprocess.TimeoutExpired("nvidia-smi", options["timeout"])

    monkeypatch.setattr(machine.subprocess, "run", hanging)
    assert machine.ask_nvidia_smi(["--x"]) is None


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
