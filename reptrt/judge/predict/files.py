"""Which images predict reads, and where it draws them."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from reptrt.core.artifacts import replacing
from reptrt.core.errors import ArtifactError, DataError, option
from reptrt.data.images import IMAGE_SUFFIXES, list_images

_FORMATS = {  # suffix -> PIL's name
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".png": "PNG",
    ".bmp": "BMP",
    ".webp": "WEBP",
    ".ppm": "PPM",
    ".tif": "TIFF",
    ".tiff": "TIFF",
}
_QUALITY = 92  # of JPEG and WEBP


@dataclass(frozen=True, slots=True)
class Listed:
    """Images, each once, and the folder that all of them are in."""

    folder: Path
    paths: tuple[Path, ...]


def listed_images(given: Sequence[Path]) -> Listed:
    """Return the images that were given: files as they are, of folders all images in them.

    Raises:
        DataError: a path does not exist, a folder holds no images, or nothing was given.
    """
    if not given:
        raise DataError(f"{option('images')}: got none, expected image files or folders of them")
    paths: list[Path] = []
    for path in given:
        if not path.exists():
            raise DataError(f"{path}: does not exist; check the path")
        paths += list_images(path).paths if path.is_dir() else [path]
    unique = tuple(dict.fromkeys(paths))
    if len(given) == 1 and given[0].is_dir():
        return Listed(given[0], unique)
    parents = {path.parent for path in unique}
    if len(parents) == 1:
        return Listed(parents.pop(), unique)
    unique = tuple(dict.fromkeys(path.absolute() for path in unique))
    return Listed(Path(os.path.commonpath([path.parent for path in unique])), unique)


def pictures_of(images: Listed, output: Path) -> tuple[Path, ...]:
    """Return where each image is drawn: a file, or a file of the same name in a folder.

    Raises:
        ArtifactError: several images would be drawn into one file, an image would be overwritten,
            or the folder cannot be made.
    """
    is_file = output.suffix.lower() in IMAGE_SUFFIXES and not output.is_dir()
    if is_file and len(images.paths) > 1:
        raise ArtifactError(
            f"{option('output')} {output}: is one file, for {len(images.paths)} images; give a "
            "folder"
        )
    if not is_file and output.exists() and not output.is_dir():
        raise ArtifactError(
            f"{option('output')} {output}: is a file, expected a folder, or a name that ends in "
            f"{' '.join(sorted(IMAGE_SUFFIXES))} for one image"
        )
    if not output.parent.is_dir():
        raise ArtifactError(f"{output}: folder {output.parent} does not exist; create it first")
    if is_file:
        targets: tuple[Path, ...] = (output,)
    else:
        names = (path.relative_to(images.folder) for path in images.paths)
        targets = tuple(output / _drawable(name) for name in names)
    _refuse_overwriting(images, targets)
    return targets


def _drawable(name: Path) -> Path:
    return name if name.suffix.lower() in _FORMATS else name.with_name(f"{name.name}.png")


def _refuse_overwriting(images: Listed, targets: Sequence[Path]) -> None:
    inputs = {(path.stat().st_dev, path.stat().st_ino) for path in images.paths}
    for target in targets:
        if target.exists() and (target.stat().st_dev, target.stat().st_ino) in inputs:
            raise ArtifactError(
                f"{target}: is an image that would be drawn over; give another {option('output')}"
            )


def write_picture(picture: Image.Image, target: Path) -> None:
    """Write a picture, whole or not at all; its folder is made if it does not exist.

    Raises:
        ArtifactError: the picture cannot be written.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise ArtifactError(f"{target.parent}: cannot be made ({err.strerror or err})") from err
    with replacing(target) as part, open(part, "wb") as stream:
        picture.save(stream, format=_FORMATS[target.suffix.lower()], quality=_QUALITY)
