"""golden.json of a model folder: are its files whole, and does the model compute here what it computed when made?

The file holds texts, the tokens they must become, the logits those must give within a tolerance, and the sha256 of the
folder's other files. compressor/golden.py writes it, with the plain loops of the tier `scalar`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from service.tokenizer import Row, Tokenizer

if TYPE_CHECKING:
    from service.engine import Engine
    from service.model import OnnxModel

FILE = "golden.json"
Numbers = npt.NDArray[np.float64]


class GoldenRow(BaseModel):
    """One input: a text or two, its tokens, and the model's outputs for it alone."""

    text: str
    text_pair: str | None = None
    input_ids: list[int] = Field(min_length=1)
    token_type_ids: list[int] = Field(min_length=1)
    logits: list[float] = Field(default_factory=list)
    start_logits: list[float] = Field(default_factory=list)
    end_logits: list[float] = Field(default_factory=list)

    @property
    def row(self) -> Row:
        return Row(np.array(self.input_ids, np.int64), np.array(self.token_type_ids, np.int64))

    def outputs(self, names: Sequence[str]) -> list[Numbers]:
        return [np.array(getattr(self, name), np.float64) for name in names]


class Golden(BaseModel):
    model_config = ConfigDict(extra="ignore")

    tolerance: float = Field(gt=0, allow_inf_nan=False, description="Largest difference of a logit.")
    sha256: Mapping[str, str]
    rows: list[GoldenRow] = Field(min_length=1)


def wrong_tokens(golden: Golden, tokenizer: Tokenizer) -> str | None:
    """What is wrong with the tokenizer, as a part of a sentence."""
    for i, expected in enumerate(golden.rows):
        texts = [expected.text] if expected.text_pair is None else [expected.text, expected.text_pair]
        ids = [tokens.ids for tokens in tokenizer.encode(texts)]
        row = (tokenizer.single if len(ids) == 1 else tokenizer.pair).join(*ids)
        if row.ids.tolist() != expected.input_ids or row.type_ids.tolist() != expected.token_type_ids:
            return f"the tokenizer splits row {i} of {FILE} otherwise than when the folder was made"
    return None


async def largest_error(golden: Golden, engine: Engine, model: OnnxModel) -> float:
    """Largest difference of a logit, the rows in one batch and one by one; inf where there are too few logits."""
    rows = [expected.row for expected in golden.rows]
    found = await engine.infer(model, rows)
    alone = [(await engine.infer(model, [row]))[0] for row in rows]
    worst = 0.0
    for expected, *outputs in zip(golden.rows, found, alone, strict=True):
        for one in outputs:
            for wanted, values in zip(expected.outputs(model.outputs), one, strict=True):
                # An output with one value per token keeps the padding of its batch at its end.
                if len(values) < len(wanted) or len(wanted) == 0:
                    return float("inf")
                worst = max(worst, float(np.abs(values[: len(wanted)] - wanted).max()))
    return worst
