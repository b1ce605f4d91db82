"""A worker process: reads tasks from stdin, one JSON value a line, and writes what came of them.

    -> {"work": "module:function", "payload": {...}, "threads": 1}
    <- {"result": ...}  or  {"failure": "one line"}

It ends as soon as stdin does, in the middle of a task too: whoever started it is gone then.
"""

import importlib
import json
import os
import queue
import sys
import threading
import traceback
from typing import Any

from reptrt.core.errors import ReptrtError


def call(work: str, payload: Any, threads: int | None = None) -> dict[str, Any]:
    """Call a function; return its result, or in one line what it raised.

    Args:
        work: "module:function".
        payload: its argument.
        threads: of torch; None: as they are.
    """
    try:
        module, _, name = work.partition(":")
        function = getattr(importlib.import_module(module), name)
        if threads is not None and "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(threads)
        return {"result": function(payload)}
    except ReptrtError as err:
        return {"failure": " ".join(str(err).split())}
    except MemoryError as err:
        return {"failure": f"not enough memory ({' '.join(str(err).split())})"}
    except Exception as err:
        traceback.print_exc()
        where = traceback.extract_tb(err.__traceback__)[-1]
        return {
            "failure": f"{type(err).__name__}: {' '.join(str(err).split())} "
            f"({os.path.basename(where.filename)}:{where.lineno}); this is a bug of reptrt"
        }


def main() -> None:
    """Serve until stdin ends."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a factory prints is no answer
    tasks: queue.Queue[str] = queue.Queue()
    threading.Thread(target=_listen, args=(tasks,), daemon=True).start()
    while True:
        message = json.loads(tasks.get())
        print(json.dumps(call(**message)), file=answers, flush=True)


def _listen(tasks: "queue.Queue[str]") -> None:
    for line in sys.stdin:
        tasks.put(line)
    os._exit(1)
