"""TOML files of small sweeps."""

from pathlib import Path

import numpy as np
import onnx

from tests.support.helpers import ort_run
from tests.support.small_run import SIZE, reptrt, write_data, write_factory

MADE = """\
data = "calib.npz"
eval_data = "eval.npz"
targets = ["tensorrt", "onnxruntime"]
recipes = ["plain", "fast"]

[export]
input_size = [1, 8, 8]

[calibrate]
images = 24

[nets.made]
source = "net_of_a_small_run.py:make"
"""
FILE = f"""\
{MADE}
[nets.given]
source = "given.onnx"
targets = ["tensorrt"]
recipes = ["fast"]

[nets.given.export]
input_size = [1, 8, 8]
"""


def write_inputs(folder: Path) -> Path:
    """Write a sheet, its nets and its images, with labels that the float net finds."""
    source, given = write_factory(folder), folder / "given.onnx"
    write_data(folder / "calib.npz")
    assert reptrt("export", source, *SIZE, "-o", given).exit_code == 0
    x = np.random.default_rng(1).integers(0, 256, (200, 1, 8, 8), dtype=np.uint8)
    (scores,) = ort_run(onnx.load(given), {"input": x.astype(np.float32) / 255}).values()
    np.savez(folder / "eval.npz", x=x, y=scores.argmax(axis=1))
    return write_sheet(folder, FILE)


def write_sheet(folder: Path, text: str) -> Path:
    """Write a TOML file into a folder."""
    path = folder / "sweep.toml"
    path.write_text(text)
    return path
