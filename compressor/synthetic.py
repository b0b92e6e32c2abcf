"""Model folders of any BERT shape with random weights: for timing, since time does not depend on the weights.

They go through the very export that trained models go through, so the graphs are the same.
"""

from __future__ import annotations

import string
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from compressor.config import CompressionConfig, ConfigError, LayerPlan
from compressor.export import Factors, Storage, export
from compressor.ksvd import Factorization
from compressor.layers import head_size, materialize
from compressor.stf import attach, plan_model
from kernels.banks import bank_atoms

# name: (layers, hidden size, heads, intermediate size)
SHAPES = {
    "bert-base": (12, 768, 12, 3072),
    "bert-large": (24, 1024, 16, 4096),
    "distilbert-base": (6, 768, 12, 3072),
    "minilm-l6-h384": (6, 384, 12, 1536),
    "minilm-l12-h384": (12, 384, 12, 1536),
    "bert-mini": (4, 256, 4, 1024),
}


def write_folders(
    shape: str, compression: CompressionConfig, output: Path, *, storage: Storage = "int8", seed: int = 0
) -> dict[str, dict[str, Any]]:
    """Write the model folders ``output/dense`` and ``output/dsformer``; returns the sizes of each.

    Raises :class:`ConfigError` for an unknown shape, or sizes that do not fit it.
    """
    if shape not in SHAPES:
        raise ConfigError(f"unknown shape {shape!r}: the shapes are {', '.join(SHAPES)}")
    torch.manual_seed(seed)
    layers, hidden, heads, intermediate = SHAPES[shape]
    model = BertForSequenceClassification(
        BertConfig(
            num_hidden_layers=layers,
            hidden_size=hidden,
            num_attention_heads=heads,
            intermediate_size=intermediate,
            id2label={0: "NEGATIVE", 1: "POSITIVE"},
        )
    ).eval()
    if not compression.block_size:
        compression = replace(compression, block_size=head_size(model))
    plans = plan_model(model, compression)
    tokenizer = _letters()
    entry: dict[str, Any] = {"task": "classify", "base_model": f"{shape} (random weights)"}
    dense = {**entry, "variant": "dense"}
    sizes = {"dense": export(model, tokenizer, None, output / "dense", config_entry=dense, storage=storage)}

    generator = np.random.default_rng(seed)
    stacks = attach(model, plans, [_random_factors(plan, generator) for _, plan in plans])
    factors = {
        stack.names[0]: Factors(
            stack.names,
            stack.dictionary.detach().numpy(),
            stack.indices.numpy(),
            stack.values.detach().numpy(),
        )
        for stack in stacks
    }
    entry |= {"variant": "dsformer", "preset": compression.name, "block_size": compression.block_size}
    sizes["dsformer"] = export(
        materialize(model), tokenizer, factors, output / "dsformer", config_entry=entry, storage=storage
    )
    return sizes


def _random_factors(plan: LayerPlan, generator: np.random.Generator) -> Factorization:
    """Unit atoms, supports without repetition, and values that give S·D about the spread of BERT's own weights."""
    dictionary = generator.standard_normal((plan.n_blocks, plan.n_atoms, plan.block_size), dtype=np.float32)
    dictionary /= np.linalg.norm(dictionary, axis=2, keepdims=True)
    rank = generator.random((plan.n_blocks, plan.out_features, plan.n_atoms), dtype=np.float32)
    if plan.bank_limit is not None:  # no more than that of a bank: the others come after all that are allowed
        for first in range(0, plan.n_atoms, bank_atoms(plan.n_atoms)):
            bank = rank[..., first : first + bank_atoms(plan.n_atoms)]
            last = min(plan.bank_limit, bank.shape[2]) - 1
            bank[bank > np.partition(bank, last, axis=2)[..., last : last + 1]] += 1
    indices = np.sort(np.argpartition(rank, plan.n_nonzero - 1, axis=2)[..., : plan.n_nonzero], axis=2)
    spread = 0.02 * (plan.block_size / plan.n_nonzero) ** 0.5
    values = generator.standard_normal(indices.shape, dtype=np.float32) * np.float32(spread)
    return Factorization(torch.from_numpy(dictionary), torch.from_numpy(indices), torch.from_numpy(values))


def _letters() -> PreTrainedTokenizerFast:
    """A WordPiece tokenizer that knows letters and digits: enough to serve a model that knows nothing."""
    signs = string.ascii_lowercase + string.digits + string.punctuation
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *signs, *(f"##{sign}" for sign in signs)]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(word, vocabulary[word]) for word in ("[CLS]", "[SEP]")],
    )
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=512, **names)
