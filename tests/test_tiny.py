"""The whole way on a net of three layers, in a few seconds: what runs before every commit."""

import re
from pathlib import Path

import numpy as np
import torch
from click.testing import CliRunner

from reptrt.cli import main
from reptrt.core.artifacts import read_sidecar

NET = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.wide = nn.Conv2d(8, 8, 3, padding=1)
        self.narrow = nn.Conv2d(8, 8, 1)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x):
        return (self.wide(x) * 0.05 + self.narrow(x) * 0.1 + self.norm(x)).relu()

def make():
    torch.manual_seed(0)
    stem, head = nn.Conv2d(1, 8, 3), nn.Linear(288, 10)
    return nn.Sequential(stem, nn.ReLU(), Block(), Block(), nn.Flatten(), head)
"""


def reptrt(*args: object) -> str:
    done = CliRunner().invoke(main, [str(arg) for arg in args])
    assert done.exit_code == 0, done.stderr
    return done.stdout


def test_from_a_net_to_int8(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    (tmp_path / "net.py").write_text(NET)
    x = np.random.default_rng(0).integers(0, 256, (64, 1, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", x=x)
    fp, q, data = tmp_path / "net.onnx", tmp_path / "net.int8.onnx", tmp_path / "images.npz"

    assert " 2 blocks fused " in reptrt(
        "export", f"{tmp_path}/net.py:make", "--input-size", "1x8x8", "-o", fp
    )
    summary = reptrt("calibrate", fp, "--data", data, "-n", 64, "-o", q)
    assert re.search(r"^images +64$", summary, re.MULTILINE)
    assert " 0 errors  0 warnings " in reptrt("lint", q)
    judged = reptrt("eval", q, "--data", data, "--reference", fp)
    assert float(judged.split()[-1]) > 25  # dB; 8 bits give about 30
    sidecar = read_sidecar(q)
    assert sidecar is not None
    assert set(sidecar.parents) == {"net.onnx", "images.npz"}
