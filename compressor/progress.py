"""Progress: a bar on a terminal, a line every half minute where standard error is a file or a pipe."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

console = Console(stderr=True)

_SECONDS_BETWEEN_LINES = 30.0


@contextmanager
def progress(title: str | None, total: int, done: int = 0) -> Iterator[Callable[..., None]]:
    """A bar of ``total`` steps; yields ``advance(note="")`` to be called after each. No title: nothing is shown."""
    if title is None:
        yield lambda note="": None
        return
    if not console.is_terminal:
        yield _lines(title, total, done)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(title, total=total, completed=done, note="")

        def advance(note: str = "") -> None:
            bar.update(task, advance=1, note=note)

        yield advance


def _lines(title: str, total: int, done: int) -> Callable[..., None]:
    started = printed = time.monotonic()
    first = done

    def advance(note: str = "") -> None:
        nonlocal done, printed
        done += 1
        now = time.monotonic()
        if done < total and now - printed < _SECONDS_BETWEEN_LINES:
            return
        printed = now
        left = (now - started) / (done - first) * (total - done) / 60
        console.print(f"{title}: {done} of {total}, {left:.0f} min left {note}", highlight=False)

    return advance
