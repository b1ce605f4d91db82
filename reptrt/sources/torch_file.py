"""The files that torch.save and safetensors write -> their content, read as data.

zip (torch 1.6 and newer)  NAME/data.pkl, NAME/data/KEY for each storage, NAME/byteorder
legacy                     five pickles (magic number, version, system, content, keys), storages
plain pickle               one pickle, with numpy arrays as weights
safetensors                8 bytes of length, a JSON header, the tensors
"""

import io
import sys
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors.torch import load_file

from reptrt.sources.rebuild import Name, Storage
from reptrt.sources.unpickle import PickleError, unpickle

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_TAR_MAGIC, _TAR_MAGIC_AT = b"ustar", 257
_DTYPES: Mapping[str, torch.dtype] = {
    "Double": torch.float64,
    "Float": torch.float32,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
    "ComplexDouble": torch.complex128,
    "ComplexFloat": torch.complex64,
    "QInt8": torch.int8,
    "QUInt8": torch.uint8,
    "QInt32": torch.int32,
    "Untyped": torch.uint8,
}


class UnsupportedFileError(Exception):
    """A file of a known kind without a state dict; the message says which, and what to do."""


def read_content(path: Path) -> Any:
    """Return the content of a checkpoint file: plain values, tensors on the CPU, stand-ins.

    Raises:
        OSError: the file cannot be read.
        UnsafePickleError: the file calls something that reaches the system; it was not called.
        UnsupportedFileError: the file is empty, a TorchScript archive or a tar file of torch 0.1.
        Exception: the file is damaged; the readers raise errors of many kinds then.
    """
    num_bytes = path.stat().st_size
    if not num_bytes:
        raise UnsupportedFileError("the file is empty, copy it again")
    with open(path, "rb") as stream:
        head = stream.read(_TAR_MAGIC_AT + len(_TAR_MAGIC))
        stream.seek(0)
        if head.startswith(b"PK"):
            return _read_zip(stream)
        if _is_safetensors(path, head, num_bytes):
            return load_file(path, device="cpu")
        if head[_TAR_MAGIC_AT:] == _TAR_MAGIC:
            raise UnsupportedFileError("a tar file of torch 0.1, open it in an old torch")
        return _read_pickles(stream, num_bytes)


def _is_safetensors(path: Path, head: bytes, num_bytes: int) -> bool:
    """Return whether a file starts as safetensors do: the header's length in 8 bytes, then JSON."""
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= num_bytes - 8:
        return True
    return path.suffix == ".safetensors"


def _read_zip(stream: BinaryIO) -> Any:
    """Read the content of a zip; zipfile compares the checksum of each member that is read."""
    with zipfile.ZipFile(stream) as archive:
        members = {name.partition("/")[2]: name for name in archive.namelist()}
        if "constants.pkl" in members:
            raise UnsupportedFileError(
                "a TorchScript archive, not a state dict, open it with torch.jit.load"
            )
        if "data.pkl" not in members:
            raise PickleError("a zip file without data.pkl")
        order = archive.read(members["byteorder"]).decode() if "byteorder" in members else "little"
        storages: dict[str, Storage] = {}

        def storage_of(identity: tuple[Any, ...]) -> Storage:
            dtype, key, numel = _storage_type(identity)
            if key not in storages:
                raw = bytearray(archive.read(members[f"data/{key}"]))
                storages[key] = Storage(_flat(raw, dtype, numel, order))
            return storages[key]

        return unpickle(io.BytesIO(archive.read(members["data.pkl"])), storage_of)


def _read_pickles(stream: BinaryIO, num_bytes: int) -> Any:
    """Read a legacy file; storages come behind the content, so that they are filled last."""
    storages: dict[str, torch.Tensor] = {}

    def storage_of(identity: tuple[Any, ...]) -> Storage | Name:
        if identity[:1] == ("module",) and isinstance(identity[1], Name):
            return identity[1]  # a class with its source code, which is dropped
        dtype, key, numel = _storage_type(identity)
        if key not in storages:
            total = numel * dtype.itemsize + sum(flat.nbytes for flat in storages.values())
            if total > num_bytes:
                raise PickleError(f"storages of {total} bytes in a file of {num_bytes} bytes")
            storages[key] = torch.zeros(numel, dtype=dtype)
        view = identity[5] if len(identity) > 5 else None
        if view is None:
            return Storage(storages[key])
        _, offset, size = view
        return Storage(storages[key][offset : offset + size])

    first = unpickle(stream, storage_of)
    if first != _LEGACY_MAGIC:
        return first
    for _ in ("version", "system"):
        unpickle(stream, storage_of)
    content = unpickle(stream, storage_of)
    for key in unpickle(stream, storage_of):
        flat = storages[key]
        numel = int.from_bytes(_exactly(stream, 8), "little")
        raw = bytearray(_exactly(stream, numel * flat.itemsize))
        flat.copy_(_flat(raw, flat.dtype, flat.numel(), "little"))
    return content


def _exactly(stream: BinaryIO, num_bytes: int) -> bytes:
    raw = stream.read(num_bytes)
    if len(raw) != num_bytes:
        raise EOFError("the file ends inside a storage")
    return raw


def _storage_type(identity: tuple[Any, ...]) -> tuple[torch.dtype, str, int]:
    """Return type, key and number of values of ("storage", type, key, device, numel, ...)."""
    match identity:
        case ("storage", Name(text), str() as key, _, int() as numel, *_) if numel >= 0:
            package, _, kind = text.rpartition(".")
            dtype = _DTYPES.get(kind.removesuffix("Storage"))
            if package in ("torch", "torch.cuda", "torch.storage") and dtype is not None:
                return dtype, key, numel
    raise PickleError("a persistent id that is not a storage of torch")


def _flat(raw: bytearray, dtype: torch.dtype, numel: int, order: str) -> torch.Tensor:
    """Return the values of a storage as a flat tensor that owns ``raw``."""
    if len(raw) < numel * dtype.itemsize:
        raise PickleError(f"a storage of {numel} values has only {len(raw)} bytes")
    if not numel:
        return torch.empty(0, dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        flat = torch.frombuffer(raw, dtype=dtype, count=numel)
    if order != sys.byteorder and dtype.itemsize > 1:
        flat.untyped_storage().byteswap(dtype)  # type: ignore[no-untyped-call]
    return flat
