"""Four of five clients leave before their answer: what they asked is dropped, counted, and the rest are served at once.

python tests/load/departures.py MODELS [--clients 200]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import statistics
import time
from pathlib import Path

from harness import Answer, Served, ask, encode

LONG = {"inputs": ["the film is good and clara lives in berkeley " * 8] * 60}
SHORT = {"inputs": "the film is good"}
NORMAL_SECONDS = 5


async def leave(port: int) -> None:
    """Ask much, and go."""
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(encode("/classify", LONG))
    await writer.drain()
    await asyncio.sleep(0.05)
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()


async def scenario(service: Served, clients: int) -> tuple[float, float, list[Answer]]:
    """p95 of a short request before and soon after, and the answers of those who stayed."""

    async def p95() -> float:
        return statistics.quantiles([(await ask(service.port, "/classify", SHORT)).seconds for _ in range(40)], n=20)[
            -1
        ]

    before = await p95()
    staying = [asyncio.create_task(ask(service.port, "/classify", SHORT)) for _ in range(clients // 5)]
    await asyncio.gather(*(leave(service.port) for _ in range(clients - len(staying))))
    answers = await asyncio.gather(*staying)
    deadline = time.monotonic() + NORMAL_SECONDS
    after = await p95()
    while after > 3 * before and time.monotonic() < deadline:
        after = await p95()
    return before, after, answers


def check(models: Path, clients: int, module: str = "service") -> None:
    with Served(models, module=module, max_queue_tokens=10**9) as service:
        before, after, answers = asyncio.run(scenario(service, clients))
        deadline = time.monotonic() + NORMAL_SECONDS
        while service.metric("dsformer_inflight_requests") and time.monotonic() < deadline:
            time.sleep(0.05)
        gone = service.metric("dsformer_requests_total", outcome="cancelled")
        answered = service.metric("dsformer_requests_total", outcome="ok")
        leaving = clients - len(answers)
        print(
            f"{clients} clients, {leaving} left: {gone:.0f} counted as cancelled, {answered:.0f} answered; "
            f"p95 of a short request {1000 * before:.1f} ms before, {1000 * after:.1f} ms after"
        )
        assert all(answer.status == 200 for answer in answers)
        assert service.metric("dsformer_inflight_requests") == 0
        assert service.metric("dsformer_queue_items") == 0
    assert leaving / 2 < gone <= leaving
    assert after < max(0.25, 5 * before)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", type=Path)
    parser.add_argument("--clients", type=int, default=200)
    options = parser.parse_args()
    check(options.models, options.clients)
