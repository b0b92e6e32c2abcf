"""Cutting rows into runs."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from service.engine import plan


@given(lengths=st.lists(st.integers(1, 600), max_size=80), budget=st.integers(1, 3000))
def test_every_row_runs_once_within_the_budget(lengths: list[int], budget: int) -> None:
    batches = plan(lengths, budget)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        padded = len(batch) * max(lengths[i] for i in batch)
        assert padded <= budget or len(batch) == 1


def test_similar_lengths_run_together() -> None:
    assert plan([5, 100, 6, 99], 200) == [[1, 3], [2, 0]]
