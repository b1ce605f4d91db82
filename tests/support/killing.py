"""Kill runs and start them again; one process imports everything once and forks for every run.

    python -m tests.support.killing FOLDER KILLS

makes KILLS runs in FOLDER/0, FOLDER/1, ... Each is killed (SIGKILL) at a moment within the duration
of a run and then started again. Two undisturbed runs get the next numbers. Prints JSON: {"seconds":
duration of a run, "kills": [{"after": seconds, "found": [files]}]}.
"""

import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import onnxruntime  # noqa: F401  # what a run needs is imported before the first fork
import torch

import reptrt.runs.run  # noqa: F401
from reptrt.cli import main
from tests.support.learned_nets import rep_net, write_images, write_net

FAST = ("--batch", 1, "--bench-seconds", 0.02, "--threads", 1)
OPTIONS = ("--recipe", "accurate", "--iterations", 12, "-n", 40, *FAST)


def start(folder: Path, number: int) -> int:
    """Start a run in a process of its own; return its id."""
    sys.stdout.flush()
    process = os.fork()
    if process:
        return process
    status = 70
    try:
        log = os.open(folder / f"{number}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        arguments = ["run", folder / "m.onnx", *OPTIONS]
        arguments += ["--data", folder / "d.npz", "-o", folder / str(number)]
        main([str(argument) for argument in arguments], standalone_mode=False)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)  # skips the clean-up handlers, which belong to the parent process


def finish(process: int) -> None:
    """Wait for a run that must succeed."""
    _, status = os.waitpid(process, 0)
    if status:
        raise RuntimeError(f"a run ended with status {status}")


def kill_after(seconds: float, process: int) -> bool:
    """Kill a process after some seconds; return whether it was still running."""
    time.sleep(seconds)
    os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    if os.WIFSIGNALED(status):
        return True
    if status:
        raise RuntimeError(f"a run ended with status {status}")
    return False


def kill_runs(folder: Path, kills: int) -> dict[str, object]:
    """Make the undisturbed runs and the killed ones."""
    torch.set_num_threads(1)
    weight = torch.zeros(1, requires_grad=True)
    weight.sum().backward()
    write_net(folder / "m.onnx", rep_net())
    write_images(folder / "d.npz", 48)
    finish(start(folder, kills))  # warms the caches of the disk up
    began = time.perf_counter()
    finish(start(folder, kills + 1))
    whole = time.perf_counter() - began
    rng = random.Random(0)
    done = []
    for index in range(kills):
        after = whole * (index + rng.random()) / kills
        hit = kill_after(after, start(folder, index))
        files = sorted(p.name for p in (folder / str(index)).glob("*")) if hit else ["finished"]
        finish(start(folder, index))
        done.append({"after": after, "found": files})
    return {"seconds": whole, "kills": done}


if __name__ == "__main__":
    print(json.dumps(kill_runs(Path(sys.argv[1]), int(sys.argv[2]))))
