"""Read the names of classes: a text file with one a line, or the categories of a COCO file."""

import json
from pathlib import Path
from typing import Any

from reptrt.core.errors import ArtifactError, ConfigError, option


def read_labels(path: Path, num_classes: int | None, of: str) -> tuple[str, ...]:
    """Return the names of classes, in the order of the network's classes.

    A ``.json`` file is a list of names, or COCO annotations, whose categories count in the order of
    their ids.

    Args:
        path: the file.
        num_classes: how many there must be; None: not known.
        of: what has the classes, for the message.

    Raises:
        ArtifactError: the file cannot be read.
        ConfigError: a name is empty, or there are too few or too many.
    """
    try:
        text = path.read_text(encoding="utf-8")
        labels = _names(json.loads(text)) if path.suffix.lower() == ".json" else text.splitlines()
    except (OSError, ValueError, LookupError, TypeError) as err:
        raise ArtifactError(f"{path}: labels cannot be read ({err})") from err
    names = tuple(label.strip() for label in labels)
    if not names or not all(names) or num_classes not in (None, len(names)):
        expected = "one per class" if num_classes is None else f"{num_classes}, one per class"
        raise ConfigError(
            f"{option('labels')}: {path} has {len(names)} lines ({names.count('')} empty), "
            f"expected {expected} of {of}"
        )
    return names


def _names(content: Any) -> list[str]:
    if isinstance(content, dict):
        content = [item["name"] for item in sorted(content["categories"], key=lambda c: c["id"])]
    if not isinstance(content, list) or not all(isinstance(name, str) for name in content):
        raise ValueError("expected a list of names, or COCO annotations")
    return content
