import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reptrt.core.errors import DataError
from reptrt.data.coco import find_annotations, read_annotations

Content = dict[str, Any]


def content() -> Content:
    return {
        "images": [
            {"id": 5, "file_name": "b.jpg", "width": 40, "height": 30},
            {"id": 2, "file_name": "a.jpg", "width": 20, "height": 10},
        ],
        "categories": [{"id": 9, "name": "nine"}, {"id": 4, "name": "four"}],
        "annotations": [
            {"id": 1, "image_id": 5, "category_id": 9, "bbox": [1, 2, 3, 4], "area": 7.5},
            {"id": 2, "image_id": 5, "category_id": 4, "bbox": [0, 0, 40, 30.5], "iscrowd": 1},
        ],
    }


def write(folder: Path, value: Any) -> Path:
    path = folder / "boxes.json"
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def test_objects_of_each_image(tmp_path: Path) -> None:
    read = read_annotations(write(tmp_path, content()))
    assert read.class_names == ("four", "nine")
    objects = read.by_file["b.jpg"]
    np.testing.assert_array_equal(objects.boxes, [[1, 2, 4, 6], [0, 0, 40, 30.5]])
    assert objects.classes.tolist() == [1, 0]
    assert objects.areas.tolist() == [7.5, 1220]
    assert objects.crowds.tolist() == [0, 1]
    assert objects.size == (30, 40)
    assert read.by_file["a.jpg"].boxes.shape == (0, 4)


@pytest.mark.parametrize(
    "name",
    [
        *("instances_val.json", "annotations/instances_val.json", "val.json"),
        *("val/_annotations.coco.json", "val/annotations.json", "val/instances.json"),
    ],
)
def test_usual_names(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "val").mkdir()
    assert find_annotations(tmp_path / "val") is None
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("{}")
    assert find_annotations(tmp_path / "val") == tmp_path / name
    monkeypatch.chdir(tmp_path / "val")
    assert find_annotations(Path(".")) == tmp_path / name


def test_a_category_that_only_groups_others_is_no_class(tmp_path: Path) -> None:
    value = content()
    value["categories"].append({"id": 0, "name": "numbers", "supercategory": "none"})
    assert read_annotations(write(tmp_path, value)).class_names == ("numbers", "four", "nine")
    value["categories"][0]["supercategory"] = "numbers"
    read = read_annotations(write(tmp_path, value))
    assert read.class_names == ("four", "nine")
    assert read.by_file["b.jpg"].classes.tolist() == [1, 0]
    value["annotations"][0]["category_id"] = 0  # it has a box: it is a class
    assert len(read_annotations(write(tmp_path, value)).class_names) == 3


def change(*path: Any, value: Any) -> Callable[[Content], None]:
    def apply(of: Content) -> None:
        at: Any = of
        for key in path[:-1]:
            at = at[key]
        if value is None:
            del at[path[-1]]
        else:
            at[path[-1]] = value

    return apply


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (change("images", value=None), "has no list images, expected a COCO json"),
        (change("images", value=[]), "holds no images"),
        (change("annotations", value=[]), "holds no annotations"),
        (change("categories", value=[]), "holds no categories"),
        (change("images", 0, "file_name", value=None), "has no file_name"),
        (change("images", 0, "width", value="wide"), "has no usable number"),
        (change("images", 0, "id", value=2), "two images with the id 2"),
        (change("images", 0, "file_name", value="a.jpg"), "two images with the file_name 'a.jpg'"),
        (change("categories", 0, "id", value=4), "two categories with the id 4"),
        (change("annotations", 0, "bbox", value=None), "annotation 1 has no bbox"),
        (change("annotations", 0, value=3), "annotation 3 has no usable number"),
        (change("annotations", 0, "bbox", value=[1, 2, 3]), r"bbox is \[1, 2, 3\], expected x, y"),
        (change("annotations", 0, "bbox", value=[1, 2, 3, float("nan")]), "bbox is .*nan"),
        (change("annotations", 1, "image_id", value=6), "annotation 2 is of image 6, expected"),
        (change("annotations", 1, "category_id", value=0), "category 0, expected one .*: 4, 9"),
        (change("annotations", 0, "bbox", value=[1, 2, 0, 4]), "1 of 2 boxes have no width or no"),
        (change("annotations", 0, "bbox", value=[1, 2, 3, -4]), "no width or no height"),
        (
            change("annotations", 0, "bbox", value=[35, 2, 30, 4]),
            r"1 of 2 boxes have their centre outside .* annotation 1: .* in b.jpg of 40x30",
        ),
    ],
)
def test_what_is_no_annotation(
    tmp_path: Path, changed: Callable[[Content], None], message: str
) -> None:
    value = content()
    changed(value)
    with pytest.raises(DataError, match=message) as caught:
        read_annotations(write(tmp_path, value))
    assert "boxes.json" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [("[1, 2]", "holds a list, expected a COCO json"), ("{", "not readable as json"), ("", "json")],
)
def test_what_is_no_json(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_annotations(write(tmp_path, text))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none.json: does not exist; give annotations"):
        read_annotations(tmp_path / "none.json")


def test_boxes_that_reach_beyond_the_image(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    value = content()
    value["annotations"][0]["bbox"] = [-3, 2, 10, 4]
    with caplog.at_level(logging.WARNING):
        read = read_annotations(write(tmp_path, value))
    assert read.by_file["b.jpg"].boxes[0].tolist() == [-3, 2, 7, 6]
    assert "1 of 2 boxes reach beyond the image" in caplog.text
