"""Where text work runs: long texts in a pool of threads, so that the event loop is never blocked; short ones at once.

To hand a short text to another thread and back takes longer than to tokenize it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from service.errors import ClientGone
from service.tokenizer import SHORT_CHARS

T = TypeVar("T")


class Workers:
    def __init__(self, threads: int) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="text")
        self._free = asyncio.Semaphore(threads)

    async def run(
        self, function: Callable[[], T], chars: int, gone: Callable[[], Awaitable[bool]] | None = None
    ) -> tuple[T, float]:
        """The function's result and the seconds it took.

        chars: of all texts that it has to do with. gone: asked when a thread is free; where the client has left,
        nothing runs and ClientGone is raised.
        """
        if chars <= SHORT_CHARS:
            return timed(function)
        async with self._free:
            if gone is not None and await gone():
                raise ClientGone("The client has left.")
            return await asyncio.get_running_loop().run_in_executor(self._pool, timed, function)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


def timed(function: Callable[[], T]) -> tuple[T, float]:
    began = time.perf_counter()
    result = function()
    return result, time.perf_counter() - began
