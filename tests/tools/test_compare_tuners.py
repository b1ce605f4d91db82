"""tools/compare_tuners.py with fake rivals: what they get, what is kept, and why one failed."""

import shutil
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from tests.support.helpers import TOOLS, load_tool
from tests.support.onnx_nets import plain_chain

tool = load_tool("compare_tuners")
measure = tool.measure
rows = sys.modules["rivals.rows"]

SEARCHES = """\
import shutil
import numpy as np
from job import run
def quantize(job):
    images, labels = (np.load(job.options[name]) for name in ("images", "labels"))
    shutil.copy(job.model, job.output)
    return {"evaluations": len(images), "labels": labels.tolist()}
run(quantize)
"""
FAILS = """\
from job import run
def quantize(job):
    raise RuntimeError("not for this net")
run(quantize)
"""


def test_rivals_get_the_tuning_half_and_say_what_they_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environments = sys.modules["rivals.environments"]
    monkeypatch.setattr(environments, "make", lambda environment, folder: Path(sys.executable))
    monkeypatch.setattr(environments, "versions", lambda environment, folder: {})
    onnx.save(plain_chain(), tmp_path / "net.onnx")
    pixels = np.random.default_rng(0).integers(0, 256, (12, 3, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", x=pixels, y=np.arange(12) % 5)
    sources, output = tmp_path / "runners", tmp_path / "out"
    for folder in (sources, output):
        folder.mkdir()
    shutil.copy(TOOLS / "rivals" / "job.py", sources)
    for name, text in (("nncf_accuracy", SEARCHES), ("modelopt_auto", FAILS)):
        (sources / f"{name}.py").write_text(text)
    at = measure.Bench(tmp_path / "net.onnx", output, tmp_path / "env", 60.0, 0.0, sources)
    measure.write_images(at, tmp_path / "images.npz", 8)
    taken = [11, 2, 5]
    options = tool.write_tuning(at, tmp_path / "images.npz", taken)
    found = {row.name: tool.search(at, row) for row in rows.tuners({**options, "max_drop": 0.001})}
    assert found["nncf-control"]["evaluations"] == len(taken)
    assert found["nncf-control"]["labels"] == [2, 0, 1]  # of 2, 5 and 11: in the order of the data
    assert found["nncf-control"]["seconds"] >= 0
    assert found["modelopt-auto"] == {"why": "RuntimeError: not for this net"}
