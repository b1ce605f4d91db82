"""Model repositories of Triton: what the configuration says, and that it is whole or absent."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from click.testing import CliRunner, Result
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format

from reptrt.cli import main
from reptrt.core.artifacts import sidecar_path
from reptrt.core.errors import ArtifactError, ConfigError, EngineError
from reptrt.graph.preprocess import Preprocess
from reptrt.trt import triton as module
from reptrt.trt.details import EngineDetails, TensorInfo
from reptrt.trt.options import PackageOptions, ShapeRange
from reptrt.trt.package import package
from tests.support.engines import engine_details, write_fake_engine
from tests.support.qdq_graphs import qdq_model, save

_FIELDS = {  # of Triton's model_config.proto, those that are written; text has no field numbers
    "ModelConfig": {
        "name": "string",
        "platform": "string",
        "max_batch_size": "int32",
        "input": "ModelInput*",
        "output": "ModelOutput*",
        "instance_group": "ModelInstanceGroup*",
        "dynamic_batching": "ModelDynamicBatching",
        "parameters": "ParametersEntry*",
    },
    "ModelInput": {"name": "string", "data_type": "DataType", "dims": "int64*"},
    "ModelOutput": {
        "name": "string",
        "data_type": "DataType",
        "dims": "int64*",
        "label_filename": "string",
    },
    "ModelInstanceGroup": {"count": "int32", "kind": "Kind"},
    "ModelDynamicBatching": {"max_queue_delay_microseconds": "uint64"},
    "ParametersEntry": {"key": "string", "value": "ModelParameter"},
    "ModelParameter": {"string_value": "string"},
}
_ENUMS = {
    "DataType": ["TYPE_INVALID", "TYPE_FP32", "TYPE_FP16", "TYPE_INT32"],
    "Kind": ["KIND_AUTO", "KIND_GPU"],
}


def own_config_class() -> Any:
    """A message class with the fields that are used; it refuses a text with any other."""
    file = descriptor_pb2.FileDescriptorProto(
        name="triton_subset.proto", package="t", syntax="proto3"
    )
    for name, values in _ENUMS.items():
        enum = file.enum_type.add(name=name)
        for number, value in enumerate(values):
            enum.value.add(name=value, number=number)
    field = descriptor_pb2.FieldDescriptorProto
    for name, fields in _FIELDS.items():
        message = file.message_type.add(name=name)
        for number, (key, spec) in enumerate(fields.items(), 1):
            kind = spec.rstrip("*")
            added = message.field.add(name=key, number=number)
            added.label = field.LABEL_REPEATED if spec.endswith("*") else field.LABEL_OPTIONAL
            if kind in _FIELDS or kind in _ENUMS:
                added.type = field.TYPE_MESSAGE if kind in _FIELDS else field.TYPE_ENUM
                added.type_name = f".t.{kind}"
            else:
                added.type = getattr(field, f"TYPE_{kind.upper()}")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("t.ModelConfig"))


OWN = own_config_class()


def tritons_config_class() -> Any:
    """Triton's own class; read from its file, because the package around it needs grpc."""
    found = importlib.util.find_spec("tritonclient")
    if found is None or not found.submodule_search_locations:
        pytest.skip("tritonclient is not installed; extra dev leaves it out: it pins ml_dtypes")
    path = Path(found.submodule_search_locations[0]) / "grpc" / "model_config_pb2.py"
    spec = importlib.util.spec_from_file_location("model_config_pb2", path)
    assert spec is not None
    assert spec.loader is not None
    loaded: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded.ModelConfig


def assert_part_of(own: Any, whole: Any) -> None:
    """All fields of a message, and all below it, are fields of another one, by name and type."""
    assert own.name == whole.name
    forms = []
    for message in (own, whole):
        proto = descriptor_pb2.DescriptorProto()
        message.CopyToProto(proto)
        forms.append({field.name: (field.type, field.label) for field in proto.field})
    assert forms[0].items() <= forms[1].items()
    for name, field in own.fields_by_name.items():
        other = whole.fields_by_name[name]
        if field.message_type is not None:
            assert_part_of(field.message_type, other.message_type)
        if field.enum_type is not None:
            assert field.enum_type.name == other.enum_type.name
            assert set(field.enum_type.values_by_name) <= set(other.enum_type.values_by_name)


def test_the_fields_are_tritons() -> None:
    """So a text that the class here takes is one that Triton takes."""
    assert_part_of(OWN.DESCRIPTOR, tritons_config_class().DESCRIPTOR)


def engine_file(folder: Path, details: EngineDetails | None = None) -> Path:
    """A file with the header of an engine of tensorrt 10.13."""
    plan = b"ftrt" + bytes(12) + (100).to_bytes(8, "little") + bytes([10, 13, 0, 35]) + bytes(72)
    return write_fake_engine(folder / "net.int8.engine", plan, details)


def parse(path: Path) -> Any:
    return text_format.Parse((path / "config.pbtxt").read_text(encoding="utf-8"), OWN())


def test_the_configuration_says_what_the_engine_is(tmp_path: Path) -> None:
    engine = engine_file(tmp_path)
    report = package(engine, tmp_path / "repo", PackageOptions(instances=2, max_queue_delay_us=7))
    assert report.path == tmp_path / "repo" / "net_int8"
    config = parse(report.path)
    assert (config.name, config.platform) == ("net_int8", "tensorrt_plan")
    assert config.max_batch_size == 64
    (image,) = config.input
    assert (image.name, list(image.dims)) == ("input", [3, 32, 48])
    assert [(out.name, list(out.dims)) for out in config.output] == [
        ("logits", [3]),
        ("features", [8, 2, 2]),
    ]
    types = image.DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_number
    kinds = [types[tensor.data_type].name for tensor in (image, *config.output)]
    assert kinds == ["TYPE_FP32", "TYPE_FP32", "TYPE_FP16"]
    (group,) = config.instance_group
    assert (group.count, group.kind) == (2, _ENUMS["Kind"].index("KIND_GPU"))
    assert config.dynamic_batching.max_queue_delay_microseconds == 7
    assert not config.output[0].label_filename


def test_the_engine_and_its_preprocessing_travel(tmp_path: Path) -> None:
    engine = engine_file(tmp_path)
    report = package(engine, tmp_path / "repo", PackageOptions(name="digits.v1"))
    assert (report.path / "1" / "model.plan").read_bytes() == engine.read_bytes()
    config = parse(report.path)
    parameters = {entry.key: entry.value.string_value for entry in config.parameters}
    assert json.loads(parameters["reptrt.preprocess"]) == {
        "channels": 3,
        "height": 32,
        "width": 48,
        "mean": [0.5, 0.4, 0.3],
        "std": [0.2, 0.2, 0.2],
        "resize": "crop",
    }
    text = (report.path / "README.md").read_text(encoding="utf-8")
    assert "# digits.v1" in text
    assert "until the image covers 36 x 54, then cut out the centre 32 x 48." in text
    assert "mean [0.5, 0.4, 0.3]" in text
    assert "tensorrt 10.13.0.35 for sm89" in text


def test_the_letterbox_of_a_detector_is_written_out(tmp_path: Path) -> None:
    preprocess = replace(Preprocess.plain(3, 320, 416), resize="letterbox")
    engine = engine_file(tmp_path, engine_details(preprocess=preprocess))
    report = package(engine, tmp_path / "repo", PackageOptions())
    text = (report.path / "README.md").read_text(encoding="utf-8")
    assert "until the image fits 320 x 416, and put it in the middle of pixels 114" in text


def test_labels(tmp_path: Path) -> None:
    labels = tmp_path / "classes.txt"
    labels.write_text("cat\nhérisson\ndog\n", encoding="utf-8")
    options = PackageOptions(labels=labels)
    report = package(engine_file(tmp_path), tmp_path / "repo", options)
    assert report.num_labels == 3
    config = parse(report.path)
    assert [out.label_filename for out in config.output] == ["labels.txt", ""]
    assert (report.path / "labels.txt").read_text(encoding="utf-8").split() == [
        "cat",
        "hérisson",
        "dog",
    ]


def test_a_fixed_batch_is_part_of_the_shape(tmp_path: Path) -> None:
    details = engine_details(
        inputs=(TensorInfo("input", (4, 3, 32, 48), "FLOAT"),),
        outputs=(TensorInfo("logits", (4, 3), "FLOAT"),),
        profile={},
        preprocess=None,
    )
    report = package(engine_file(tmp_path, details), tmp_path / "repo", PackageOptions())
    config = parse(report.path)
    assert config.max_batch_size == 0
    assert list(config.input[0].dims) == [4, 3, 32, 48]
    assert not config.HasField("dynamic_batching")
    assert "Not recorded" in (report.path / "README.md").read_text(encoding="utf-8")


def test_names_are_quoted(tmp_path: Path) -> None:
    name = 'a "b" \\ c'
    shapes = ShapeRange((1, 3), (2, 3), (4, 3))
    details = engine_details(inputs=(TensorInfo(name, (-1, 3), "FLOAT"),), profile={name: shapes})
    report = package(engine_file(tmp_path, details), tmp_path / "repo", PackageOptions())
    assert parse(report.path).input[0].name == name


def test_another_model_in_the_repository_stays(tmp_path: Path) -> None:
    engine, repo = engine_file(tmp_path), tmp_path / "repo"
    package(engine, repo, PackageOptions(name="a"))
    package(engine, repo, PackageOptions(name="b"))
    assert sorted(path.name for path in repo.iterdir()) == ["a", "b"]
    with pytest.raises(ArtifactError, match=r"repo/a: exists; remove it, or give another name"):
        package(engine, repo, PackageOptions(name="a"))


def test_nothing_is_left_of_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_file(tmp_path)
    before = sorted(tmp_path.iterdir())

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.shutil, "copyfile", full)
    with pytest.raises(ArtifactError, match=r"cannot be written .No space left on device"):
        package(engine, tmp_path / "repo", PackageOptions())
    assert sorted(tmp_path.iterdir()) == before


def test_bad_input(tmp_path: Path) -> None:
    engine, repo = engine_file(tmp_path), tmp_path / "repo"
    labels = tmp_path / "labels.txt"
    labels.write_text("one\ntwo\n")
    with pytest.raises(
        ConfigError, match=r"has 2 lines .0 empty., expected 3, one per class of logits"
    ):
        package(engine, repo, PackageOptions(labels=labels))
    with pytest.raises(ArtifactError, match="labels cannot be read"):
        package(engine, repo, PackageOptions(labels=tmp_path / "none.txt"))
    with pytest.raises(ArtifactError, match=r"folder .* does not exist"):
        package(engine, tmp_path / "no" / "repo", PackageOptions())
    with pytest.raises(ArtifactError, match="not a readable ONNX file"):
        package(labels, repo, PackageOptions())
    text = tmp_path / "text.engine"
    text.write_text("no engine")
    with pytest.raises(EngineError, match="not a TensorRT engine"):
        package(text, repo, PackageOptions())
    with pytest.raises(ConfigError, match="instances: got 0"):
        PackageOptions(instances=0)
    with pytest.raises(ConfigError, match="name: got 'a/b'"):
        PackageOptions(name="a/b")
    odd = engine_details(outputs=(TensorInfo("logits", (-1, 3), "FP8"),))
    odd_engine = engine_file(tmp_path, odd)
    with pytest.raises(ConfigError, match="output logits: FP8, which Triton cannot serve"):
        package(odd_engine, repo, PackageOptions())
    sidecar_path(engine).unlink()
    with pytest.raises(ArtifactError, match="has no sidecar"):
        package(engine, repo, PackageOptions())
    assert not repo.exists()


def test_a_real_engine_through_the_command_line(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    save(qdq_model(), tmp_path / "m.onnx")

    def reptrt(*args: str | Path) -> Result:
        return CliRunner().invoke(main, list(map(str, args)), catch_exceptions=False)

    engine = tmp_path / "m.engine"
    args = ["build-engine", tmp_path / "m.onnx", "-o", engine, "--backend", "tensorrt-rtx"]
    assert reptrt(*args, "--shapes", "1:4:16").exit_code == 0
    done = reptrt("package", engine, "-o", tmp_path / "repo", "--json", "-")
    assert done.exit_code == 0
    assert "Triton's TensorRT backend loads engines of tensorrt only" in done.stderr
    assert json.loads(done.stdout)["max_batch_size"] == 16
    assert parse(tmp_path / "repo" / "m").max_batch_size == 16
