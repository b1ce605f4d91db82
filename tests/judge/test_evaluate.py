import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper
from PIL import Image

from reptrt.core.errors import ArtifactError, ConfigError, DataError
from reptrt.data.images import ImageFiles
from reptrt.graph.preprocess import Preprocess
from reptrt.judge.evaluate import EvalReport, FileResult, evaluate, preprocess_of
from reptrt.judge.options import EvaluateOptions
from tests.support.engines import engine_details, write_fake_engine
from tests.support.helpers import ort_run
from tests.support.tiny_nets import classifier, quantized_conv

RNG = np.random.default_rng(2)
NUM = 50
COLOURS = RNG.integers(0, 256, (NUM, 3, 1, 1))  # so that images get different classes
PIXELS = (COLOURS * RNG.uniform(0.6, 1, (NUM, 3, 8, 8))).astype(np.uint8)
LABELS = RNG.integers(0, 10, NUM)


def metadata(mean: float) -> dict[str, object]:
    values = {"channels": 3, "height": 8, "width": 8, "mean": [mean] * 3, "std": [0.5] * 3}
    return {"preprocess": {**values, "resize": "none"}}


def save(path: Path, model: onnx.ModelProto) -> Path:
    onnx.save(model, path)
    return path


def logits_of(model: onnx.ModelProto, mean: float = 0.0, std: float = 1.0) -> np.ndarray:
    images = (PIXELS.astype(np.float32) / np.float32(255) - np.float32(mean)) / np.float32(std)
    return ort_run(model, {"x": images})["logits"]


def top_k(logits: np.ndarray, labels: np.ndarray, k: int) -> float:
    hits = [
        label in sorted(range(len(row)), key=lambda c: -row[c])[:k]
        for row, label in zip(logits, labels, strict=True)
    ]
    return sum(hits) / len(hits)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    np.savez(tmp_path / "data.npz", x=PIXELS, y=LABELS)
    return tmp_path / "data.npz"


@pytest.fixture
def nets(tmp_path: Path) -> tuple[Path, Path]:
    noisy = classifier()
    weight = onnx.numpy_helper.to_array(noisy.graph.initializer[0])
    changed = weight + np.random.default_rng(3).normal(0, 0.3, weight.shape).astype(np.float32)
    noisy.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(changed, "w"))
    return save(tmp_path / "float.onnx", classifier()), save(tmp_path / "noisy.onnx", noisy)


def only(report: EvalReport) -> FileResult:
    (result,) = report.results
    return result


@pytest.mark.parametrize("batch_size", [1, 16, 64])
def test_every_number_against_numpy(nets: tuple[Path, Path], data: Path, batch_size: int) -> None:
    report = evaluate(
        list(nets)[::-1], data, EvaluateOptions(reference=nets[0], batch_size=batch_size, threads=1)
    )
    noisy, exact = report.results
    reference, output = (logits_of(onnx.load(path)).astype(np.float64) for path in nets)

    assert (noisy.file, exact.file) == (str(nets[1]), str(nets[0]))
    assert noisy.images == NUM
    assert noisy.top1 == pytest.approx(top_k(output, LABELS, 1))
    assert noisy.top5 == pytest.approx(top_k(output, LABELS, 5))
    same = np.mean([a.argmax() == b.argmax() for a, b in zip(reference, output, strict=True)])
    assert noisy.agreement == pytest.approx(same)
    assert 0 < same < 1
    sqnr = 10 * np.log10((reference**2).sum() / ((reference - output) ** 2).sum())
    # the batch size may change the order of float32 sums
    assert noisy.sqnr_db == pytest.approx(sqnr, abs=1e-3)
    assert noisy.identical is False
    assert exact.top1 == pytest.approx(top_k(reference, LABELS, 1))


def test_the_change_of_top1_has_the_interval_of_the_images_that_changed(
    nets: tuple[Path, Path], tmp_path: Path
) -> None:
    """The variance is that of McNemar's counts: the images that were won and those lost."""
    float_best, best = (logits_of(onnx.load(path)).argmax(axis=1) for path in nets)
    labels = np.where(np.arange(NUM) % 3 > 0, float_best, best)
    np.savez(tmp_path / "data.npz", x=PIXELS, y=labels)
    options = EvaluateOptions(reference=nets[0], threads=1)
    exact, noisy = evaluate(list(nets), tmp_path / "data.npz", options).results
    before, after = float_best == labels, best == labels
    won, lost = int((after & ~before).sum()), int((before & ~after).sum())
    assert won > 0
    assert lost > 0
    half = 1.96 * np.sqrt(won + lost - (won - lost) ** 2 / NUM) / NUM
    ends = [(won - lost) / NUM + end for end in (0, -half, half)]
    change = noisy.measures["top1_change"]
    assert [change[key] for key in ("value", "low", "high")] == pytest.approx(ends, abs=1e-12)
    assert noisy.top1 - exact.top1 == pytest.approx(change["value"])
    assert exact.measures["top1_change"] is None


def test_the_reference_and_its_copy_are_identical_and_json_stays_valid(
    nets: tuple[Path, Path], data: Path, tmp_path: Path
) -> None:
    copy = save(tmp_path / "copy.onnx", classifier())
    report = evaluate([nets[0], copy], data, EvaluateOptions(reference=nets[0], threads=1))
    for row in json.loads(json.dumps(report.to_dict(), allow_nan=False))["results"]:
        assert row["sqnr_db"] is None
        assert row["identical"] is True
        assert row["agreement"] == 1.0
    assert report.results[1].sqnr_db == float("inf")


def test_without_a_reference_nothing_is_compared(nets: tuple[Path, Path], data: Path) -> None:
    row = evaluate([nets[1]], data, EvaluateOptions(threads=1)).to_dict()["results"][0]
    keys = {"file", "images", "top1", "top5", "agreement", "sqnr_db", "outputs", "identical"}
    assert set(row) == {*keys, "top1_change"}
    assert (
        row["top1_change"]
        is row["agreement"]
        is row["outputs"]
        is row["sqnr_db"]
        is row["identical"]
        is None
    )
    assert row["top1"] is not None


def detector(noise: tuple[float, float], names: tuple[str, str]) -> onnx.ModelProto:
    """Boxes 1000 x and scores x / 1000, each with a constant relative error."""
    nodes, constants = [], []
    for name, factor, error in zip(names, (1e3, 1e-3), noise, strict=True):
        value = np.asarray(factor * (1 + error), dtype=np.float32)
        constants.append(onnx.numpy_helper.from_array(value, f"{name}.factor"))
        nodes.append(helper.make_node("Mul", ["x", f"{name}.factor"], [name]))
    shape = ["N", 3, 8, 8]
    graph = helper.make_graph(
        nodes,
        "detector",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name in names],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    helper.set_model_props(model, {f"reptrt.{k}": json.dumps(v) for k, v in metadata(0).items()})
    return model


def test_every_output_counts_in_its_own_unit(data: Path, tmp_path: Path) -> None:
    names = ("boxes", "scores")
    exact = save(tmp_path / "float.onnx", detector((0, 0), names))
    nets = [exact]
    for index, noise in enumerate([(1e-3, 0.1), (0.1, 1e-3), (0.0, 0.1)]):
        nets.append(save(tmp_path / f"{index}.onnx", detector(noise, names)))
    options = EvaluateOptions(reference=exact, task="any", threads=1)
    report = evaluate(nets, data, options)
    same, *others = report.results
    assert same.identical
    for result, decibels in zip(others, [(60, 20), (20, 60), (np.inf, 20)], strict=True):
        assert result.outputs == pytest.approx(dict(zip(names, decibels, strict=True)), abs=0.02)
        assert result.sqnr_db == pytest.approx(20 + 10 * np.log10(2), abs=0.02)
        assert result.identical is False  # the first output may be
    assert others[2].to_dict()["outputs"]["boxes"] is None
    assert all(name in str(report) for name in names)


def test_outputs_are_matched_by_name(data: Path, tmp_path: Path) -> None:
    exact = save(tmp_path / "float.onnx", detector((0, 0), ("boxes", "scores")))
    other = save(tmp_path / "other.onnx", detector((0, 0.1), ("pixels", "scores")))
    result = only(evaluate([other], data, EvaluateOptions(reference=exact, threads=1)))
    assert result.outputs == pytest.approx({"boxes": np.inf, "scores": 20.0}, abs=0.02)


def test_a_first_output_without_the_batch_is_left_out(data: Path, tmp_path: Path) -> None:
    """What NonMaxSuppression selects has as many rows as it finds."""
    model = detector((0, 0.1), ("boxes", "scores"))
    model.graph.node.append(helper.make_node("NonZero", ["boxes"], ["selected"]))
    rows = helper.make_tensor_value_info("selected", onnx.TensorProto.INT64, [4, "K"])
    model.graph.output.insert(0, rows)
    exact = save(tmp_path / "float.onnx", detector((0, 0), ("boxes", "scores")))
    both = save(tmp_path / "both.onnx", model)
    for reference, scores in ((both, np.inf), (exact, 20.0)):
        options = EvaluateOptions(reference=reference, task="any", threads=1)
        outputs = only(evaluate([both], data, options)).outputs
        assert outputs == pytest.approx({"boxes": np.inf, "scores": scores}, abs=0.02)
    del model.graph.output[1:]
    alone = save(tmp_path / "alone.onnx", model)
    message = r"output selected: shape \(4, \d+\) for 50 images; expected the batch as its first"
    with pytest.raises(ArtifactError, match=message):
        evaluate([alone], data, EvaluateOptions(task="any", threads=1))


def test_a_reference_with_an_unused_first_input(data: Path, tmp_path: Path) -> None:
    model = detector((0, 0), ("boxes", "scores"))
    del model.metadata_props[:]
    size = helper.make_tensor_value_info("im_info", onnx.TensorProto.FLOAT, ["N", 3])
    model.graph.input.insert(0, size)
    path = save(tmp_path / "float.onnx", model)
    result = only(evaluate([path], data, EvaluateOptions(reference=path, task="any", threads=1)))
    assert result.identical


def test_a_reference_beside_the_files_has_no_row(nets: tuple[Path, Path], data: Path) -> None:
    result = only(evaluate([nets[1]], data, EvaluateOptions(reference=nets[0], threads=1)))
    assert result.file == str(nets[1])
    assert result.sqnr_db is not None


def test_without_labels_accuracy_is_null(nets: tuple[Path, Path], tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", PIXELS)
    result = only(
        evaluate([nets[1]], tmp_path / "x.npy", EvaluateOptions(reference=nets[0], threads=1))
    )
    assert result.top1 is result.top5 is None
    assert result.agreement is not None


def test_each_file_gets_its_own_preprocessing(tmp_path: Path, data: Path) -> None:
    dark, bright = (
        save(tmp_path / f"{mean}.onnx", classifier(metadata=metadata(mean))) for mean in (0.2, 0.7)
    )
    result = evaluate([dark, bright], data, EvaluateOptions(reference=dark, threads=1)).results[1]
    a, b = (logits_of(classifier(), mean, 0.5).astype(np.float64) for mean in (0.2, 0.7))
    expected = 10 * np.log10((a**2).sum() / ((a - b) ** 2).sum())
    assert result.sqnr_db == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(("means", "decodes"), [((0.2, 0.2), 12), ((0.2, 0.7), 24)])
def test_images_are_decoded_once_for_each_preprocessing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, means: tuple[float, float], decodes: int
) -> None:
    (tmp_path / "images").mkdir()
    for number in range(12):
        image = Image.fromarray(PIXELS[number].transpose(1, 2, 0))
        image.save(tmp_path / "images" / f"{number}.png")
    decoded: list[Path] = []
    decode = ImageFiles._decode
    monkeypatch.setattr(
        ImageFiles, "_decode", lambda self, path: (decoded.append(path), decode(self, path))[1]
    )
    files = [
        save(tmp_path / f"{i}.onnx", classifier(metadata=metadata(mean)))
        for i, mean in enumerate(means)
    ]
    evaluate(files, tmp_path / "images", EvaluateOptions(batch_size=5, threads=1))
    assert len(decoded) == decodes


@pytest.mark.parametrize("batch", [1, 7, 64], ids=["one", "rest of 1", "more than asked"])
def test_a_fixed_batch_size_is_filled_up(
    nets: tuple[Path, Path], tmp_path: Path, data: Path, batch: int
) -> None:
    fixed = save(tmp_path / "fixed.onnx", classifier(batch=batch))
    result = only(
        evaluate([fixed], data, EvaluateOptions(reference=nets[0], batch_size=20, threads=1))
    )
    assert result.images == NUM
    assert result.agreement == 1.0
    assert result.sqnr_db is not None
    assert result.sqnr_db > 120  # float32 rounding at most


def test_a_limit_takes_a_seeded_sample(nets: tuple[Path, Path], data: Path) -> None:
    first, again, other = (
        only(
            evaluate(
                [nets[1]], data, EvaluateOptions(reference=nets[0], limit=20, seed=seed, threads=1)
            )
        )
        for seed in (0, 0, 1)
    )
    assert first.images == 20
    assert first == again
    assert first.sqnr_db != other.sqnr_db


def test_a_map_as_output_is_compared_but_has_no_classes(tmp_path: Path, data: Path) -> None:
    path = save(tmp_path / "map.onnx", quantized_conv())
    result = only(evaluate([path], data, EvaluateOptions(reference=path, threads=1)))
    assert result.identical is True
    assert result.top1 is result.agreement is None


def test_logits_with_trailing_ones_have_classes(tmp_path: Path, data: Path) -> None:
    model = classifier(classes=6)
    del model.graph.node[3:]  # conv, ReLU, pool: (N, 6, 1, 1)
    model.graph.node[-1].output[0] = "logits"
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("logits", 1, ["N", 6, 1, 1]))
    np.savez(data, x=PIXELS, y=LABELS % 6)
    result = only(evaluate([save(tmp_path / "map.onnx", model)], data, EvaluateOptions(threads=1)))
    assert result.top1 == pytest.approx(top_k(logits_of(model).reshape(NUM, 6), LABELS % 6, 1))


# --- what cannot be judged -----------------------------------------------------------------------


def test_more_labels_than_classes(tmp_path: Path, data: Path) -> None:
    path = save(tmp_path / "few.onnx", classifier(classes=4))
    with pytest.raises(
        DataError, match=r"few.onnx: label 9 in the data, but the net has 4 classes"
    ):
        evaluate([path], data, EvaluateOptions(threads=1))


def test_class_folders_are_counted(tmp_path: Path) -> None:
    """A label is the position of its folder, which says nothing if some are missing."""
    path = save(tmp_path / "six.onnx", classifier(classes=6))
    folder = tmp_path / "images"
    for number in range(5):
        (folder / f"class{number}").mkdir(parents=True)
        image = Image.fromarray(PIXELS[number].transpose(1, 2, 0))
        image.save(folder / f"class{number}" / "0.png")
    options = EvaluateOptions(threads=1)
    message = r"six.onnx: the net has 6 classes, the data 5 class folders; .*task='any'"
    with pytest.raises(DataError, match=message):
        evaluate([path], folder, options)
    assert only(evaluate([path], folder, replace(options, task="any"))).top1 is None
    (folder / "class5").mkdir()  # no images of it, but its place is known
    assert only(evaluate([path], folder, options)).top1 is not None


def test_outputs_of_another_shape_than_the_reference(
    nets: tuple[Path, Path], tmp_path: Path, data: Path
) -> None:
    path = save(tmp_path / "many.onnx", classifier(classes=12))
    with pytest.raises(ConfigError, match=r"shape \(50, 12\), the reference's \(50, 10\)"):
        evaluate([path], data, EvaluateOptions(reference=nets[0], threads=1))


def test_nan_outputs_are_a_failure_not_a_number(tmp_path: Path, data: Path) -> None:
    model = classifier()
    weight = np.full((6, 10), np.inf, np.float32)
    model.graph.initializer[1].CopyFrom(onnx.numpy_helper.from_array(weight, "v"))
    path = save(tmp_path / "nan.onnx", model)
    with pytest.raises(
        ArtifactError, match=r"nan.onnx: NaN or infinite outputs on 50 of 50 images"
    ):
        evaluate([path], data, EvaluateOptions(threads=1))


def test_a_batch_size_must_be_positive(nets: tuple[Path, Path], data: Path) -> None:
    with pytest.raises(ConfigError, match="batch_size: got 0"):
        evaluate([nets[0]], data, EvaluateOptions(batch_size=0, threads=1))


def test_an_engine_is_prepared_as_its_sidecar_says(tmp_path: Path, nets: tuple[Path, Path]) -> None:
    engine = tmp_path / "m.engine"
    engine.write_bytes(b"engine")
    with pytest.raises(ConfigError, match=r"expected m.engine.json beside it, or give reference"):
        preprocess_of(engine)
    assert preprocess_of(engine, nets[0]) == Preprocess.plain(3, 8, 8)
    preprocess = Preprocess(3, 8, 8, (0.25,) * 3, (0.5,) * 3, "none")
    write_fake_engine(engine, b"engine", engine_details(preprocess=preprocess))
    assert preprocess_of(engine) == preprocess


def test_the_table_shows_percent_and_gaps(nets: tuple[Path, Path], data: Path) -> None:
    from rich.console import Console

    report = evaluate(list(nets), data, EvaluateOptions(reference=nets[0], threads=1))
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(report.to_table())
    text = console.export_text()
    console.file.close()
    assert f"{100 * report.results[1].top1:.2f} %" in text  # type: ignore[operator]
    assert f"{report.results[1].sqnr_db:.2f}" in text
    assert "inf" in text
