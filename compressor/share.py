"""Layers that share their weights, after ALBERT: a BERT becomes a model that calls one layer again and again.

The result is an ordinary ALBERT of Hugging Face, so every tool knows it. Its embeddings are as wide as its layers, and
what maps the ones to the others is the identity. Sharing changes what the model computes: it has to be fine-tuned
afterwards, and no task's head is kept. A compression of it counts, and stores, the shared matrices once.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from transformers import AlbertConfig, AlbertModel, AutoModel, AutoTokenizer, BertModel

from compressor.checkpoint import first_line
from compressor.config import ConfigError
from compressor.files import replaced_folder

# What both configurations call alike.
_SAME = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "max_position_embeddings",
    "type_vocab_size",
    "initializer_range",
    "layer_norm_eps",
    "pad_token_id",
)

# BERT's names within a layer, and ALBERT's.
_PARTS = {
    "attention.self.query": "attention.query",
    "attention.self.key": "attention.key",
    "attention.self.value": "attention.value",
    "attention.output.dense": "attention.dense",
    "attention.output.LayerNorm": "attention.LayerNorm",
    "intermediate.dense": "ffn",
    "output.dense": "ffn_output",
    "output.LayerNorm": "full_layer_layer_norm",
}


def share_folder(source: str, output: Path, groups: int = 1) -> dict[str, Any]:
    """Write the BERT ``source`` (folder or hub id) with shared layers to ``output``; returns its sizes.

    Raises :class:`ConfigError` where ``source`` is no BERT, or its layers do not make ``groups`` equal groups.
    """
    try:
        model = AutoModel.from_pretrained(source, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(source, use_fast=True)
    except Exception as error:
        raise ConfigError(f"cannot load the model {source!r}: {first_line(error)}") from error
    shared = share_layers(model, groups)
    with replaced_folder(output) as folder:
        shared.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return {
        "layers": shared.config.num_hidden_layers,
        "groups": groups,
        "parameters_before": sum(parameter.numel() for parameter in model.parameters()),
        "parameters": sum(parameter.numel() for parameter in shared.parameters()),
    }


def share_layers(model: Any, groups: int = 1) -> AlbertModel:
    """An ALBERT whose layers, in ``groups`` of neighbours, all have the weights of the first of their group."""
    if not isinstance(model, BertModel):
        raise ConfigError(f"layers can be shared in a BERT, but this is a {type(model).__name__}")
    if hasattr(model, "compression"):
        raise ConfigError("this model is compressed already; share the layers of the dense one, and compress that")
    n_layers = model.config.num_hidden_layers
    if groups < 1 or n_layers % groups:
        raise ConfigError(f"{n_layers} layers do not make {groups} equal groups; choose a number that divides them")
    same = {name: getattr(model.config, name) for name in _SAME}
    shared = AlbertModel(
        AlbertConfig(
            **same,
            embedding_size=model.config.hidden_size,
            num_hidden_groups=groups,
            classifier_dropout_prob=model.config.hidden_dropout_prob,
        )
    )
    weights = {
        new: tensor for name, tensor in model.state_dict().items() if (new := _new_name(name, n_layers // groups))
    }
    weights["encoder.embedding_hidden_mapping_in.weight"] = torch.eye(model.config.hidden_size)
    weights["encoder.embedding_hidden_mapping_in.bias"] = torch.zeros(model.config.hidden_size)
    shared.load_state_dict(weights)
    return shared.eval()


def _new_name(name: str, layers_a_group: int) -> str | None:
    """ALBERT's name of a tensor of BERT; None in layers that take another's weights."""
    inside = re.fullmatch(r"encoder\.layer\.(\d+)\.(.+)\.(weight|bias)", name)
    if not inside:
        return name.replace("pooler.dense.", "pooler.")
    group, rest = divmod(int(inside[1]), layers_a_group)
    if rest:
        return None
    return f"encoder.albert_layer_groups.{group}.albert_layers.0.{_PARTS[inside[2]]}.{inside[3]}"
