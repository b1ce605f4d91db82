"""Make the virtual environments of the rivals, unless they exist."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from rivals.rows import Environment

from reptrt.core.artifacts import write_json
from reptrt.core.errors import ReptrtError

_MADE = "reptrt-rival.json"  # written into a complete environment: its key and versions


class NotInstalledError(ReptrtError):
    """An environment that cannot be made."""


def make(environment: Environment, folder: Path) -> Path:
    """Install an environment under a folder, unless it exists there; return its Python.

    Raises:
        NotInstalledError: pip could not install a package; the message is its last line.
    """
    home = folder / environment.name
    python = home / "bin" / "python"
    if _made(home).get("key") == _key(environment):
        return python
    if not python.exists():
        _run([sys.executable, "-m", "venv", str(home)])
    install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    _run([*install, *environment.packages])
    if environment.without_dependencies:
        _run([*install, "--no-deps", *environment.without_dependencies])
    listed = _run([str(python), "-m", "pip", "list", "--format", "json"])
    installed = {package["name"].lower(): package["version"] for package in json.loads(listed)}
    write_json(home / _MADE, {"key": _key(environment), "versions": installed})
    return python


def versions(environment: Environment, folder: Path) -> dict[str, str]:
    """Return the packages of an environment that `make` has made."""
    return dict(_made(folder / environment.name).get("versions", {}))


def _made(home: Path) -> dict[str, Any]:
    path = home / _MADE
    return json.loads(path.read_text()) if path.exists() else {}


def _key(environment: Environment) -> str:
    parts = [sys.version, *environment.packages, "--", *environment.without_dependencies]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        said = lines[-1] if lines else f"exit {done.returncode}"
        raise NotInstalledError(f"{' '.join(command[:4])}: {said}")
    return done.stdout
