"""The lane of comparisons, beside the requests to the tasks and always behind them.

A comparison is admitted by a bound of its own. Comparisons take turns round by round. A round goes on only while no
request to a task is admitted, and its rows run only while none of theirs wait (engine.py), so that a request waits at
most for the one run it finds in progress. Nothing that runs here counts in the metrics of requests.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from service.admission import MAX_RETRY_SECONDS, Admission
from service.errors import Overloaded
from service.workers import Workers

MAX_COMPARISONS = 8
# Only the comparison whose turn it is looks, and a look takes some microseconds.
LOOK_SECONDS = 0.005


class Lane:
    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self._turn = asyncio.Lock()
        self._last_seconds = 1.0  # that a comparison took
        self.inside = 0  # comparisons that wait or run
        # Of its own: a long text of a comparison must not keep one of a request waiting.
        self.workers = Workers(1)

    @contextmanager
    def enter(self) -> Iterator[None]:
        """Overloaded when too many comparisons wait."""
        if self.inside >= MAX_COMPARISONS:
            seconds = min(MAX_RETRY_SECONDS, max(1, math.ceil(self.inside * self._last_seconds)))
            raise Overloaded(f"{self.inside} comparisons wait or run, the most there can be; try again later.", seconds)
        began = time.perf_counter()
        self.inside += 1
        try:
            yield
        finally:
            # With others beside it a comparison takes their time as well.
            self._last_seconds = (time.perf_counter() - began) / self.inside
            self.inside -= 1

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """The time of one round, in which no other comparison runs."""
        async with self._turn:
            yield

    async def quiet(self) -> None:
        """Return when no request to a task is admitted."""
        while self._admission.requests:
            await asyncio.sleep(LOOK_SECONDS)

    def close(self) -> None:
        self.workers.close()
