"""Extractive question answering over contexts of any length.

A context longer than one window is cut into windows that share `doc_stride` tokens; each is read together with the
question. All windows are decoded at once, on raw logits:

- candidates: every span (i, j) of context tokens of one window with i <= j < i + max_answer_len. All of them are
  looked at, not the best few starts and ends. A span that lies in two windows counts once, with its better logits.
- rank: start_logit(i) + end_logit(j).
- score: P(i) Q(j), where P is the softmax of the start logits over the context tokens of all windows together, and Q
  the same of the end logits. So scores are in [0, 1], those of one answer list sum to at most 1, and the order by score
  is the order by rank.
- the empty answer (`handle_impossible_answer`): its logits are those of the first token ([CLS]) in the window where
  their sum is smallest, for a context has no answer only if none of its windows has. It then takes part in both
  softmaxes and in the ranking as one more candidate.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from service.errors import Invalid, TooLong
from service.model import Logits
from service.schemas import OffsetEncoding, QaParameters, Question
from service.tokenizer import Row, Tokenizer, Tokens

DEFAULT_WINDOW_TOKENS = 384
DEFAULT_STRIDE_TOKENS = 128
NULL_POSITION = 0  # of [CLS]

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Window:
    row: Row
    first: int  # its first context token, counted in the whole context
    count: int  # context tokens in it
    at: int  # where that first token stands in the row


@dataclass(frozen=True)
class Passage:
    """One question with its context, cut into windows."""

    context: str
    tokens: Tokens
    windows: list[Window]
    question_cut: bool


@dataclass(frozen=True)
class Span:
    """Tokens first..last of the context, both included; first = last = -1 is the empty answer."""

    first: int
    last: int
    score: float


EMPTY = -1


def prepare(
    tokenizer: Tokenizer, items: Sequence[Question], parameters: QaParameters, max_length: int, max_windows: int
) -> list[Passage]:
    length = min(parameters.max_seq_len or DEFAULT_WINDOW_TOKENS, max_length)
    encoded = tokenizer.encode([item.question for item in items] + [item.context for item in items])
    questions, contexts = encoded[: len(items)], encoded[len(items) :]
    passages = []
    room = max_windows
    for i, (item, question, context) in enumerate(zip(items, questions, contexts, strict=True)):
        for name, text in (("question", question), ("context", context)):
            if len(text) == 0:
                raise Invalid(f"inputs[{i}].{name}: the tokenizer finds no word in the text.")
        starts, size = cut_windows(tokenizer, i, len(question), len(context), parameters, length)
        if len(starts) > room:
            raise TooLong(
                f"inputs[{i}].context has {len(context)} tokens, too long: the contexts of one request may need "
                f"{max_windows} windows of {length} tokens together. Send less, or a smaller doc_stride."
            )
        room -= len(starts)
        asked = question.ids[: parameters.max_question_len]
        windows = [
            Window(
                tokenizer.pair.join(asked, context.ids[start : start + size]),
                start,
                min(size, len(context) - start),
                len(tokenizer.pair.before) + len(asked) + len(tokenizer.pair.between),
            )
            for start in starts
        ]
        passages.append(Passage(item.context, context, windows, len(asked) < len(question)))
    return passages


def cut_windows(
    tokenizer: Tokenizer, index: int, question: int, context: int, parameters: QaParameters, length: int
) -> tuple[range, int]:
    """First context token of each window, and the context tokens that one window holds."""
    size = length - tokenizer.pair.size - min(question, parameters.max_question_len)
    if size < 1:
        raise Invalid(
            f"inputs[{index}].question leaves no room for the context in a window of {length} tokens: "
            "raise max_seq_len or lower max_question_len."
        )
    stride = parameters.doc_stride
    if stride is None:
        stride = min(DEFAULT_STRIDE_TOKENS, size // 2)
    if stride >= size:
        raise Invalid(
            f"parameters.doc_stride: {stride} tokens shared by neighbouring windows leave no step forward, for a "
            f"window holds {size} tokens of the context of inputs[{index}]."
        )
    # The last window is the first one that reaches the end.
    return range(0, max(1, context - stride), size - stride), size


def answer(
    passage: Passage, starts: Sequence[Logits], ends: Sequence[Logits], parameters: QaParameters
) -> list[dict[str, object]]:
    """Best answers of one passage, best first.

    starts, ends : one array (T,) per window
    """
    null = None
    if parameters.handle_impossible_answer:
        null = min(
            ((float(s[NULL_POSITION]), float(e[NULL_POSITION])) for s, e in zip(starts, ends, strict=True)), key=sum
        )
    spans = best_spans(
        [(w.first, s[w.at : w.at + w.count]) for w, s in zip(passage.windows, starts, strict=True)],
        [e[w.at : w.at + w.count] for w, e in zip(passage.windows, ends, strict=True)],
        parameters.max_answer_len,
        parameters.top_k or 1,
        null,
    )
    return [to_answer(passage, span, parameters.offset_encoding) for span in spans]


def best_spans(
    starts: Sequence[tuple[int, Logits]],
    ends: Sequence[Logits],
    max_answer_len: int,
    top_k: int,
    null: tuple[float, float] | None = None,
) -> list[Span]:
    """The top_k spans over all windows, as the module's docstring defines them; fewer where there are fewer.

    starts : per window its first token in the context and the start logits (n,) of its context tokens
    ends   : per window the end logits (n,) of the same tokens
    null   : start and end logit of the empty answer, where it is allowed
    """
    extra_start, extra_end = ([null[0]], [null[1]]) if null else ([], [])
    normalizer = log_sum_exp([*(s for _, s in starts), extra_start]) + log_sum_exp([*ends, extra_end])
    found: dict[tuple[int, int], float] = {}
    for (first, start), end in zip(starts, ends, strict=True):
        for i, j, total in top_of_window(start, end, max_answer_len, top_k):
            span = (first + i, first + j)
            found[span] = max(total, found.get(span, -np.inf))
    if null:
        found[EMPTY, EMPTY] = null[0] + null[1]
    # Equal totals: the earlier span, then the shorter.
    ranked = sorted(found.items(), key=lambda item: (-item[1], item[0]))[:top_k]
    return [Span(i, j, float(np.exp(min(0.0, total - normalizer)))) for (i, j), total in ranked]


def top_of_window(start: Logits, end: Logits, max_answer_len: int, top_k: int) -> list[tuple[int, int, float]]:
    """Best (i, j, start[i] + end[j]) of one window with i <= j < i + max_answer_len.

    Spans of one window are distinct, so its best top_k hold every span it can give to the overall top_k.
    """
    length = min(max_answer_len, len(end))
    padded = np.concatenate([end.astype(np.float64), np.full(length - 1, -np.inf)])
    totals = start.astype(np.float64)[:, None] + np.lib.stride_tricks.sliding_window_view(padded, length)  # (n, length)
    flat = totals.ravel()
    # A stable sort would be exact for ties too, but the window's best few are enough and ties are rare.
    count = min(top_k, flat.size)
    chosen = np.argpartition(-flat, count - 1)[:count] if count < flat.size else np.arange(flat.size)
    return [
        (int(index) // length, int(index) // length + int(index) % length, float(flat[index]))
        for index in chosen
        if np.isfinite(flat[index])
    ]


def log_sum_exp(parts: Sequence[npt.ArrayLike]) -> float:
    values: Floats = np.concatenate([np.asarray(part, dtype=np.float64) for part in parts])
    top = values.max()
    return float(top + np.log(np.exp(values - top).sum()))


def to_answer(passage: Passage, span: Span, encoding: OffsetEncoding) -> dict[str, object]:
    if span.first == EMPTY:
        return {"answer": "", "score": span.score, "start": 0, "end": 0}
    start, _ = passage.tokens.span(span.first)
    end = with_marks(passage.context, passage.tokens.span(span.last)[1])
    return {
        "answer": passage.context[start:end],
        "score": span.score,
        "start": position(passage.context, start, encoding),
        "end": position(passage.context, end, encoding),
    }


def with_marks(context: str, end: int) -> int:
    """Move an end past the combining marks of its last letter, which accent-stripping tokenizers leave out."""
    while end < len(context) and unicodedata.category(context[end]) in ("Mn", "Me"):
        end += 1
    return end


def position(context: str, codepoint: int, encoding: OffsetEncoding) -> int:
    """A code-point offset in another unit."""
    if encoding == "utf16":
        return len(context[:codepoint].encode("utf-16-le")) // 2
    if encoding == "byte":
        return len(context[:codepoint].encode("utf-8"))
    return codepoint
