"""The weights that are compressed: where they are in a model, and how a layer is exchanged for a compressed one.

Every method works on the linear layers of the encoder: query, key, value and output of attention, and the two of the
feed-forward net. Embeddings, biases, layer norms and heads stay as they are.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compressor.config import ConfigError


@dataclass(frozen=True)
class StackSpec:
    """The layers of one stack by module name, and their role."""

    names: tuple[str, ...]
    role: str


# Where the four kinds of matrices live in each architecture's layer, relative to it.
_LAYER_PATTERNS = (
    # BERT, RoBERTa, ELECTRA, CamemBERT, XLM-RoBERTa
    {
        "qkv": ("attention.self.query", "attention.self.key", "attention.self.value"),
        "attention_output": ("attention.output.dense",),
        "ffn1": ("intermediate.dense",),
        "ffn2": ("output.dense",),
    },
    # DistilBERT
    {
        "qkv": ("attention.q_lin", "attention.k_lin", "attention.v_lin"),
        "attention_output": ("attention.out_lin",),
        "ffn1": ("ffn.lin1",),
        "ffn2": ("ffn.lin2",),
    },
    # ALBERT
    {
        "qkv": ("attention.query", "attention.key", "attention.value"),
        "attention_output": ("attention.dense",),
        "ffn1": ("ffn",),
        "ffn2": ("ffn_output",),
    },
)


def find_stacks(model: nn.Module) -> list[StackSpec]:
    """The matrices of every encoder layer, Q, K and V stacked; raises :class:`ConfigError` for other models."""
    modules = dict(model.named_modules())
    for pattern in _LAYER_PATTERNS:
        query = pattern["qkv"][0]
        ends = re.compile(rf"^(.*)\.{re.escape(query)}$")
        layers = [match.group(1) for name in modules if (match := ends.match(name))]
        specs = [
            StackSpec(tuple(f"{layer}.{name}" for name in names), role)
            for layer in layers
            for role, names in pattern.items()
        ]
        if specs and all(isinstance(modules.get(name), nn.Linear) for spec in specs for name in spec.names):
            return specs
    raise ConfigError(
        f"{type(model).__name__} is not a model of the BERT family that can be factorized: expected encoder layers "
        f"with query, key, value, output and two feed-forward linear layers"
    )


def stacked_weight(model: nn.Module, names: Sequence[str]) -> Tensor:
    """The members' weights on top of one another, (M, N)."""
    weights = [model.get_submodule(name).weight for name in names]
    return weights[0] if len(weights) == 1 else torch.cat(weights)  # type: ignore[arg-type, return-value]


def set_weights(model: nn.Module, names: Sequence[str], stacked: Tensor) -> None:
    """``stacked`` (M, N) into the layers that it is the weights of, in order."""
    layers = [linear_layer(model, name) for name in names]
    for layer, rows in zip(layers, torch.split(stacked, [layer.out_features for layer in layers]), strict=True):
        layer.weight = nn.Parameter(rows.to(layer.weight.device).clone())  # whoever holds the old one keeps it


def linear_names(model: nn.Module) -> list[str]:
    """Module names of all those matrices, one by one."""
    return [name for spec in find_stacks(model) for name in spec.names]


def linear_layer(model: nn.Module, name: str) -> nn.Linear:
    layer = model.get_submodule(name)
    assert isinstance(layer, nn.Linear)  # as find_stacks found it
    return layer


def finite_weight(model: nn.Module, name: str) -> Tensor:
    """The weight (M, N) of one layer, without gradients; raises :class:`ConfigError` where it is not finite."""
    weight = linear_layer(model, name).weight.detach()
    if not torch.isfinite(weight).all():
        raise ConfigError(f"{name} has weights that are not finite; the checkpoint is broken")
    return weight


def head_size(model: Any) -> int:
    """Width of one attention head, the paper's block size."""
    config = model.config
    return int(config.hidden_size // config.num_attention_heads)


class CompressedLinear(nn.Module, ABC):
    """What takes an ``nn.Linear``'s place while its compressed weight is trained."""

    in_features: int
    out_features: int
    bias: Tensor | None

    @abstractmethod
    def effective_weight(self) -> Tensor:
        """The weight (out_features, in_features) that the layer multiplies by, with the gradients of the method."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.effective_weight(), self.bias)


def compressed_layers(model: nn.Module) -> Iterator[tuple[str, CompressedLinear]]:
    """(name, layer) of what is compressed in ``model``; layers that share their weights (ALBERT) come once."""
    for name, module in model.named_modules():
        if isinstance(module, CompressedLinear):
            yield name, module


def replace_layer(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put ``layer`` where the module ``name`` was, in place."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)


@torch.no_grad()
def materialize(model: nn.Module) -> nn.Module:
    """Turn a compressed model back into plain linear layers that hold effective weights, in place."""
    for name, layer in list(compressed_layers(model)):
        linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        linear.weight = nn.Parameter(layer.effective_weight().detach().clone())
        linear.bias = layer.bias  # type: ignore[assignment]
        replace_layer(model, name, linear)
    if hasattr(model, "factorized_stacks"):  # the dictionaries of stf.py, which no layer reads any more
        del model.factorized_stacks
    return model
