"""SIGTERM under load, again and again: no request that got a connection stays without an answer, and the status is 0.

python tests/load/endings.py MODELS [--times 20]
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import time
from pathlib import Path

from harness import Answer, Served, ask

CLIENTS = 16
SECONDS_BEFORE = 1.0
TEXT = "the film is good " * 10


async def load(service: Served, stop: asyncio.Event) -> list[Answer]:
    """Clients that ask without a pause, over a new connection each time, until nobody listens any more."""
    answers: list[Answer] = []

    async def client() -> None:
        while not stop.is_set():
            answers.append(await ask(service.port, "/classify", {"inputs": TEXT}))
            if answers[-1].status == 0:
                return

    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    return answers


async def end_under_load(models: Path) -> tuple[collections.Counter[int], int, float]:
    """Answers by status, the exit status, and the seconds that the end took."""
    service = Served(models, grace_seconds=0.5, drain_seconds=10).start()
    stop = asyncio.Event()
    loading = asyncio.create_task(load(service, stop))
    await asyncio.sleep(SECONDS_BEFORE)
    began = time.monotonic()
    status = await asyncio.to_thread(service.end)
    took = time.monotonic() - began
    stop.set()
    return collections.Counter(answer.status for answer in await loading), status, took


def check(models: Path, times: int) -> None:
    for i in range(times):
        answers, status, took = asyncio.run(end_under_load(models))
        print(f"end {i + 1}: exit status {status} after {took:.1f} s, answers by status {dict(answers)}")
        assert status == 0
        assert took < 10  # all are answered at once: nothing waits for the deadline of the drain
        assert set(answers) <= {200, 429, 503, 0}, answers
        assert answers[200] > CLIENTS


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", type=Path)
    parser.add_argument("--times", type=int, default=20)
    options = parser.parse_args()
    check(options.models, options.times)
