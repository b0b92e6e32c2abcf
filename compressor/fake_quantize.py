"""Fine-tuning on an 8-bit grid, after Zafrir et al., "Q8BERT: Quantized 8Bit BERT" (2019).

Every linear layer and embedding sees its weights, and every linear layer its inputs, rounded to 8 bits: symmetric, one
scale a tensor. The scale is the largest entry of the weights, and of the inputs a moving average of the largest entries
of the batches. Gradients pass straight through the rounding. What is left in the end is an ordinary model whose weights
lie on the grid.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

_LIMIT = 127
# Q8BERT's moving average of the largest input.
_MEMORY = 0.9
_LEAST_SCALE = 1e-8


def _rounded(x: Tensor, largest: Tensor) -> Tensor:
    scale = (largest.float() / _LIMIT).clamp_min(_LEAST_SCALE)
    zero = torch.zeros_like(scale, dtype=torch.int32)
    return torch.fake_quantize_per_tensor_affine(x.float(), scale, zero, -_LIMIT, _LIMIT).to(x.dtype)


class WeightGrid(nn.Module):
    """A parametrization: weights as the nearest of 255 equidistant values."""

    def forward(self, weight: Tensor) -> Tensor:
        return _rounded(weight, weight.detach().abs().amax())


class InputGrid(nn.Module):
    """Inputs likewise; in training it learns how large they are."""

    largest: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("largest", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            now = x.detach().float().abs().amax()
            self.largest = torch.where(self.largest == 0, now, _MEMORY * self.largest + (1 - _MEMORY) * now)
        return _rounded(x, self.largest)


@contextmanager
def on_grid(model: nn.Module) -> Iterator[None]:
    """Within the block ``model`` computes on the grid; afterwards its weights lie on it and it is an ordinary model."""
    layers = [module for module in model.modules() if isinstance(module, nn.Linear | nn.Embedding)]
    hooks: list[Any] = []
    for layer in layers:
        parametrize.register_parametrization(layer, "weight", WeightGrid())
        if isinstance(layer, nn.Linear):
            layer.input_grid = InputGrid()
            hooks.append(layer.register_forward_pre_hook(lambda layer, inputs: (layer.input_grid(inputs[0]),)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for layer in layers:
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
            if isinstance(layer, nn.Linear):
                del layer.input_grid
