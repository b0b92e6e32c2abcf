"""Low-rank baselines: W (M, N) ≈ second (M, r) · first (r, N), trained and exported as two linear layers.

Each minimises its own error over all matrices of rank r, in closed form (‖·‖ is Frobenius')::

    svd     ‖W − W'‖              Eckart and Young (1936)
    fwsvd   ‖diag(√f)(W − W')‖    f the Fisher information of W's rows: Hsu et al., "Language model compression with
                                  weighted low-rank factorization" (2022)
    drone   ‖(W − W')X‖           X the layer's inputs: Chen et al., "DRONE: Data-aware low-rank compression" (2021)

A weighted error is least where W is projected onto singular vectors of the *weighted* matrix: ``W·VVᵀ`` with the right
ones of diag(√f)·W, ``UUᵀ·W`` with the left ones of W·G^½, G = XXᵀ. Nothing is inverted, so rows without Fisher
information and inputs that span less than N dimensions need no special case. What they leave undecided, a ridge
decides: a millionth of the mean weight, by which the rest of the rank goes to the plain error ‖W − W'‖.

All of them train FT-F-FT: fine-tune, factorize, fine-tune. Q, K and V are factorized one by one, as in the papers. Left
out on purpose: ranks by each layer's own loss, as DRONE chooses them; every layer gets the same share.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from compressor.calibration import Calibration, fisher_rows, output_importance
from compressor.config import ConfigError, MethodOptions, Schedule
from compressor.data_aware import best_weight, row_scales
from compressor.factors import LowRankFactors, WeightFactors, ratio
from compressor.layers import (
    CompressedLinear,
    compressed_layers,
    find_stacks,
    finite_weight,
    linear_layer,
    linear_names,
    replace_layer,
)
from compressor.progress import progress
from compressor.sequential import layer_inputs

# Of the mean weight; see above. In float64 it moves a well-conditioned optimum by no more than this share.
_RIDGE = 1e-6

# second (M, r) and first (r, N), float64.
Pair = tuple[Tensor, Tensor]


# --- closed forms --------------------------------------------------------------------------------------------


@torch.no_grad()
def truncated_svd(weight: Tensor, rank: int) -> Pair:
    """The factors that minimise ‖W − W'‖."""
    u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    return _balanced(u[:, :rank] * s[:rank], vh[:rank])


@torch.no_grad()
def fisher_weighted_svd(weight: Tensor, rank: int, fisher: Tensor) -> Pair:
    """The factors that minimise ‖diag(√f)(W − W')‖; ``fisher`` f is (M,), not negative."""
    weight, fisher = weight.double(), fisher.double()
    scale = (fisher + _ridge(fisher)).sqrt().unsqueeze(1)
    vh = torch.linalg.svd(scale * weight, full_matrices=False)[2][:rank]
    return _balanced(weight @ vh.T, vh)


@torch.no_grad()
def data_aware_svd(weight: Tensor, rank: int, gram: Tensor, importance: Tensor | None = None) -> Pair:
    """The factors that minimise ‖(W − W')X‖; ``gram`` XXᵀ is (N, N).

    With the ``importance`` (M,) of outputs it is ‖diag(r)(W − W')X‖, see data_aware.py.
    """
    scales = row_scales(importance).unsqueeze(1) if importance is not None else 1.0
    weight = weight.double() * scales
    variances, directions = torch.linalg.eigh(gram.double())
    variances = variances.clamp_min(0)  # rounding may go below zero
    root = directions * (variances + _ridge(variances)).sqrt()
    u = torch.linalg.svd(weight @ root, full_matrices=False)[0][:, :rank]
    return _balanced(u / scales, u.T @ weight)


def _ridge(weights: Tensor) -> Tensor:
    """What every weight gets on top; where all are zero, plain SVD is left."""
    mean = weights.mean()
    return torch.where(mean > 0, _RIDGE * mean, torch.ones_like(mean))


def _balanced(second: Tensor, first: Tensor) -> Pair:
    """The same product with each column of ``second`` as long as its row of ``first``: Adam steps suit both."""
    lengths = second.norm(dim=0).clamp_min(1e-30), first.norm(dim=1).clamp_min(1e-30)
    scale = (lengths[1] / lengths[0]).sqrt()
    return second * scale, first / scale.unsqueeze(1)


# --- the layer -----------------------------------------------------------------------------------------------


class LowRankLinear(CompressedLinear):
    """``second(first(x))`` in place of an ``nn.Linear``; keeps its bias."""

    def __init__(self, linear: nn.Linear, factors: LowRankFactors) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        rank = len(factors.first)
        self.first = nn.Linear(self.in_features, rank, bias=False)
        self.second = nn.Linear(rank, self.out_features, bias=False)
        self.first.weight = nn.Parameter(torch.from_numpy(factors.first).to(linear.weight))
        self.second.weight = nn.Parameter(torch.from_numpy(factors.second).to(linear.weight))
        self.second.bias = linear.bias

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        return self.second.bias

    def effective_weight(self) -> Tensor:
        return self.second.weight @ self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))  # type: ignore[no-any-return]


# --- the methods ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RankPlan:
    """The rank r of one layer's weight (M, N)."""

    name: str
    out_features: int
    in_features: int
    rank: int

    @property
    def shape(self) -> str:
        return f"{self.out_features}x{self.in_features}"


@dataclass(frozen=True)
class _LowRank(ABC):
    """``ratio``: the target by eq. 11, which no layer misses: ranks are rounded down."""

    name: ClassVar[str]
    schedules: ClassVar[tuple[Schedule, ...]] = ("ft-f-ft",)
    factors_type: ClassVar[type[WeightFactors]] = LowRankFactors

    ratio: float

    @classmethod
    def from_options(cls, options: MethodOptions) -> _LowRank:
        own = [field.name for field in fields(cls) if field.name != "ratio"]
        options.require_only(cls.name, "preset", "ratio", *own)
        return cls(options.target_ratio(), **{name: getattr(options, name) for name in own})

    def prepare(self, model: nn.Module) -> None:  # noqa: B027 - rank does not depend on an order
        pass

    def plan(self, model: nn.Module) -> list[RankPlan]:
        plans = []
        for name in linear_names(model):
            m, n = linear_layer(model, name).weight.shape
            rank = int(m * n / (self.ratio * (m + n)) + 1e-9)  # a ratio that fits exactly is not lost to rounding
            if rank < 1:
                raise ConfigError(
                    f"{name}: a ratio of {self.ratio:g} leaves its {m} × {n} weight less than rank 1, which is "
                    f"{m * n / (m + n):.4g}x; ask for a smaller ratio"
                )
            plans.append(RankPlan(name, m, n, rank))
        return plans

    def settle(self, model: nn.Module, factors: Any, calibration: Calibration, memory: Path | None) -> _LowRank:
        return self

    def describe(self, plan: Sequence[RankPlan], errors: Mapping[str, float] | None) -> dict[str, Any]:
        stored = sum(each.rank * (each.out_features + each.in_features) for each in plan)
        return {
            "ratio_target": self.ratio,
            "ratio_eq11": round(sum(each.out_features * each.in_features for each in plan) / stored, 4),
            "ranks": {each.shape: each.rank for each in plan},
            "relative_error": errors,
            **{field.name: getattr(self, field.name) for field in fields(self) if field.name != "ratio"},
        }

    def factorize(self, model: nn.Module, plan: Sequence[RankPlan], calibration: Calibration) -> list[LowRankFactors]:
        weights = {each.name: finite_weight(model, each.name) for each in plan}
        ranks = {each.name: each.rank for each in plan}
        factors = []
        with progress(self.name, total=len(plan)) as advance:
            for each, (second, first) in zip(plan, self._pairs(model, weights, ranks, calibration), strict=True):
                factors.append(LowRankFactors(each.name, first.float().cpu().numpy(), second.float().cpu().numpy()))
                advance()
        return factors

    def attach(
        self, model: nn.Module, plan: Sequence[RankPlan], factors: Sequence[LowRankFactors], schedule: Schedule
    ) -> None:
        by_name = {factor.member: factor for factor in factors}
        for each in plan:
            factor = by_name.get(each.name)
            wanted = (each.out_features, each.rank, each.in_features)
            found = (*factor.second.shape, factor.first.shape[1]) if factor else None
            if factor is None or found != wanted:
                raise ConfigError(
                    f"{each.name} has M, r, N of {found}, but the ratio wants {wanted}; give the preset or the ratio "
                    f"that it was compressed with"
                )
            replace_layer(model, each.name, LowRankLinear(linear_layer(model, each.name), factor))

    def collect(self, model: nn.Module) -> list[LowRankFactors]:
        return [
            LowRankFactors(
                name, *(part.weight.detach().float().cpu().contiguous().numpy() for part in (layer.first, layer.second))
            )
            for name, layer in compressed_layers(model)
            if isinstance(layer, LowRankLinear)
        ]

    @classmethod
    def restore(cls, factors: Sequence[LowRankFactors]) -> tuple[_LowRank, list[RankPlan]]:
        sizes = [(factor.member, len(factor.second), factor.first.shape[1], len(factor.first)) for factor in factors]
        return cls(ratio(factors)), [RankPlan(*each) for each in sizes]

    @abstractmethod
    def _pairs(
        self, model: nn.Module, weights: Mapping[str, Tensor], ranks: Mapping[str, int], calibration: Calibration
    ) -> Iterator[Pair]:
        """Factors of the ``weights``, which are named in the order in which their layers compute."""


@dataclass(frozen=True)
class SVD(_LowRank):
    name = "svd"

    def _pairs(
        self, model: nn.Module, weights: Mapping[str, Tensor], ranks: Mapping[str, int], calibration: Calibration
    ) -> Iterator[Pair]:
        for name, weight in weights.items():
            yield truncated_svd(weight, ranks[name])


@dataclass(frozen=True)
class _Calibrated(_LowRank):
    """``calibration_rows`` of the training data are looked at."""

    calibration_rows: int = MethodOptions.calibration_rows

    def __post_init__(self) -> None:
        if self.calibration_rows < 1:
            raise ConfigError(f"--calibration-rows must be at least 1, got {self.calibration_rows}")


@dataclass(frozen=True)
class FWSVD(_Calibrated):
    name = "fwsvd"

    def _pairs(
        self, model: nn.Module, weights: Mapping[str, Tensor], ranks: Mapping[str, int], calibration: Calibration
    ) -> Iterator[Pair]:
        fisher = fisher_rows(model, list(weights), calibration, self.calibration_rows)
        for name, weight in weights.items():
            yield fisher_weighted_svd(weight, ranks[name], fisher[name])


@dataclass(frozen=True)
class DRONE(_Calibrated):
    """``sequential``: X is what a layer gets once those before it are factorized (sequential.py).

    ``weigh_outputs``: by how far the hidden states move with them (data_aware.py).
    """

    name = "drone"

    sequential: bool = False
    weigh_outputs: bool = False

    def _pairs(
        self, model: nn.Module, weights: Mapping[str, Tensor], ranks: Mapping[str, int], calibration: Calibration
    ) -> Iterator[Pair]:
        stacks, rows = find_stacks(model), self.calibration_rows
        inputs = layer_inputs(model, stacks, calibration, rows, sequential=self.sequential)
        importance = output_importance(model, list(weights), calibration, rows) if self.weigh_outputs else {}
        for stack in stacks:
            seen = inputs.of(stack.names[0], lambda: None)
            targets = {name: best_weight(weights[name], seen.gram, seen.cross) for name in stack.names}
            pairs = [
                data_aware_svd(target, ranks[name], seen.gram, importance.get(name)) for name, target in targets.items()
            ]
            inputs.exchange(stack.names, torch.cat([second @ first for second, first in pairs]))
            yield from pairs
