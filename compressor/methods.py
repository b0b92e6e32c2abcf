"""The compression methods behind one interface; to add one, write its module and put it into ``METHODS``.

A method turns weights into factors, and the pipeline does the rest, the same for all: fine-tuning, distillation,
checkpoints, resuming, export, measuring::

    prepare     the dense model rewritten into an equal one that suits the method better
    plan        sizes that reach the target, or a sentence why they cannot
    settle      sizes that data must decide, if any
    factorize   weights → factors, once, perhaps with calibration data
    attach      factors → layers to train, in place of the model's own
    collect     the trained layers → factors, which a checkpoint keeps and an export puts into the graph
    restore     factors → method and sizes, for a checkpoint that somebody else loads

Everything is said of a model's *set* of named weights and never of one matrix, so there is room for methods that tie
weights together; what each would do here:

- Factors shared across layers (Tucker over stacked layers, a dictionary for several): ``plan`` groups the names; one
  factors object has all of a group as its ``members`` and counts the shared arrays once in ``bits``; its layers hold
  the same ``nn.Parameter``, which the optimiser sees once; ``put`` adds one initializer that all members' nodes read.
- Permuted rows or columns (Kronecker products after TQCompressor): the permutation is an integer array among
  ``tensors`` and a buffer of the layer, and ``bits`` counts it; ``effective_weight`` undoes it; ``put`` folds it into a
  neighbour or adds a Gather on the features.
- Factorized embeddings: ``plan`` names the embedding, ``attach`` puts a module in its place whose ``effective_weight``
  is the table but whose ``forward`` looks rows up, ``layers.materialize`` learns to make an ``nn.Embedding`` of it, and
  ``put`` replaces its Gather instead of a MatMul.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from compressor.calibration import Calibration
from compressor.config import ConfigError, MethodOptions, Schedule
from compressor.dense_sparse import DenseSparse
from compressor.factors import WeightFactors
from compressor.layers import CompressedLinear, linear_layer
from compressor.lowrank import DRONE, FWSVD, SVD
from compressor.nm import NM


class Method(Protocol):
    """One compression method with its settings, a frozen value.

    ``schedules`` it can be trained by, its paper's own first. A ``plan`` is the method's own business: the pipeline
    only hands it back. What cannot work is a :class:`ConfigError`.
    """

    name: ClassVar[str]
    schedules: ClassVar[tuple[Schedule, ...]]
    factors_type: ClassVar[type[WeightFactors]]

    @classmethod
    def from_options(cls, options: MethodOptions) -> Method:
        """The method as asked for; options that mean nothing to it are refused."""

    def prepare(self, model: nn.Module) -> None:
        """Rewrite a dense model, in place, into one that computes the same; most methods leave it as it is."""

    def plan(self, model: nn.Module) -> Sequence[Any]:
        """Sizes for all weights of ``model`` that will be compressed; it is only looked at."""

    def settle(self, model: nn.Module, factors: Any, calibration: Calibration, memory: Path | None) -> Method:
        """The method with all sizes decided, where :meth:`plan` leaves some open: those that ``factors`` have, if a
        checkpoint is trained on; else by looking at the data. ``memory``: a file that a killed run leaves for the next.
        """

    def describe(self, plan: Any, errors: Mapping[str, float] | None) -> dict[str, Any]:
        """Plain values for ``card.json``: the ratio by eq. 11 as ``ratio_eq11``, the sizes, and the errors given."""

    def factorize(self, model: nn.Module, plan: Any, calibration: Calibration) -> Sequence[Any]:
        """Factors of the planned weights; ``model`` is left as it is."""

    def attach(self, model: nn.Module, plan: Any, factors: Any, schedule: Schedule) -> None:
        """Exchange the planned layers for trainable ones that start from ``factors``, in place."""

    def collect(self, model: nn.Module) -> Sequence[WeightFactors]:
        """The factors of the layers that :meth:`attach` put into ``model``, as they are now."""

    @classmethod
    def restore(cls, factors: Sequence[Any]) -> tuple[Method, Sequence[Any]]:
        """A method and a plan by which ``factors`` can be attached again: their sizes, where nothing else is known."""


METHODS: dict[str, type[Method]] = {"ds": DenseSparse, "svd": SVD, "fwsvd": FWSVD, "drone": DRONE, "nm": NM}


def find_method(name: str) -> type[Method]:
    if name not in METHODS:
        raise ConfigError(f"unknown method {name!r}: the methods are {', '.join(METHODS)}")
    return METHODS[name]


def find_schedule(method: Method, name: Schedule | None) -> Schedule:
    """The schedule asked for, or the method's own; ``ft-f``, no training at all, is open to every method."""
    if name is None:
        return method.schedules[0]
    known = (*method.schedules, "ft-f")
    if name not in known:
        raise ConfigError(
            f"--schedule {name} is not how --method {method.name} is trained; it knows {', '.join(known)}"
        )
    return name


def dense_weights(model: nn.Module, factors: Sequence[WeightFactors]) -> dict[str, Tensor]:
    """The weights that ``factors`` stand for, by name, as they are before :meth:`Method.attach`."""
    return {name: linear_layer(model, name).weight.detach() for factor in factors for name in factor.members}


@torch.no_grad()
def relative_errors(
    model: nn.Module, factors: Sequence[WeightFactors], weights: Mapping[str, Tensor]
) -> dict[str, float]:
    """‖W − W'‖ / ‖W‖ of each set of weights (0 for zero weights), by its first member, with W' as ``model`` has it."""
    errors = {}
    for factor in factors:
        difference = scale = 0.0
        for name in factor.members:
            layer = model.get_submodule(name)
            assert isinstance(layer, CompressedLinear)
            difference += float((weights[name] - layer.effective_weight()).square().sum())
            scale += float(weights[name].square().sum())
        errors[factor.members[0]] = round((difference / scale) ** 0.5, 4) if scale else 0.0
    return errors
