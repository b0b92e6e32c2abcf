"""Many distinct requests at once, of mixed tasks, variants and lengths: each gets the answer that it gets alone.

    python tests/load/concurrency.py MODELS [--requests 10000] [--connections 256]

So many connections are open at once, each with a request; 10000 means that all requests are. MODELS holds both tasks in
both variants. Batches change the order of float32 sums, so scores may differ by TOLERANCE.
"""

from __future__ import annotations

import argparse
import asyncio
import random
from pathlib import Path
from typing import Any

from harness import Answer, Served, ask

CONNECTIONS = 256
PATIENCE_SECONDS = 1200
TOLERANCE = 1e-4
WORDS = ["the", "film", "is", "good", "bad", "clara", "lives", "in", "berkeley", "who", "where", "does", "live", "a"]


def distinct(requests: int) -> list[tuple[str, dict[str, Any]]]:
    """Paths and bodies; the number in each text makes it the only one of its kind."""
    draw = random.Random(0)
    made = []
    for i in range(requests):
        words = " ".join(draw.choices(WORDS, k=draw.choice([1, 3, 10, 30])))
        variant = draw.choice(["dense", "dsformer"])
        if draw.random() < 0.7:
            made.append((f"/variants/{variant}/classify", {"inputs": f"{i} {words}"}))
        else:
            question = {"question": f"who is {i}", "context": f"{words} {i} " * draw.choice([1, 4])}
            made.append((f"/variants/{variant}/qa", {"inputs": question}))
    return made


def differs(one: Any, other: Any) -> bool:
    if isinstance(one, float):
        return abs(one - other) > TOLERANCE
    if isinstance(one, dict):
        return set(one) != set(other) or any(differs(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) != len(other) or any(map(differs, one, other))
    return bool(one != other)


async def gather(port: int, requests: list[tuple[str, dict[str, Any]]], connections: int) -> list[Answer]:
    limit = asyncio.Semaphore(connections)

    async def one(path: str, body: dict[str, Any]) -> Answer:
        async with limit:
            return await ask(port, path, body, seconds=PATIENCE_SECONDS)

    return await asyncio.gather(*(one(path, body) for path, body in requests))


def check(models: Path, requests: int, connections: int = CONNECTIONS) -> None:
    made = distinct(requests)
    with Served(models, max_queue_tokens=10**9, max_queue_seconds=PATIENCE_SECONDS) as service:
        together = asyncio.run(gather(service.port, made, connections))
        rows = service.metric("dsformer_batch_items_sum") / service.metric("dsformer_batch_items_count")
        alone = asyncio.run(gather(service.port, made, 1))
    lost = sum(answer.status != 200 for answer in together)
    wrong = sum(differs(a.body, b.body) for a, b in zip(together, alone, strict=True))
    print(
        f"{requests} requests, {connections} at once: {lost} lost, {wrong} other than alone; "
        f"{rows:.1f} rows a batch, warm-up included"
    )
    assert lost == wrong == 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", type=Path)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--connections", type=int, default=CONNECTIONS)
    options = parser.parse_args()
    check(options.models, options.requests, options.connections)
