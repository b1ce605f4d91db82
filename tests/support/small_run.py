"""A run of a small net that is fast enough to be made in each test."""

from pathlib import Path

import numpy as np
from click.testing import CliRunner, Result

from reptrt.cli import main

SIZE = ("--input-size", "1x8x8")

_FACTORY = """\
import torch
from torch import nn


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.wide = nn.Conv2d(6, 6, 3, padding=1)
        self.narrow = nn.Conv2d(6, 6, 1)

    def forward(self, x):
        return (self.wide(x) + self.narrow(x) + x).relu()


def make():
    {seed}
    return nn.Sequential(nn.Conv2d(1, 6, 3), Block(), Block(), nn.Flatten(), nn.Linear(216, 10))
"""


def write_factory(folder: Path, *, seeded: bool = True, name: str = "net") -> str:
    """Write a factory of a small rep-net; return it as a source."""
    path = folder / f"{name}_of_a_small_run.py"
    path.write_text(_FACTORY.format(seed="torch.manual_seed(0)" if seeded else "pass"))
    return f"{path}:make"


def write_data(path: Path, number: int = 40) -> Path:
    """Write images with labels."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (number, 1, 8, 8), dtype=np.uint8)
    np.savez(path, x=x, y=rng.integers(0, 10, number))
    return path


def make_run(source: str, data: Path, folder: Path, *more: object) -> Path:
    """Make a run; return its folder."""
    fast = ("--recipe", "fast", "-n", 32, "--batch", 1, "--bench-seconds", 0.01)
    result = reptrt("run", source, *SIZE, "--data", data, *fast, "-o", folder, *more)
    assert result.exit_code == 0, result.output
    return folder


def reptrt(*arguments: object) -> Result:
    """Run a command; raise an exception that the command line does not report as an error."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def refused(*arguments: object) -> str:
    """Run a command that must fail in one line; return the line."""
    result = reptrt(*arguments)
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    return line
