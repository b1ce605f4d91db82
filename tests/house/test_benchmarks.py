"""The benchmarks still run: each once, without a clock."""

import os
import subprocess
import sys

import pytest

from tests.support.pages import REPOSITORY

pytest.importorskip("pytest_benchmark")


@pytest.mark.slow
def test_every_benchmark_runs() -> None:
    command = [sys.executable, "-m", "pytest", "tests/benchmarks", "-o", "python_files=bench_*.py"]
    command += ["-o", "addopts=-q", "-p", "no:cacheprovider", "--benchmark-disable"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    last = done.stdout.strip().splitlines()[-1]
    assert "passed" in last
    assert "skipped" not in last
