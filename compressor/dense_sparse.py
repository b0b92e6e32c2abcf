"""DSFormer itself as a compression method: K-SVD, then the straight-through factorizer or frozen supports."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from compressor.allocation import allocate, candidates_of
from compressor.calibration import Calibration, output_importance
from compressor.config import (
    Budget,
    CompressionConfig,
    ConfigError,
    KSVDConfig,
    LayerPlan,
    MethodOptions,
    Schedule,
    Size,
    compression_ratio,
)
from compressor.data_aware import best_weight, factorize_outputs, relative_output_error
from compressor.factors import WeightFactors, ratio
from compressor.graph import Factors
from compressor.ksvd import Factorization
from compressor.layers import StackSpec, linear_layer, linear_names, set_weights, stacked_weight
from compressor.neurons import order_neurons
from compressor.progress import progress
from compressor.sequential import layer_inputs
from compressor.stf import Planned, attach, factorize_stacks, plan_model, stacks_of
from kernels.banks import bank_atoms, bank_limit

log = logging.getLogger(__name__)

# How much smaller than --ratio asks a checkpoint may be that is trained on under that name.
_SAME_RATIO = 1.1


@dataclass(frozen=True)
class DenseSparse:
    """W ≈ S·D with the sizes of ``compression``, started by ``ksvd``, perhaps with the neurons in a better order."""

    name: ClassVar[str] = "ds"
    schedules: ClassVar[tuple[Schedule, ...]] = ("ft-f-stf", "ft-f-ft")
    factors_type: ClassVar[type[WeightFactors]] = Factors

    compression: CompressionConfig
    ksvd: KSVDConfig
    order_neurons: bool = False

    @classmethod
    def from_options(cls, options: MethodOptions) -> DenseSparse:
        own = ("preset", "ratio", "gamma", "delta", "block_size", "limit_banks", "iterations", "dictionary_update")
        looks = options.data_aware or options.ratio is not None
        start = ("data_aware", "sequential", "weigh_outputs", "order_neurons", *(["calibration_rows"] if looks else []))
        options.require_only(cls.name, *own, *start)
        options.require_one_size()
        return cls(
            CompressionConfig(
                options.preset or CompressionConfig.preset,
                options.gamma,
                options.delta,
                options.block_size,
                options.limit_banks,
                None if options.ratio is None else Budget(options.ratio, options.calibration_rows),
            ),
            KSVDConfig(
                options.iterations,
                options.dictionary_update,
                options.seed,
                options.calibration_rows if options.data_aware else 0,
                options.sequential,
                options.weigh_outputs,
            ),
            options.order_neurons,
        )

    def prepare(self, model: nn.Module) -> None:
        if self.order_neurons:
            order_neurons(model, self.plan(model))

    def plan(self, model: nn.Module) -> list[Planned]:
        """With a budget the smallest of all sizes, until :meth:`settle` has chosen."""
        if self.compression.budget and not self.compression.sizes:
            grid = candidates_of(model, self.compression)
            return [(spec, min(plans, key=lambda plan: plan.bits)) for spec, plans in grid]
        return plan_model(model, self.compression)

    def settle(
        self, model: nn.Module, factors: Sequence[Factors], calibration: Calibration, memory: Path | None
    ) -> DenseSparse:
        budget = self.compression.budget
        if not budget:
            return self
        if factors:
            found = ratio(factors)
            if not 1 <= found / budget.ratio + 1e-9 < _SAME_RATIO:
                raise ConfigError(
                    f"the checkpoint is compressed by {found:.2f}x, but --ratio asks for {budget.ratio:g}x; "
                    f"give the ratio or the preset that it was compressed with"
                )
            sizes = tuple(Size(each.members[0], each.dictionary.shape[1], each.values.shape[2]) for each in factors)
        else:
            sizes = allocate(model, self.compression, calibration, self.ksvd.seed, memory)
        return replace(self, compression=replace(self.compression, sizes=sizes))

    def describe(self, plan: Sequence[Planned], errors: Mapping[str, float] | None) -> dict[str, Any]:
        return {
            **(self._describe_sizes(plan) if self.compression.budget else self._describe_preset(plan)),
            "block_size": plan[0][1].block_size,
            "ratio_eq11": round(compression_ratio([sizes for _, sizes in plan]), 4),
            "ksvd": asdict(self.ksvd),
            "order_neurons": self.order_neurons,
            "ksvd_relative_error": errors,
        }

    def _describe_preset(self, plan: Sequence[Planned]) -> dict[str, Any]:
        return {
            "preset": self.compression.name,
            "gamma": {spec.role: sizes.n_atoms / sizes.out_features for spec, sizes in plan},
            "delta": self.compression.delta_value(),
        }

    def _describe_sizes(self, plan: Sequence[Planned]) -> dict[str, Any]:
        """γ and δ are means over the stacks of a role."""
        assert self.compression.budget
        gamma, delta = defaultdict(list), defaultdict(list)
        for spec, sizes in plan:
            gamma[spec.role].append(sizes.n_atoms / sizes.out_features)
            delta[spec.role].append(sizes.n_nonzero / sizes.block_size)
        return {
            "preset": self.compression.name,
            "ratio_target": self.compression.budget.ratio,
            "calibration_rows": self.compression.budget.calibration_rows,
            "gamma": {role: round(mean(found), 4) for role, found in gamma.items()},
            "delta": {role: round(mean(found), 4) for role, found in delta.items()},
            "sizes": {spec.names[0]: {"K": sizes.n_atoms, "S": sizes.n_nonzero} for spec, sizes in plan},
        }

    def factorize(self, model: nn.Module, plan: Sequence[Planned], calibration: Calibration) -> list[Factors]:
        if not self.ksvd.calibration_rows:
            return [
                Factors(spec.names, *_arrays(start.dictionary, start.indices, start.values))
                for (spec, _), start in zip(plan, factorize_stacks(model, plan, self.ksvd), strict=True)
            ]
        specs, rows = [spec for spec, _ in plan], self.ksvd.calibration_rows
        inputs = layer_inputs(model, specs, calibration, rows, sequential=self.ksvd.sequential)
        weighs = self.ksvd.weigh_outputs
        importance = output_importance(model, linear_names(model), calibration, rows) if weighs else {}
        steps = sum(inputs.n_batches + sizes.n_blocks * self.ksvd.sweeps for _, sizes in plan)
        factors: list[Factors] = []
        with progress("K-SVD", total=steps) as advance:
            for spec, sizes in plan:
                weight = stacked_weight(model, spec.names).detach()
                seen = inputs.of(spec.names[0], advance)
                target = best_weight(weight, seen.gram, seen.cross)
                matters = torch.cat([importance[name] for name in spec.names]) if importance else None
                start = factorize_outputs(target, sizes, self.ksvd, seen.gram, advance, matters)
                found = start.factorization
                inputs.exchange(spec.names, found.dense())
                arrays = _arrays(found.dictionary, found.indices, found.values, start.metric, start.target)
                factors.append(Factors(spec.names, *arrays))
                error = relative_output_error(target, found.dense(), seen.gram)
                log.info("%s: outputs are off by %.4f of their norm", factors[-1].name, error)
        return factors

    def attach(self, model: nn.Module, plan: Sequence[Planned], factors: Sequence[Factors], schedule: Schedule) -> None:
        by_name = {factor.members: factor for factor in factors}
        starts, metrics = [], []
        for spec, sizes in plan:
            factor = by_name.get(tuple(spec.names))
            wanted = (sizes.n_blocks, sizes.n_atoms, sizes.block_size, sizes.n_nonzero)
            found = (*factor.dictionary.shape, factor.indices.shape[2]) if factor else None
            if factor is None or found != wanted:
                raise ConfigError(
                    f"{spec.names[0]} has blocks, K, B, S of {found}, but the preset wants {wanted}; "
                    f"give the preset, the ratio, or the gamma, delta and block size that it was compressed with"
                )
            device = linear_layer(model, spec.names[0]).weight.device
            starts.append(
                Factorization(
                    torch.from_numpy(factor.dictionary).to(device),
                    torch.from_numpy(factor.indices).long().to(device),
                    torch.from_numpy(factor.values).to(device),
                )
            )
            metrics.append(None if factor.metric is None else torch.from_numpy(factor.metric).to(device))
            if factor.target is not None:
                set_weights(model, spec.names, torch.from_numpy(factor.target))
        for stack in attach(model, plan, starts, metrics):
            if schedule == "ft-f-ft":
                stack.freeze_supports()

    def collect(self, model: nn.Module) -> list[Factors]:
        return [
            Factors(stack.names, *_arrays(stack.dictionary, stack.indices, stack.values, stack.metric))
            for stack in stacks_of(model)
        ]

    @classmethod
    def restore(cls, factors: Sequence[Factors]) -> tuple[DenseSparse, list[Planned]]:
        return cls(CompressionConfig(), KSVDConfig()), [(StackSpec(each.members, ""), _sizes(each)) for each in factors]


def _sizes(factor: Factors) -> LayerPlan:
    """Of these factors; codes that keep to the banks of their dictionary are to keep to them."""
    _, n_atoms, block_size = factor.dictionary.shape
    n_nonzero = factor.indices.shape[2]
    limit = bank_limit(n_atoms, n_nonzero)
    banks = factor.indices // bank_atoms(n_atoms)
    limited = all(int((banks == bank).sum(axis=2).max()) <= limit for bank in range(int(banks.max()) + 1))
    return LayerPlan(
        factor.out_features, factor.in_features, block_size, n_atoms, n_nonzero, limit if limited else None
    )


def _arrays(*parts: Tensor | None) -> list[Any]:
    return [None if part is None else part.detach().contiguous().cpu().numpy() for part in parts]
