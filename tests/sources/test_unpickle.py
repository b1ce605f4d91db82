"""Pickles are read as data: nothing that a file names is imported or called."""

import io
import os
import pickle
import random
import struct
import subprocess
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from reptrt.core.errors import CheckpointError
from reptrt.sources.checkpoint import read_checkpoint
from reptrt.sources.rebuild import Name, StandIn, Storage, UnsafePickleError
from reptrt.sources.unpickle import PickleError, unpickle
from tests.support.bystander import watched

STATE = {"w": torch.arange(6.0).reshape(2, 3)}


class Calls:
    """Pickles as a call of ``function(*args)``."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def read(raw: bytes) -> Any:
    return unpickle(io.BytesIO(raw), lambda identity: Storage(torch.arange(10.0)))


def as_zip(path: Path, pickled: bytes) -> Path:
    """Write a file of torch.save whose content is a pickle of our own."""
    torch.save(STATE, path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, pickled if name.endswith("data.pkl") else content)
    return path


def as_legacy(path: Path, pickled: bytes) -> Path:
    head = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}]
    path.write_bytes(b"".join(pickle.dumps(part, 2) for part in head) + pickled + b"\x80\x02].")
    return path


def as_plain(path: Path, pickled: bytes) -> Path:
    path.write_bytes(pickled)
    return path


def as_tar(path: Path, pickled: bytes) -> Path:
    with tarfile.open(path, "w") as archive:
        for name in ("storages", "tensors", "pickle"):
            info = tarfile.TarInfo(name)
            info.size = len(pickled)
            archive.addfile(info, io.BytesIO(pickled))
    return path


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def hostile(victim: Path) -> dict[str, bytes]:
    """Return pickles that create ``victim`` when pickle loads them, by what they do."""
    command = f"touch {victim}"
    code = f"open({str(victim)!r}, 'w')"
    system = b"cos\nsystem\n"
    calls = {
        "system": Calls(os.system, command),
        "mkdir": Calls(os.mkdir, str(victim)),
        "popen": Calls(subprocess.Popen, ["touch", str(victim)]),
        "eval": Calls(eval, code),
        "exec": Calls(exec, code),
        "open": Calls(open, str(victim), "w"),
        "inside": {"state_dict": STATE, "epoch": [Calls(os.mkdir, str(victim))]},
        "as-key": {("a", Calls(os.mkdir, str(victim))): 1},
    }
    pickles = {name: pickle.dumps(value, 2) for name, value in calls.items() if name != "inside"}
    call = text(command) + b"\x85R"
    return {
        **pickles,
        "protocol-0": pickle.dumps(calls["system"], 0),
        "protocol-5": pickle.dumps(calls["system"], 5),
        "stack-global": b"\x80\x04" + text("os") + text("system") + b"\x93" + call + b".",
        "getattr": b"\x80\x02cbuiltins\ngetattr\n(cos\n__dict__\n" + text("get") + b"tR"
        + text("system") + b"\x85R" + call + b".",
        "getattr-of-a-module": b"\x80\x02cbuiltins\ngetattr\n(c__builtin__\n__import__\n"
        + text("os") + b"\x85R" + text("system") + b"tR" + call + b".",
        "dotted": b"\x80\x04" + text("torch") + text("os.system") + b"\x93" + call + b".",
        "through-torch": b"\x80\x02ctorch.serialization\nos.system\n" + call + b".",
        "apply": b"\x80\x02cfunctools\npartial\n" + system + b"\x85R" + call + b".",
        "map": b"\x80\x02cbuiltins\nlist\ncbuiltins\nmap\n" + system + text(command)
        + b"\x85\x86R\x85R.",
        "defaultdict": b"\x80\x02ccollections\ndefaultdict\n" + system + b"\x85R.",
        "inst": b"\x80\x02(" + text(command) + b"ios\nsystem\n.",
        "obj": b"\x80\x02(" + system + text(command) + b"o.",
        "newobj": b"\x80\x02csubprocess\nPopen\n" + text(command) + b"K\x00N\x87\x81.",
        "build": b"\x80\x02ctorch.nn.modules.module\nModule\n)\x81}" + text("__setstate__")
        + system + b"s" + b"b" + text(command) + b"b.",
        "build-a-name": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}" + text("__code__")
        + text("x") + b"sb.",
        "torch-load": b"\x80\x02ctorch.serialization\nload\n" + text(str(victim)) + b"\x85R.",
        "load-from-bytes": b"\x80\x02ctorch.storage\n_load_from_bytes\n"
        + pickle.dumps(pickle.dumps(calls["system"]), 4)[11:-2] + b"\x85R.",
        "lazy-module-as-type": b"\x80\x02ctorch._utils\n_rebuild_tensor_v3\n(("
        + text("storage") + b"ctorch\nByteStorage\n" + text("0") + text("cpu")
        + b"K\x18tQK\x00K\x01\x85K\x01\x85\x89Nctorch\n_inductor\ntR.",
        "hub": b"\x80\x02ctorch.hub\nload\n" + text("somebody/repo") + text("net") + b"\x86R.",
        "numpy": b"\x80\x02cnumpy.testing._private.utils\nrunstring\n" + text(code)
        + b"}\x86R.",
        "rebuild-type": b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\n(" + system
        + b"ctorch\nTensor\n" + text(command) + b"\x85NtR.",
        "persistent": b"\x80\x02(" + text("storage") + system + text("0") + text("cpu")
        + b"K\x01tQ.",
        "persistent-module": b"\x80\x02(" + text("module") + system + text("a.py")
        + text(code) + b"tQ" + call + b".",
    }  # fmt: skip


NAMES = tuple(hostile(Path("x")))


@pytest.mark.parametrize("write", [as_plain, as_legacy, as_zip, as_tar], ids=lambda w: w.__name__)
@pytest.mark.parametrize("name", NAMES, ids=str)
def test_hostile_pickles_neither_call_nor_import_anything(
    tmp_path: Path, name: str, write: Callable[[Path, bytes], Path]
) -> None:
    victim = tmp_path / "victim"
    path = write(tmp_path / "a.pt", hostile(victim)[name])
    with watched() as events, pytest.raises(CheckpointError) as caught:
        read_checkpoint(path)
    assert not events
    assert not victim.exists()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["system", "getattr-of-a-module", "apply", "inst", "obj"], ids=str)
def test_the_traps_work(tmp_path: Path, name: str) -> None:
    victim = tmp_path / "victim"
    with watched() as events:
        pickle.loads(hostile(victim)[name])
    assert victim.exists()
    assert any(event.startswith("os.system") for event in events)


@pytest.mark.parametrize(
    "callee",
    [os.system, eval, exec, open, subprocess.Popen, pickle.loads, __import__],
    ids=lambda callee: callee.__name__,
)
@pytest.mark.parametrize("protocol", range(6))
def test_calls_of_the_system_are_refused_by_name(callee: Any, protocol: int) -> None:
    with pytest.raises(UnsafePickleError, match=callee.__name__.strip("_")):
        read(pickle.dumps({"a": [Calls(callee, "x")]}, protocol))


def test_unknown_names_stand_for_what_they_were_given() -> None:
    assert read(pickle.dumps(nn.functional.relu)) == Name("torch.nn.functional.relu")
    made = read(pickle.dumps(Calls(nn.functional.relu, 1, "two")))
    assert isinstance(made, StandIn)
    assert (made.name, made.args, made.state) == ("torch.nn.functional.relu", (1, "two"), None)


@pytest.mark.parametrize("protocol", range(6))
def test_plain_values_come_back(protocol: int) -> None:
    shared = [1, 2]
    value = {
        "numbers": [0, -1, 255, 70_000, 2**40, -(2**70), 1.5, True, False, None],
        "text": ["", "a", "ü" * 300, "\n\\'"],
        "bytes": [b"", b"a\xff", b"x" * 300],
        "tuples": [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)],
        "nested": {"a": {"b": [shared, shared]}},
        5: "number as key",
    }
    got = read(pickle.dumps(value, protocol))
    assert got == value
    assert got["nested"]["a"]["b"][0] is got["nested"]["a"]["b"][1]


@pytest.mark.parametrize(
    "raw",
    [
        *(b"\x80\x02.", b"\x80\x02(.", b"\x80\x02\x85.", b"\x80\x02K\x01R.", b"\x80\x02}K\x01a."),
        *(b"\x80\x02]K\x01K\x02s.", b"\x80\x02h\x05.", b"\x80\x02\x82\x01.", b"\x80\x02Pid\n."),
        *(
            b"\x80\x02K\x01Q.",
            b"\x80\x02}(K\x01u.",
            b"\x80\x02t.",
            b"\x80\x05\x97.",
            b"garbage",
            b"",
        ),
        b"\x80\x02K\x01K\x02\x93.",
    ],
    ids=lambda raw: raw.hex() or "empty",
)
def test_damaged_pickles_raise_one_of_a_few_errors(raw: bytes) -> None:
    with pytest.raises((PickleError, ValueError, IndexError, KeyError)):
        read(raw)


@pytest.mark.parametrize(
    "arguments",
    [
        *((0, (11,), (1,)), (5, (6,), (1,)), (0, (2, 6), (5, 1)), (0, (3, 4), (4, 1))),
        *(
            (0, (2,), (1, 1)),
            (-1, (2,), (1,)),
            (0, (-2,), (1,)),
            (0, (2,), (-1,)),
            (0, (2,), (1.5,)),
        ),
    ],
    ids=str,
)
def test_views_beyond_their_storage_are_refused(arguments: tuple[Any, ...]) -> None:
    offset, size, stride = (pickle.dumps(part, 2)[2:-1] for part in arguments)
    raw = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n((tQ" + offset + size + stride + b"\x89NtR."
    with pytest.raises(ValueError, match="a tensor of size"):
        read(raw)


def test_huge_storages_are_refused_before_they_are_made(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    raw = (tmp_path / "a.pt").read_bytes()
    assert raw.count(b"K\x06Nt") == 1
    for size in (2**31 - 1, 2**20):
        huge = raw.replace(b"K\x06Nt", b"J" + struct.pack("<i", size) + b"Nt")
        (tmp_path / "huge.pt").write_bytes(huge)
        with pytest.raises(CheckpointError, match=f"storages of {4 * size} bytes in a file of"):
            read_checkpoint(tmp_path / "huge.pt")


@pytest.mark.slow
@pytest.mark.parametrize("write", [as_plain, as_legacy, as_zip], ids=lambda write: write.__name__)
def test_damage_anywhere_gives_a_refusal_or_a_state_dict(
    tmp_path: Path, write: Callable[[Path, bytes], Path]
) -> None:
    """Bytes of a real pickle are changed at random; only CheckpointError may come out."""
    torch.save({"model": nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))}, tmp_path / "b.pt")
    with zipfile.ZipFile(tmp_path / "b.pt") as archive:
        whole = archive.read("b/data.pkl")
    rng = random.Random(0)
    num_refused = 0
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(rng.choice((1, 1, 2, 8))):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        path = write(tmp_path / "a.pt", bytes(damaged))
        with watched() as events:
            try:
                read_checkpoint(path)
            except CheckpointError:
                num_refused += 1
        assert not events
    assert num_refused > 100
