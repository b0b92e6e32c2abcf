"""The event loop is never blocked: how long /livez takes while texts of a megabyte are worked on.

    python tests/load/blocking.py MODELS [--seconds 10]

A probe asks every 10 ms over a connection of its own, first of a service that does nothing, then of one that always has
such a text in flight. MODELS holds both tasks.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from pathlib import Path

from harness import Served, ask

PROBE = b"GET /livez HTTP/1.1\r\nHost: t\r\n\r\n"
EVERY_SECONDS = 0.01
WORDS = "the film is good and clara lives in berkeley "
MEGABYTE = WORDS * (1_000_000 // len(WORDS))
TRUNCATED = {"truncation": "right"}
# Each is tokenized to its end. Whether a context of a megabyte has more windows than allowed depends on their length.
BODIES = [
    ("/classify", {"inputs": MEGABYTE, "parameters": TRUNCATED}, (200,)),
    ("/classify", {"inputs": "x" * 1_000_000, "parameters": TRUNCATED}, (200,)),
    ("/classify", {"inputs": "東" * 330_000, "parameters": TRUNCATED}, (200,)),
    ("/classify", {"inputs": [MEGABYTE[:20_000]] * 50, "parameters": TRUNCATED}, (200,)),
    ("/qa", {"inputs": {"question": "who lives in berkeley", "context": MEGABYTE}}, (200, 422)),
    ("/qa", {"inputs": {"question": "who lives in berkeley", "context": MEGABYTE[:60_000]}}, (200,)),
]


async def probe(port: int, seconds: float) -> list[float]:
    """Milliseconds of each answer of /livez."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    took, ends = [], time.perf_counter() + seconds
    while (began := time.perf_counter()) < ends:
        writer.write(PROBE)
        assert b" 200 " in await reader.readuntil(b"\r\n")
        await reader.readuntil(b'"ok"}')
        took.append(1000 * (time.perf_counter() - began))
        await asyncio.sleep(EVERY_SECONDS)
    writer.close()
    return took


async def press(port: int, path: str, body: object, statuses: tuple[int, ...], stop: asyncio.Event) -> int:
    count = 0
    while not stop.is_set():
        answer = await ask(port, path, body)
        assert answer.status in statuses, answer
        count += 1
    return count


async def both(
    port: int, path: str, body: object, statuses: tuple[int, ...], seconds: float
) -> tuple[list[float], int]:
    stop = asyncio.Event()
    pressing = asyncio.create_task(press(port, path, body, statuses, stop))
    took = await probe(port, seconds)
    stop.set()
    return took, await pressing


def show(name: str, took: list[float], count: int) -> float:
    p99 = statistics.quantiles(took, n=100)[98]
    most, median = max(took), statistics.median(took)
    print(f"{name}: {count} answered; /livez p50 {median:.1f} ms, p99 {p99:.1f} ms, most {most:.1f} ms", flush=True)
    return p99


def check(models: Path, seconds: float) -> tuple[float, float]:
    """p99 of /livez in milliseconds: at rest, and the worst with such a text in flight."""
    with Served(models, max_windows=1024) as service:
        rest = show("nothing", asyncio.run(probe(service.port, seconds)), 0)
        worst = 0.0
        for path, body, statuses in BODIES:
            made = asyncio.run(both(service.port, path, body, statuses, seconds))
            worst = max(worst, show(f"{path} {str(body)[:40]}", *made))
    return rest, worst


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", type=Path)
    parser.add_argument("--seconds", type=float, default=10)
    options = parser.parse_args()
    check(options.models, options.seconds)
