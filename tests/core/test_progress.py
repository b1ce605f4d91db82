import io

import pytest
from rich.console import Console

from reptrt.core import progress
from reptrt.core.progress import track


def terminal() -> tuple[Console, io.StringIO]:
    stream = io.StringIO()
    return Console(file=stream, force_terminal=True, width=80), stream


def test_items_pass_unchanged() -> None:
    assert list(track(iter("abc"), 3, "work")) == ["a", "b", "c"]


def test_nothing_is_drawn_without_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_QUIET_SECONDS", 0.0)
    stream = io.StringIO()
    assert list(track(range(3), 3, "work", Console(file=stream))) == [0, 1, 2]
    assert stream.getvalue() == ""


def test_nothing_is_drawn_for_short_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_QUIET_SECONDS", 1000.0)
    console, stream = terminal()
    assert list(track(range(3), 3, "work", console)) == [0, 1, 2]
    assert stream.getvalue() == ""


def test_long_work_draws_a_bar_and_takes_it_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_QUIET_SECONDS", 0.0)
    console, stream = terminal()
    assert list(track(range(3), 3, "judging", console)) == [0, 1, 2]
    assert "judging" in stream.getvalue()
    assert "3/3" in stream.getvalue()
    assert "\x1b[2K" in stream.getvalue()  # erased at the end


def test_a_failure_inside_the_loop_ends_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_QUIET_SECONDS", 0.0)
    console, stream = terminal()
    steps = track(range(3), 3, "judging", console)
    next(steps)
    next(steps)
    steps.close()
    assert stream.getvalue().endswith("\x1b[2K")
    assert not console._live_stack


def test_a_label_can_tell_of_the_last_item(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_QUIET_SECONDS", 0.0)
    console, stream = terminal()
    done: list[int] = []
    for item in track(range(3), 3, lambda: f"learn {done[-1:]}", console):
        done.append(item)
    assert "learn [2]" in stream.getvalue()
