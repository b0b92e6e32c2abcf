"""What the layers of a model are given: in the dense model, or layer after layer, each behind those compressed already.

What the layers do wrong adds up on the way through a model, and each can make good a part of what has reached it. X are
a layer's inputs in the dense model, and X' those in a copy of it whose earlier layers are compressed; its outputs on X'
should be what the dense one's are on X, which :func:`compressor.data_aware.best_weight` aims at.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from compressor.calibration import Calibration, input_grams, inputs_of, measuring, require_finite
from compressor.layers import StackSpec, set_weights


@dataclass(frozen=True)
class Inputs:
    """Of a layer, over all tokens that are not padding: ``gram`` X'X'ᵀ and ``cross`` XX'ᵀ, both (N, N) float64."""

    gram: Tensor
    cross: Tensor


class LayerInputs(Protocol):
    """The inputs of layers that are asked for in the order in which they compute.

    ``n_batches`` of the data are read for each of them, besides what was read at first.
    """

    @property
    def n_batches(self) -> int: ...

    def of(self, name: str, advance: Callable[[], None]) -> Inputs:
        """Those of the layer of that module name; ``advance`` is called after each batch."""

    def exchange(self, names: Sequence[str], stacked: Tensor) -> None:
        """From now on ``stacked`` (M, N) are the weights of these layers, on top of one another."""


def layer_inputs(
    model: Any, specs: Sequence[StackSpec], calibration: Calibration, n_rows: int, *, sequential: bool
) -> LayerInputs:
    """Of the layers of ``specs`` on ``n_rows`` of the data; ``model`` is left as it is."""
    if sequential:
        return _LayerByLayer(model, calibration, n_rows)
    return _AllAtOnce(input_grams(model, specs, calibration, n_rows))


@dataclass(frozen=True)
class _AllAtOnce:
    """In the dense model, where no layer hears of what becomes of another: X' are X."""

    grams: dict[str, Tensor]
    n_batches: int = 0

    def of(self, name: str, advance: Callable[[], None]) -> Inputs:
        return Inputs(self.grams[name], self.grams[name])

    def exchange(self, names: Sequence[str], stacked: Tensor) -> None:
        pass


class _LayerByLayer:
    """The dense model beside a copy whose layers are exchanged; both read the data as far as the layer looked at."""

    def __init__(self, model: Any, calibration: Calibration, n_rows: int) -> None:
        self._dense, self._compressed = model, copy.deepcopy(model)
        self._batches = calibration.batches(n_rows)

    @property
    def n_batches(self) -> int:
        return len(self._batches)

    @torch.no_grad()
    def of(self, name: str, advance: Callable[[], None]) -> Inputs:
        gram: Any = 0
        cross: Any = 0
        n_calls = None  # in one pass: layers that share their weights (ALBERT) are one module, called several times
        for batch in self._batches:
            dense = _inputs(self._dense, name, batch, n_calls)
            compressed = _inputs(self._compressed, name, batch, n_calls)
            n_calls = len(dense)
            for x, given in zip(dense, compressed, strict=True):
                gram, cross = gram + given.T @ given, cross + x.T @ given
            advance()
        return Inputs(*(require_finite(each, f"the inputs of {name}") for each in (gram, cross)))

    def exchange(self, names: Sequence[str], stacked: Tensor) -> None:
        set_weights(self._compressed, names, stacked.to(self._compressed.dtype))


class _ReachedError(Exception):
    """The forward pass has come as far as it is needed."""


def _inputs(model: Any, name: str, batch: dict[str, Tensor], n_calls: int | None) -> list[Tensor]:
    """(tokens, N) float64 at each of the first ``n_calls`` calls of a module, None: at all of them."""
    inputs = inputs_of(batch, model)
    mask = inputs["attention_mask"].bool()
    seen: list[Tensor] = []

    def hook(_: Any, given: tuple[Tensor, ...]) -> None:
        seen.append(given[0][mask].double())
        if len(seen) == n_calls:
            raise _ReachedError

    handle = model.get_submodule(name).register_forward_pre_hook(hook)
    with measuring(model, [handle]), suppress(_ReachedError):
        model(**inputs)
    return seen
