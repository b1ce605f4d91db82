"""eval --task any: cosine and PSNR of outputs, against numpy and scikit-learn."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from reptrt.judge.evaluate import EvalReport, FileResult, evaluate
from reptrt.judge.options import EvaluateOptions
from tests.support.helpers import ort_run

metrics = pytest.importorskip("sklearn.metrics")

PIXELS = np.random.default_rng(4).integers(0, 256, (11, 3, 12, 10), dtype=np.uint8)
X = PIXELS.astype(np.float32) / np.float32(255)


def net(noise: float, *, gain: float = 1.0, several: bool = False) -> onnx.ModelProto:
    """Return a network with a picture as output, gain * (x + noise * x of the pixel beside it)."""
    kernel = np.zeros((3, 3, 1, 3), np.float32)
    kernel[range(3), range(3), 0, 1] = gain
    kernel[range(3), range(3), 0, 0] = gain * noise
    nodes = [
        helper.make_node("Conv", ["x", "k"], ["picture"], pads=[0, 1, 0, 1]),
        helper.make_node("GlobalAveragePool", ["picture"], ["p"]),
        helper.make_node("Flatten", ["p"], ["means"]),
    ]
    outputs = {"picture": ["N", 3, 12, 10], **({"means": ["N", 3]} if several else {})}
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 12, 10])],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in outputs.items()],
        [numpy_helper.from_array(kernel, "k")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)


def judged(folder: Path, exact: onnx.ModelProto, noisy: onnx.ModelProto) -> EvalReport:
    np.savez(folder / "data.npz", x=PIXELS)
    for name, model in (("exact", exact), ("noisy", noisy)):
        onnx.save(model, folder / f"{name}.onnx")
    files = [folder / "exact.onnx", folder / "noisy.onnx"]
    options = EvaluateOptions(task="any", reference=files[0], batch_size=4, threads=1)
    return evaluate(files, folder / "data.npz", options)


def row_of(report: EvalReport, name: str) -> list[str]:
    """Return the cells of the last row of that name."""
    table = report.to_table()
    rows = zip(*(column.cells for column in table.columns), strict=True)
    return [[str(cell) for cell in row] for row in rows if str(row[0]).endswith(name)][-1]


@pytest.mark.parametrize(("gain", "peak"), [(1.0, 1.0), (255.0, 255.0)])
def test_cosine_and_psnr_of_a_picture(tmp_path: Path, gain: float, peak: float) -> None:
    models = net(0, gain=gain), net(0.1, gain=gain)
    report = judged(tmp_path, *models)
    reference, output = (ort_run(model, {"x": X})["picture"].astype(float) for model in models)
    same, result = report.results
    psnr = 10 * np.log10(peak**2 / metrics.mean_squared_error(reference.ravel(), output.ravel()))
    cosine = metrics.pairwise.cosine_similarity([reference.ravel()], [output.ravel()])[0, 0]
    assert result.measures["cosine"] == {"picture": pytest.approx(cosine, abs=1e-9)}
    assert result.measures["psnr_db"] == {"picture": pytest.approx(psnr)}
    assert same.measures["psnr_db"] == {"picture": None}
    assert row_of(report, "noisy.onnx")[2:4] == [f"{cosine:.5f}", f"{psnr:.2f}"]
    assert row_of(report, "exact.onnx")[2:4] == ["1.00000", "inf"]


def test_several_outputs_have_a_row_each(tmp_path: Path) -> None:
    models = net(0, several=True), net(0.1, several=True)
    report = judged(tmp_path, *models)
    result = report.results[1]
    reference, output = (ort_run(model, {"x": X})["means"] for model in models)
    cosine = (reference * output).sum() / np.sqrt((reference**2).sum() * (output**2).sum())
    assert list(result.measures["cosine"]) == ["picture", "means"]
    assert result.measures["cosine"]["means"] == pytest.approx(cosine, abs=1e-6)
    assert list(result.measures["psnr_db"]) == ["picture"]
    assert result.outputs is not None
    assert row_of(report, "means")[2:] == [f"{cosine:.5f}", "", f"{result.outputs['means']:.2f}"]
    psnr = f"{result.measures['psnr_db']['picture']:.2f}"
    assert row_of(report, "noisy.onnx")[2:4] == ["", psnr]  # there is one picture
    assert row_of(report, "picture")[3:] == [psnr, f"{result.outputs['picture']:.2f}"]


@pytest.mark.parametrize("gain", [-1.0, 3.0, 100.0, 400.0])
def test_values_of_another_range_are_no_picture(tmp_path: Path, gain: float) -> None:
    result = judged(tmp_path, net(0, gain=gain), net(0.1, gain=gain)).results[1]
    assert result.measures["psnr_db"] == {}
    assert 0.9 < result.measures["cosine"]["picture"] < 1


def test_without_a_reference_nothing_is_known(tmp_path: Path) -> None:
    judged(tmp_path, net(0), net(0.1))
    options = EvaluateOptions(task="any")
    (result,) = evaluate([tmp_path / "noisy.onnx"], tmp_path / "data.npz", options).results
    assert isinstance(result, FileResult)
    assert {**result.measures} == dict.fromkeys(("top1", "top5", "agreement", "cosine", "psnr_db"))
