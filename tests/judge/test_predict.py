"""predict: boxes come back to the image, pictures are written whole, mistakes are named."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from PIL import Image

import reptrt
from reptrt.cli import main
from reptrt.core.errors import ArtifactError, ConfigError, DataError, ReptrtError
from reptrt.graph.net import model_from_net, net_from_model
from reptrt.graph.preprocess import Preprocess, write_preprocess
from reptrt.judge.predict.draw import PALETTE
from reptrt.judge.predict.report import Predictions
from reptrt.trt.options import PackageOptions
from reptrt.trt.package import package
from tests.support.detectors import colour_detector
from tests.support.engines import engine_details, write_fake_engine
from tests.support.helpers import ort_run
from tests.support.tiny_nets import classifier, quantized_conv

_RED, _GREEN = (255, 0, 0), (0, 255, 0)


@pytest.fixture
def detector(tmp_path: Path) -> Path:
    return _save(colour_detector(), tmp_path / "det.onnx", resize="letterbox")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return _picture(tmp_path / "photos" / "a.png", (128, 64), {(16, 16): _RED, (80, 32): _GREEN})


def _save(model: onnx.ModelProto, path: Path, **changes: object) -> Path:
    net = net_from_model(model)
    size = model.graph.input[0].type.tensor_type.shape.dim[2].dim_value
    plain = Preprocess.plain(3, size, size)
    write_preprocess(net, replace(plain, **changes))  # type: ignore[arg-type]
    onnx.save(model_from_net(net), path)
    return path


def _picture(
    path: Path,
    size: tuple[int, int],
    squares: dict[tuple[int, int], tuple[int, int, int]],
    side: int = 16,
) -> Path:
    """Write black pixels with squares, whose corners are given as (x, y)."""
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    for (x, y), colour in squares.items():
        pixels[y : y + side, x : x + side] = colour
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def _boxes(predictions: Predictions) -> list[dict[str, tuple[float, ...]]]:
    """Return label -> box of each image."""
    return [
        {item.label: tuple(np.round(item.box or (), 2)) for item in prediction.found}
        for prediction in predictions.images
    ]


def test_boxes_come_back_to_the_image(detector: Path, image: Path, tmp_path: Path) -> None:
    """128 x 64 is scaled by 1/2 and put 16 pixels down; the squares are then single cells."""
    found = reptrt.predict(detector, image)
    assert found.task == "detect"
    assert _boxes(found) == [{"class 0": (16, 16, 32, 32), "class 1": (80, 32, 96, 48)}]
    assert all(item.score > 0.99 for item in found.images[0].found)
    assert found.images[0].drawn is None
    names = tmp_path / "names.txt"
    names.write_text("red\ngreen\n")
    output = tmp_path / "nms.onnx"
    package(detector, output, PackageOptions(nms=replace(PackageOptions().nms, append=True)))
    for net in (detector, output):
        named = reptrt.predict(net, image, labels=names)
        assert _boxes(named) == [{"red": (16, 16, 32, 32), "green": (80, 32, 96, 48)}]
    assert not reptrt.predict(detector, image, confidence=1).images[0].found


@pytest.mark.parametrize("resize", ["stretch", "letterbox"])
def test_several_sizes_in_a_folder(detector: Path, image: Path, resize: str) -> None:
    """More images than one batch; each is drawn under its name, also from a sub-folder."""
    expected = []
    for index in range(10):
        scale = 1 + index % 3
        size = (128 * scale, 128 * scale)
        _picture(image.parent / f"{index}.png", size, {(64 * scale, 0): _RED}, 16 * scale)
        expected.append({"class 0": tuple(scale * side for side in (64, 0, 80, 16))})
    image.unlink()
    found = reptrt.predict(detector, image.parent, resize=resize)
    assert _boxes(found) == expected


def test_a_detector_without_metadata_gets_letterboxed_images(image: Path, tmp_path: Path) -> None:
    onnx.save(colour_detector(), tmp_path / "plain.onnx")
    found = reptrt.predict(tmp_path / "plain.onnx", image)
    assert _boxes(found) == [{"class 0": (16, 16, 32, 32), "class 1": (80, 32, 96, 48)}]


def test_what_is_drawn(detector: Path, image: Path, tmp_path: Path) -> None:
    found = reptrt.predict(detector, image, tmp_path / "drawn")
    assert found.images[0].drawn == tmp_path / "drawn" / "a.png"
    with Image.open(tmp_path / "drawn" / "a.png") as picture:
        assert picture.size == (640, 320)  # 128 x 64 enlarged, so that text can be read
        pixels = np.asarray(picture)
    for colour, (x1, y1, x2, y2) in zip(
        PALETTE, [(16, 16, 32, 32), (80, 32, 96, 48)], strict=False
    ):
        edge = [(5 * x1, 5 * (y1 + y2) // 2), (5 * x2, 5 * (y1 + y2) // 2), (5 * x2 - 20, 5 * y2)]
        assert [tuple(pixels[y, x]) for x, y in edge] == [colour] * 3
    assert tuple(pixels[5 * 24, 5 * 24]) == _RED  # nothing is filled


def test_one_picture_and_its_formats(detector: Path, image: Path, tmp_path: Path) -> None:
    for suffix, kind in ((".jpg", "JPEG"), (".webp", "WEBP"), (".PNG", "PNG"), (".tif", "TIFF")):
        output = tmp_path / f"one{suffix}"
        assert reptrt.predict(detector, [image], output).images[0].drawn == output
        with Image.open(output) as picture:
            assert picture.format == kind


def test_two_folders_with_the_same_names(detector: Path, image: Path, tmp_path: Path) -> None:
    other = _picture(tmp_path / "more" / "a.png", (64, 64), {(8, 8): _GREEN}, side=8)
    found = reptrt.predict(detector, [image.parent, other, other], tmp_path / "drawn")
    drawn = [prediction.drawn for prediction in found.images]
    assert drawn == [tmp_path / "drawn" / name / "a.png" for name in ("photos", "more")]
    assert all(path is not None and path.is_file() for path in drawn)
    assert _boxes(found)[1] == {"class 1": (8, 8, 16, 16)}


def test_a_classifier_names_five_classes(tmp_path: Path) -> None:
    net = _save(classifier(), tmp_path / "net.onnx")
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    found = reptrt.predict(net, tmp_path / "a.png", tmp_path / "drawn")
    batch = pixels.transpose(2, 0, 1)[None].astype(np.float32) / np.float32(255)
    (logits,) = ort_run(onnx.load(net), {"x": batch})["logits"].astype(np.float64)
    softmax = np.exp(logits) / np.exp(logits).sum()
    best = np.argsort(-softmax)[:5]
    assert found.task == "classify"
    assert [item.index for item in found.images[0].found] == list(best)
    scores = [item.score for item in found.images[0].found]
    np.testing.assert_allclose(scores, softmax[best], rtol=1e-5)
    with Image.open(tmp_path / "drawn" / "a.png") as picture:
        assert picture.width == 640
        assert picture.height > 640 + 5 * 12  # five lines of letters below


def test_probabilities_stay_as_they_are(tmp_path: Path) -> None:
    net = net_from_model(classifier())
    (logits,) = net.graph.outputs
    (scores,) = net.graph.layer(op="Softmax", inputs=[logits], outputs=["p"], attrs={"axis": 1})
    scores.dtype, scores.shape = logits.dtype, logits.shape
    net.graph.outputs = [scores]
    path = _save(model_from_net(net), tmp_path / "net.onnx")
    Image.new("RGB", (8, 8), (90, 10, 200)).save(tmp_path / "a.png")
    plain = reptrt.predict(_save(classifier(), tmp_path / "logits.onnx"), tmp_path / "a.png")
    found = reptrt.predict(path, tmp_path / "a.png")
    expected = [item.score for item in plain.images[0].found]
    np.testing.assert_allclose([i.score for i in found.images[0].found], expected, rtol=1e-5)


def test_the_command_line(detector: Path, image: Path, tmp_path: Path) -> None:
    args = ["predict", str(detector), str(image), "-o", str(tmp_path / "drawn")]
    done = CliRunner().invoke(main, args, catch_exceptions=False)
    assert done.exit_code == 0
    assert "1 x class 0, 1 x class 1" in done.stdout
    done = CliRunner().invoke(main, [*args, "--json", "-"], catch_exceptions=False)
    (entry,) = json.loads(done.stdout)["images"]
    assert (entry["image"], entry["drawn"]) == (str(image), str(tmp_path / "drawn" / "a.png"))
    first = entry["found"][0]
    assert (first["class"], first["label"]) == (0, "class 0")
    assert first["box"] == pytest.approx([16, 16, 32, 32])


def test_nothing_found_and_nothing_drawn(detector: Path, tmp_path: Path) -> None:
    empty = _picture(tmp_path / "photos" / "e.png", (64, 64), {})
    found = reptrt.predict(detector, empty)
    assert (found.images[0].found, "nothing" in str(found)) == ((), True)


def test_images_that_cannot_be_used(detector: Path, image: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.jpg").write_text("no image")
    cases = {
        tmp_path / "none.jpg": "none.jpg: does not exist",
        tmp_path / "empty": "no images found",
        tmp_path / "text.jpg": r"1 of 1 images cannot be read: text.jpg .not an image",
    }
    for path, reason in cases.items():
        with pytest.raises(DataError, match=reason):
            reptrt.predict(detector, [path], tmp_path / "drawn")
    with pytest.raises(DataError, match="images: got none"):
        reptrt.predict(detector, [])
    with pytest.raises(DataError, match=r"1 of 2 images cannot be read: text.jpg"):
        reptrt.predict(detector, [image, tmp_path / "text.jpg"], tmp_path / "drawn")
    assert not (tmp_path / "drawn").exists()


def test_outputs_that_cannot_be_used(detector: Path, image: Path, tmp_path: Path) -> None:
    before = image.read_bytes()
    other = _picture(image.parent / "b.png", (64, 64), {})
    (tmp_path / "file").write_text("")
    cases: list[tuple[list[Path], Path, str]] = [
        ([image, other], tmp_path / "one.png", "is one file, for 2 images; give a folder"),
        ([image], tmp_path / "file", "is a file, expected a folder"),
        ([image], image, "is an image that would be drawn over"),
        ([image.parent], image.parent, "is an image that would be drawn over"),
        ([image], tmp_path / "no" / "drawn", "folder .*no does not exist"),
    ]
    for images, output, reason in cases:
        with pytest.raises(ArtifactError, match=reason):
            reptrt.predict(detector, images, output)
    assert image.read_bytes() == before


def test_networks_and_options_that_do_not_fit(detector: Path, image: Path, tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("a\nb\nc\n")
    net = _save(classifier(), tmp_path / "net.onnx", resize="stretch")
    cases: list[tuple[Path, dict[str, object], str]] = [
        (detector, {"labels": names}, "look like raw .*2 classes.*, expected 3 classes"),
        (net, {"labels": names}, "labels: .* has 3 names, the net has 10 classes"),
        (net, {"task": "detect"}, "of no detector known here"),
        (detector, {"task": "classify"}, "are those of a detector, raw .*: leave out task"),
        (_save(quantized_conv(), tmp_path / "map.onnx"), {}, "and not one output with scores"),
        (detector, {"layout": "ultralytics"}, "of no detector of form ultralytics"),
        (detector, {"max_boxes": 0}, "max_boxes: got 0, expected 1 or more"),
    ]
    engine = write_fake_engine(tmp_path / "m.engine", b"", engine_details(preprocess=None))
    cases.append((engine, {}, "m.engine: how its images are prepared is unknown"))
    for file, options, reason in cases:
        with pytest.raises((ConfigError, ReptrtError), match=reason):
            reptrt.predict(file, image, **options)
