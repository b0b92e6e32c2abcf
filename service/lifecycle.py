"""The service's life: warming up, ready, draining; or failed.

Ready means that every model ran at every shape of a grid up to the token budget, and gave the stored answers of its
golden.json. SIGTERM makes it unready at once and goes on serving for a grace, so that whoever balances load can turn
elsewhere; server.py ends it. When inference ends or hangs, the service is unready from that moment, and `watch` ends
the process so that a supervisor starts a new one.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

import numpy as np

from service import golden
from service.engine import Engine
from service.errors import Draining, NotReady
from service.model import OnnxModel
from service.tokenizer import Row

log = logging.getLogger(__name__)

WARM_UP_LENGTHS = (8, 16, 32, 64, 128, 256, 384, 512)
WARM_UP_RUNS = 2
WATCH_SECONDS = 0.25


class Lifecycle:
    def __init__(self, engine: Engine, hang_seconds: float) -> None:
        self._engine = engine
        self._hang_seconds = hang_seconds
        self.ready = False  # the warm-up has ended well
        self.failure = ""  # a sentence: it has not, and never will
        self.draining = False
        self.closed = False  # the grace is over
        self.crashed = False

    def check_alive(self) -> None:
        """NotReady where a restart may help."""
        if self.failure:
            raise NotReady(self.failure)
        if self.crashed:
            raise NotReady("Inference has ended or hangs; the service is about to end.")

    def check_serving(self) -> None:
        """NotReady or Draining where a request cannot be answered."""
        self.check_alive()
        if self.closed:
            raise Draining("The service is ending; another one will answer.")
        if not self.ready:
            raise NotReady("The models are still warming up; try again in a moment.")
        if trouble := self._engine.trouble():
            raise NotReady(trouble)

    def check_ready(self) -> None:
        """The same, and Draining from the first moment of the end: requests should go elsewhere."""
        self.check_serving()
        if self.draining:
            raise Draining("The service is ending; send requests to another one.")

    async def watch(self, end: Callable[[], None]) -> None:
        """Call `end` when inference has ended or hangs."""
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            if self._engine.dead or self._engine.stuck_seconds() > self._hang_seconds:
                self.crashed = True
                log.critical("inference has ended or hangs: the process ends", extra={"dead": self._engine.dead})
                self._engine.fail_all(NotReady("Inference has ended or hangs; the service is about to end."))
                end()
                return


def shapes(max_length: int, max_batch_tokens: int) -> list[tuple[int, int]]:
    """Batch and length of the warm-up's runs: each length alone, and in the largest batch of the token budget."""
    lengths = sorted({min(length, max_length) for length in (*WARM_UP_LENGTHS, max_length)})
    return [(rows, length) for length in lengths for rows in sorted({1, max(1, max_batch_tokens // length)})]


async def warm_up(engine: Engine, model: OnnxModel, max_batch_tokens: int) -> None:
    """Run every shape of the grid: allocations and first-time work happen here, and the longest time is noted."""
    for rows, length in shapes(model.max_length, max_batch_tokens):
        zeros = np.zeros(length, dtype=np.int64)
        for _ in range(WARM_UP_RUNS):
            began = time.perf_counter()
            await engine.infer(model, [Row(zeros, zeros)] * rows)
            engine.warmed(time.perf_counter() - began)


async def self_test(engine: Engine, model: OnnxModel) -> float:
    """Largest difference of a logit from golden.json. Raises NotReady where it is too large, NaN included."""
    error = await golden.largest_error(model.artifact.golden, engine, model)
    tolerance = model.artifact.golden.tolerance
    if not error <= tolerance:
        raise NotReady(
            f"The self-test of {model.artifact.name} failed: a logit differs by {error:.3g} from {golden.FILE}, "
            f"and {tolerance:.3g} is allowed."
        )
    return error
