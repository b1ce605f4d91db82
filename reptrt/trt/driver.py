"""The first GPU of this machine, as the NVIDIA driver describes it."""

import ctypes
import sys
from dataclasses import dataclass
from typing import Any

_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76  # CUdevice_attribute
_NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE


@dataclass(frozen=True, slots=True)
class Gpu:
    """The first GPU that the NVIDIA driver shows."""

    name: str
    target: str  # its compute capability: "sm89"
    driver: tuple[int, int]  # the newest CUDA version that the driver takes
    bus_id: str = ""  # "0000:01:00.0"; "" if the driver does not say


def find_gpu() -> Gpu | str:
    """Return the first GPU, or a line that says why there is none.

    This calls the driver library itself, because TensorRT and CUDA end the process without a GPU.
    """
    library = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        cuda = ctypes.CDLL(library)
    except OSError:
        return f"no NVIDIA driver on this machine ({library} not found)"
    status = int(cuda.cuInit(0))
    if status == _NO_DEVICE:
        return "the NVIDIA driver shows no GPU (check CUDA_VISIBLE_DEVICES)"
    if status:
        return f"the NVIDIA driver does not start (cuInit gives error {status})"
    return _first_gpu(cuda)


def _first_gpu(cuda: Any) -> Gpu | str:
    device, number, driver = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    name = ctypes.create_string_buffer(128)
    status = cuda.cuDeviceGet(ctypes.byref(device), 0)
    status = status or cuda.cuDeviceGetName(name, len(name), device)
    status = status or cuda.cuDriverGetVersion(ctypes.byref(driver))
    numbers = []
    for attribute in (_CAPABILITY_MAJOR, _CAPABILITY_MINOR):
        status = status or cuda.cuDeviceGetAttribute(ctypes.byref(number), attribute, device)
        numbers.append(number.value)
    if status:
        return f"the NVIDIA driver does not answer (error {int(status)})"
    version = (driver.value // 1000, driver.value % 1000 // 10)
    return Gpu(
        name.value.decode(errors="replace"),
        f"sm{numbers[0]}{numbers[1]}",
        version,
        _bus_id(cuda, device),
    )


def _bus_id(cuda: Any, device: Any) -> str:
    text = ctypes.create_string_buffer(32)
    status = cuda.cuDeviceGetPCIBusId(text, len(text), device)
    return "" if status else text.value.decode(errors="replace")
