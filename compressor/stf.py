"""The Straight-Through Factorizer: train a model whose weights are S·D while W is what the optimiser moves.

How it works (paper algorithm 1). The forward pass uses ``S·D`` with S coded afresh by OMP from the current W and D.
The backward pass hands the task's gradient to W as if the factorization were the identity, gives D the gradient of
½‖W − SD‖², and S nothing::

    grad W = g        grad D = Sᵀ(S·D − W)        grad S = none

What follows from that second rule is kept in one place, here and in ``train.py``: D's gradient does not come from
the loss, so it is collected once per optimiser step, clipped apart from W's, and gets no weight decay; atoms are
renormalised before they are coded with. What the rule leaves open has its options, all of them off unless asked for:
a closed-form step of D, a pull of W to S·D, and supports that stay unless another one is clearly better.

The baseline FT-F-FT is the same module with the supports frozen: W is dropped, and D and the values get their true
gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from compressor import processes
from compressor.config import CompressionConfig, KSVDConfig, LayerPlan
from compressor.ksvd import Factorization, factorize, least_squares
from compressor.layers import (
    CompressedLinear,
    StackSpec,
    find_stacks,
    head_size,
    linear_layer,
    replace_layer,
    stacked_weight,
)
from compressor.omp import (
    Users,
    blocks,
    gram_of_codes,
    reconstruct,
    refit,
    refit_all,
    sparse_code_all,
    transposed_product,
)
from compressor.progress import progress

# Where atoms share their users the closed-form step is damped, by this share of the mean diagonal of SᵀS.
_RIDGE = 1e-3


class _StraightThrough(torch.autograd.Function):
    """Rows of ``S·D`` in place of the same rows of W; grad D is collected where the ``users`` of atoms are given."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, dictionary: Tensor, indices: Tensor, values: Tensor, users: Users | None
    ) -> Tensor:
        product = reconstruct(dictionary, indices, values)
        ctx.users = users
        ctx.n_atoms = dictionary.shape[1]
        if users:
            ctx.save_for_backward(weight, product, indices, values)
        return product

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.users or not ctx.needs_input_grad[1]:
            return gradient, None, None, None, None
        weight, product, indices, values = ctx.saved_tensors
        downhill = transposed_product(indices, values, product - weight, ctx.n_atoms, ctx.users)
        return gradient, downhill, None, None, None


class FactorizedStack(nn.Module):
    """One dictionary a block for a stack of layers that share their input (Q, K and V; else a single layer).

    ``dictionary`` (N/B, K, B) is a parameter, ``indices`` (N/B, M, S) and ``values`` (N/B, M, S) are the codes of
    the members' weights, stacked in order: M is the sum of their ``out_features``. ``metric`` (N/B, B, B), if any, is
    what errors are measured in when weights are coded, ‖(W_i − S_i D_i) metric_i‖ (data_aware.py).
    """

    indices: Tensor
    metric: Tensor | None

    def __init__(
        self, names: Sequence[str], plan: LayerPlan, start: Factorization, metric: Tensor | None = None
    ) -> None:
        super().__init__()
        self.names = tuple(names)
        self.plan = plan
        self.dictionary = nn.Parameter(start.dictionary.clone())
        self.values = nn.Parameter(start.values.clone(), requires_grad=False)
        self.register_buffer("indices", start.indices.clone())
        self.register_buffer("metric", metric)
        self.frozen = False
        # Rows whose part of grad D was asked for since the last coding. There is one coding an optimiser step, so
        # micro-batches and layers that share their weights (ALBERT) do not count it twice.
        self._collected: set[int] = set()
        # Of the atoms by the rows of each member, and the indices that they are of.
        self._users: dict[int, Users] = {}
        self._users_of: tuple[Tensor, int] | None = None

    def freeze_supports(self) -> None:
        """From here on D and the values are trained by their true gradients (FT-F-FT)."""
        self.frozen = True
        self.dictionary.requires_grad_(True)
        self.values.requires_grad_(True)

    def target(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The stacked ``weight`` (M, N) and the atoms, renormalised first, as the metric sees them: what is coded."""
        self._collected.clear()
        lengths = self._in_metric(self.dictionary).norm(dim=2, keepdim=True)
        self.dictionary.div_(lengths.clamp_min(1e-12))
        rows = self._in_metric(blocks(weight, self.plan.block_size))
        return rows.transpose(0, 1).flatten(1), self._in_metric(self.dictionary)

    def take(self, indices: Tensor, values: Tensor, weight: Tensor, atoms: Tensor, hysteresis: float) -> float:
        """Fresh codes of :meth:`target`, where they are enough better; returns the share of entries that changed."""
        if hysteresis:
            refitted = refit(weight, atoms, self.indices)
            fresh, old = _row_errors(weight, atoms, indices, values), _row_errors(weight, atoms, self.indices, refitted)
            stays = (fresh >= (1 - hysteresis) * old).unsqueeze(2)
            indices, values = torch.where(stays, self.indices, indices), torch.where(stays, refitted, values)
        kept = (indices.unsqueeze(3) == self.indices.unsqueeze(2)).any(3).float().mean()
        self.indices.copy_(indices)
        self.values.copy_(values)
        return 1.0 - float(kept)

    def take_codes_of(self, owner: int, afresh: bool) -> None:
        """D and the codes as one of several processes has them, in place of coding."""
        self._collected.clear()
        processes.broadcast([self.dictionary, self.values, *([self.indices] if afresh else [])], owner)

    @torch.no_grad()
    def solve_dictionary(self, weight: Tensor, share: float) -> None:
        """D ← D + share·(SᵀS)⁻¹Sᵀ(W − SD): so far towards the least-squares dictionary of the codes as they are."""
        codes = self.indices, self.values
        downhill = transposed_product(*codes, weight - self.dense(), self.plan.n_atoms)
        self.dictionary.add_(least_squares(gram_of_codes(*codes, self.plan.n_atoms), downhill, _RIDGE), alpha=share)

    def _in_metric(self, rows: Tensor) -> Tensor:
        """``rows`` (N/B, ·, B) of each block as the metric sees them."""
        return rows if self.metric is None else rows @ self.metric

    @torch.no_grad()
    def dense(self) -> Tensor:
        """S·D of the whole stack, (M, N)."""
        return reconstruct(self.dictionary, self.indices, self.values)

    def effective(self, weight: Tensor, start: int, stop: int) -> Tensor:
        """Rows ``start:stop`` of S·D, with the gradients of the schedule in force."""
        indices, values = self.indices[:, start:stop], self.values[:, start:stop]
        trains = torch.is_grad_enabled() and self.dictionary.requires_grad
        if self.frozen:
            return reconstruct(self.dictionary, indices, values, self._users_by(start, stop) if trains else None)
        users = None
        if trains and start not in self._collected:
            self._collected.add(start)
            users = self._users_by(start, stop)
        # Dictionaries keep float32 under autocast: their gradient is a small difference of large numbers.
        with torch.autocast(weight.device.type, enabled=False):
            product: Tensor = _StraightThrough.apply(  # type: ignore[no-untyped-call]
                weight, self.dictionary, indices, values, users
            )
        return product

    def _users_by(self, start: int, stop: int) -> Users:
        """Of the atoms by rows ``start:stop``; they are sorted anew when the indices are others, or have changed."""
        indices, version = self._users_of or (None, -1)
        if self.indices is not indices or self.indices._version != version:
            self._users, self._users_of = {}, (self.indices, self.indices._version)
        if start not in self._users:
            self._users[start] = Users.of(self.indices[:, start:stop], self.plan.n_atoms)
        return self._users[start]


@torch.no_grad()
def code_stacks(
    stacks: Sequence[FactorizedStack], weights: Sequence[Tensor], *, afresh: bool = True, hysteresis: float = 0.0
) -> list[float]:
    """New codes of the stacked ``weights`` (M, N) of each; ``afresh=False`` keeps the supports and re-solves values.

    A row of a block keeps its support, too, unless a fresh one lowers its error by more than the share
    ``hysteresis``. Returns the share of support entries that changed in each. Call it once an optimiser step, before
    the forward pass.
    """
    if not stacks:  # there are more processes than stacks
        return []
    targets = [stack.target(weight) for stack, weight in zip(stacks, weights, strict=True)]
    if not afresh:
        known = [(*target, stack.indices) for target, stack in zip(targets, stacks, strict=True)]
        for stack, values in zip(stacks, refit_all(known), strict=True):
            stack.values.copy_(values)
        return [0.0] * len(stacks)
    sizes = [(stack.plan.n_nonzero, stack.plan.bank_limit) for stack in stacks]
    codes = sparse_code_all([(*target, *size) for target, size in zip(targets, sizes, strict=True)])
    return [
        stack.take(*fresh, *target, hysteresis) for stack, fresh, target in zip(stacks, codes, targets, strict=True)
    ]


def _row_errors(weight: Tensor, dictionary: Tensor, indices: Tensor, values: Tensor) -> Tensor:
    """(N/B, M) ‖W − SD‖ of each row of each block."""
    error = blocks(weight - reconstruct(dictionary, indices, values), dictionary.shape[2])
    return error.square().sum(dim=2).sqrt()


class FactorizedLinear(CompressedLinear):
    """An ``nn.Linear`` whose weight is a slice of a stack's S·D; keeps W and the bias of the layer it replaces."""

    def __init__(self, linear: nn.Linear, stack: FactorizedStack, start: int) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.rows = (start, start + linear.out_features)
        self._stack = (stack,)  # a tuple, so that the stack is registered once, in the model's own list

    def effective_weight(self) -> Tensor:
        return self._stack[0].effective(self.weight, *self.rows)


# A stack and its sizes.
Planned: TypeAlias = tuple[StackSpec, LayerPlan]


def plan_model(model: nn.Module, config: CompressionConfig) -> list[Planned]:
    """Sizes of every stack, or the :class:`ConfigError` of the first that does not fit."""
    if not config.block_size:
        config = replace(config, block_size=head_size(model))
    return [
        (spec, config.plan(spec.names[0], spec.role, *stacked_weight(model, spec.names).shape))
        for spec in find_stacks(model)
    ]


def factorize_model(
    model: nn.Module,
    config: CompressionConfig,
    ksvd: KSVDConfig = KSVDConfig(),  # noqa: B008 - frozen
) -> list[FactorizedStack]:
    """Replace every encoder matrix of ``model`` by its K-SVD factorization, in place.

    Returns the stacks; the model also holds them as ``model.factorized_stacks``.
    """
    plans = plan_model(model, config)
    return attach(model, plans, factorize_stacks(model, plans, ksvd))


def factorize_stacks(model: nn.Module, plans: Sequence[Planned], ksvd: KSVDConfig) -> list[Factorization]:
    """K-SVD of every planned stack; ``model`` is left as it is."""
    starts = []
    with progress("K-SVD", total=len(plans) * ksvd.sweeps) as advance:
        for spec, plan in plans:
            starts.append(factorize(stacked_weight(model, spec.names), plan, ksvd, on_sweep=advance))
    return starts


def attach(
    model: nn.Module,
    plans: Sequence[Planned],
    starts: Sequence[Factorization],
    metrics: Sequence[Tensor | None] | None = None,
) -> list[FactorizedStack]:
    """Put known factorizations into ``model`` in place of its linear layers; ``metrics``: of each, if any."""
    stacks = []
    for (spec, plan), start, metric in zip(plans, starts, metrics or [None] * len(starts), strict=True):
        stack = FactorizedStack(spec.names, plan, start, metric)
        offset = 0
        for name in spec.names:
            linear = linear_layer(model, name)
            replace_layer(model, name, FactorizedLinear(linear, stack, offset))
            offset += linear.out_features
        stacks.append(stack)
    model.factorized_stacks = nn.ModuleList(stacks)
    return stacks


def code_model(model: nn.Module, *, afresh: bool = True, hysteresis: float = 0.0) -> float:
    """Code every stack from the weights as they are now; returns the mean share of changed support entries.

    Of several processes each codes some of the stacks and gives the others what came of it. So coding gets faster with
    their number, and supports are the same everywhere even where rounding is not.
    """
    stacks = stacks_of(model)
    owners = processes.share_out(
        [stack.plan.n_atoms * stack.plan.out_features * stack.plan.n_blocks for stack in stacks]
    )
    own = [stack for stack, owner in zip(stacks, owners, strict=True) if owner == processes.rank()]
    changed = code_stacks(
        own, [stacked_weight(model, stack.names) for stack in own], afresh=afresh, hysteresis=hysteresis
    )
    flips = torch.tensor(sum(changed), dtype=torch.float64, device=stacks[0].indices.device)
    if processes.count() > 1:
        for stack, owner in zip(stacks, owners, strict=True):
            stack.take_codes_of(owner, afresh)
        processes.add_up([flips])
    return float(flips) / len(stacks)


@torch.no_grad()
def pull_to_products(model: nn.Module, strength: float) -> None:
    """Add the gradient of ½λ‖W − SD‖² to that of every stack's weights, with λ = strength·‖g‖/‖W‖.

    ``strength`` has no unit: at 1 the pull is to the task's gradient g as W − SD is to W. It is SR-STE's pull (Zhou et
    al., 2021) to the nearest S·D in the place of the nearest N:M mask.
    """
    for stack in stacks_of(model):
        weights: list[Any] = [model.get_submodule(name).weight for name in stack.names]
        gradients = [weight.grad for weight in weights]
        scale = strength * _length(gradients) / _length(weights)
        products = torch.split(stack.dense(), [len(weight) for weight in weights])
        for weight, gradient, product in zip(weights, gradients, products, strict=True):
            gradient.add_(scale * (weight - product))


def _length(parts: Sequence[Any]) -> Tensor:
    """Of several tensors as one vector."""
    squares: Tensor = sum(part.square().sum() for part in parts)
    return squares.sqrt().clamp_min(1e-30)


def solve_dictionaries(model: nn.Module, share: float) -> None:
    """The closed-form step of every stack's dictionary, from the weights as they are now."""
    for stack in stacks_of(model):
        stack.solve_dictionary(stacked_weight(model, stack.names), share)


def stacks_of(model: nn.Module) -> list[FactorizedStack]:
    """The stacks of a factorized model; empty for a dense one."""
    return list(getattr(model, "factorized_stacks", ()))
