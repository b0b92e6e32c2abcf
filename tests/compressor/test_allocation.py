"""Sizes of single matrices: the knapsack is exact, keeps to its budget, and is never worse than one size for all."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import make_config, make_tokenizer
from transformers import BertForSequenceClassification

from compressor import allocation
from compressor.allocation import (
    Choice,
    Memory,
    allocate,
    candidates,
    candidates_of,
    choose,
    measure,
    short_factorizations,
)
from compressor.calibration import Calibration, displacement
from compressor.config import (
    PRESETS,
    Budget,
    CompressionConfig,
    ConfigError,
    LayerPlan,
    MethodOptions,
    compression_ratio,
)
from compressor.data import ClassifyExample, classify_features
from compressor.data_aware import relative_output_error
from compressor.dense_sparse import DenseSparse
from compressor.layers import find_stacks, stacked_weight
from compressor.stf import plan_model
from compressor.tasks import find_task

MINILM = (("qkv", 1152, 384), ("attention_output", 384, 384), ("ffn1", 1536, 384), ("ffn2", 384, 1536))
TINY = CompressionConfig(block_size=16, budget=Budget(2.5, 20))


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    model = BertForSequenceClassification(
        make_config(hidden_size=128, num_attention_heads=8, intermediate_size=256)
    ).eval()
    with torch.no_grad():
        for number, spec in enumerate(find_stacks(model)):  # some are of low rank and cost less than others
            for name in spec.names:
                weight = model.get_submodule(name).weight
                u, s, vh = torch.linalg.svd(torch.randn(weight.shape), full_matrices=False)
                weight.copy_(0.3 * (u * s * 0.5 ** (number * torch.arange(len(s)) / 8)) @ vh)
    return model


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    tokenizer = make_tokenizer()
    texts = ["the film was good .", "a dull plot .", "queen and king lived in paris .", "so very awful"] * 5
    features = classify_features([ClassifyExample(text, None, 0) for text in texts], tokenizer, 32)
    return Calibration(features, find_task("sst2"), tokenizer.pad_token_id)


@pytest.fixture(scope="module")
def measured(model: Any, calibration: Calibration) -> list[list[Choice]]:
    return measure(model, candidates_of(model, TINY), calibration, 20, 0, Memory(None, ""))


def ratio_of(taken: list[Choice]) -> float:
    return compression_ratio([choice.plan for choice in taken])


def cost_of(taken: list[Choice]) -> float:
    return sum(choice.cost for choice in taken)


# --- the knapsack --------------------------------------------------------------------------------------------

PLANS = [LayerPlan(64, 16, 8, k, s) for k in (12, 20, 40) for s in (1, 3)]


@settings(max_examples=60, deadline=None)
@given(
    costs=st.lists(st.lists(st.floats(0, 10), min_size=len(PLANS), max_size=len(PLANS)), min_size=1, max_size=3),
    share=st.floats(0, 1),
)
def test_the_choice_is_the_best_of_all(costs: list[list[float]], share: float) -> None:
    choices = [[Choice(plan, cost) for plan, cost in zip(PLANS, row, strict=True)] for row in costs]
    least, most = (len(costs) * pick(plan.bits for plan in PLANS) for pick in (min, max))
    budget = least + share * (most - least)
    taken = choose(choices, budget)
    assert [choice in row for choice, row in zip(taken, choices, strict=True)] == [True] * len(costs)
    assert sum(choice.bits for choice in taken) <= budget * (1 + 1e-9)
    within = [each for each in itertools.product(*choices) if sum(choice.bits for choice in each) <= budget]
    best = min((cost_of(list(each)) for each in within), default=None)
    if best is not None:
        assert cost_of(taken) <= best + 1e-6 * max(map(max, costs))


def test_a_budget_below_the_smallest_sizes() -> None:
    choices = [[Choice(plan, 1.0) for plan in PLANS]]
    smallest = min(plan.bits for plan in PLANS)
    with pytest.raises(ConfigError, match=rf"{32 * 64 * 16 / smallest:.2f}x is the most that they reach"):
        choose(choices, 0.9 * smallest)


# --- the grid ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
def test_what_a_preset_gives_is_a_choice(preset: str) -> None:
    config = CompressionConfig(preset, block_size=32)
    for role, m, n in MINILM:
        grid = candidates(role, m, n, config)
        assert config.plan(role, role, m, n) in grid
        assert all(32 < plan.n_atoms <= m and 1 <= plan.n_nonzero <= plan.n_atoms for plan in grid)
        assert sorted(set(grid), key=lambda plan: (plan.n_atoms, plan.n_nonzero)) == grid


def test_ratios_out_of_reach(model: Any) -> None:
    reach = r"with blocks of 16 the sizes that are tried give (\d\.\d\d)x to (\d\.\d\d)x"
    for ratio in (1.05, 50.0):
        with pytest.raises(ConfigError, match=rf"--ratio {ratio:g} is out of reach: {reach}"):
            candidates_of(model, replace(TINY, budget=Budget(ratio, 20)))
    with pytest.raises(ConfigError, match="in blocks of 20, which must divide 128"):
        candidates_of(model, replace(TINY, block_size=20))
    with pytest.raises(ConfigError, match="--ratio must be greater than 1"):
        Budget(1.0, 20)
    with pytest.raises(ConfigError, match="--calibration-rows must be at least 1"):
        Budget(2.0, 0)
    for name, value in (("preset", "2x"), ("gamma", 0.2), ("delta", 0.2)):
        with pytest.raises(ConfigError, match=f"--{name} {value} and --ratio 2.0 both set the size"):
            DenseSparse.from_options(MethodOptions(ratio=2.0, **{name: value}))  # type: ignore[arg-type]


# --- what it gains -------------------------------------------------------------------------------------------


def test_errors_fall_with_size(model: Any, calibration: Calibration) -> None:
    """Of one matrix with its S, and of the whole model with its budget."""
    spec = find_stacks(model)[0]
    plans = [LayerPlan(384, 128, 16, 48, s) for s in (1, 2, 4, 6)]
    weight, gram = stacked_weight(model, spec.names).detach(), torch.eye(128, dtype=torch.float64)
    errors = [relative_output_error(weight, found.dense(), gram) for found in short_factorizations(weight, plans)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.5 * errors[0]


def test_the_whole_costs_less_with_a_larger_budget(measured: list[list[Choice]]) -> None:
    n_bits = 32 * sum(row[0].plan.n_weights for row in measured)
    taken = [choose(measured, n_bits / ratio) for ratio in (4.0, 3.0, 2.5, 2.0)]
    assert [ratio_of(each) >= ratio for each, ratio in zip(taken, (4.0, 3.0, 2.5, 2.0), strict=True)] == [True] * 4
    costs = [cost_of(each) for each in taken]
    assert costs == sorted(costs, reverse=True)
    assert len(set(costs)) == 4
    assert len({choice.plan for choice in taken[2]}) > 4  # eight stacks of four shapes: not one size a shape


def test_never_worse_than_the_preset_at_its_size(model: Any, measured: list[list[Choice]]) -> None:
    plans = [plan for _, plan in plan_model(model, CompressionConfig("2x", block_size=16))]
    uniform = [next(c for c in row if c.plan == plan) for row, plan in zip(measured, plans, strict=True)]
    taken = choose(measured, sum(choice.bits for choice in uniform))
    assert sum(choice.bits for choice in taken) <= sum(choice.bits for choice in uniform)
    assert cost_of(taken) < cost_of(uniform)


def test_displacement_is_of_the_stand_in_alone(model: Any, calibration: Calibration) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for spec in find_stacks(model)[:2]:
        weight = stacked_weight(model, spec.names).detach().clone()
        moved = [
            displacement(model, spec.names, weight + size * torch.randn_like(weight), calibration, 20)
            for size in (0.0, 0.05, 1.0)
        ]
        for none, little, much in zip(*moved, strict=True):
            assert none == 0 < little < much
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# --- a killed run --------------------------------------------------------------------------------------------


def test_a_killed_measuring_goes_on(
    model: Any, calibration: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(allocation, "_GAMMAS", ())  # the presets' sizes alone
    monkeypatch.setattr(allocation, "_DELTAS", (Fraction(1, 8), Fraction(1, 8)))
    whole = allocate(model, TINY, calibration, 0)
    path, calls = tmp_path / "sizes.json", []

    def counted(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return short_factorizations(*arguments)

    monkeypatch.setattr(allocation, "short_factorizations", counted)
    with pytest.raises(KeyboardInterrupt):
        allocate(model, TINY, calibration, 0, path)
    assert len(json.loads(path.read_text())["found"]) == 3
    assert allocate(model, TINY, calibration, 0, path) == whole
    assert len(calls) == 4 + 5
    assert allocate(model, TINY, calibration, 0, path) == whole
    assert len(calls) == 4 + 5
    path.write_text(path.read_text()[:-9])  # what cannot be read is measured again, as is what other settings gave
    assert allocate(model, TINY, calibration, 0, path) == whole
    assert len(calls) == 4 + 5 + 8
    assert allocate(model, TINY, replace(calibration, seed=1), 0, path)
    assert len(calls) == 4 + 5 + 16
