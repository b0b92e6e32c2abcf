"""Classification: texts to rows, logits to scored labels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from service.artifact import Config
from service.errors import Invalid, TooLong
from service.model import Logits
from service.schemas import FunctionName, TextPair
from service.settings import Truncation
from service.tokenizer import Ids, Row, Tokenizer, Tokens, cut_pair

FUNCTION_OF_PROBLEM: dict[str, FunctionName] = {
    "single_label_classification": "softmax",
    "multi_label_classification": "sigmoid",
    "regression": "none",
}


def prepare(
    tokenizer: Tokenizer, items: Sequence[TextPair], truncation: Truncation, max_length: int
) -> tuple[list[Row], int]:
    """Rows of the inputs, and how many of them were cut."""
    texts = [item.text for item in items]
    pairs = [item.text_pair for item in items if item.text_pair is not None]
    encoded = iter(tokenizer.encode(texts + pairs))
    first = [next(encoded) for _ in texts]
    second = [next(encoded) if item.text_pair is not None else None for item in items]
    rows, cut = [], 0
    for i, (a, b) in enumerate(zip(first, second, strict=True)):
        row, was_cut = build_row(tokenizer, i, a, b, truncation, max_length)
        rows.append(row)
        cut += was_cut
    return rows, cut


def build_row(
    tokenizer: Tokenizer, index: int, a: Tokens, b: Tokens | None, truncation: Truncation, max_length: int
) -> tuple[Row, bool]:
    if len(a) == 0 or (b is not None and len(b) == 0):
        raise Invalid(f"inputs[{index}]: the tokenizer finds no word in the text.")
    frame = tokenizer.single if b is None else tokenizer.pair
    room = max_length - frame.size
    total = len(a) + (0 if b is None else len(b))
    if total <= room:
        return frame.join(a.ids, None if b is None else b.ids), False
    if truncation == "error":
        raise TooLong(
            f"inputs[{index}] has {total + frame.size} tokens and the model takes {max_length}: shorten it, or set "
            'parameters.truncation to "right" or "left" to have its end or its start cut off.'
        )
    if b is None:
        return frame.join(cut(a.ids, room, truncation)), True
    keep_a, keep_b = cut_pair(len(a), len(b), room)
    return frame.join(cut(a.ids, keep_a, truncation), cut(b.ids, keep_b, truncation)), True


def cut(ids: Ids, keep: int, truncation: Truncation) -> Ids:
    return ids[len(ids) - keep :] if truncation == "left" else ids[:keep]


def function_of(config: Config) -> FunctionName:
    """What `function_to_apply` = default means for a model."""
    if config.problem_type is not None:
        return FUNCTION_OF_PROBLEM[config.problem_type]
    # One logit has no rival, so softmax would always say 1; Transformers takes the sigmoid here too.
    return "sigmoid" if len(config.id2label) == 1 else "softmax"


def scores(logits: Logits, function: FunctionName) -> npt.NDArray[np.float64]:
    """Scores of one input's logits (labels,)."""
    x = logits.astype(np.float64)
    if function == "softmax":
        powers = np.exp(x - x.max())
        return np.asarray(powers / powers.sum())
    if function == "sigmoid":
        # exp of a negative number only: no overflow at either end.
        powers = np.exp(-np.abs(x))
        return np.asarray(np.where(x >= 0, 1.0, powers) / (1.0 + powers))
    return x


def answer(logits: Logits, labels: Sequence[str], function: FunctionName, top_k: int | None) -> list[dict[str, object]]:
    """Labels with scores, best first; equal scores keep the order of the labels."""
    values = scores(logits, function)
    order = np.argsort(-values, kind="stable")[:top_k]
    return [{"label": labels[i], "score": float(values[i])} for i in order]
