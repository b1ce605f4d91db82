"""Record what reading a file does in the process: imports, system calls, pickle lookups."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

_WATCHED = (
    *("os.", "subprocess.", "socket.", "shutil.", "exec", "compile", "import", "pickle.find_class"),
    *("ctypes.", "webbrowser.", "urllib.", "code.__new__", "marshal."),
)
_HARMLESS = ("os.scandir", "os.listdir")
for _encoding in ("cp437", "raw_unicode_escape"):  # their import at the first use is no event
    "".encode(_encoding)
_events: list[str] | None = None


def _hook(event: str, args: tuple[object, ...]) -> None:
    if _events is not None and event.startswith(_WATCHED) and event not in _HARMLESS:
        _events.append(f"{event} {args[0] if args else ''}")


sys.addaudithook(_hook)  # cannot be removed; does nothing unless `watched` is active


@contextmanager
def watched() -> Iterator[list[str]]:
    """Collect the events of the block; the list is empty if it only read and computed."""
    global _events
    _events = []
    try:
        yield _events
    finally:
        _events = None
