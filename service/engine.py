"""Where inference runs: one thread for all models, which takes the next batch as soon as it is free.

One thread, because each run already uses every core: two at once would take turns on the same cores and spoil each
other's timing. The models take turns as well. Nothing waits for a batch to fill: what came while the last batch ran is
what the next one is made of. A job of low priority runs by itself while no other row waits, and is left out of the
metrics and of the speed. A job is touched by the event loop alone, but for its list of waiting rows, which the lock
guards.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from service.batching import JobQueue
from service.errors import BackendFailed, ClientGone, DeadlineExceeded, ServiceError
from service.model import Logits, OnnxModel
from service.tokenizer import Row

log = logging.getLogger(__name__)

# Most requests are answered sooner, and to watch a connection costs a task.
WATCH_CLIENT_AFTER_SECONDS = 0.05
# Share of the newest batch in the moving mean of the speed.
SPEED_SHARE = 0.1
# A batch that takes so many times as long as the slowest of the warm-up is stuck, or as good as.
PATIENCE = 4.0


@dataclass
class Timings:
    """What one request spent where, in seconds."""

    tokenize: float = 0.0
    queue: float = 0.0  # waiting for the inference thread
    infer: float = 0.0  # batches with rows of this request, whole
    postprocess: float = 0.0


@dataclass(eq=False)
class Job:
    """The rows of one request."""

    model: OnnxModel
    rows: Sequence[Row]
    future: asyncio.Future[list[list[Logits]]]
    alone: bool = False
    low_priority: bool = False
    infer: float = 0.0
    lengths: Sequence[int] = field(init=False)
    waiting: list[int] = field(init=False)
    outputs: list[list[Logits]] = field(init=False)

    def __post_init__(self) -> None:
        self.lengths = [len(row) for row in self.rows]
        self.waiting = sorted(range(len(self.rows)), key=self.lengths.__getitem__)
        self.outputs = [[] for _ in self.rows]


@dataclass(frozen=True)
class Batch:
    """What ran, for the metrics."""

    model: OnnxModel
    items: list[tuple[Job, int]]
    seconds: float

    @property
    def low_priority(self) -> bool:
        return self.items[0][0].low_priority  # such a job runs alone

    @property
    def tokens(self) -> int:
        return sum(job.lengths[row] for job, row in self.items)

    @property
    def padded_tokens(self) -> int:
        return len(self.items) * max(job.lengths[row] for job, row in self.items)


class Engine:
    def __init__(self, max_batch_tokens: int, on_batch: Callable[[Batch], None], stall_seconds: float = 1.5) -> None:
        self._max_batch_tokens = max_batch_tokens
        self._on_batch = on_batch
        self._stall_seconds = stall_seconds
        self._slowest = 0.0
        self._changed = threading.Condition()
        self._queues: dict[OnnxModel, JobQueue[Job]] = {}
        self._turns: deque[OnnxModel] = deque()
        self._low: JobQueue[Job] = JobQueue(max_batch_tokens)
        self._jobs: set[Job] = set()
        self._running_since: float | None = None
        self._closed = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._work, name="inference", daemon=True)
        self.tokens_per_second = 0.0

    # ------------------------------------------------------------------------------------------------- the event loop

    async def infer(
        self,
        model: OnnxModel,
        rows: Sequence[Row],
        timings: Timings | None = None,
        seconds: float | None = None,
        gone: Callable[[], Awaitable[None]] | None = None,
        low_priority: bool = False,
    ) -> list[list[Logits]]:
        """The model's outputs for each row, in the rows' order.

        seconds : rows that no batch took by then never run, and DeadlineExceeded is raised
        gone    : returns when the client has left; then too the rest never runs, and ClientGone is raised
        low_priority : each of its batches waits until no row of another priority does
        An output with one value per token keeps the padding of its batch at its end.
        """
        timings = timings or Timings()
        loop = asyncio.get_running_loop()
        job = Job(model, rows, loop.create_future(), alone=low_priority, low_priority=low_priority)
        handles = []
        if seconds is not None:
            handles.append(loop.call_later(max(0.0, seconds), self._expire, job))
        watches: list[asyncio.Task[None]] = []
        if gone is not None:
            handles.append(
                loop.call_later(
                    WATCH_CLIENT_AFTER_SECONDS, lambda: watches.append(loop.create_task(self._watch(job, gone)))
                )
            )
        submitted = time.perf_counter()
        self._submit(job, loop)
        try:
            return await job.future
        finally:
            with self._changed:
                job.waiting.clear()
            self._jobs.discard(job)
            for handle in handles:
                handle.cancel()
            for watch in watches:
                watch.cancel()
            timings.infer += job.infer
            timings.queue += max(0.0, time.perf_counter() - submitted - job.infer)

    def trouble(self) -> str | None:
        """Why no answer can be expected, as a sentence; None when all is well."""
        if self._loop is not None and not self._thread.is_alive() and not self._closed:
            return "The inference thread has ended; the service is about to end, too."
        if self.stuck_seconds() > max(self._stall_seconds, PATIENCE * self._slowest):
            return "An inference takes far longer than any should; the service answers nothing until it ends."
        return None

    def stuck_seconds(self) -> float:
        """How long the batch that runs now has been running."""
        since = self._running_since
        return 0.0 if since is None else time.perf_counter() - since

    @property
    def dead(self) -> bool:
        return self._loop is not None and not self._closed and not self._thread.is_alive()

    def queued(self, model: OnnxModel) -> tuple[int, int]:
        """Rows and tokens that wait for a model."""
        with self._changed:
            jobs = [job for job in self._jobs if job.model is model and not job.low_priority]
            lengths = [job.lengths[row] for job in jobs for row in job.waiting]
        return len(lengths), sum(lengths)

    def fail_all(self, error: ServiceError) -> None:
        """Answer everything that waits or runs with an error."""
        for job in list(self._jobs):
            self._fail(job, error)

    def close(self) -> None:
        self._closed = True
        with self._changed:
            self._changed.notify()

    def has_ended(self, seconds: float) -> bool:
        """Whether the thread is gone, after it was closed; a batch in progress is waited for so long."""
        if self._thread.is_alive():
            self._thread.join(seconds)
        return not self._thread.is_alive()

    def _submit(self, job: Job, loop: asyncio.AbstractEventLoop) -> None:
        if self._loop is None:
            self._loop = loop
            self._thread.start()
        self._jobs.add(job)
        with self._changed:
            (self._low if job.low_priority else self._queue(job.model)).add(job)
            self._changed.notify()

    def _queue(self, model: OnnxModel) -> JobQueue[Job]:
        """The model's queue, made if there is none. The lock is held."""
        if model not in self._queues:
            self._queues[model] = JobQueue(self._max_batch_tokens)
            self._turns.append(model)
        return self._queues[model]

    def _fail(self, job: Job, error: BaseException) -> None:
        with self._changed:
            job.waiting.clear()
        if not job.future.done():
            job.future.set_exception(error)

    def _expire(self, job: Job) -> None:
        if job.waiting:
            self._fail(job, DeadlineExceeded("The request waited longer than its deadline and was not begun or ended."))

    async def _watch(self, job: Job, gone: Callable[[], Awaitable[None]]) -> None:
        await gone()
        self._fail(job, ClientGone("The client has left."))

    def _deliver(self, batch: Batch, outputs: list[Logits] | None, failure: Exception | None) -> None:
        """Hand out what the thread computed; runs on the event loop."""
        jobs = dict.fromkeys(job for job, _ in batch.items)
        for job in jobs:
            job.infer += batch.seconds
        if outputs is None:
            self._after_failure(batch, jobs, failure or BackendFailed("The model failed."))
            return
        for position, (job, row) in enumerate(batch.items):
            job.outputs[row] = [output[position] for output in outputs]
        for job in jobs:
            if all(job.outputs) and not job.future.done():
                job.future.set_result(job.outputs)
        if batch.low_priority:
            return
        speed = batch.tokens / max(batch.seconds, 1e-6)
        self.tokens_per_second += (speed - self.tokens_per_second) * (SPEED_SHARE if self.tokens_per_second else 1)
        # After those who wait have been woken, and so after their answers have been sent.
        asyncio.get_running_loop().call_soon(self._on_batch, batch)

    def _after_failure(self, batch: Batch, jobs: dict[Job, None], failure: Exception) -> None:
        """One request must not spoil another: each goes on by itself, and the one that fails then is to blame."""
        if len(jobs) == 1:
            self._fail(next(iter(jobs)), failure)
            return
        with self._changed:
            for job in jobs:
                if not job.future.done():
                    job.alone = True
                    queued = bool(job.waiting)
                    job.waiting += [row for other, row in batch.items if other is job]
                    if not queued:
                        self._queue(batch.model).add(job)
            self._changed.notify()

    def warmed(self, seconds: float) -> None:
        """Tell the longest that a sound batch takes here."""
        self._slowest = max(self._slowest, seconds)

    # ----------------------------------------------------------------------------------------------------- the thread

    def _work(self) -> None:
        try:
            self._serve_batches()
        except BaseException as error:
            # Nothing should come here; `dead` and `trouble` tell, and the process ends.
            log.critical("the inference thread has ended", extra={"kind": type(error).__name__})

    def _serve_batches(self) -> None:
        assert self._loop is not None
        while True:
            with self._changed:
                while not (items := self._take()):
                    if self._closed:
                        return
                    self._changed.wait()
            model = items[0][0].model
            outputs, failure = None, None
            began = self._running_since = time.perf_counter()
            try:
                outputs = model.run([job.rows[row] for job, row in items])
            except Exception as error:
                failure = error
            batch = Batch(model, items, time.perf_counter() - began)
            self._running_since = None
            try:
                self._loop.call_soon_threadsafe(self._deliver, batch, outputs, failure)
            except RuntimeError:
                return  # the event loop has ended, and nobody waits any more
            # While this thread waits, it must not keep a model in memory that has been replaced.
            del model, items, batch, outputs

    def _take(self) -> list[tuple[Job, int]]:
        for _ in range(len(self._turns)):
            # A queue lasts from a job to the next moment without one, so that no model is kept that nobody asks for.
            model = self._turns.popleft()
            if items := self._queues[model].take():
                self._turns.append(model)
                return items
            del self._queues[model]
        return self._low.take()
