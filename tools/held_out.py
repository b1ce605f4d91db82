"""Divide calibration images into two halves: one calibrates, the other judges."""

from pathlib import Path

import numpy as np

from reptrt.data.dataset import open_dataset
from reptrt.graph.net import net_from_model, read_model
from reptrt.graph.preprocess import read_preprocess


def halves(net: Path, data: Path, folder: Path, seed: int) -> tuple[Path, Path]:
    """Write two random halves of a data set as arrays in the net's input size; return the files."""
    dataset = open_dataset(data, read_preprocess(net_from_model(read_model(net))))
    x = np.concatenate(list(dataset.batches(256)))
    order = np.random.default_rng(seed).permutation(len(x))
    files = folder / "calibrate.npz", folder / "judge.npz"
    for path, indices in zip(files, np.array_split(order, 2), strict=True):
        np.savez(path, x=x[np.sort(indices)])
    return files
