"""Far more clients than the queue takes: only 200, 429 and 504, singles and batches refused alike, hardly less done.

    python tests/load/overload.py MODELS [--clients 500] [--seconds 10]

With limits of 1 to 8 tokens every request is over the limit, so one runs at a time and the others are refused: goodput
is then compared with one client who never waits, and with the limit a service has by itself, with as many clients as
fill its batches.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import random
import time
from pathlib import Path

from harness import Served, ask

TEXT = "the film is good and clara lives in berkeley " * 4
BODIES = [{"inputs": TEXT}, {"inputs": [TEXT, TEXT, TEXT]}]
ALLOWED = {200, 429, 504}


async def press(port: int, clients: int, seconds: float) -> tuple[dict[str, collections.Counter[int]], float]:
    """Statuses of single and of batch requests, and the texts answered in a second."""
    counts = {"single": collections.Counter[int](), "batch": collections.Counter[int]()}
    ends = time.perf_counter() + seconds

    async def client(number: int) -> None:
        body = BODIES[number % 2]
        while time.perf_counter() < ends:
            answer = await ask(port, "/classify", body)
            counts["batch" if number % 2 else "single"][answer.status] += 1
            if answer.status == 429:
                # As a good client does, but not all in step.
                pause = int(answer.headers["retry-after"]) * random.uniform(0.5, 1.0)
                await asyncio.sleep(min(pause, max(0.0, ends - time.perf_counter())))

    await asyncio.gather(*(client(i) for i in range(clients)))
    return counts, (counts["single"][200] + 3 * counts["batch"][200]) / seconds


def check(models: Path, limit: int, clients: int, seconds: float, calm_clients: int) -> float:
    """Goodput under overload, as a share of that with `calm_clients`."""
    with Served(models, max_queue_tokens=limit) as service:
        calm = asyncio.run(press(service.port, calm_clients, seconds))[1]
        counts, busy = asyncio.run(press(service.port, clients, seconds))
    statuses = {kind: dict(count) for kind, count in counts.items()}
    print(
        f"limit {limit}, {clients} clients: {statuses}; goodput {busy:.0f} texts/s, calm {calm:.0f}: {busy / calm:.2f}"
    )
    for count in counts.values():
        assert set(count) <= ALLOWED, count
        assert count[429]
    return busy / calm


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", type=Path)
    parser.add_argument("--clients", type=int, default=500)
    parser.add_argument("--seconds", type=float, default=10)
    options = parser.parse_args()
    for limit in (1, 2, 4, 8):
        check(options.models, limit, options.clients, options.seconds, calm_clients=2)
    check(options.models, 4096, options.clients, options.seconds, calm_clients=16)
