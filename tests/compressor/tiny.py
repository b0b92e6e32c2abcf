"""A tiny random BERT with a real tokenizer, as Hugging Face folders on disk: what the compressor reads."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertForQuestionAnswering, BertForSequenceClassification, PreTrainedTokenizerFast

# fmt: off
WORDS = [
    "a", "the", "film", "movie", "was", "is", "good", "bad", "great", "awful", "fine", "dull",
    "plot", "actor", "story", "and", "but", "not", "very", "so", "who", "what", "where", "when",
    "won", "lost", "city", "river", "king", "queen", "lived", "in", "on", "of", "paris", "rome",
    ".",
]
# fmt: on


def make_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {token: i for i, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])],
    )
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=128, **names)


def make_config(**changes: object) -> BertConfig:
    settings: dict[str, object] = {
        "vocab_size": len(WORDS) + 5,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 128,
        **changes,
    }
    return BertConfig(**settings)


def save_folder(folder: Path, kind: str) -> Path:
    torch.manual_seed(0)
    model = (BertForQuestionAnswering if kind == "qa" else BertForSequenceClassification)(make_config())
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def stored_factors(folder: Path) -> dict[str, np.ndarray]:
    """What a compressed checkpoint's file has in the place of weights, by name."""
    factors = json.loads((folder / "config.json").read_text())["quantization_config"]["factors"]
    held = load_file(folder / "model.safetensors")
    return {
        name: held[name] for each in factors for name in (f"{each['members'][0]}.{part}" for part in each["tensors"])
    }
