"""Networks packed for serving: ONNX files in Triton repositories, and NMS behind detectors."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

import reptrt
from reptrt.cli import main
from reptrt.core.artifacts import read_sidecar
from reptrt.core.errors import ArtifactError, ConfigError, RewriteError
from reptrt.core.nms_options import PLUGIN, NmsOptions
from reptrt.graph.model import Model
from reptrt.graph.net import model_from_net, net_from_model
from reptrt.graph.preprocess import Preprocess, write_preprocess
from reptrt.rewrite.append_nms import OUTPUTS
from reptrt.trt import driver
from reptrt.trt.build import build_engine
from reptrt.trt.details import TensorInfo, read_engine_record
from reptrt.trt.driver import Gpu
from reptrt.trt.options import BuildOptions, PackageOptions
from reptrt.trt.package import package
from tests.support.detectors import tiny_detector
from tests.support.engines import engine_details
from tests.support.fake_tensorrt import FULL_RELEASES, FakeTensorrt
from tests.support.helpers import ort_run
from tests.trt.test_triton import engine_file, parse

_NMS = NmsOptions(append=True, max_boxes=20)
_RESULTS = (
    TensorInfo("num_detections", (-1, 1), "INT32"),
    TensorInfo("detection_boxes", (-1, 20, 4), "FLOAT"),
    TensorInfo("detection_scores", (-1, 20), "FLOAT"),
    TensorInfo("detection_classes", (-1, 20), "INT32"),
)


@pytest.fixture
def detector(tmp_path: Path) -> Path:
    """A detector of three classes for letterboxed images, as a file."""
    net = net_from_model(tiny_detector())
    write_preprocess(net, replace(Preprocess.plain(3, 32, 64), resize="letterbox"))
    path = tmp_path / "det.onnx"
    onnx.save(model_from_net(net), path)
    return path


def _images() -> np.ndarray:
    return np.random.default_rng(0).uniform(0, 1, (2, 3, 32, 32)).astype(np.float32)


def test_an_onnx_file_becomes_a_model_of_the_onnxruntime_backend(
    detector: Path, tmp_path: Path
) -> None:
    report = package(detector, tmp_path / "repo", PackageOptions())
    assert (report.platform, report.max_batch_size) == ("onnxruntime_onnx", 64)
    config = parse(report.path)
    assert (config.name, config.platform) == ("det", "onnxruntime_onnx")
    assert list(config.input[0].dims) == [3, 32, 32]
    assert [(out.name, list(out.dims)) for out in config.output] == [("last", [16, 8])]
    proto = onnx.load(report.path / "1" / "model.onnx")
    assert [node.op_type for node in proto.graph.node].count("Conv") == 3
    assert "Detections" not in (report.path / "README.md").read_text()


def test_a_detector_with_nms_its_labels_and_the_way_back(detector: Path, tmp_path: Path) -> None:
    labels = tmp_path / "coco.json"
    categories = [{"id": 7, "name": "RBC"}, {"id": 2, "name": "WBC"}, {"id": 9, "name": "plate"}]
    labels.write_text(json.dumps({"images": [], "categories": categories}))
    report = package(detector, tmp_path / "repo", PackageOptions(nms=_NMS, labels=labels))
    assert (report.outputs, report.num_labels) == (OUTPUTS, 3)
    config = parse(report.path)
    assert [list(out.dims) for out in config.output] == [[1], [20, 4], [20], [20]]
    assert [out.label_filename for out in config.output] == ["", "", "", "labels.txt"]
    assert (report.path / "labels.txt").read_text().split() == ["WBC", "RBC", "plate"]
    text = (report.path / "README.md").read_text()
    assert "The first num_detections entries of detection_boxes" in text
    assert "s = min(64 / w, 32 / h)" in text
    assert "y = (y - (32 - sh) // 2) * h / sh" in text
    served = onnx.load(report.path / "1" / "model.onnx")
    assert tuple(ort_run(served, {"images": _images()})) == OUTPUTS


def test_one_file_with_nms_for_onnxruntime_or_for_tensorrt(detector: Path, tmp_path: Path) -> None:
    for platform, op in (("auto", "NonMaxSuppression"), ("tensorrt", PLUGIN)):
        output = tmp_path / f"{platform}.onnx"
        report = package(detector, output, PackageOptions(platform=platform, nms=_NMS))  # type: ignore[arg-type]
        assert (report.path, report.outputs) == (output, OUTPUTS)
        assert op in [node.op_type for node in onnx.load(output).graph.node]
        sidecar = read_sidecar(output)
        assert sidecar is not None
        assert (sidecar.artifact, list(sidecar.parents)) == ("float-onnx", ["det.onnx"])
        assert reptrt.lint(output).findings == reptrt.lint(detector).findings
    assert Model.read(tmp_path / "auto.onnx").preprocess.resize == "letterbox"


def test_nms_behind_an_int8_detector_changes_nothing_in_front_of_it(tmp_path: Path) -> None:
    onnx.save(tiny_detector("raw"), tmp_path / "det.onnx")
    int8 = reptrt.calibrate(tmp_path / "det.onnx", np.concatenate([_images()] * 8), recipe="fast")
    assert not {"NonMaxSuppression", PLUGIN} & {node.op_type for node in int8.proto.graph.node}
    for platform in ("onnxruntime", "tensorrt"):
        output = tmp_path / f"{platform}.onnx"
        reptrt.package(int8, output, platform=platform, nms=True, confidence=0.1)
        sidecar = read_sidecar(output)
        assert sidecar is not None
        assert sidecar.artifact == "int8-onnx"
        before, after = reptrt.lint(int8), reptrt.lint(output)
        assert (after.int8_layers, after.findings) == (before.int8_layers, before.findings)
    results = ort_run(onnx.load(tmp_path / "onnxruntime.onnx"), {"images": _images()})
    assert (results["num_detections"] > 0).all()


def test_a_plugin_in_a_file_does_not_keep_it_from_calibration(tmp_path: Path) -> None:
    """What is written is opened in onnxruntime, which knows no EfficientNMS_TRT."""
    onnx.save(tiny_detector(), tmp_path / "det.onnx")
    package(
        tmp_path / "det.onnx", tmp_path / "nms.onnx", PackageOptions(platform="tensorrt", nms=_NMS)
    )
    int8 = reptrt.calibrate(tmp_path / "nms.onnx", np.concatenate([_images()] * 8), recipe="fast")
    int8.save(tmp_path / "nms.int8.onnx")
    ops = [node.op_type for node in onnx.load(tmp_path / "nms.int8.onnx").graph.node]
    assert PLUGIN in ops
    assert "QuantizeLinear" in ops


@pytest.mark.parametrize("release", FULL_RELEASES)
def test_an_engine_with_nms(
    release: str, detector: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeTensorrt(release)
    monkeypatch.setitem(sys.modules, "tensorrt", fake)
    monkeypatch.setattr(driver, "find_gpu", lambda: Gpu("NVIDIA GeForce RTX 4090", "sm89", (12, 8)))
    build_engine(detector, tmp_path / "det.engine", BuildOptions("tensorrt", nms=_NMS))
    (registered,) = fake.called("init_libnvinfer_plugins")
    assert registered[1] == ""
    record = read_engine_record(tmp_path / "det.engine")
    assert record is not None
    assert [tensor.name for tensor in record.details.outputs] == list(OUTPUTS)
    assert record.details.num_classes == 3


def test_boxes_stay_in_fp32_in_an_fp16_engine(
    detector: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeTensorrt(FULL_RELEASES[-1])
    monkeypatch.setitem(sys.modules, "tensorrt", fake)
    monkeypatch.setattr(driver, "find_gpu", lambda: Gpu("NVIDIA GeForce RTX 4090", "sm89", (12, 8)))
    build_engine(detector, tmp_path / "det.engine", BuildOptions("tensorrt", nms=_NMS))
    ((content,),) = fake.called("OnnxParser.parse")
    graph = onnx.shape_inference.infer_shapes(onnx.load_from_string(content)).graph
    types = {value.name: value.type.tensor_type.elem_type for value in graph.value_info}
    (plugin,) = (node for node in graph.node if node.op_type == PLUGIN)
    assert [types[name] for name in plugin.input] == [onnx.TensorProto.FLOAT] * 2
    assert onnx.TensorProto.FLOAT16 in types.values()


def test_labels_of_an_engine_with_nms(tmp_path: Path) -> None:
    details = engine_details(outputs=_RESULTS, num_classes=2)
    labels = tmp_path / "labels.txt"
    labels.write_text("a\nb\n")
    engine = engine_file(tmp_path, details)
    report = package(engine, tmp_path / "repo", PackageOptions(labels=labels))
    assert parse(report.path).output[3].label_filename == "labels.txt"
    labels.write_text("a\nb\nc\n")
    with pytest.raises(
        ConfigError, match=r"has 3 lines .0 empty., expected 2, one per class of num"
    ):
        package(engine, tmp_path / "other", PackageOptions(labels=labels))


def test_labels_of_a_detector_without_nms_count_its_classes(detector: Path, tmp_path: Path) -> None:
    labels = tmp_path / "labels.json"
    labels.write_text('["a", "b"]')
    with pytest.raises(ConfigError, match="expected 3, one per class of last"):
        package(detector, tmp_path / "repo", PackageOptions(labels=labels))
    labels.write_text('{"categories": 3}')
    with pytest.raises(ArtifactError, match="labels cannot be read"):
        package(detector, tmp_path / "repo", PackageOptions(labels=labels))


def test_rtx_has_no_nms(detector: Path, tmp_path: Path) -> None:
    reason = "neither EfficientNMS_TRT nor a kernel for NonMaxSuppression"
    with pytest.raises(ConfigError, match=f"nms: tensorrt-rtx .*{reason}"):
        package(detector, tmp_path / "o.onnx", PackageOptions("tensorrt-rtx", nms=_NMS))
    package(detector, tmp_path / "o.onnx", PackageOptions(nms=_NMS))
    pytest.importorskip("tensorrt_rtx")
    rtx = BuildOptions("tensorrt-rtx", targets=("sm89",))
    with pytest.raises(ConfigError, match=f"nms: tensorrt-rtx .*{reason}"):
        build_engine(detector, tmp_path / "o.engine", replace(rtx, nms=_NMS))
    with pytest.raises(ConfigError, match=f"o.onnx: node .*NonMaxSuppression.*{reason}"):
        build_engine(tmp_path / "o.onnx", tmp_path / "o.engine", rtx)


def test_what_does_not_fit(detector: Path, tmp_path: Path) -> None:
    engine = engine_file(tmp_path)
    with pytest.raises(ConfigError, match="is built already; give it to reptrt build-engine"):
        package(engine, tmp_path / "repo", PackageOptions(nms=_NMS))
    with pytest.raises(ConfigError, match="is an engine, which Triton serves with tensorrt only"):
        package(engine, tmp_path / "repo", PackageOptions(platform="onnxruntime"))
    with pytest.raises(ConfigError, match=r"is an ONNX file, .* build it first with reptrt build"):
        package(detector, tmp_path / "repo", PackageOptions(platform="tensorrt", nms=_NMS))
    with pytest.raises(ConfigError, match="one ONNX file is written with nms only"):
        package(detector, tmp_path / "o.onnx", PackageOptions())
    with pytest.raises(ArtifactError, match="is the file it would be made from"):
        package(detector, detector, PackageOptions(nms=_NMS))
    with pytest.raises(RewriteError, match="NMS cannot be appended"):
        package(detector, tmp_path / "repo", PackageOptions(nms=replace(_NMS, layout="raw")))
    assert not (tmp_path / "repo").exists()
    with pytest.raises(ConfigError, match=r"iou: got 2, expected 0\.0 to 1\.0"):
        NmsOptions(iou=2)


def test_the_command_line(detector: Path, tmp_path: Path) -> None:
    args = ["package", str(detector), "-o", str(tmp_path / "o.onnx"), "--max-boxes", "5"]
    done = CliRunner().invoke(main, [*args, "--nms"], catch_exceptions=False)
    assert done.exit_code == 0
    assert "o.onnx  for onnxruntime  batch 64" in done.stdout
    dims = onnx.load(tmp_path / "o.onnx").graph.output[1].type.tensor_type.shape.dim
    assert [dim.dim_value for dim in dims][1:] == [5, 4]
    refused = CliRunner().invoke(main, args, catch_exceptions=False)
    assert refused.exit_code == 1
    assert "written with --nms only" in refused.stderr
