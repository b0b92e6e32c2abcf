"""N:M semi-structured sparsity: of every M neighbours in a row of W, the N largest stay and the others are zero.

Two ways to train it, both from the fine-tuned model:

ft-f-ft   ASP (Mishra et al., "Accelerating sparse deep neural networks", 2021): the mask is set once by magnitude, and
          the weights that stay are fine-tuned.
sr-ste    Zhou et al., "Learning N:M fine-grained structured sparse neural networks from scratch" (2021): the mask is
          set anew in every forward pass, all weights get the gradient of the masked ones straight through, and those
          that are masked now are pulled to zero::

              grad W = g + λ·(1 − mask) ⊙ W

          The paper trains by SGD; Adam, here as for every method, scales that pull together with the gradient.

A group lies along ``in_features``, as sparse tensor cores want it. By eq. 11 the size is N/M·(1 + b/32) of the dense
one, with b bits for a place in the group: 2:4 is 1.88x, and there is nothing to choose. Left out on purpose: ASP's
search for a permutation of columns, and kernels that skip the zeros: the exported graph multiplies by the whole matrix.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from compressor.calibration import Calibration
from compressor.config import ConfigError, MethodOptions, Schedule
from compressor.factors import MaskedFactors, WeightFactors, index_bits
from compressor.layers import (
    CompressedLinear,
    compressed_layers,
    finite_weight,
    linear_layer,
    linear_names,
    replace_layer,
)

# Ratios are written with two digits: 1.88 asks for 2:4's 1.882.
_SAME_RATIO = 0.005


@torch.no_grad()
def largest_mask(weight: Tensor, kept: int, group: int) -> Tensor:
    """(M, N) bool: the ``kept`` largest magnitudes of each ``group`` neighbours in a row; of equals, the first."""
    # Place by place, since SR-STE does this in every step: sorting the groups takes five times as long.
    places = weight.abs().reshape(-1, group).T.contiguous()  # (group, groups)
    larger = torch.zeros(places.shape, dtype=torch.uint8, device=weight.device)  # how many of its group come before it
    for i, place in enumerate(places):
        larger[:i] += place > places[:i]
        larger[i + 1 :] += place >= places[i + 1 :]
    return (larger < kept).T.reshape(weight.shape)


class _SparseRefined(torch.autograd.Function):
    """W under its mask; the gradient goes straight through, plus λ·W where the mask is zero."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor, decay: float) -> Tensor:
        ctx.save_for_backward(weight, mask)
        ctx.decay = decay
        return weight * mask

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        weight, mask = ctx.saved_tensors
        return gradient + ctx.decay * ~mask * weight, None, None


class MaskedLinear(CompressedLinear):
    """An ``nn.Linear`` under an N:M mask; keeps its weight and bias.

    ``decay`` λ: the mask follows the weights (SR-STE). None: it stays as it is at the start (ASP).
    """

    def __init__(self, linear: nn.Linear, kept: int, group: int, decay: float | None) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.kept, self.group, self.decay = kept, group, decay
        self.register_buffer("fixed_mask", self._largest() if decay is None else None)

    def mask(self) -> Tensor:
        """(out_features, in_features) bool, as it is now."""
        return self._largest() if self.fixed_mask is None else self.fixed_mask  # type: ignore[return-value]

    def effective_weight(self) -> Tensor:
        if self.decay is None:
            return self.weight * self.mask()
        product: Tensor = _SparseRefined.apply(self.weight, self.mask(), self.decay)  # type: ignore[no-untyped-call]
        return product

    def _largest(self) -> Tensor:
        return largest_mask(self.weight, self.kept, self.group)


@dataclass(frozen=True)
class NM:
    """``kept`` of each ``group`` weights stay; ``sparse_decay`` is SR-STE's λ (its authors' default: 2e-4)."""

    name: ClassVar[str] = "nm"
    schedules: ClassVar[tuple[Schedule, ...]] = ("ft-f-ft", "sr-ste")
    factors_type: ClassVar[type[WeightFactors]] = MaskedFactors

    kept: int = 2
    group: int = 4
    sparse_decay: float = MethodOptions.sparse_decay

    def __post_init__(self) -> None:
        if not 0 < self.kept < self.group <= 256:
            raise ConfigError(f"--pattern N:M needs 0 < N < M ≤ 256, got {self.pattern}")
        if not (math.isfinite(self.sparse_decay) and self.sparse_decay >= 0):
            raise ConfigError(f"--sparse-decay must be 0 or more, got {self.sparse_decay}")

    @classmethod
    def from_options(cls, options: MethodOptions) -> NM:
        options.require_only(cls.name, "preset", "ratio", "pattern", "sparse_decay")
        found = re.fullmatch(r"(\d{1,3}):(\d{1,3})", options.pattern)
        if not found:
            raise ConfigError(f"--pattern must be N:M, as 2:4, got {options.pattern!r}")
        method = cls(int(found[1]), int(found[2]), options.sparse_decay)
        asked = options.ratio is not None or options.preset is not None
        if asked and abs(options.target_ratio() - method.ratio) > _SAME_RATIO:
            raise ConfigError(
                f"{method.pattern} sparsity is {method.ratio:.2f}x, whatever the model, and cannot be "
                f"{options.target_ratio():g}x; leave out --preset and --ratio, or choose another --pattern"
            )
        return method

    @property
    def pattern(self) -> str:
        return f"{self.kept}:{self.group}"

    @property
    def ratio(self) -> float:
        """By eq. 11, with an index of whole bits for each weight that stays."""
        return self.group / (self.kept * (1 + index_bits(self.group) / 32))

    def prepare(self, model: nn.Module) -> None:
        pass

    def plan(self, model: nn.Module) -> list[str]:
        """The names of the layers; raises :class:`ConfigError` where the pattern does not fit one."""
        names = linear_names(model)
        for name in names:
            in_features = linear_layer(model, name).in_features
            if in_features % self.group:
                raise ConfigError(
                    f"{name}: in_features {in_features} is not divisible by {self.group}; "
                    f"choose a --pattern N:M whose M divides it"
                )
        return names

    def settle(self, model: nn.Module, factors: Any, calibration: Calibration, memory: Path | None) -> NM:
        return self

    def describe(self, plan: Sequence[str], errors: Mapping[str, float] | None) -> dict[str, Any]:
        return {
            "pattern": self.pattern,
            "ratio_eq11": round(self.ratio, 4),
            "sparse_decay": self.sparse_decay,
            "relative_error": errors,
        }

    def factorize(self, model: nn.Module, plan: Sequence[str], calibration: Calibration) -> list[MaskedFactors]:
        factors = []
        for name in plan:
            weight = finite_weight(model, name)
            factors.append(self._factors(name, weight, largest_mask(weight, self.kept, self.group)))
        return factors

    def attach(
        self, model: nn.Module, plan: Sequence[str], factors: Sequence[MaskedFactors], schedule: Schedule
    ) -> None:
        """Layers start from the model's own weights: SR-STE moves those under the mask too."""
        by_name = {factor.member: factor for factor in factors}
        decay = self.sparse_decay if schedule == "sr-ste" else None
        for name in plan:
            factor = by_name.get(name)
            if factor is None or (factor.kept, factor.group) != (self.kept, self.group):
                found = f"{factor.kept}:{factor.group}" if factor else "no pattern"
                raise ConfigError(f"{name} has {found}, but {self.pattern} is wanted; give the --pattern it has")
            replace_layer(model, name, MaskedLinear(linear_layer(model, name), self.kept, self.group, decay))

    def collect(self, model: nn.Module) -> list[MaskedFactors]:
        return [
            self._factors(name, layer.weight.detach(), layer.mask())
            for name, layer in compressed_layers(model)
            if isinstance(layer, MaskedLinear)
        ]

    @classmethod
    def restore(cls, factors: Sequence[MaskedFactors]) -> tuple[NM, list[str]]:
        return cls(factors[0].kept, factors[0].group), [factor.member for factor in factors]

    def _factors(self, name: str, weight: Tensor, mask: Tensor) -> MaskedFactors:
        """The weights under ``mask`` without the others, and their places."""
        groups = mask.reshape(len(weight), -1, self.group)
        places = groups.nonzero()[:, 2].reshape(*groups.shape[:2], self.kept)
        values = weight.reshape(groups.shape).gather(2, places)
        return MaskedFactors(name, self.group, values.float().cpu().numpy(), places.to(torch.uint8).cpu().numpy())
