"""The sidecar of an engine as values: what is written comes back, damage is one clear error."""

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from reptrt.cli import main
from reptrt.core.artifacts import sha256_of, sidecar_path, write_artifact
from reptrt.core.errors import ArtifactError, ConfigError
from reptrt.judge.evaluate import preprocess_of
from reptrt.judge.explain import evidence
from reptrt.rewrite.contract import Skipped
from reptrt.trt import driver
from reptrt.trt.details import EngineDetails, Rest, TensorInfo, read_engine_record
from reptrt.trt.inspect import inspect
from reptrt.trt.options import BuildOptions, PackageOptions, ShapeRange
from reptrt.trt.package import package
from tests.support.engines import engine_details, write_fake_engine

PLAN = b"ftrt" + bytes(12) + (64).to_bytes(8, "little") + bytes([1, 7, 1, 116]) + bytes(36)
Change = Callable[[dict[str, Any]], object]


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    return write_fake_engine(tmp_path / "m.engine", PLAN, parents={"m.onnx": "abc"})


def damage(engine: Path, change: Change) -> None:
    """Change what the sidecar of an engine says."""
    path = sidecar_path(engine)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    details = engine_details(
        rest=Rest("converted", 3, (Skipped("conv0", "scale 1e-06"),)),
        int8_layers=("a", "b"),
        device_memory_bytes=4096,
    )
    options = BuildOptions(shapes=ShapeRange((1,), (2,), (4,)), timing_cache=Path("cache"))
    path = write_fake_engine(tmp_path / "m.engine", PLAN, details, options, {"m.onnx": "abc"})
    record = read_engine_record(path)
    assert record is not None
    assert (record.details, record.options) == (details, options)
    assert (record.sha256, record.parents) == (sha256_of(path), {"m.onnx": "abc"})
    content = json.loads(sidecar_path(path).read_text())
    assert content["options"]["shapes"] == "1:2:4"
    assert content["details"]["profile"] == {"input": "1x3x32x48:8x3x32x48:64x3x32x48"}
    assert content["details"]["inputs"] == [
        {"name": "input", "shape": [-1, 3, 32, 48], "dtype": "FLOAT"}
    ]
    sidecar_path(path).unlink()
    assert read_engine_record(path) is None


# Entry of ``details`` -> a value that it cannot have, and what is said of it.
DAMAGE: list[tuple[str, Any, str]] = [
    ("backend", 3, r"details\.backend: got 3, expected a value of type str"),
    ("backend_version", None, r"details\.backend_version: got None, expected"),
    ("targets", "sm89", r"details\.targets: got 'sm89', expected a list"),
    ("targets", [89], r"details\.targets\[0\]: got 89, expected"),
    ("inputs", {}, r"details\.inputs: got \{\}, expected a list"),
    ("inputs", [], r"inputs: got none, expected one or more tensors"),
    ("inputs", ["input"], r"details\.inputs\[0\]: got 'input', expected an object"),
    ("inputs", [{"name": "i", "shape": 4, "dtype": "FLOAT"}], r"inputs\[0\]\.shape: got 4, exp"),
    ("inputs", [{"name": "i", "shape": ["4"], "dtype": "F"}], r"shape\[0\]: got '4', expected"),
    ("inputs", [{"name": "i", "shape": [-2], "dtype": "F"}], r"tensor i: shape is \[-2\], expect"),
    ("outputs", None, r"details\.outputs: got None, expected a list"),
    ("outputs", [], r"outputs: got none, expected one or more tensors"),
    ("outputs", [{"name": "o", "shape": [4]}], r"details\.outputs\[0\]: no field dtype"),
    ("profile", [], r"details\.profile: got \[\], expected an object"),
    ("profile", {}, r"profile: got dimensions \{\}, expected \{'input': 4\}"),
    ("profile", {"input": 8}, r"details\.profile\.input: got 8, expected a value of type str"),
    ("profile", {"input": "8x"}, r"shapes: got '8x', expected MIN:OPT:MAX"),
    ("profile", {"input": "1:8:64"}, r"profile: got dimensions \{'input': 1\}, expected"),
    ("profile", {"other": "1x3x4x4"}, r"profile: got dimensions \{'other': 4\}, expected"),
    ("num_layers", "3", r"details\.num_layers: got '3', expected a value of type int"),
    ("int8_layers", {"conv0": 1}, r"details\.int8_layers: got .*, expected a list"),
    ("int8_layers", [None], r"details\.int8_layers\[0\]: got None, expected"),
    ("size_bytes", 1.5, r"details\.size_bytes: got 1\.5, expected a value of type int"),
    ("device_memory_bytes", "no", r"details\.device_memory_bytes: got 'no', expected"),
    ("without_effect", "x", r"details\.without_effect: got 'x', expected a list"),
    ("rest", "fp32", r"details\.rest: got 'fp32', expected an object"),
    ("rest", {"state": "fp8", "num_converted": 0, "left_fp32": []}, r"rest\.state: got 'fp8'"),
    ("rest", {"state": "fp32", "num_converted": 0, "left_fp32": ["w0"]}, r"left_fp32\[0\]: got"),
    ("num_classes", "3", r"details\.num_classes: got '3', expected"),
    ("preprocess", [3, 8, 8], r"details\.preprocess: got \[3, 8, 8\], expected an object"),
    ("preprocess", {"mean": [0.5]}, r"details\.preprocess: no field channels"),
]
PREPROCESS: list[tuple[str, Any, str]] = [
    ("channels", "3", r"details\.preprocess\.channels: got '3', expected a value of type int"),
    ("height", 0, r"height: got 0, expected a positive number"),
    ("width", None, r"details\.preprocess\.width: got None, expected"),
    ("mean", 0.5, r"details\.preprocess\.mean: got 0\.5, expected a list"),
    ("mean", [0.5], r"mean: got 1 values, expected 3"),
    ("std", [1, "a", 1], r"details\.preprocess\.std\[1\]: got 'a', expected"),
    ("std", [1, 0, 1], r"std: got .*, expected positive numbers"),
    ("resize", "fit", r"details\.preprocess\.resize: got 'fit', expected one of"),
]


def test_the_table_has_every_field() -> None:
    assert {name for name, _, _ in DAMAGE} == {item.name for item in fields(EngineDetails)}


def assert_one_error(engine: Path, expected: str) -> None:
    """Every reader of a damaged sidecar says the same, in one line."""
    where = r"^\S*m\.engine\.json: .*"
    remedy = ".*; build the engine again, or delete this file to use the engine without"
    readers: list[Callable[[], object]] = [
        lambda: read_engine_record(engine),
        lambda: inspect(engine),
        lambda: package(engine, engine.parent / "repo", PackageOptions()),
        lambda: preprocess_of(engine),
        lambda: evidence(engine, 1, on_gpu=True),
    ]
    for reader in readers:
        with pytest.raises(ArtifactError, match=where + expected + remedy):
            reader()
    for command in (["inspect", engine], ["package", engine, "-o", engine.parent / "repo"]):
        result = CliRunner().invoke(main, [str(part) for part in command], catch_exceptions=False)
        assert (result.exit_code, len(result.stderr.splitlines())) == (1, 1)
    assert not (engine.parent / "repo").exists()


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "find_gpu", lambda: "no NVIDIA driver on this machine")


@pytest.mark.parametrize(("name", "value", "expected"), DAMAGE)
def test_damaged_details_are_one_error(
    engine: Path, name: str, value: object, expected: str
) -> None:
    damage(engine, lambda content: content["details"].update({name: value}))
    assert_one_error(engine, expected)


@pytest.mark.parametrize(("name", "value", "expected"), PREPROCESS)
def test_damaged_preprocessing_is_one_error(
    engine: Path, name: str, value: object, expected: str
) -> None:
    damage(engine, lambda content: content["details"]["preprocess"].update({name: value}))
    assert_one_error(engine, expected)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda c: c["details"].pop("rest"), r"details: no field rest"),
        (lambda c: c["details"].update(wizardry=1), r"details: unknown field wizardry"),
        (lambda c: c["options"].update(refit="yes"), r"options\.refit: got 'yes', expected"),
        (lambda c: c["options"].update(shapes={}), r"options\.shapes: got \{\}, expected"),
        (lambda c: c["options"].pop("backend"), r"options: no field backend"),
        (lambda c: c.update(artifact="int8-onnx"), r"artifact: got 'int8-onnx', expected 'engine'"),
    ],
    ids=["missing", "unknown", "type", "text form", "missing option", "another file's"],
)
def test_a_damaged_sidecar_is_one_error(engine: Path, change: Change, expected: str) -> None:
    damage(engine, change)
    assert_one_error(engine, expected)


@pytest.mark.parametrize("field", ["parents", "versions"])
def test_hashes_and_versions_are_texts(engine: Path, field: str) -> None:
    damage(engine, lambda content: content.update({field: {"m.onnx": 5}}))
    expected = rf"not a sidecar written by reptrt \({field}.m.onnx: got 5, expected a text\)"
    with pytest.raises(ArtifactError, match=expected):
        read_engine_record(engine)


def test_labels_of_an_output_without_dimensions(tmp_path: Path) -> None:
    details = engine_details(outputs=(TensorInfo("score", (), "FLOAT"),))
    engine = write_fake_engine(tmp_path / "m.engine", PLAN, details)
    labels = tmp_path / "labels.txt"
    labels.write_text("a\nb\n")
    with pytest.raises(ConfigError, match=r"has 2 lines .*expected 1, o"):
        package(engine, tmp_path / "repo", PackageOptions(labels=labels))


def test_an_engine_with_the_sidecar_of_another_version_of_reptrt(tmp_path: Path) -> None:
    path = tmp_path / "m.engine"
    write_artifact(path, PLAN, artifact="engine", parents={}, options={}, details={})
    with pytest.raises(ArtifactError, match=r"options: no field backend; it was written by anothe"):
        read_engine_record(path)
