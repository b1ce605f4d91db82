import builtins
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from reptrt.core.errors import ArtifactError, ConfigError, DataError, MissingDependencyError
from reptrt.execute.runner import (
    OrtRunner,
    open_runner,
    ort_version,
    usable_cores,
)
from reptrt.trt import machine as conditions
from tests.support.helpers import optimized_op_counts, ort_run
from tests.support.tiny_nets import classifier, quantized_conv

IMAGES = np.random.default_rng(1).standard_normal((5, 3, 8, 8)).astype(np.float32)


@pytest.fixture
def net(tmp_path: Path) -> Path:
    path = tmp_path / "net.onnx"
    onnx.save(classifier(), path)
    return path


@pytest.mark.parametrize("as_bytes", [False, True], ids=["file", "bytes"])
def test_outputs_are_those_of_onnxruntime_itself(net: Path, as_bytes: bool) -> None:
    with OrtRunner(net.read_bytes() if as_bytes else net, threads=1) as runner:
        found = runner.run(IMAGES)
        assert list(found) == runner.output_names == ["logits"]
    np.testing.assert_array_equal(found["logits"], ort_run(onnx.load(net), {"x": IMAGES})["logits"])


def test_every_output_comes_by_name() -> None:
    model = classifier()
    model.graph.output.append(helper.make_tensor_value_info("p", TensorProto.FLOAT, None))
    with OrtRunner(model.SerializeToString(), threads=1) as runner:
        found = runner.run(IMAGES)
    expected = ort_run(model, {"x": IMAGES})
    assert list(found) == list(expected) == ["logits", "p"]
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name])


@pytest.mark.parametrize(("batch", "first"), [("N", None), (4, 4)])
def test_attributes_describe_the_net(batch: int | str, first: int | None) -> None:
    with OrtRunner(classifier(batch=batch).SerializeToString(), threads=2) as runner:
        assert (runner.name, runner.device, runner.threads) == ("onnxruntime", "cpu", 2)
        assert (runner.input_name, runner.input_shape) == ("x", [first, 3, 8, 8])


def test_threads_default_to_the_cores_of_this_process(net: Path) -> None:
    with OrtRunner(net) as runner:
        assert runner.threads == usable_cores() >= 1
    with pytest.raises(ConfigError, match="threads: got 0"):
        OrtRunner(net, threads=0)


def test_external_data_is_read(tmp_path: Path) -> None:
    model = classifier()
    path = tmp_path / "net.onnx"
    onnx.save(model, path, save_as_external_data=True, location="w.bin", size_threshold=0)
    assert (tmp_path / "w.bin").exists()
    with OrtRunner(path) as runner:
        found = runner.run(IMAGES)["logits"]
    np.testing.assert_allclose(found, ort_run(classifier(), {"x": IMAGES})["logits"], rtol=1e-5)


def test_a_batch_that_does_not_fit_is_refused_in_one_line(net: Path) -> None:
    with OrtRunner(net) as runner:
        with pytest.raises(DataError, match=r"float32 batch \(5, 3, 8, 7\), input x is \[None, 3,"):
            runner.run(IMAGES[..., :7])
        with pytest.raises(DataError, match="float64 batch") as caught:
            runner.run(IMAGES.astype(np.float64))
    assert "\n" not in str(caught.value)
    assert "[ONNXRuntimeError]" not in str(caught.value)


def two_inputs() -> onnx.ModelProto:
    model = classifier()
    model.graph.input.append(helper.make_tensor_value_info("x2", TensorProto.FLOAT, [1]))
    model.graph.node.append(helper.make_node("Neg", ["x2"], ["y2"]))
    model.graph.output.append(helper.make_tensor_value_info("y2", TensorProto.FLOAT, [1]))
    return model


def test_an_input_that_no_node_reads_needs_no_data() -> None:
    model = classifier()
    model.graph.input.append(helper.make_tensor_value_info("x2", TensorProto.FLOAT, [1]))
    with (
        OrtRunner(model.SerializeToString()) as alone,
        OrtRunner(classifier().SerializeToString()) as expected,
    ):
        for name, value in expected.run(IMAGES).items():
            np.testing.assert_array_equal(alone.run(IMAGES)[name], value)


def newer_ir() -> onnx.ModelProto:
    model = classifier()
    model.ir_version = 1000
    return model


def unknown_operator() -> onnx.ModelProto:
    model = classifier()
    model.graph.node[0].op_type = "Sparkle"
    model.graph.node[0].domain = "nowhere"
    model.opset_import.append(helper.make_opsetid("nowhere", 1))
    return model


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"junk", "model: 4 bytes are not an ONNX model"),
        (b"", "refuses this model"),
        (two_inputs().SerializeToString(), "2 inputs, expected one image batch"),
        (
            newer_ir().SerializeToString(),
            r"refuses this model \(Unsupported model IR version: 1000",
        ),
        (unknown_operator().SerializeToString(), "refuses this model .*Sparkle"),
    ],
    ids=["junk", "empty", "two inputs", "newer", "unknown operator"],
)
def test_a_model_that_cannot_run(
    content: bytes, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ArtifactError, match=message) as caught:
        OrtRunner(content)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""  # onnxruntime says nothing beside the exception


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"none.onnx does not exist"):
        OrtRunner(tmp_path / "none.onnx")


def test_warnings_of_onnxruntime_are_silent(capfd: pytest.CaptureFixture[str]) -> None:
    model = classifier()
    unused = helper.make_tensor("unused", TensorProto.FLOAT, [1], [0.0])
    model.graph.initializer.append(unused)  # onnxruntime warns when it removes one
    OrtRunner(model.SerializeToString()).run(IMAGES)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("device", ["cuda", "tensorrt"])
def test_a_device_that_is_not_there_names_what_is(net: Path, device: str) -> None:
    import onnxruntime

    if len(onnxruntime.get_available_providers()) > 2:
        pytest.skip("this onnxruntime has a GPU provider")
    with pytest.raises(ConfigError, match=rf"device: got {device}, .*only .*CPUExecutionProvider"):
        OrtRunner(net, device=device)


def test_a_missing_onnxruntime_says_how_to_install_it(
    net: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_import = builtins.__import__

    def without(name: str, *args: object) -> object:
        if name.startswith("onnxruntime"):
            raise ImportError("No module named 'onnxruntime'")
        return real_import(name, *args)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingDependencyError, match="pip install onnxruntime"):
        OrtRunner(net)


def test_importing_the_module_does_not_import_onnxruntime() -> None:
    code = "import sys, reptrt.execute.runner; sys.exit('onnxruntime' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_stderr_works_again_after_the_first_import(tmp_path: Path) -> None:
    code = "import os, reptrt.execute.runner as r; r.ort_version(); os.write(2, b'still here')"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert done.stderr == b"still here"
    assert ort_version().count(".") >= 2


# --- what really runs --------------------------------------------------------------------------


@pytest.mark.parametrize("signed", [False, True], ids=["uint8", "int8"])
def test_quantized_convolutions_run_in_int8_with_the_same_codes(signed: bool) -> None:
    model = quantized_conv(signed=signed)
    counts = optimized_op_counts(model.SerializeToString())
    assert isinstance(counts, Counter)
    assert counts["QLinearConv"] == 1
    assert "Conv" not in counts
    with OrtRunner(model.SerializeToString(), threads=1) as runner:
        found = runner.run(IMAGES)["logits"]
    expected = ort_run(model, {"x": IMAGES}, optimize=False)["logits"]
    assert (expected > 0).mean() > 0.2
    # the same integers, but a float product that lies on a rounding border may fall either way
    assert np.abs(found - expected).max() <= 0.05 * 1.001
    assert (found != expected).mean() < 0.01


def test_a_relu_before_fp8_codes_is_kept(capfd: pytest.CaptureFixture[str]) -> None:
    """onnxruntime's own optimizations drop it, as before UINT8 codes with zero point 0."""
    zero = helper.make_tensor("zero", TensorProto.FLOAT8E4M3FN, [], b"\0", raw=True)
    scale = helper.make_tensor("scale", TensorProto.FLOAT, [], [0.25])
    nodes = [
        helper.make_node("Relu", ["x"], ["r"]),
        helper.make_node("QuantizeLinear", ["r", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["logits"]),
    ]
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", 8]) for n in ("x", "logits"))
    graph = helper.make_graph(nodes, "fp8", [x], [y], [scale, zero])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    values = np.linspace(-4, 4, 16, dtype=np.float32).reshape(2, 8)
    with OrtRunner(model.SerializeToString(), threads=1) as runner:
        found = runner.run(values)["logits"]
    assert np.array_equal(found > 0, values > 0)
    assert found.min() == 0
    assert np.abs(found - values.clip(0)).max() <= 4 / 16  # three bits behind the leading one
    assert capfd.readouterr().out == ""


def test_a_float_convolution_is_counted_as_one(net: Path) -> None:
    plain = optimized_op_counts(net)
    assert "QLinearConv" not in plain
    assert plain["Conv"] + plain["FusedConv"] == 1


# --- one door for every file -------------------------------------------------------------------


def test_open_runner_takes_onnx_files(net: Path) -> None:
    for kind in ("auto", "ort"):
        with open_runner(net, runner=kind, threads=1) as runner:
            assert runner.name == "onnxruntime"
            assert runner.run(IMAGES)["logits"].shape == (5, 10)


def test_open_runner_refuses_the_other_kind(net: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"not an .engine or .plan file; build an engine from it first"
    ):
        open_runner(net, runner="tensorrt")
    with pytest.raises(ConfigError, match=r"an engine cannot run in onnxruntime"):
        open_runner(tmp_path / "m.engine", runner="ort")


def test_open_sessions_leave_each_other_the_cores(net: Path) -> None:
    options = OrtRunner(net, threads=2)._session.get_session_options()
    assert options.get_session_config_entry("session.force_spinning_stop") == "1"
    assert options.intra_op_num_threads == 2
    assert os.cpu_count() is not None


@pytest.mark.parametrize(
    ("machine", "flags", "wanted"),
    [
        ("x86_64", "sse avx2 avx512f avx512_vnni", ""),
        ("AMD64", "sse avx2 avx_vnni", ""),
        ("x86_64", "sse avx2 avx512f", "1"),
        ("AMD64", None, "1"),
        ("aarch64", None, ""),
    ],
)
def test_products_do_not_saturate_without_vnni(
    net: Path, machine: str, flags: str | None, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conditions.platform, "machine", lambda: machine)
    monkeypatch.setattr(conditions, "_cpuinfo", lambda field: flags)
    options = OrtRunner(net)._session.get_session_options()
    asked = options.get_session_config_entry("session.x64quantprecision") if wanted else ""
    assert asked == wanted
    assert conditions.may_saturate() == bool(wanted)
