"""Compare the calibration images with those that a net was trained on, and warn of a difference.

Of each tensor that batch norms know (`graph.trained`), with mean mu and deviation sigma of channel
c over the training images, and m the mean of each of n calibration images over its positions:

    shift^2 = sum_c ((E[m] - mu)^2 - Var[m] / n) / sum_c sigma^2

The second term is what chance adds, so few images do not look like other images. The shift of the
images is the largest one of the tensors (ours).

Trained nets with images of their own training set have at most 0.1; at half the brightness 0.3 to
0.5, without their mean and std 0.5 to 1.1, with noise 0.9 to 2.1. Channels in the wrong order have
0.15 to 0.28 and are not found. Training on pictures that are composed of others (mosaic, in
detectors) shifts the batch norms' own statistics: 0.5. docs/methods.md has the table.
"""

import logging
from collections.abc import Mapping

import numpy as np
import torch

from reptrt.core.arrays import Float64Array
from reptrt.data.dataset import Dataset
from reptrt.execute.torchgraph import TorchGraph
from reptrt.graph.net import Net
from reptrt.graph.trained import Trained, take_trained
from reptrt.quantize.calib.collect import rows_that_count, watch

_LOG = logging.getLogger(__name__)

_IMAGES = 64
_FEWEST = 8  # with fewer, chance is as large as what it hides
_WARN_ABOVE = 0.3  # between images of the training set and images without mean and std


def warn_of_other_images(net: Net, dataset: Dataset, device: torch.device) -> None:
    """Log how far images lie from the training images, as a warning if that is far.

    Args:
        net: a float net; what batch norms know is removed from its metadata.
        dataset: calibration images, prepared for the net.
        device: where to compute.
    """
    trained = take_trained(net)
    if not trained or dataset.length < _FEWEST:
        return
    images = dataset.spread(min(_IMAGES, dataset.length))
    with torch.inference_mode():
        shift = image_shift(TorchGraph(net, device), images, trained)
    if shift > _WARN_ABOVE:
        _LOG.warning(
            "%s: the images differ from those that the net was trained on: the means of its first "
            "layers are off by %.2f standard deviations (usual: up to 0.1; 0.5 after training on "
            "mosaics); check the images, the order of their channels, and mean and std of export",
            dataset.name,
            shift,
        )
    else:
        _LOG.debug("%s: %.2f standard deviations from the training images", dataset.name, shift)


def image_shift(graph: TorchGraph, images: Dataset, trained: Mapping[str, Trained]) -> float:
    """Return how far images lie from the training images, in standard deviations.

    Args:
        graph: of the float net.
        images: at least two.
        trained: tensor (N, C, ...) -> its statistics over the training images.
    """
    means: dict[str, list[Float64Array]] = {name: [] for name in trained}

    def record(name: str, count: int, value: torch.Tensor) -> None:
        rows = value[: rows_that_count(count, value)].flatten(2).double()
        means[name].append((rows.mean(2) if rows.dim() > 2 else rows).cpu().numpy())

    watch(graph, images, {name: [record] for name in trained}, "images")
    return max(_shift(np.concatenate(means[name]), trained[name]) for name in trained)


def _shift(means: Float64Array, trained: Trained) -> float:
    by_chance = means.var(axis=0, ddof=1) / len(means)
    excess = np.square(means.mean(axis=0) - trained.mean) - by_chance
    power = float(np.square(trained.deviation, dtype=np.float64).sum())
    return float(np.sqrt(max(float(excess.sum()), 0.0) / power)) if power > 0 else 0.0
