"""Text to token ids, with character offsets.

Long texts go through `encode_batch`, even one alone: `encode` holds the interpreter lock, so one long text would freeze
the event loop for as long as it takes. Short ones go through `encode`, which wakes no other thread. Texts are tokenized
bare; the special tokens around them come from a frame read once from the tokenizer's own post-processor, so that
cutting a text to length or into windows is plain slicing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding
from tokenizers import Tokenizer as HfTokenizer

from service.errors import StartError

# About 0.3 ms of tokenizing.
SHORT_CHARS = 2000

Ids = npt.NDArray[np.int64]
Special = list[tuple[int, int]]  # (token id, type id) of each special token


@dataclass(frozen=True)
class Row:
    """One input of a model, special tokens included, not padded."""

    ids: Ids  # (T,)
    type_ids: Ids  # (T,)

    def __len__(self) -> int:
        return len(self.ids)


class Tokens:
    """One bare text: `ids` (T,), and where its tokens stand."""

    def __init__(self, encoding: Encoding) -> None:
        self.ids: Ids = np.array(encoding.ids, dtype=np.int64)
        self._encoding = encoding

    def __len__(self) -> int:
        return len(self.ids)

    def span(self, token: int) -> tuple[int, int]:
        """First code point of a token, and one past its last.

        Asked one by one: as a list, the offsets of a megabyte of text hold the interpreter lock for long.
        """
        found = self._encoding.token_to_chars(token)
        if found is None:
            raise IndexError(f"token {token} of {len(self)} stands for no text")
        return found


@dataclass(frozen=True)
class Frame:
    """The special tokens around one text, or around and between two: before, A, between, B, after."""

    before: Special
    between: Special
    after: Special
    type_a: int
    type_b: int

    @property
    def size(self) -> int:
        return len(self.before) + len(self.between) + len(self.after)

    def join(self, a: Ids, b: Ids | None = None) -> Row:
        ids: list[Ids] = [_column(self.before, 0), a, _column(self.between, 0)]
        types: list[Ids] = [_column(self.before, 1), np.full_like(a, self.type_a), _column(self.between, 1)]
        if b is not None:
            ids.append(b)
            types.append(np.full_like(b, self.type_b))
        ids.append(_column(self.after, 0))
        types.append(_column(self.after, 1))
        return Row(np.concatenate(ids), np.concatenate(types))


class Tokenizer:
    """The tokenizer.json of a model folder."""

    def __init__(self, path: Path) -> None:
        try:
            self._tokenizer = HfTokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise StartError(f"Model folder {path.parent}: tokenizer.json cannot be read: {error}.") from error
        # The file may carry the settings of its training; a cut must never happen unseen.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        try:
            self.single = frame(self._tokenizer.encode_batch(["a"])[0])
            self.pair = frame(self._tokenizer.encode_batch([("a", "a")])[0])
        except ValueError as error:
            raise StartError(f"Model folder {path.parent}: tokenizer.json: {error}.") from error

    @property
    def max_id(self) -> int:
        """Largest token id."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values())

    def encode(self, texts: Sequence[str]) -> list[Tokens]:
        """Tokenize without special tokens. Lets other Python threads run meanwhile, unless it is done in a moment."""
        if sum(map(len, texts)) <= SHORT_CHARS:
            return [Tokens(self._tokenizer.encode(text, add_special_tokens=False)) for text in texts]
        return [Tokens(e) for e in self._tokenizer.encode_batch(list(texts), add_special_tokens=False)]


def frame(probe: Encoding) -> Frame:
    """Read the special tokens off a probe that was encoded with them."""
    parts: list[Special] = [[], [], []]
    type_of = {0: 0, 1: 0}
    seen: list[int] = []
    for sequence, token, kind in zip(probe.sequence_ids, probe.ids, probe.type_ids, strict=True):
        if sequence is None:
            parts[len(seen)].append((token, kind))
        elif sequence not in seen:
            seen.append(sequence)
            type_of[sequence] = kind
    if seen == [0]:
        return Frame(parts[0], [], parts[1], type_of[0], 0)
    if seen == [0, 1]:
        return Frame(parts[0], parts[1], parts[2], type_of[0], type_of[1])
    raise ValueError("the letter 'a' gives no token, or the order of two texts is changed")


def cut_pair(a: int, b: int, room: int) -> tuple[int, int]:
    """Lengths that two texts keep so that both fit in `room`: the longer one loses first."""
    if a + b <= room:
        return a, b
    short = min(a, b, room // 2)
    # The shorter text stays whole while the other alone can pay; past that both get half.
    return (short, room - short) if a <= b else (room - short, short)


def _column(special: Special, index: int) -> Ids:
    return np.array([token[index] for token in special], dtype=np.int64)
