"""Images as a program has them: a path, an array or tensor, a DataLoader, batches of any kind.

A batch is an array or tensor (N, C, H, W) or (N, H, W, C), or a pair of it and its labels (N,), as
a DataLoader over a dataset with labels yields it. Pixels are uint8 and are prepared as the network
says; floats are the network's input already, as the transforms of a DataLoader leave them.
"""

import functools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from reptrt.core.arrays import AnyArray
from reptrt.core.errors import DataError, option
from reptrt.data.arrays import Arrays, checked_labels
from reptrt.data.dataset import Images
from reptrt.data.objects import Objects, are_targets, objects_from_target

_EXPECTED = (
    "expected an array or tensor (N, C, H, W), a pair of it and its labels, a DataLoader or other "
    "iterable of such batches, a folder of images, an .npz or an .npy"
)


class _Batch(NamedTuple):
    images: AnyArray
    labels: AnyArray | None
    objects: tuple[Objects, ...] | None = None


def images_from(
    value: Any,
    *,
    limit: int | None = None,
    labels: bool = True,
    targets: bool = False,
    parameter: str = "images",
) -> Images:
    """Return images in any form that a program has them in, ready for `open_dataset`.

    Batches of a loader are put into memory, in the type that they have.

    Args:
        value: a path; an array or tensor; a pair (images, labels); an iterable of either.
        limit: so many images of an iterable are enough: the first ones, in its order.
        labels: whether labels are wanted; else whatever stands beside images is ignored.
        targets: whether boxes are wanted: a list with a dict of ``boxes`` and ``labels`` for each
            image, as torchvision's detection data sets give them. The images may then be a list of
            arrays (C, H, W) of one size.
        parameter: the name of the caller's parameter, for messages.

    Raises:
        DataError: anything else, or batches that do not fit each other.
    """
    where = option(parameter)
    if isinstance(value, Arrays):
        return value
    if isinstance(value, str | os.PathLike):
        return Path(value)
    read = _detection_batch if targets else functools.partial(_batch, with_labels=labels)
    if (batch := read(value, where)) is not None:
        return _joined([batch], parameter)
    if isinstance(value, Mapping) or not isinstance(value, Iterable):
        is_torch_dataset = hasattr(value, "__getitem__") and not isinstance(value, Mapping)
        hint = "; wrap it in torch.utils.data.DataLoader" if is_torch_dataset else ""
        raise DataError(f"{where}: got {_kind(value)}, {_EXPECTED}{hint}")
    batches = list(_until(_batches(value, where, read), limit))
    if not batches:
        raise DataError(f"{where}: got no batches from {_kind(value)}, expected at least one")
    return _joined(batches, parameter)


def _batches(
    value: Iterable[Any], where: str, read: Callable[[Any, str], _Batch | None]
) -> Iterator[_Batch]:
    for index, item in enumerate(value):
        batch = read(item, f"{where}: batch {index}")
        if batch is None:
            kinds = ", ".join(type(entry).__name__ for entry in item) if _is_sequence(item) else ""
            inside = f" ({kinds})" if kinds else ""
            raise DataError(
                f"{where}: batch {index} of {_kind(value)} is {_kind(item)}{inside}, expected an "
                "array or tensor (N, C, H, W), or a pair of it and its labels (N,)"
            )
        yield batch


def _until(batches: Iterator[_Batch], limit: int | None) -> Iterator[_Batch]:
    """Yield batches until they hold ``limit`` images; the last is cut."""
    left = limit
    for images, labels, objects in batches:
        yield _Batch(
            images[:left],
            None if labels is None else labels[:left],
            None if objects is None else objects[:left],
        )
        if left is not None:
            left -= len(images)
            if left <= 0:
                return


def _batch(value: Any, where: str, with_labels: bool) -> _Batch | None:
    """Return an array, or a pair of images and labels, as a batch; None if it is neither."""
    images = _array(value, where)
    if images is not None:
        return _Batch(_checked_rank(images, where), None)
    if not _is_sequence(value) or not value:
        return None
    images, *others = (_array(entry, where) for entry in value)
    if images is None or images.ndim != 4 or any(o is not None and o.ndim == 4 for o in others):
        return None  # several batches, perhaps
    if not others or not with_labels:
        return _Batch(images, None)
    if len(others) > 1 or (_is_sequence(value[1]) and not _are_integers(value[1])):
        return None
    labels = others[0] if others[0] is not None else _list_of_labels(value[1], where)
    return _Batch(images, checked_labels(f"{where}: labels", labels, len(images)))


def _detection_batch(value: Any, where: str) -> _Batch | None:
    """Return a pair of images and targets as a batch, else images alone; None if it is neither."""
    if not _is_sequence(value) or len(value) != 2 or not are_targets(value[1]):
        return _batch(value, where, with_labels=False)
    images = _array(value[0], where)
    if images is None and _is_sequence(value[0]):
        parts = [_array(entry, where) for entry in value[0]]
        known = [part for part in parts if part is not None and part.ndim == 3]
        sizes = {part.shape for part in known}
        if len(known) < len(parts) or len(sizes) != 1:
            raise DataError(
                f"{where}: images of sizes {sorted(sizes)}, expected arrays (C, H, W) of one size: "
                "that of the net; or give a folder of images and a COCO json"
            )
        images = np.stack(known)
    if images is None:
        return None
    targets = value[1]
    if len(targets) != len(_checked_rank(images, where)):
        raise DataError(f"{where}: {len(images)} images and {len(targets)} targets")
    named = enumerate(targets)
    objects = tuple(objects_from_target(f"{where}: target {i}", of) for i, of in named)
    return _Batch(images, None, objects)


def _list_of_labels(value: Any, where: str) -> AnyArray:
    """Return a list of integers as an array.

    Raises:
        DataError: anything else.
    """
    if _is_sequence(value):
        return np.asarray(value, np.int64)
    raise DataError(
        f"{where}: labels are {_kind(value)}, expected class indices as an array, a tensor or a "
        "list of integers; without labels, pass the images alone"
    )


def _is_sequence(value: Any) -> bool:
    return isinstance(value, tuple | list)


def _are_integers(values: Iterable[Any]) -> bool:
    return all(isinstance(value, int | np.integer) for value in values)


def _checked_rank(images: AnyArray, where: str) -> AnyArray:
    if images.ndim != 4:
        hint = ""
        if images.ndim == 3:
            hint = "; one image is a batch of one: images[None]"
            if ": batch " in where:
                hint = "; stack single images into one array: numpy.stack(images)"
        raise DataError(f"{where}: shape {images.shape}, expected (N, C, H, W){hint}")
    return images


def _array(value: Any, where: str) -> AnyArray | None:
    """Return a numpy array or a torch tensor as an array; None for anything else."""
    if isinstance(value, np.ndarray):
        return value
    if type(value).__module__.partition(".")[0] == "torch" and hasattr(value, "detach"):
        if str(value.layout) != "torch.strided":
            raise DataError(f"{where}: got a tensor of layout {value.layout}, expected a dense one")
        tensor = value.detach().cpu()  # bfloat16 has no counterpart in numpy
        array: AnyArray = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
        return array
    return None


def _joined(batches: list[_Batch], parameter: str) -> Arrays:
    """Return batches as one array.

    Raises:
        DataError: they differ in shape or type, or only some have labels.
    """
    first = batches[0].images
    for index, (images, labels, _) in enumerate(batches):
        here, there = (f"{a.dtype} {a.shape[1:]}" for a in (images, first))
        if here != there:
            raise DataError(
                f"{option(parameter)}: batch {index} has images {here}, batch 0 {there}; expected "
                "the same in all batches"
            )
        if (labels is None) != (batches[0].labels is None):
            raise DataError(
                f"{option(parameter)}: some batches have labels and some do not; expected all or "
                "none"
            )
    if len(batches) == 1:
        return Arrays(parameter, *batches[0])
    images = np.concatenate([batch.images for batch in batches])
    taken = [batch.labels for batch in batches if batch.labels is not None]
    objects = tuple(of for batch in batches for of in batch.objects or ())
    return Arrays(parameter, images, np.concatenate(taken) if taken else None, objects or None)


def _kind(value: Any) -> str:
    name = type(value).__name__
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"
