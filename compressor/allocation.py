"""K and S of every stack under one budget, in place of one γ and one δ for all.

Of each stack a small grid of sizes is tried. A choice takes its bits by eq. 11, and costs

    cost = displacement · (error / error of the reference)²        error = ‖(W − Ŵ)X‖ / ‖WX‖

with X the inputs of the layer on calibration rows. The displacement is how far the model moves on some of these rows
when this stack alone becomes its reference, the choice next to the preset 2.8x: small errors add up in squares, so one
measurement a stack prices all its choices. It is the mean of the two losses of distillation, of hidden states and of
answers, each as a share of its sum over all stacks. One choice of each stack is taken so that the costs sum to the
least at which the bits keep to the budget: a multiple-choice knapsack, which HiGHS solves exactly.

Errors without that price are no guide. SST-2 before any training, at the size of the preset 2.8x: the preset leaves
the hidden states 0.45 of their square away, the least sum of squared errors 0.52, the least cost 0.40.

Ŵ is a plain K-SVD of a few sweeps, which starts from the dictionary of the choice before it. That ranks the choices
fairly, though fifty sweeps would leave less of each error: all get the same few, most of what K-SVD gains it gains in
the first, and what it gains later is about the same share of every choice.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import Tensor, nn

from compressor.calibration import Calibration, displacement, input_grams
from compressor.config import PRESETS, CompressionConfig, ConfigError, KSVDConfig, LayerPlan, Size
from compressor.data_aware import relative_output_error
from compressor.files import replace_file
from compressor.ksvd import Factorization, factorize
from compressor.layers import StackSpec, find_stacks, head_size, stacked_weight
from compressor.progress import progress
from kernels.banks import bank_limit

log = logging.getLogger(__name__)

# A stack and the sizes that it may have.
StackChoices: TypeAlias = tuple[StackSpec, list[LayerPlan]]

# Sweeps of K-SVD for the first choice of each K, and for each further S.
_FIRST_SWEEPS = 4
_SWEEPS = 1
# K in whole vectors of 16 lanes, at about these γ; S in steps of δ between these. The presets' own come on top.
_LANES = 16
_GAMMAS = (Fraction(1, 12), Fraction(1, 8), Fraction(1, 6), Fraction(1, 4))
_DELTAS, _DELTA_STEP = (Fraction(1, 16), Fraction(5, 16)), Fraction(1, 32)
# Each stack's displacement is measured at what this preset gives it, on so many rows at most.
_REFERENCE = PRESETS["2.8x"]
_DISPLACEMENT_ROWS = 64
# Below this is nothing.
_TINY = 1e-12
# Units of the budget in the knapsack: the solver keeps to a millionth of one.
_UNITS = 1e6
_SOLVER_SECONDS = 60.0


@dataclass(frozen=True)
class Choice:
    """One size of one stack, and what it costs."""

    plan: LayerPlan
    cost: float

    @property
    def bits(self) -> float:
        return self.plan.bits


def allocate(
    model: nn.Module, config: CompressionConfig, calibration: Calibration, seed: int, memory: Path | None = None
) -> tuple[Size, ...]:
    """K and S of every stack of ``model`` for the least cost within ``config.budget``.

    ``memory``: a file that keeps what was measured, so that a killed run measures only the rest.
    Raises :class:`ConfigError` for a ratio that is out of reach.
    """
    assert config.budget
    grid = candidates_of(model, config)
    n_weights = sum(plans[0].n_weights for _, plans in grid)
    kept = Memory(memory, repr((config, seed, calibration.seed, len(calibration.features))))
    choices = measure(model, grid, calibration, config.budget.calibration_rows, seed, kept)
    taken = choose(choices, 32 * n_weights / config.budget.ratio)
    for (spec, _), choice in zip(grid, taken, strict=True):
        log.info("%s: K %d, S %d", spec.names[0], choice.plan.n_atoms, choice.plan.n_nonzero)
    return tuple(
        Size(spec.names[0], choice.plan.n_atoms, choice.plan.n_nonzero)
        for (spec, _), choice in zip(grid, taken, strict=True)
    )


# --- the grid ------------------------------------------------------------------------------------------------


def candidates_of(model: nn.Module, config: CompressionConfig) -> list[StackChoices]:
    """The choices of each stack; :class:`ConfigError` if none fits one, or if they cannot make the ratio asked for."""
    assert config.budget
    ratio = config.budget.ratio
    if not config.block_size:
        config = replace(config, block_size=head_size(model))
    grid = []
    for spec in find_stacks(model):
        m, n = stacked_weight(model, spec.names).shape
        plans = candidates(spec.role, m, n, config)
        if not plans:
            raise ConfigError(
                f"{spec.names[0]}: no K and S fit a matrix of {m} × {n} in blocks of {config.block_size}, which must "
                f"divide {n} and be less than K; choose another block size"
            )
        grid.append((spec, plans))
    n_bits = 32 * sum(plans[0].n_weights for _, plans in grid)
    least, most = (n_bits / sum(pick(plan.bits for plan in plans) for _, plans in grid) for pick in (max, min))
    if not least <= ratio <= most:
        raise ConfigError(
            f"--ratio {ratio:g} is out of reach: with blocks of {config.block_size} the sizes that are tried give "
            f"{least:.2f}x to {most:.2f}x"
        )
    return grid


def candidates(role: str, out_features: int, in_features: int, config: CompressionConfig) -> list[LayerPlan]:
    """The grid of one stack, by K and then S; what the presets give it is on it, if it fits the stack at all."""
    block = config.block_size
    if in_features % block:
        return []
    atoms = {_LANES * round(gamma * out_features / _LANES) for gamma in _GAMMAS}
    atoms |= {round(preset.gamma[role] * out_features) for preset in PRESETS.values()}
    first, last = (max(1, round(delta * block)) for delta in _DELTAS)
    nonzeros = {*range(first, last + 1, max(1, round(_DELTA_STEP * block)))}
    nonzeros |= {max(1, round(preset.delta * block)) for preset in PRESETS.values()}
    return [
        LayerPlan(out_features, in_features, block, k, s, bank_limit(k, s) if config.limit_banks else None)
        for k in sorted(atoms)
        if block < k <= out_features
        for s in sorted(nonzeros)
    ]


# --- measuring -----------------------------------------------------------------------------------------------


def short_factorizations(weight: Tensor, plans: Sequence[LayerPlan], seed: int = 0) -> Iterator[Factorization]:
    """K-SVD of ``weight`` (M, N) in a few sweeps with each of ``plans``, as :func:`candidates` sorts them."""
    dictionary: Tensor | None = None
    for plan in plans:
        if dictionary is not None and dictionary.shape[1] != plan.n_atoms:
            dictionary = None
        sweeps = _FIRST_SWEEPS if dictionary is None else _SWEEPS
        found = factorize(weight, plan, KSVDConfig(sweeps, seed=seed), start=dictionary)
        dictionary = found.dictionary
        yield found


def measure(
    model: nn.Module, grid: Sequence[StackChoices], calibration: Calibration, n_rows: int, seed: int, memory: Memory
) -> list[list[Choice]]:
    """The choices of ``grid`` with their costs; ``model`` is left as it was."""
    missing = [(spec, plans) for spec, plans in grid if spec.names[0] not in memory.found]
    grams = input_grams(model, [spec for spec, _ in missing], calibration, n_rows) if missing else {}
    n_choices, n_missing = (sum(len(plans) for _, plans in each) for each in (grid, missing))
    with progress("sizes", total=n_choices, done=n_choices - n_missing) as advance:
        for spec, plans in missing:
            name, errors = spec.names[0], []
            weight = stacked_weight(model, spec.names).detach()
            stand_in, reference = weight, _reference(spec, plans)
            for i, found in enumerate(short_factorizations(weight, plans, seed)):
                approximation = found.dense()
                errors.append(relative_output_error(weight, approximation, grams[name]))
                if i == reference:
                    stand_in = approximation
                advance()
            moved = displacement(model, spec.names, stand_in, calibration, min(n_rows, _DISPLACEMENT_ROWS))
            memory.keep(name, errors, moved)
    return _priced(grid, [memory.found[spec.names[0]] for spec, _ in grid])


def _priced(grid: Sequence[StackChoices], measured: Sequence[Mapping[str, Any]]) -> list[list[Choice]]:
    moved = np.array([each["displacement"] for each in measured])  # (stacks, 2)
    displacements = (moved / np.maximum(moved.sum(axis=0), _TINY)).mean(axis=1).tolist()
    choices = []
    for (spec, plans), each, displaced in zip(grid, measured, displacements, strict=True):
        price = displaced / max(each["errors"][_reference(spec, plans)] ** 2, _TINY)
        choices.append([Choice(plan, price * error**2) for plan, error in zip(plans, each["errors"], strict=True)])
    return choices


def _reference(spec: StackSpec, plans: Sequence[LayerPlan]) -> int:
    """Which of ``plans`` is next to what the preset gives this stack, in proportion."""

    def distance(i: int) -> float:
        n_atoms, n_nonzero = plans[i].out_features * _REFERENCE.gamma[spec.role], plans[i].block_size * _REFERENCE.delta
        return abs(math.log(plans[i].n_atoms / n_atoms)) + abs(math.log(plans[i].n_nonzero / n_nonzero))

    return min(range(len(plans)), key=distance)


class Memory:
    """What is measured already, by stack; in a file, if there is one, for as long as ``settings`` are the same."""

    def __init__(self, path: Path | None, settings: str) -> None:
        self.path, self.settings = path, settings
        self.found: dict[str, dict[str, Any]] = {}
        if path and path.is_file():
            try:
                kept = json.loads(path.read_text())
            except ValueError:
                return
            if kept.get("settings") == settings:
                self.found = kept["found"]

    def keep(self, name: str, errors: Sequence[float], displacement: Sequence[float]) -> None:
        self.found[name] = {"errors": list(errors), "displacement": list(displacement)}
        if self.path:
            replace_file(self.path, json.dumps({"settings": self.settings, "found": self.found}).encode())


# --- choosing ------------------------------------------------------------------------------------------------


def choose(choices: Sequence[Sequence[Choice]], budget: float) -> list[Choice]:
    """One of each stack's ``choices``, of least cost together among those that take no more than ``budget`` bits."""
    rows = [_unbeaten(each) for each in choices]
    flat = [choice for row in rows for choice in row]
    costs = np.array([choice.cost for choice in flat])
    bits = np.array([choice.bits for choice in flat])
    owner = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
    found = milp(
        costs / (costs.max() or 1.0),
        integrality=np.ones(len(flat)),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(bits[None] * (_UNITS / budget), ub=_UNITS),
            LinearConstraint((owner == np.arange(len(rows))[:, None]).astype(float), lb=1, ub=1),
        ],
        options={"mip_rel_gap": 0.0, "time_limit": _SOLVER_SECONDS},
    )
    if found.x is None:
        most = sum(32 * row[0].plan.n_weights for row in rows) / sum(row[0].bits for row in rows)
        raise ConfigError(f"no choice of sizes keeps to the budget: {most:.2f}x is the most that they reach")
    return [flat[i] for i in np.flatnonzero(found.x > 0.5)]


def _unbeaten(choices: Sequence[Choice]) -> list[Choice]:
    """By size, without those that another beats at no more bits."""
    kept: list[Choice] = []
    for choice in sorted(choices, key=lambda each: (each.bits, each.cost)):
        if not kept or choice.cost < kept[-1].cost:
            kept.append(choice)
    return kept
