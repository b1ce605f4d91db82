"""The driver library: which GPU there is, or in one line why there is none."""

import re

import pytest

from reptrt.trt import driver


def test_find_gpu_without_a_driver(monkeypatch):
    def no_library(name):
        raise OSError(name)

    monkeypatch.setattr(driver.ctypes, "CDLL", no_library)
    assert re.fullmatch(r"no NVIDIA driver on this machine \(\S+ not found\)", driver.find_gpu())


class FakeCuda:
    """The driver library of a machine with one RTX 4090, or with a defect."""

    def __init__(self, init=0):
        self.init = init

    def cuInit(self, flags):  # noqa: N802
        return self.init

    def cuDeviceGet(self, device, ordinal):  # noqa: N802
        return 0

    def cuDeviceGetName(self, name, length, device):  # noqa: N802
        name.value = b"NVIDIA GeForce RTX 4090"
        return 0

    def cuDeviceGetPCIBusId(self, text, length, device):  # noqa: N802
        text.value = b"0000:01:00.0"
        return 0

    def cuDriverGetVersion(self, version):  # noqa: N802
        version._obj.value = 12080
        return 0

    def cuDeviceGetAttribute(self, number, attribute, device):  # noqa: N802
        number._obj.value = {75: 8, 76: 9}[attribute]
        return 0


@pytest.mark.parametrize(
    ("init", "expected"),
    [
        (
            0,
            r"Gpu\(name='NVIDIA GeForce RTX 4090', target='sm89', driver=\(12, 8\), "
            r"bus_id='0000:01:00\.0'\)",
        ),
        (100, "the NVIDIA driver shows no GPU .*"),
        (999, ".*cuInit gives error 999.*"),
    ],
    ids=["gpu", "no device", "broken"],
)
def test_find_gpu(monkeypatch, init, expected):
    monkeypatch.setattr(driver.ctypes, "CDLL", lambda name: FakeCuda(init))
    assert re.fullmatch(expected, str(driver.find_gpu()))
