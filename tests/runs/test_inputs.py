"""What a run reads is recorded by content."""

import hashlib
import shutil
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image

from reptrt.core.errors import ArtifactError, DataError
from reptrt.runs.inputs import (
    DataRecord,
    check_data,
    check_source,
    record_data,
    record_files,
    source_files,
)
from reptrt.sources.source import Source
from tests.support.onnx_nets import plain_chain


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    rng = np.random.default_rng(0)
    for kind in ("cat", "dog"):
        (folder / kind).mkdir(parents=True)
        for index in range(2):
            pixels = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / kind / f"{index}.png")
    return folder


def test_the_hash_of_a_folder_is_that_of_its_list(images: Path) -> None:
    """As sha256sum and a shell would make it."""
    lines = ""
    for label, kind in enumerate(("cat", "dog")):
        for index in range(2):
            digest = hashlib.sha256((images / kind / f"{index}.png").read_bytes()).hexdigest()
            lines += f"{digest} {label} {kind}/{index}.png\n"
    expected = hashlib.sha256(lines.encode()).hexdigest()
    assert record_data(images) == DataRecord(images, expected, 4)


def test_what_counts_and_what_does_not(images: Path, tmp_path: Path) -> None:
    before = record_data(images)
    (images / "dog" / "notes.txt").write_text("none")
    assert record_data(images) == before
    shutil.copytree(images, tmp_path / "copy")
    assert record_data(tmp_path / "copy").sha256 == before.sha256
    (images / "ape").mkdir()  # moves the labels of the others
    assert record_data(images).sha256 != before.sha256
    (images / "ape").rmdir()
    (images / "cat" / "1.png").rename(images / "cat" / "2.png")
    assert record_data(images).sha256 != before.sha256


def test_a_flat_folder_has_no_labels(images: Path) -> None:
    digest = hashlib.sha256((images / "cat/0.png").read_bytes()).hexdigest()
    (images / "cat/1.png").unlink()
    expected = hashlib.sha256(f"{digest} - 0.png\n".encode()).hexdigest()
    assert record_data(images / "cat").sha256 == expected


def test_missing_data_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing\.npz: does not exist; expected a folder"):
        record_data(tmp_path / "nothing.npz")


def test_changed_data_is_named_with_both_hashes(images: Path) -> None:
    before = record_data(images)
    check_data("data", before, images)
    pixels = np.zeros((4, 4, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(images / "cat" / "0.png")
    now = record_data(images).sha256
    with pytest.raises(
        ArtifactError, match=rf"images: has changed since the run: sha256 is {now}, expected "
    ):
        check_data("data", before, images)
    (images / "cat" / "0.png").unlink()
    with pytest.raises(ArtifactError, match=r"got 3 files of images, the run read 4 \(sha256 "):
        check_data("data", before, images)
    shutil.rmtree(images)
    with pytest.raises(
        ArtifactError, match=rf"does not exist; the run read 4 files .*{before.sha256}: .*give data"
    ):
        check_data("data", before, images)


def test_files_of_a_zoo_net(tmp_path: Path) -> None:
    assert source_files(Source("repvgg")) == ()
    assert source_files(Source("repvgg", tmp_path / "w.pt")) == (tmp_path / "w.pt",)


def test_files_of_a_factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = tmp_path / "w.pt"
    assert source_files(Source(f"{tmp_path}/net.py:make", weights)) == (
        tmp_path / "net.py",
        weights,
    )
    package = tmp_path / "package_nobody_imports"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('it was imported')")
    (package / "net.py").write_text("")
    monkeypatch.chdir(tmp_path)
    (found,) = source_files(Source("package_nobody_imports.net:make"))
    assert found.resolve() == package / "net.py"
    assert source_files(Source("package_nobody_imports.nothing:make")) == ()
    assert "package_nobody_imports" not in sys.modules


def test_files_of_an_onnx_file_with_its_weights_outside(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(plain_chain(), str(path))
    assert source_files(Source(str(path))) == (path,)
    onnx.save(
        plain_chain(),
        str(path),
        save_as_external_data=True,
        location="weights.bin",
        size_threshold=0,
    )
    assert source_files(Source(str(path))) == (path, tmp_path / "weights.bin")
    path.write_bytes(b"no net")
    assert source_files(Source(str(path))) == (path,)


def test_a_changed_source_is_named_with_both_hashes(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    path.write_bytes(b"one")
    records = record_files([path])
    check_source(records, (path,))
    path.write_bytes(b"two")
    got, expected = (hashlib.sha256(text).hexdigest() for text in (b"two", b"one"))
    with pytest.raises(
        ArtifactError, match=rf"w\.pt: has changed .* is {got}, expected {expected}"
    ):
        check_source(records, (path,))
    path.unlink()
    with pytest.raises(ArtifactError, match=rf"w\.pt: does not exist; .*{expected}: .*weights"):
        check_source(records, (path,))
    with pytest.raises(
        ArtifactError, match=rf"w\.pt: the run read it \(sha256 {expected}\), and it is not found"
    ):
        check_source(records, ())
