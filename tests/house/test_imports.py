"""What an import costs and needs, and the names that users rely on."""

import subprocess
import sys

import click
import pytest

import reptrt
from reptrt import cli, pipeline
from reptrt.core import errors

OPTIONAL = ("torch", "onnxruntime", "tensorrt", "tensorrt_rtx", "pycuda")
HEAVY = (*OPTIONAL, "numpy", "onnx", "onnx_graphsurgeon", "sklearn", "PIL")

BLOCKED = f"""
import sys
from importlib.abc import MetaPathFinder

class Block(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {OPTIONAL!r}:
            raise ModuleNotFoundError(f"{{name}} is blocked", name=name)

sys.meta_path.insert(0, Block())
"""


def python(code: str, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *args],
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("name", OPTIONAL)
def test_the_block_blocks(name: str) -> None:
    done = python(f"{BLOCKED}\nimport {name}")
    assert f"{name} is blocked" in done.stderr


def test_import_needs_nothing_heavy() -> None:
    done = python(
        f"{BLOCKED}\nimport reptrt, reptrt.cli, reptrt.core.errors; print(reptrt.__version__)"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == reptrt.__version__


@pytest.mark.parametrize("args", [["--help"], ["export", "--help"], ["calibrate", "--help"]])
def test_help_needs_nothing_heavy(args: list[str]) -> None:
    done = python(f"{BLOCKED}\nfrom reptrt.cli import main; main()", *args)
    assert done.returncode == 0, done.stderr
    assert "Usage:" in done.stdout


@pytest.mark.parametrize("args", [["--help"], ["--version"], ["build-engine", "--help"]])
def test_help_loads_nothing_heavy(args: list[str]) -> None:
    code = (
        "import sys; from reptrt.cli import main; main(standalone_mode=False); "
        f"print('loaded', sorted(set({HEAVY!r}) & set(sys.modules)))"
    )
    done = python(code, *args)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "loaded []"


def test_help_of_no_command_loads_anything_heavy() -> None:
    code = (
        "import sys; from reptrt.cli import main\n"
        "for name in main.commands: main([name, '--help'], standalone_mode=False)\n"
        f"print('loaded', sorted(set({HEAVY!r}) & set(sys.modules)))"
    )
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "loaded []"


def test_calibrate_loads_no_optimizer_of_graphs() -> None:
    """onnxscript and sympy take as long as half of torch; few files need them."""
    code = (
        "import sys, torch; before = set(sys.modules); import reptrt.pipeline.calibrating\n"
        "names = {'onnxscript', 'onnx_ir', 'sympy', 'scipy', 'sklearn', 'pandas', 'matplotlib'}\n"
        "print('loaded', sorted(names & (set(sys.modules) - before)))"
    )
    assert python(code).stdout.splitlines()[-1] == "loaded []"


def test_learning_loads_no_compiler() -> None:
    """torch.optim.Adam imports it, for longer than learning a small net takes."""
    code = (
        "import sys, torch; from reptrt.quantize.reconstruct.adam import Adam, Group\n"
        "x = torch.ones(3, requires_grad=True); x.square().sum().backward()\n"
        "Adam([Group([x], 0.1, False)]).step(1.0); assert x[0] < 1\n"
        "print('loaded', sorted({'torch._dynamo', 'sympy'} & set(sys.modules)))"
    )
    assert python(code).stdout.splitlines()[-1] == "loaded []"


def test_the_list_of_commands_loads_no_options() -> None:
    code = (
        "import sys; from reptrt.cli import main; main(['--help'], standalone_mode=False)\n"
        "print('loaded', [name for name in sys.modules if name.endswith('.options')])"
    )
    assert python(code).stdout.splitlines()[-1] == "loaded []"


def test_the_package_runs_as_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "reptrt", "--version"], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (0, f"reptrt, version {reptrt.__version__}\n")


def test_demo_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; from reptrt.demo.__main__ import main; main(standalone_mode=False); "
        f"print('loaded', sorted(set({HEAVY!r}) & set(sys.modules)))"
    )
    assert python(code, "--help").stdout.splitlines()[-1] == "loaded []"


def test_without_onnxruntime_one_line_says_what_to_install() -> None:
    code = BLOCKED.replace(repr(OPTIONAL), repr(("onnxruntime",)))
    code += "\nfrom reptrt.execute.runner import open_runner\nfrom pathlib import Path\n"
    code += "open_runner(Path('missing.onnx'))"
    done = python(code)
    assert "MissingDependencyError" in done.stderr
    assert "pip install" in done.stderr.splitlines()[-1]


def test_commands_are_a_contract() -> None:
    assert isinstance(cli.main, click.Group)
    assert {
        "export",
        "calibrate",
        "lint",
        "build-engine",
        "inspect",
        "package",
        "eval",
        "bench",
        "run",
    } <= set(cli.main.commands)


def test_public_names_are_a_contract() -> None:
    pinned = {
        "CalibrateOptions",
        "CalibrateReport",
        "ExportOptions",
        "ExportReport",
        "Source",
        "calibrate",
        "export",
    }
    assert pinned <= set(pipeline.__all__)
    assert [name for name in pipeline.__all__ if not hasattr(pipeline, name)] == []


def test_errors_are_a_contract() -> None:
    family = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and value.__module__ == errors.__name__
    }
    assert family == {
        "ArtifactError",
        "CalibrationError",
        "CheckpointError",
        "ConfigError",
        "DataError",
        "EngineError",
        "MissingDependencyError",
        "ReptrtError",
        "RewriteError",
    }
    assert all(issubclass(getattr(errors, name), errors.ReptrtError) for name in family)
