"""Batching: every row runs once, within the budget, in fair turns, and everybody gets their own answer."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.admission import Admission, Ticket
from service.batching import MAX_PADDING_SHARE, WINDOW_ROWS, JobQueue, choose
from service.engine import Batch, Engine, Timings
from service.errors import BackendFailed, ClientGone, DeadlineExceeded, Overloaded
from service.tokenizer import Row

lengths_of_rows = st.lists(st.integers(1, 600), min_size=1, max_size=40)


@dataclass(eq=False)
class FakeJob:
    lengths: list[int]
    alone: bool = False
    waiting: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.waiting = sorted(range(len(self.lengths)), key=self.lengths.__getitem__)


class FakeModel:
    """Answers each row with its own tokens; slow where told, failing on some tokens. Notes each batch."""

    def __init__(self, seconds: float = 0.0, poison: int = -1) -> None:
        self.seconds, self.poison = seconds, poison
        self.batches: list[list[Row]] = []
        self.go, self.begun = threading.Event(), threading.Event()
        self.go.set()

    def run(self, rows: Sequence[Row]) -> list[np.ndarray]:
        self.begun.set()
        self.go.wait(10)
        self.batches.append(list(rows))
        time.sleep(self.seconds)
        if any(self.poison in row.ids for row in rows):
            raise BackendFailed("The model failed.")
        return [np.array([[row.ids[0], len(row)] for row in rows], np.float32)]


def row(number: int, length: int) -> Row:
    return Row(np.full(length, number, np.int64), np.zeros(length, np.int64))


def check(outputs: Sequence[Sequence[np.ndarray]], rows: Sequence[Row]) -> None:
    assert [(int(o[0]), int(o[1])) for (o,) in outputs] == [(r.ids[0], len(r)) for r in rows]


def engine(budget: int = 1024, seen: list[Batch] | None = None) -> Engine:
    return Engine(budget, [].append if seen is None else seen.append)


# ------------------------------------------------------------------------------------------------------------- batches


@given(lengths=lengths_of_rows, budget=st.integers(1, 3000))
def test_a_batch_holds_the_first_row_and_keeps_to_budget_and_padding(lengths: list[int], budget: int) -> None:
    chosen = choose(lengths, budget)
    assert 0 in chosen
    assert len(set(chosen)) == len(chosen)
    padded = len(chosen) * max(lengths[i] for i in chosen)
    assert padded <= budget or chosen == [0]
    assert padded - sum(lengths[i] for i in chosen) <= MAX_PADDING_SHARE * padded


@given(jobs=st.lists(lengths_of_rows, max_size=12), budget=st.integers(1, 3000))
def test_every_row_is_taken_once(jobs: list[list[int]], budget: int) -> None:
    queue: JobQueue[FakeJob] = JobQueue(budget)
    made = [FakeJob(lengths) for lengths in jobs]
    for job in made:
        queue.add(job)
    taken = []
    while batch := queue.take():
        taken += batch
    assert sorted((made.index(job), r) for job, r in taken) == [
        (i, r) for i, lengths in enumerate(jobs) for r in range(len(lengths))
    ]


def test_similar_lengths_run_together() -> None:
    queue: JobQueue[FakeJob] = JobQueue(200)
    for length in (5, 100, 6, 99):
        queue.add(FakeJob([length]))
    batches = [[job.lengths[r] for job, r in queue.take()] for _ in range(2)]
    assert batches == [[5, 6], [99, 100]]


def test_a_short_text_waits_for_one_batch_of_a_long_context_not_for_all() -> None:
    queue: JobQueue[FakeJob] = JobQueue(1024)
    queue.add(FakeJob([384] * 100))
    queue.add(FakeJob([12]))
    assert [job.lengths[r] for job, r in queue.take()] == [384, 384]
    assert [job.lengths[r] for job, r in queue.take()] == [12]


def test_windows_of_two_requests_share_a_batch() -> None:
    queue: JobQueue[FakeJob] = JobQueue(2048)
    made = [FakeJob([384, 384, 384]), FakeJob([384, 384])]
    for job in made:
        queue.add(job)
    assert {made.index(job) for job, _ in queue.take()} == {0, 1}


def test_the_window_is_bounded() -> None:
    queue: JobQueue[FakeJob] = JobQueue(10**9)
    for _ in range(3 * WINDOW_ROWS):
        queue.add(FakeJob([8]))
    assert len(queue.take()) == WINDOW_ROWS


# -------------------------------------------------------------------------------------------------------------- engine


@settings(deadline=None, max_examples=25)
@given(
    jobs=st.lists(st.lists(st.integers(1, 300), min_size=1, max_size=8), min_size=1, max_size=30),
    budget=st.integers(1, 1024),
)
def test_everybody_gets_their_own_answer_once(jobs: list[list[int]], budget: int) -> None:
    seen: list[Batch] = []
    models = [FakeModel(), FakeModel()]

    async def one(tested: Engine, number: int, lengths: list[int]) -> None:
        rows = [row(100 * number + i, length) for i, length in enumerate(lengths)]
        timings = Timings()
        check(await tested.infer(models[number % 2], rows, timings), rows)
        assert timings.infer >= 0
        assert timings.queue >= 0

    async def all_of_them() -> None:
        tested = engine(budget, seen)
        await asyncio.gather(*(one(tested, i, lengths) for i, lengths in enumerate(jobs)))
        tested.close()

    asyncio.run(all_of_them())
    ran = [int(r.ids[0]) for model in models for batch in model.batches for r in batch]
    assert sorted(ran) == sorted(100 * i + j for i, lengths in enumerate(jobs) for j in range(len(lengths)))
    assert sum(len(batch.items) for batch in seen) == len(ran)
    for batch in seen:
        assert batch.padded_tokens <= budget or len(batch.items) == 1


def test_what_comes_while_a_batch_runs_is_the_next_batch() -> None:
    model = FakeModel()

    async def main() -> None:
        tested = engine()
        model.go.clear()
        waiting = []
        for i in range(9):
            waiting.append(asyncio.create_task(tested.infer(model, [row(i, 10)])))
            await asyncio.to_thread(model.begun.wait, 10)
        assert tested.queued(model) == (8, 80)
        model.go.set()
        await asyncio.gather(*waiting)
        tested.close()

    asyncio.run(main())
    assert [len(batch) for batch in model.batches] == [1, 8]


def test_rows_of_low_priority_run_by_themselves_when_no_other_waits() -> None:
    model, seen = FakeModel(), []

    async def main() -> None:
        tested = engine(seen=seen)
        model.go.clear()
        waiting = [asyncio.create_task(tested.infer(model, [row(0, 10)]))]
        while not model.begun.is_set():
            await asyncio.sleep(0.01)
        low = [row(7, 600), row(8, 600)]  # two batches
        waiting.append(asyncio.create_task(tested.infer(model, low, low_priority=True)))
        await asyncio.sleep(0.02)
        waiting += [asyncio.create_task(tested.infer(model, [row(i, 600)])) for i in (1, 2)]
        await asyncio.sleep(0.02)
        assert tested.queued(model) == (2, 1200)
        model.go.set()
        found = await asyncio.gather(*waiting)
        check(found[1], low)
        tested.close()
        await asyncio.sleep(0)

    asyncio.run(main())
    assert [[int(r.ids[0]) for r in batch] for batch in model.batches] == [[0], [1], [2], [8], [7]]
    assert not [batch for batch in seen if batch.low_priority]


def test_one_bad_request_spoils_no_other() -> None:
    model = FakeModel(poison=5)

    async def main() -> list[object]:
        tested = engine()
        model.go.clear()
        waiting = [asyncio.create_task(tested.infer(model, [row(i, 10), row(i, 11)])) for i in range(9)]
        await asyncio.sleep(0.05)
        model.go.set()
        found = await asyncio.gather(*waiting, return_exceptions=True)
        tested.close()
        return found

    for i, answer in enumerate(asyncio.run(main())):
        if i == 5:
            assert isinstance(answer, BackendFailed)
        else:
            check(answer, [row(i, 10), row(i, 11)])


def test_what_is_too_late_or_has_no_client_never_runs() -> None:
    model = FakeModel()

    async def main() -> list[object]:
        tested = engine()
        model.go.clear()
        left = asyncio.Event()
        first = asyncio.create_task(tested.infer(model, [row(1, 10)], seconds=1.0))
        while not model.begun.is_set():
            await asyncio.sleep(0.01)
        late = asyncio.create_task(tested.infer(model, [row(2, 10)], seconds=0.1))
        gone = asyncio.create_task(tested.infer(model, [row(3, 10)], gone=left.wait))
        stays = asyncio.create_task(tested.infer(model, [row(4, 10)], seconds=30, gone=asyncio.Event().wait))
        left.set()
        await asyncio.sleep(1.2)
        assert late.done()
        assert gone.done()
        model.go.set()
        found = await asyncio.gather(first, late, gone, stays, return_exceptions=True)
        tested.close()
        return found

    first, late, gone, stays = asyncio.run(main())
    check(first, [row(1, 10)])  # it had begun
    assert isinstance(late, DeadlineExceeded)
    assert isinstance(gone, ClientGone)
    check(stays, [row(4, 10)])
    assert [[int(r.ids[0]) for r in batch] for batch in model.batches] == [[1], [4]]


# ----------------------------------------------------------------------------------------------------------- admission


@given(costs=st.lists(st.integers(1, 50), max_size=60), limit=st.integers(1, 200))
def test_the_limit_holds_and_whoever_fits_gets_in_in_order(costs: list[int], limit: int) -> None:
    async def scenario() -> None:
        admission = Admission(limit, lambda: 10.0)
        inside: deque[tuple[int, Ticket]] = deque()
        waiting: deque[asyncio.Task[Ticket]] = deque()
        entered = 0

        async def settle_down() -> None:
            nonlocal entered
            for _ in range(3):
                await asyncio.sleep(0)
            while waiting and waiting[0].done():
                inside.append((entered, waiting.popleft().result()))
                entered += 1
            assert not any(task.done() for task in waiting)  # nobody overtakes
            assert admission.tokens <= limit or len(inside) == 1
            assert admission.requests == len(inside)

        for cost in costs:
            room = admission.has_room(cost)
            waiting.append(asyncio.ensure_future(admission.enter(cost)))
            await settle_down()
            assert room == (not waiting)
            while admission.crowded:
                with pytest.raises(Overloaded):
                    await admission.enter(cost)
                inside.popleft()[1].leave()
                await settle_down()
        while inside:
            inside.popleft()[1].leave()
            await settle_down()
        assert (admission.tokens, admission.requests, len(waiting)) == (0, 0, 0)

    asyncio.run(scenario())


def test_nobody_waits_at_the_door_for_long() -> None:
    async def scenario() -> None:
        admission = Admission(1, lambda: 10.0)
        first = await admission.enter(1)
        with pytest.raises(Overloaded):
            await admission.enter(1, 0.01)
        cancelled = asyncio.ensure_future(admission.enter(1))
        await asyncio.sleep(0)
        first.leave()
        cancelled.cancel()  # at the very moment that it was let in
        await asyncio.gather(cancelled, return_exceptions=True)
        assert (admission.tokens, admission.requests) == (0, 0)

    asyncio.run(scenario())


def test_the_speed_is_that_of_the_whole_service_under_load() -> None:
    async def scenario() -> None:
        admission = Admission(1, lambda: 1e9)
        ticket = await admission.enter(5)
        assert admission.tokens_per_second() == 1e9
        for _ in range(20):
            waiting = [asyncio.ensure_future(admission.enter(5)) for _ in range(4)]
            for place in waiting:
                await asyncio.sleep(0.01)
                ticket.leave()
                ticket = await place
        # 5 tokens in 10 ms, or longer.
        assert 10 < admission.tokens_per_second() < 600

    asyncio.run(scenario())


def test_retry_after_is_the_time_that_the_queue_takes() -> None:
    admission = Admission(1000, lambda: 100.0)
    Ticket(admission, 10).settle(900)
    assert admission.refusal(200).headers["Retry-After"] == "9"
    assert admission.tokens == 900
    assert admission.refusal(200).headers["Retry-After"] == "11"  # behind the one before
    for _ in range(100):
        last = admission.refusal(200)
    assert last.headers["Retry-After"] == "60"
