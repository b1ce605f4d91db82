"""Whole or not at all: files, their sidecars, and what happens when the disk refuses."""

import errno
import hashlib
import json
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from reptrt.core.artifacts import (
    Sidecar,
    package_versions,
    read_sidecar,
    replacing,
    require_folder,
    sha256_of,
    sidecar_path,
    write_artifact,
    write_bytes,
    write_json,
)
from reptrt.core.errors import ArtifactError


def write(path: Path, content: bytes = b"new") -> Sidecar:
    return write_artifact(
        path,
        content,
        artifact="float-onnx",
        parents={"a.pt": "ff"},
        options={"opset": 19},
        details={"blocks": [1, 2]},
    )


def names(folder: Path) -> list[str]:
    """Everything in a folder, temporary files included."""
    return sorted(path.name for path in folder.iterdir())


def is_part_of(target: str, name: str) -> bool:
    return re.fullmatch(rf"\.{re.escape(target)}\.[^.]+\.part", name) is not None


def refuse(monkeypatch: pytest.MonkeyPatch, function: str, when: Callable[[str], bool]) -> None:
    """Let a method of Path fail like a full disk when its path is one that ``when`` picks."""
    original = getattr(Path, function)

    def full(self: Path, *args: object) -> object:
        if when(self.name):
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(self, *args)

    monkeypatch.setattr(Path, function, full)


def test_a_file_and_its_sidecar(tmp_path: Path) -> None:
    path = tmp_path / "M.onnx"
    sidecar = write(path, b"content")
    assert path.read_bytes() == b"content"
    assert sidecar.sha256 == sha256_of(path) == hashlib.sha256(b"content").hexdigest()
    assert read_sidecar(path) == sidecar
    stored = json.loads(sidecar_path(path).read_text())
    assert sidecar_path(path) == tmp_path / "M.onnx.json"
    assert stored["parents"] == {"a.pt": "ff"}
    assert stored["options"] == {"opset": 19}
    assert stored["details"] == {"blocks": [1, 2]}
    assert stored["versions"] == package_versions()
    assert {"numpy", "onnx", "torch"} <= set(stored["versions"])
    assert names(tmp_path) == ["M.onnx", "M.onnx.json"]


def test_sha256_of_more_than_one_block(tmp_path: Path) -> None:
    content = os.urandom((1 << 20) + 17)
    (tmp_path / "big").write_bytes(content)
    assert sha256_of(tmp_path / "big") == hashlib.sha256(content).hexdigest()


def test_permissions_are_those_of_any_new_file(tmp_path: Path) -> None:
    write_bytes(tmp_path / "a", b"x")
    (tmp_path / "b").write_bytes(b"x")
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == stat.S_IMODE(
        (tmp_path / "b").stat().st_mode
    )


def test_json_is_indented_sorted_and_ends_with_a_newline(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"b": 1, "a": [2]})
    text = '{\n  "a": [\n    2\n  ],\n  "b": 1\n}\n'
    assert (tmp_path / "a.json").read_text() == text


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_nothing_is_left_when_writing_is_interrupted(
    tmp_path: Path, error: type[BaseException]
) -> None:
    path = tmp_path / "M.onnx"
    path.write_bytes(b"old")

    def interrupted() -> None:
        with replacing(path) as part:
            part.write_bytes(b"half")
            raise error

    with pytest.raises(error):
        interrupted()
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["M.onnx"]


@pytest.mark.parametrize("target", ["M.onnx", "M.onnx.json"])
@pytest.mark.parametrize("existing", [False, True], ids=["new", "over an old one"])
def test_a_full_disk_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, existing: bool
) -> None:
    path = tmp_path / "M.onnx"
    if existing:
        write(path, b"old")
    before = {name: (tmp_path / name).read_bytes() for name in names(tmp_path)}
    refuse(monkeypatch, "write_bytes", lambda name: is_part_of(target, name))
    with pytest.raises(ArtifactError, match=rf"{re.escape(target)}: cannot be written.*No space"):
        write(path)
    monkeypatch.undo()
    assert {name: (tmp_path / name).read_bytes() for name in names(tmp_path)} == before


def test_a_crash_between_the_two_renames_leaves_no_wrong_sidecar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "M.onnx"
    write(path, b"old")
    refuse(monkeypatch, "replace", lambda name: is_part_of("M.onnx.json", name))
    with pytest.raises(ArtifactError):
        write(path, b"new")
    assert path.read_bytes() == b"new"
    assert read_sidecar(path) is None
    assert names(tmp_path) == ["M.onnx"]


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    wanted = tmp_path / "nowhere" / "M.onnx"
    for attempt in (lambda: write(wanted), lambda: require_folder(wanted)):
        with pytest.raises(ArtifactError, match=r"M\.onnx: folder .*nowhere does not exist"):
            attempt()


def test_a_folder_is_not_a_target(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"is a folder, expected a file name"):
        write(tmp_path)


def test_a_folder_without_permission_is_a_stated_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(**_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(
        "reptrt.core.artifacts.tempfile.mkstemp", refused
    )  # root may write anywhere
    with pytest.raises(ArtifactError, match=r"cannot be written \(Permission denied\)"):
        write(tmp_path / "M.onnx")


def test_no_sidecar_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "M.onnx").write_bytes(b"x")
    assert read_sidecar(tmp_path / "M.onnx") is None


def test_a_changed_file_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "M.onnx", b"as written")
    (tmp_path / "M.onnx").write_bytes(b"changed")
    with pytest.raises(ArtifactError, match=r"sha256 is \w{12}\.\.\., its sidecar says \w{12}"):
        read_sidecar(tmp_path / "M.onnx")


def test_a_sidecar_without_its_file_is_a_stated_failure(tmp_path: Path) -> None:
    write(tmp_path / "M.onnx")
    (tmp_path / "M.onnx").unlink()
    with pytest.raises(ArtifactError, match=r"M\.onnx: cannot be read \(No such file"):
        read_sidecar(tmp_path / "M.onnx")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"artifact": "x"}', '{"sha": 1}', "\xff"])
def test_something_else_beside_a_file_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "M.onnx").write_bytes(b"x")
    sidecar_path(tmp_path / "M.onnx").write_text(text, encoding="latin-1")
    with pytest.raises(ArtifactError, match=r"M\.onnx\.json: not a sidecar written by reptrt"):
        read_sidecar(tmp_path / "M.onnx")
