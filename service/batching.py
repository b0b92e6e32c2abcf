"""Which rows run together. No thread and no clock: engine.py has those.

A queue holds the jobs of one model, a job the rows of one request; a window of a long context is a row like any other.
The next batch always holds the first job's next row, and that job then goes to the end of the queue: a text waits for
one batch of a long context, not for all of them. The rows that join it come from a bounded window, one row of each job
in turn, and are those nearest in length, as long as the batch stays within its tokens, padding counted, and padding
stays a small share of it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import islice
from typing import Generic, Protocol, TypeVar

WINDOW_ROWS = 128
# A padded token costs what a real one does, and on a CPU a larger batch gains little: better two runs than padding.
MAX_PADDING_SHARE = 0.2


class Waiting(Protocol):
    """What the queue needs of a job."""

    lengths: Sequence[int]  # tokens of each row
    waiting: list[int]  # rows not taken yet; the last is next
    alone: bool  # its rows must not run with those of others


Job = TypeVar("Job", bound=Waiting)


class JobQueue(Generic[Job]):
    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._jobs: deque[Job] = deque()

    def add(self, job: Job) -> None:
        self._jobs.append(job)

    def take(self) -> list[tuple[Job, int]]:
        """The next batch, as (job, row); empty when nothing waits."""
        # A job loses its rows unasked when its client leaves or its time is over.
        self._forget_empty()
        window = self._window()
        batch = [window[i] for i in choose([job.lengths[row] for job, row in window], self._max_tokens)]
        for job, row in batch:
            job.waiting.remove(row)
        self._jobs.rotate(-1)
        self._forget_empty()
        return batch

    def _forget_empty(self) -> None:
        self._jobs = deque(job for job in self._jobs if job.waiting)

    def _window(self) -> list[tuple[Job, int]]:
        """The first job's next row, then one row of each job in turn."""
        if not self._jobs:
            return []
        first = self._jobs[0]
        jobs = [first] if first.alone else [job for job in islice(self._jobs, WINDOW_ROWS) if not job.alone]
        window: list[tuple[Job, int]] = []
        depth = 1
        while jobs and len(window) < WINDOW_ROWS:
            jobs = [job for job in jobs if len(job.waiting) >= depth]
            window += [(job, job.waiting[-depth]) for job in jobs]
            depth += 1
        return window[:WINDOW_ROWS]


def choose(lengths: Sequence[int], max_tokens: int) -> list[int]:
    """Rows that run together with row 0: its neighbours in length, nearest first.

    rows x longest <= max_tokens, unless row 0 alone is more; at most MAX_PADDING_SHARE of that is padding.
    """
    if not lengths:
        return []
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    low = high = order.index(0)
    real = lengths[0]
    while True:
        sides = []
        if low > 0:
            sides.append((lengths[0] - lengths[order[low - 1]], low - 1, high))
        if high + 1 < len(order):
            sides.append((lengths[order[high + 1]] - lengths[0], low, high + 1))
        for _, new_low, new_high in sorted(sides):
            added = lengths[order[new_low if new_low < low else new_high]]
            padded = (new_high - new_low + 1) * lengths[order[new_high]]
            if padded <= max_tokens and padded - real - added <= MAX_PADDING_SHARE * padded:
                low, high, real = new_low, new_high, real + added
                break
        else:
            return order[low : high + 1]
