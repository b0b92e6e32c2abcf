"""Rows equal what the tokenizers library makes of whole inputs with special tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as HfTokenizer

from service.tokenizer import Tokenizer, cut_pair

TEXTS = ["the film is good", "Clara lives in Berkeley.", "東京は日本の首都です", "unknownword 🎬 zoé", "a " * 300]


@pytest.fixture(scope="module")
def path(models: Path) -> Path:
    return models / "tiny-qa-dense" / "tokenizer.json"


@pytest.fixture(scope="module")
def oracle(path: Path) -> HfTokenizer:
    whole = HfTokenizer.from_file(str(path))
    whole.no_truncation()
    whole.no_padding()
    return whole


@pytest.mark.parametrize("text", TEXTS)
def test_single(path: Path, oracle: HfTokenizer, text: str) -> None:
    tokenizer = Tokenizer(path)
    (tokens,) = tokenizer.encode([text])
    row, expected = tokenizer.single.join(tokens.ids), oracle.encode(text)
    assert row.ids.tolist() == expected.ids
    assert row.type_ids.tolist() == expected.type_ids
    assert [tokens.span(i) for i in range(len(tokens))] == expected.offsets[1:-1]


@pytest.mark.parametrize("text", TEXTS)
def test_pair(path: Path, oracle: HfTokenizer, text: str) -> None:
    tokenizer = Tokenizer(path)
    a, b = tokenizer.encode([TEXTS[0], text])
    row, expected = tokenizer.pair.join(a.ids, b.ids), oracle.encode(TEXTS[0], text)
    assert row.ids.tolist() == expected.ids
    assert row.type_ids.tolist() == expected.type_ids


@given(a=st.integers(1, 60), b=st.integers(1, 60), room=st.integers(2, 80))
def test_cut_pair_takes_from_the_longer_text(a: int, b: int, room: int) -> None:
    keep_a, keep_b = cut_pair(a, b, room)
    assert 1 <= keep_a <= a
    assert 1 <= keep_b <= b
    assert keep_a + keep_b == min(a + b, room)
    if keep_a < a and keep_b < b:
        assert abs(keep_a - keep_b) <= 1
    elif keep_a < a:
        assert keep_a >= b - 1
    elif keep_b < b:
        assert keep_b >= a - 1
