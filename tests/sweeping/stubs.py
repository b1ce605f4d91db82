"""Work for executors that needs no net."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

from reptrt.core.errors import DataError


def double(payload: dict[str, Any]) -> int:
    print("noise on stdout")
    return 2 * int(payload["number"])


def refuse(payload: dict[str, Any]) -> None:
    raise DataError("x.npz: holds\nno images")


def break_down(payload: dict[str, Any]) -> None:
    json.loads("no JSON")


def end(payload: dict[str, Any]) -> None:
    os.write(2, b"a library says goodbye\n")
    os._exit(7)


def die_often(payload: dict[str, Any]) -> str:
    """Die as often as the payload says, then work; each attempt is a file."""
    folder = Path(payload["folder"])
    attempts = len(list(folder.glob("attempt*")))
    (folder / f"attempt{attempts}").touch()
    if attempts < payload["times"]:
        os.kill(os.getpid(), signal.SIGKILL)
    return "done"


def sleep(payload: dict[str, Any]) -> int:
    (Path(payload["folder"]) / str(os.getpid())).touch()
    time.sleep(payload["seconds"])
    return os.getpid()
