"""The lane of comparisons, beside the requests to the tasks and always behind them.

A comparison is admitted by a bound of its own. Comparisons take turns round by round. Each step of one, a row's run or
some work on text, begins only while no request to a task is admitted, and a row only while none of theirs waits
(engine.py): a request that comes meanwhile waits for that one row. So that few do, the lane takes a small share of the
time while there is traffic: after each step it rests, and in quiet times it does not. Nothing that runs here counts in
the metrics of requests.
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
# Of the time while there is traffic: about one request in so many finds the inference thread at work for the lane, too
# few to move the p50 and hardly enough to move the p95.
TRAFFIC_SHARE = 1 / 20
# There is traffic until so long after a request came.
TRAFFIC_SECONDS = 1.0


class Lane:
    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self._turn = asyncio.Lock()
        self._last_seconds = 1.0  # that a comparison took
        self._entered = admission.entered  # requests, when last looked
        self._came = -math.inf  # when the last of them came, as far as was seen
        self._rest_until = 0.0
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

    @asynccontextmanager
    async def gap(self) -> AsyncIterator[None]:
        """The time of one step, in a gap between requests to the tasks."""
        while self._admission.requests or (self._sees_traffic() and time.perf_counter() < self._rest_until):
            await asyncio.sleep(LOOK_SECONDS)
        began = time.perf_counter()
        try:
            yield
        finally:
            now = time.perf_counter()
            self._rest_until = now + (now - began) * (1 / TRAFFIC_SHARE - 1)

    def _sees_traffic(self) -> bool:
        now = time.perf_counter()
        if self._entered != self._admission.entered:
            self._entered, self._came = self._admission.entered, now
        return now - self._came < TRAFFIC_SECONDS

    def close(self) -> None:
        self.workers.close()
