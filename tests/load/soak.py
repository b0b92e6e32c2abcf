"""Random lengths for as long as told: no error, and the memory of the process stays where it was after the warm-up.

    python tests/load/soak.py MODELS [--minutes 30]

Requests of all the tasks and variants that MODELS, one model folder or a folder of them, has.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from harness import Served, ask, resident_megabytes

CLIENTS = 8
SAMPLES = 60
WARM_SHARE = 0.2


def requests_of(models: Path) -> list[Callable[[random.Random], tuple[str, Any]]]:
    """For each task and variant what draws a path and a body."""

    def texts(draw: random.Random) -> Any:
        return ["film " * draw.randint(1, 120) for _ in range(draw.randint(1, 32))]

    def question(draw: random.Random) -> Any:
        return {"question": "who " * draw.randint(1, 20), "context": "Clara won . " * draw.randint(1, 250)}

    found = []
    for config in sorted([*models.glob("config.json"), *models.glob("*/config.json")]):
        about = json.loads(config.read_text())["dsformer"]
        path, inputs = f"/variants/{about['variant']}/{about['task']}", question if about["task"] == "qa" else texts
        found.append(lambda draw, path=path, inputs=inputs: (path, {"inputs": inputs(draw)}))
    return found


async def press(service: Served, models: Path, seconds: float) -> tuple[int, list[tuple[float, float]]]:
    """Requests answered, and (minutes, megabytes) along the way."""
    began, count = time.monotonic(), 0
    samples: list[tuple[float, float]] = []
    kinds = requests_of(models)

    async def client(number: int) -> None:
        nonlocal count
        draw = random.Random(number)
        while time.monotonic() - began < seconds:
            answer = await ask(service.port, *draw.choice(kinds)(draw))
            assert answer.status == 200, answer
            count += 1

    async def watch() -> None:
        while time.monotonic() - began < seconds:
            samples.append(((time.monotonic() - began) / 60, resident_megabytes(service.process.pid)))
            await asyncio.sleep(seconds / SAMPLES)

    await asyncio.gather(watch(), *(client(i) for i in range(CLIENTS)))
    return count, samples


def check(models: Path, minutes: float) -> float:
    """Slope of the memory after the warm-up, in megabytes a minute."""
    with Served(models) as service:
        count, samples = asyncio.run(press(service, models, 60 * minutes))
    later = [sample for sample in samples if sample[0] > WARM_SHARE * minutes]
    slope = float(np.polyfit(*zip(*later, strict=True), 1)[0])
    print(f"{minutes:g} min, {count} requests: {later[0][1]:.1f} MB to {later[-1][1]:.1f} MB, {slope:+.2f} MB/min")
    return slope


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", type=Path)
    parser.add_argument("--minutes", type=float, default=30)
    options = parser.parse_args()
    assert check(options.models, options.minutes) < 1
