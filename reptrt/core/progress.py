"""A progress bar on stderr, shown on a terminal only, for work that takes a second or more."""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Item = TypeVar("Item")

_QUIET_SECONDS = 1.0


def track(
    iterable: Iterable[Item],
    total: int,
    label: str | Callable[[], str],
    console: Console | None = None,
) -> Iterator[Item]:
    """Yield the items unchanged and show how many are done; remove the bar at the end.

    Args:
        iterable: the work; the bar advances when the next item is requested.
        total: the number of items.
        label: name of the work, in a word or two; a function is called again after each item.
        console: where to draw the bar; None: stderr.
    """
    console = console or Console(stderr=True)
    if not console.is_terminal:
        yield from iterable
        return
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    progress = Progress(*columns, TimeRemainingColumn(), console=console, transient=True)
    text = label if callable(label) else lambda: str(label)
    task = progress.add_task(text(), total=total)
    started = time.monotonic()
    try:
        for item in iterable:
            if not progress.live.is_started and time.monotonic() - started >= _QUIET_SECONDS:
                progress.start()
            yield item
            progress.update(task, advance=1, description=text())
    finally:
        progress.stop()
