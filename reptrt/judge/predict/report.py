"""What a network finds in images, as values, as a table and as JSON.

    {"network": "m.int8.onnx", "task": "detect",
     "images": [{"image": "a.jpg", "drawn": "out/a.jpg",
                 "found": [{"class": 0, "label": "RBC", "score": 0.91, "box": [1, 2, 9.5, 8]}]}]}

A box is x1, y1, x2, y2 in pixels of the image; a class of a classifier has none (null). ``drawn``
is null if no picture was written.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.table import Table

from reptrt.core.result import Result

Box = tuple[float, float, float, float]  # x1 y1 x2 y2


@dataclass(frozen=True, slots=True)
class Finding:
    """An object, or a class of the whole image."""

    index: int  # of the class
    label: str
    score: float  # 0 to 1
    box: Box | None  # in pixels of the image; None: the whole image

    def to_dict(self) -> dict[str, Any]:
        """Return the finding as JSON values."""
        box = None if self.box is None else list(self.box)
        return {"class": self.index, "label": self.label, "score": self.score, "box": box}


@dataclass(frozen=True, slots=True)
class Prediction:
    """What was found in one image, the most certain first."""

    image: Path
    found: tuple[Finding, ...]
    drawn: Path | None  # the picture that was written

    def to_dict(self) -> dict[str, Any]:
        """Return the prediction as JSON values."""
        return {
            "image": str(self.image),
            "drawn": None if self.drawn is None else str(self.drawn),
            "found": [item.to_dict() for item in self.found],
        }


@dataclass(frozen=True, slots=True, repr=False)
class Predictions(Result):
    """What one network found in each image."""

    network: str
    task: Literal["classify", "detect"]
    images: tuple[Prediction, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the predictions as JSON values."""
        images = [prediction.to_dict() for prediction in self.images]
        return {"network": self.network, "task": self.task, "images": images}

    def to_table(self) -> Table:
        """Return one row for each image."""
        table = Table(box=None, pad_edge=False)
        drawn = any(prediction.drawn is not None for prediction in self.images)
        for title in ("image", "found", *(["picture"] if drawn else [])):
            table.add_column(title, overflow="fold")
        for prediction in self.images:
            found = self._text(prediction)
            picture = [] if not drawn else [str(prediction.drawn or "-")]
            table.add_row(str(prediction.image), found, *picture)
        return table

    def _text(self, prediction: Prediction) -> str:
        """Return the number of objects of each class, or the classes with their scores."""
        if self.task == "classify":
            return ", ".join(f"{item.label} {100 * item.score:.1f} %" for item in prediction.found)
        counts = Counter(item.label for item in prediction.found)
        return ", ".join(f"{count} x {label}" for label, count in counts.most_common()) or "nothing"
