"""Rows equal what the tokenizers library makes of whole inputs with special tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as HfTokenizer
from tokenizers import pre_tokenizers, processors
from tokenizers.models import BPE

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


def test_two_separators_and_trimmed_offsets_as_roberta_has_them(tmp_path: Path) -> None:
    alphabet = ["<s>", "</s>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    made = HfTokenizer(BPE({token: i for i, token in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    made.post_processor = processors.RobertaProcessing(("</s>", 1), ("<s>", 0), trim_offsets=True)
    made.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path / "tokenizer.json")
    a, b = tokenizer.encode(["who is", "a 🎬 b"])
    expected = made.encode("who is", "a 🎬 b")
    assert tokenizer.pair.join(a.ids, b.ids).ids.tolist() == expected.ids
    assert tokenizer.pair.join(a.ids, b.ids).type_ids.tolist() == expected.type_ids
    assert tokenizer.single.join(b.ids).ids.tolist() == made.encode("a 🎬 b").ids
    offsets = [pair for pair, sequence in zip(expected.offsets, expected.sequence_ids, strict=True) if sequence == 1]
    assert [b.span(i) for i in range(len(b))] == offsets


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
