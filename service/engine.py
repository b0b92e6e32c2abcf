"""Where work runs: tokenizing and decoding in a pool, inference in one thread, nothing on the event loop.

One inference thread for all models, because each run already uses every core: two at once would take turns on the same
cores and spoil each other's timing. A request is cut into runs of bounded size, and between two of its runs others get
their turn.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from service.model import Logits, OnnxModel
from service.tokenizer import Row

T = TypeVar("T")


@dataclass
class Timings:
    """What one request spent where, in seconds."""

    tokenize: float = 0.0
    queue: float = 0.0  # waiting for the inference thread
    infer: float = 0.0
    postprocess: float = 0.0


class Engine:
    def __init__(self, threads: int, max_batch_tokens: int) -> None:
        self._max_batch_tokens = max_batch_tokens
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="text")
        self._inference = ThreadPoolExecutor(1, thread_name_prefix="inference")

    async def work(self, function: Callable[[], T]) -> tuple[T, float]:
        """Run text work off the event loop. Returns its result and the seconds it took."""
        result, began, ended = await asyncio.get_running_loop().run_in_executor(self._pool, timed, function)
        return result, ended - began

    async def infer(self, model: OnnxModel, rows: Sequence[Row], timings: Timings) -> list[list[Logits]]:
        """Run the rows, similar lengths together. Returns the model's outputs for each row, in the rows' order.

        An output with one value per token keeps the padding of its run at its end.
        """
        results: list[list[Logits]] = [[] for _ in rows]
        loop = asyncio.get_running_loop()
        for batch in plan([len(row) for row in rows], self._max_batch_tokens):
            submitted = time.perf_counter()
            chosen = [rows[i] for i in batch]
            outputs, began, ended = await loop.run_in_executor(
                self._inference, timed, lambda chosen=chosen: model.run(chosen)
            )
            timings.queue += began - submitted
            timings.infer += ended - began
            for position, i in enumerate(batch):
                results[i] = [output[position] for output in outputs]
        return results

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._inference.shutdown(wait=False, cancel_futures=True)


def plan(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Cut the rows into runs: longest first, rows x longest of the run <= max_tokens, a run never empty."""
    batches: list[list[int]] = []
    room = 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if room < 1:
            batches.append([])
            room = max(1, max_tokens // max(1, lengths[i]))
        batches[-1].append(i)
        room -= 1
    return batches


def timed(function: Callable[[], T]) -> tuple[T, float, float]:
    """Result, begin and end of a call, on the clock of time.perf_counter."""
    began = time.perf_counter()
    result = function()
    return result, began, time.perf_counter()
