"""DSFormer itself as a compression method: K-SVD, then the straight-through factorizer or frozen supports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from compressor.calibration import Calibration
from compressor.config import (
    CompressionConfig,
    ConfigError,
    KSVDConfig,
    MethodOptions,
    Schedule,
    compression_ratio,
)
from compressor.factors import WeightFactors
from compressor.graph import Factors
from compressor.ksvd import Factorization
from compressor.layers import linear_layer
from compressor.stf import Planned, attach, factorize_stacks, plan_model, stacks_of


@dataclass(frozen=True)
class DenseSparse:
    """W ≈ S·D with the sizes of ``compression``, started by ``ksvd``."""

    name: ClassVar[str] = "ds"
    schedules: ClassVar[tuple[Schedule, ...]] = ("ft-f-stf", "ft-f-ft")
    factors_type: ClassVar[type[WeightFactors]] = Factors

    compression: CompressionConfig
    ksvd: KSVDConfig

    @classmethod
    def from_options(cls, options: MethodOptions) -> DenseSparse:
        own = ("preset", "gamma", "delta", "block_size", "limit_banks", "iterations", "dictionary_update")
        options.require_only(cls.name, *own)
        return cls(
            CompressionConfig(
                options.preset or CompressionConfig.preset,
                options.gamma,
                options.delta,
                options.block_size,
                options.limit_banks,
            ),
            KSVDConfig(options.iterations, options.dictionary_update, options.seed),
        )

    def plan(self, model: nn.Module) -> list[Planned]:
        return plan_model(model, self.compression)

    def describe(self, plan: Sequence[Planned], errors: Mapping[str, float] | None) -> dict[str, Any]:
        return {
            "preset": self.compression.name,
            "gamma": {spec.role: sizes.n_atoms / sizes.out_features for spec, sizes in plan},
            "delta": self.compression.delta_value(),
            "block_size": plan[0][1].block_size,
            "ratio_eq11": round(compression_ratio([sizes for _, sizes in plan]), 4),
            "ksvd": asdict(self.ksvd),
            "ksvd_relative_error": errors,
        }

    def factorize(self, model: nn.Module, plan: Sequence[Planned], calibration: Calibration) -> list[Factors]:
        return [
            Factors(spec.names, *(part.cpu().numpy() for part in (start.dictionary, start.indices, start.values)))
            for (spec, _), start in zip(plan, factorize_stacks(model, plan, self.ksvd), strict=True)
        ]

    def attach(self, model: nn.Module, plan: Sequence[Planned], factors: Sequence[Factors], schedule: Schedule) -> None:
        by_name = {factor.members: factor for factor in factors}
        starts = []
        for spec, sizes in plan:
            factor = by_name.get(tuple(spec.names))
            wanted = (sizes.n_blocks, sizes.n_atoms, sizes.block_size, sizes.n_nonzero)
            found = (*factor.dictionary.shape, factor.indices.shape[2]) if factor else None
            if factor is None or found != wanted:
                raise ConfigError(
                    f"{spec.names[0]} has blocks, K, B, S of {found}, but the preset wants {wanted}; "
                    f"give the preset or the gamma, delta and block size that it was compressed with"
                )
            device = linear_layer(model, spec.names[0]).weight.device
            starts.append(
                Factorization(
                    torch.from_numpy(factor.dictionary).to(device),
                    torch.from_numpy(factor.indices).long().to(device),
                    torch.from_numpy(factor.values).to(device),
                )
            )
        for stack in attach(model, plan, starts):
            if schedule == "ft-f-ft":
                stack.freeze_supports()

    def collect(self, model: nn.Module) -> list[Factors]:
        return [
            Factors(
                stack.names,
                *(part.detach().contiguous().cpu().numpy() for part in (stack.dictionary, stack.indices, stack.values)),
            )
            for stack in stacks_of(model)
        ]
