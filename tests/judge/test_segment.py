"""eval --task segment: mIoU as in scikit-learn, upsampling as in torch, masks by strides."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from torch.nn import functional as F

from reptrt.core.errors import ConfigError, DataError
from reptrt.judge.evaluate import EvalReport, evaluate
from reptrt.judge.options import EvaluateOptions
from reptrt.judge.tasks.segment import enlarged
from tests.support.helpers import ort_run

metrics = pytest.importorskip("sklearn.metrics")

CLASSES = 4
RNG = np.random.default_rng(8)
Slices = tuple[slice, slice]


def opened(path: Path) -> Image.Image:
    with Image.open(path) as image:
        image.load()
    return image


def segmenter(
    size: tuple[int, int], resize: str = "stretch", *, seed: int = 0, indices: bool = False
) -> onnx.ModelProto:
    """Return a convolution of stride 2: logits (N, 4, h, w), or their arg max (N, h, w)."""
    rng = np.random.default_rng(seed)
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["logits"], pads=[1, 1, 1, 1], strides=[2, 2]),
        *([helper.make_node("ArgMax", ["logits"], ["i"], axis=1, keepdims=0)] if indices else []),
    ]
    name, kind = ("i", TensorProto.INT64) if indices else ("logits", TensorProto.FLOAT)
    graph = helper.make_graph(
        nodes,
        "segmenter",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, *size])],
        [helper.make_tensor_value_info(name, kind, ["N", *(["h", "w"] if indices else "chw")])],
        [numpy_helper.from_array(rng.standard_normal((CLASSES, 3, 3, 3)).astype("f"), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    plain = '"mean": [0, 0, 0], "std": [1, 1, 1], "channels": 3'
    text = f'{{{plain}, "height": {size[0]}, "width": {size[1]}, "resize": "{resize}"}}'
    helper.set_model_props(model, {"reptrt.preprocess": text})
    return model


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A net for 8 x 12 pixels, with its own folder of three images of that size and masks."""
    onnx.save(segmenter((8, 12)), tmp_path / "net.onnx")
    write(tmp_path, [(8, 12)] * 3)
    return tmp_path


def write(folder: Path, sizes: list[tuple[int, int]]) -> list[np.ndarray]:
    """Write images and masks of random pixels; return the masks."""
    masks = []
    for number, size in enumerate(sizes):
        for name in ("images", "masks"):
            (folder / name).mkdir(exist_ok=True)
        picture = RNG.integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(picture).save(folder / f"images/{number}.bmp")
        mask = RNG.choice([0, 1, 3, 255], size).astype(np.uint8)  # class 2 is never right
        Image.fromarray(mask).save(folder / f"masks/{number}.png")
        masks.append(mask)
    return masks


def judged(folder: Path, *nets: str, **options: object) -> EvalReport:
    given = EvaluateOptions(
        task="segment",
        threads=1,
        annotations=folder / "masks",
        **options,  # type: ignore[arg-type]
    )
    return evaluate([folder / net for net in nets], folder / "images", given)


def predicted(model: onnx.ModelProto, images: list[np.ndarray]) -> np.ndarray:
    """Return the classes at the input's size, by torch's upsampling."""
    x = np.stack(images).transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255)
    (output,) = ort_run(model, {"x": x}).values()
    if output.ndim == 3:
        small = torch.from_numpy(output[:, None].astype(np.float64))
        large = F.interpolate(small, size=x.shape[2:], mode="nearest-exact")
        return large[:, 0].numpy().astype(int)
    large = F.interpolate(
        torch.from_numpy(output), size=x.shape[2:], mode="bilinear", align_corners=False
    )
    return large.argmax(dim=1).numpy()


def expected(masks: np.ndarray, classes: np.ndarray) -> tuple[list[float], float]:
    """Return the IoU of each class and the fraction of right pixels, by scikit-learn."""
    counted = masks != 255
    truth, found = masks[counted], classes[counted]
    by_class = metrics.jaccard_score(
        truth, found, average=None, labels=range(CLASSES), zero_division=0
    )
    return by_class.tolist(), metrics.accuracy_score(truth, found)


@pytest.mark.parametrize("indices", [False, True], ids=["logits", "classes"])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_measures_are_those_of_scikit_learn(tmp_path: Path, batch_size: int, indices: bool) -> None:
    model = segmenter((8, 12), indices=indices)
    onnx.save(model, tmp_path / "net.onnx")
    masks = write(tmp_path, [(8, 12)] * 5)
    images = [np.asarray(opened(tmp_path / f"images/{i}.bmp")) for i in range(5)]
    by_class, right = expected(np.stack(masks), predicted(model, images))
    (result,) = judged(tmp_path, "net.onnx", batch_size=batch_size).results
    assert result.measures["class_iou"] == pytest.approx(by_class)
    assert result.measures["miou"] == pytest.approx(np.mean(by_class))
    assert result.measures["pixel_accuracy"] == pytest.approx(right)
    assert result.score == result.measures["miou"]


def test_a_class_that_neither_has_does_not_count(saved: Path) -> None:
    model = segmenter((8, 12))
    weight = numpy_helper.to_array(model.graph.initializer[0]).copy()
    weight[2] = weight[1] - 1  # never the largest on pixels that are not negative
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight, "w"))
    onnx.save(model, saved / "net.onnx")
    measures = judged(saved, "net.onnx").results[0].measures
    assert measures["class_iou"][2] is None
    assert measures["miou"] == pytest.approx(np.mean([measures["class_iou"][c] for c in (0, 1, 3)]))


@pytest.mark.parametrize(
    ("resize", "size", "image", "picks", "place"),
    [
        ("stretch", (8, 8), (16, 32), np.s_[1::2, 2::4], np.s_[0:8, 0:8]),
        ("letterbox", (8, 8), (16, 8), np.s_[1::2, 1::2], np.s_[0:8, 2:6]),
        ("letterbox", (8, 12), (8, 24), np.s_[1::2, 1::2], np.s_[2:6, 0:12]),
        ("crop", (14, 14), (32, 16), np.s_[9:23, 1:15], np.s_[0:14, 0:14]),
    ],
    ids=["stretch", "letterbox-tall", "letterbox-wide", "crop"],
)
def test_masks_go_the_way_of_the_images(
    tmp_path: Path,
    resize: str,
    size: tuple[int, int],
    image: tuple[int, int],
    picks: Slices,
    place: Slices,
) -> None:
    """Oracle: with these sizes the nearest pixel is every second or fourth one."""
    model = segmenter(size, resize)
    onnx.save(model, tmp_path / "net.onnx")
    (mask,) = write(tmp_path, [image])
    picture = opened(tmp_path / "images/0.bmp")
    scaled = (
        picture
        if resize == "crop"
        else picture.resize(
            (place[1].stop - place[1].start, place[0].stop - place[0].start),
            Image.Resampling.BILINEAR,
        )
    )
    x = np.full((*size, 3), 114, np.uint8)
    x[place] = np.asarray(scaled)[picks] if resize == "crop" else np.asarray(scaled)
    truth = np.full(size, 255)
    truth[place] = mask[picks]
    by_class, right = expected(truth[None], predicted(model, [x]))
    measures = judged(tmp_path, "net.onnx").results[0].measures
    assert [iou or 0 for iou in measures["class_iou"]] == pytest.approx(by_class)
    assert measures["pixel_accuracy"] == pytest.approx(right)


def test_agreement_counts_pixels_of_the_picture_alone(tmp_path: Path) -> None:
    for seed, name in enumerate(("one", "other")):
        onnx.save(segmenter((8, 8), "letterbox", seed=seed), tmp_path / f"{name}.onnx")
    write(tmp_path, [(16, 8), (8, 8)])
    report = judged(tmp_path, "one.onnx", "other.onnx", reference=tmp_path / "one.onnx")
    inputs = [opened(tmp_path / f"images/{i}.bmp") for i in range(2)]
    tall = np.full((8, 8, 3), 114, np.uint8)
    tall[:, 2:6] = np.asarray(inputs[0].resize((4, 8), Image.Resampling.BILINEAR))
    x = np.stack([tall, np.asarray(inputs[1])]).transpose(0, 3, 1, 2).astype("f") / np.float32(255)
    one, other = (
        ort_run(segmenter((8, 8), seed=seed), {"x": x})["logits"].argmax(axis=1) for seed in (0, 1)
    )
    same = np.concatenate([(one == other)[0, :, 1:3].ravel(), (one == other)[1].ravel()])
    assert 0 < same.mean() < 1
    assert report.results[0].measures["pixel_agreement"] == 1
    assert report.results[1].measures["pixel_agreement"] == pytest.approx(same.mean())


def test_without_masks_there_is_agreement_and_no_miou(saved: Path) -> None:
    options = EvaluateOptions(task="segment", reference=saved / "net.onnx")
    (result,) = evaluate([saved / "net.onnx"], saved / "images", options).results
    assert result.measures == {
        "miou": None,
        "pixel_accuracy": None,
        "class_iou": None,
        "pixel_agreement": 1.0,
    }
    assert result.score == 1.0
    np.savez(saved / "images.npz", x=RNG.integers(0, 256, (2, 3, 8, 12), dtype=np.uint8))
    (result,) = evaluate([saved / "net.onnx"], saved / "images.npz", options).results
    assert result.measures["pixel_agreement"] == 1.0


@pytest.mark.parametrize(("h", "w", "height", "width"), [(4, 4, 8, 8), (3, 5, 17, 9), (7, 2, 7, 6)])
def test_upsampling_is_that_of_torch(h: int, w: int, height: int, width: int) -> None:
    logits = RNG.standard_normal((5, h, w)).astype(np.float32)
    oracle = F.interpolate(
        torch.from_numpy(logits)[None], (height, width), mode="bilinear", align_corners=False
    )
    np.testing.assert_allclose(enlarged(logits, height, width), oracle[0], rtol=1e-5, atol=1e-5)


def test_a_palette_and_sub_folders_are_read(saved: Path) -> None:
    plain = judged(saved, "net.onnx").results[0].measures
    for number in range(3):
        for name, suffix in (("images", "bmp"), ("masks", "png")):
            folder = saved / name / f"city{number % 2}"
            folder.mkdir(exist_ok=True)
            (saved / name / f"{number}.{suffix}").rename(folder / f"{number}.{suffix}")
        path = saved / f"masks/city{number % 2}/{number}.png"
        image = opened(path)
        image.putpalette(RNG.bytes(768))
        image.save(path)
        assert opened(path).mode == "P"
    assert judged(saved, "net.onnx").results[0].measures == plain


def damage(folder: Path, kind: str) -> None:
    path = folder / "masks/1.png"
    size, mode, value = {
        "size": ((6, 8), "L", 0),
        "colours": ((12, 8), "RGB", (1, 1, 1)),
        "class": ((12, 8), "L", 7),
    }.get(kind, ((12, 8), "L", 0))
    Image.new(mode, size, value).save(path)
    if kind == "missing":
        path.unlink()
    if kind == "no image":
        path.write_text("no image")
    if kind == "cut":
        Image.fromarray(RNG.integers(0, 4, (8, 12), dtype=np.uint8)).save(path)
        path.write_bytes(path.read_bytes()[:-40])


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", r"masks: 1 of 3 images have no mask: expected 1\.png$"),
        ("size", r"1\.png: the mask is 8x6, its image 1\.bmp 8x12; expected a class"),
        ("colours", r"1\.png: holds pixels of type RGB; expected a PNG with a palette or in grey"),
        ("class", r"1\.png: class 7 in the mask, but \S+net\.onnx has 4 classes; expected 0 to 3"),
        ("no image", r"1\.png: not an image; expected a PNG"),
        ("cut", r"1\.png: cannot be read \(.*\); expected a PNG"),
    ],
)
def test_unusable_masks_are_one_line(saved: Path, kind: str, message: str) -> None:
    damage(saved, kind)
    with pytest.raises(DataError, match=message) as caught:
        judged(saved, "net.onnx")
    assert "\n" not in str(caught.value)


def test_no_folder_of_masks_and_arrays_are_one_line(saved: Path) -> None:
    options = EvaluateOptions(task="segment", annotations=saved / "net.onnx")
    with pytest.raises(DataError, match=r"net\.onnx: not a folder; expected one with a PNG mask"):
        evaluate([saved / "net.onnx"], saved / "images", options)
    np.savez(saved / "images.npz", x=RNG.integers(0, 256, (2, 3, 8, 12), dtype=np.uint8))
    with pytest.raises(DataError, match=r"images\.npz: arrays have no names by which"):
        evaluate([saved / "net.onnx"], saved / "images.npz", options)


@pytest.mark.parametrize("kind", ["logits", "probabilities"])
def test_a_single_map_is_class_1_where_it_is_likely(tmp_path: Path, kind: str) -> None:
    model = segmenter((8, 12))
    weight = numpy_helper.to_array(model.graph.initializer[0])[:1]
    weight = weight - weight.mean()  # logits of both signs
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight, "w"))
    if kind == "probabilities":
        model.graph.node.append(helper.make_node("Sigmoid", ["logits"], ["p"]))
        model.graph.output[0].name = "p"
    onnx.save(model, tmp_path / "net.onnx")
    masks = [np.where(mask == 3, 0, mask) for mask in write(tmp_path, [(8, 12)] * 3)]
    for number, mask in enumerate(masks):
        Image.fromarray(mask.astype(np.uint8)).save(tmp_path / f"masks/{number}.png")
    images = [np.asarray(opened(tmp_path / f"images/{i}.bmp")) for i in range(3)]
    x = np.stack(images).transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255)
    (output,) = ort_run(model, {"x": x}).values()
    large = F.interpolate(torch.from_numpy(output), size=(8, 12), mode="bilinear")
    found = (large[:, 0] > (0.5 if kind == "probabilities" else 0)).numpy().astype(int)
    by_class, right = expected(np.stack(masks), found)
    (result,) = judged(tmp_path, "net.onnx", batch_size=2).results
    np.testing.assert_allclose(result.measures["class_iou"], by_class[:2], rtol=1e-12)
    assert result.measures["pixel_accuracy"] == pytest.approx(right, rel=1e-12)
    assert 0.1 < found.mean() < 0.9


def test_outputs_that_are_no_classes_of_pixels_are_refused(saved: Path) -> None:
    model = segmenter((8, 12))
    model.graph.node.append(helper.make_node("GlobalAveragePool", ["logits"], ["p"]))
    model.graph.node.append(helper.make_node("Flatten", ["p"], ["f"]))
    del model.graph.output[:]
    model.graph.output.append(helper.make_tensor_value_info("f", TensorProto.FLOAT, ["N", 4]))
    onnx.save(model, saved / "net.onnx")
    with pytest.raises(ConfigError, match=r"first output is float32 \(3, 4\); expected logits"):
        judged(saved, "net.onnx")
