"""The dense model in PyTorch, for `dsformer-bench --peers`; the service itself never imports PyTorch.

    python -m compressor.dense_peer FOLDER run THREADS float32|bfloat16
    python -m compressor.dense_peer FOLDER export BATCH TOKENS FILE

The model is made from the folder's config.json with random weights: time does not depend on them. `run` says "ready",
then runs once for each line "BATCH TOKENS" on standard input and says "done". `export` writes an ONNX graph of plain
operators with a fixed shape, for systems that take nothing else.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForQuestionAnswering, AutoModelForSequenceClassification

# DeepSparse's own onnx package reads no newer one.
OPSET = 14


def make_model(folder: str, attention: str) -> Any:
    config = AutoConfig.from_pretrained(folder, attn_implementation=attention)
    answering = config.dsformer["task"] == "qa"
    auto = AutoModelForQuestionAnswering if answering else AutoModelForSequenceClassification
    return auto.from_config(config, attn_implementation=attention).eval()


def inputs(model: Any, batch: int, tokens: int) -> dict[str, Tensor]:
    ids = torch.randint(model.config.vocab_size, (batch, tokens))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}


@torch.inference_mode()
def run(folder: str, threads: int, precision: str) -> None:
    torch.set_num_threads(threads)
    model = make_model(folder, "sdpa").to(getattr(torch, precision))
    print("ready", flush=True)
    known: dict[tuple[int, int], dict[str, Tensor]] = {}
    for line in sys.stdin:
        batch, tokens = (int(word) for word in line.split())
        if (batch, tokens) not in known:
            known[batch, tokens] = inputs(model, batch, tokens)
        model(**known[batch, tokens])
        print("done", flush=True)


class _Plain(torch.nn.Module):
    """The model with tensors in and tensors out."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.model(input_ids, attention_mask, token_type_ids=token_type_ids).values())


def export(folder: str, batch: int, tokens: int, file: str) -> None:
    model = make_model(folder, "eager")
    feed = inputs(model, batch, tokens)
    names = list(feed)
    torch.onnx.export(_Plain(model), tuple(feed.values()), file, input_names=names, opset_version=OPSET, dynamo=False)


def main() -> None:
    folder, what, *rest = sys.argv[1:]
    if what == "run":
        run(folder, int(rest[0]), rest[1])
    else:
        export(folder, int(rest[0]), int(rest[1]), rest[2])


if __name__ == "__main__":
    main()
