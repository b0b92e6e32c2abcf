"""Comparisons beside requests: three people compare long contexts without a pause while one client asks short texts.

Phases with and without the comparisons take turns. Asserted is only that everybody is answered and that no comparison
is counted as a request; the latencies are printed.

python tests/load/comparisons.py MODELS [--phases 8] [--seconds 6] [--pause 0.02]
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
from pathlib import Path

from harness import Answer, Served, ask

COMPARISON = {
    "task": "qa",
    "inputs": {"question": "Where does Clara live?", "context": "Clara lives in Berkeley, and the film is good. " * 25},
}
SHORT = {"inputs": "the film is good"}
PEOPLE = 3


async def phase(port: int, people: int, seconds: float, pause: float) -> tuple[list[Answer], list[Answer]]:
    """Answers of the client, and of those who compare."""
    over = asyncio.Event()

    async def compare() -> list[Answer]:
        compared = []
        while not over.is_set():
            compared.append(await ask(port, "/compare", COMPARISON))
        return compared

    comparing = [asyncio.create_task(compare()) for _ in range(people)]
    loop = asyncio.get_running_loop()
    end = loop.time() + seconds
    answers = []
    while loop.time() < end:
        answers.append(await ask(port, "/classify", SHORT))
        await asyncio.sleep(pause)
    over.set()
    return answers, [answer for found in await asyncio.gather(*comparing) for answer in found]


def check(models: Path, phases: int, seconds: float, pause: float) -> None:
    with Served(models) as service:
        alone, beside, compared = [], [], []
        for number in range(phases):
            answers, found = asyncio.run(phase(service.port, PEOPLE * (number % 2), seconds, pause))
            (beside if number % 2 else alone).extend(answers)
            compared += found
        for name, answers in (("alone", alone), ("beside comparisons", beside)):
            times = [1000 * answer.seconds for answer in answers]
            p95 = statistics.quantiles(times, n=20)[-1]
            print(f"{name}: {len(times)} requests, p50 {statistics.median(times):.1f} ms, p95 {p95:.1f} ms")
        print(f"{len(compared)} comparisons, {sum(answer.body['repeats'] for answer in compared)} rounds")
        assert {answer.status for answer in alone + beside + compared} == {200}
        assert service.metric("dsformer_requests_total", outcome="ok") == len(alone) + len(beside)
        assert service.metric("dsformer_compare_requests_total", outcome="ok") == len(compared)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", type=Path)
    parser.add_argument("--phases", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=6)
    parser.add_argument("--pause", type=float, default=0.02)
    options = parser.parse_args()
    check(options.models, options.phases, options.seconds, options.pause)
