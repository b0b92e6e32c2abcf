"""Layer after layer: inputs against hooks on single rows, targets against least squares, and what it is for."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_calibration import make_calibration, make_model
from typer.testing import CliRunner

from compressor.__main__ import app
from compressor.calibration import Calibration, input_grams
from compressor.config import CompressionConfig, ConfigError, KSVDConfig, MethodOptions
from compressor.data import collate
from compressor.data_aware import best_weight
from compressor.dense_sparse import DenseSparse
from compressor.layers import find_stacks, materialize, set_weights, stacked_weight
from compressor.losses import LABELS
from compressor.methods import find_method
from compressor.sequential import layer_inputs

N = 12


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def seen_by(model: Any, name: str, calibration: Calibration) -> torch.Tensor:
    """(tokens, N) of the layer's calls, one row of data at a time: nothing is padded."""
    seen: list[torch.Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, x: seen.append(x[0][0]))
    model.eval()
    with torch.no_grad():
        for feature in calibration.features:
            batch = collate([feature], 0)
            model(**{key: value for key, value in batch.items() if key not in LABELS})
    handle.remove()
    return torch.cat(seen)


@pytest.mark.parametrize("name", ["bert", "qa", "albert"])
def test_inputs_are_those_behind_the_exchanged_layers(name: str) -> None:
    model, calibration = make_model(name), make_calibration(name)
    stacks = find_stacks(model)
    dense, exchanged = copy.deepcopy(model), copy.deepcopy(model)
    inputs = layer_inputs(model, stacks, calibration, 100, sequential=True)
    batches = 0

    def advance() -> None:
        nonlocal batches
        batches += 1

    for i, stack in enumerate(stacks):
        found = inputs.of(stack.names[0], advance)
        x, given = (seen_by(each, stack.names[0], calibration) for each in (dense, exchanged))
        torch.testing.assert_close(found.gram, given.T @ given, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(found.cross, x.T @ given, rtol=1e-6, atol=1e-8)
        weight = random(i, *stacked_weight(model, stack.names).shape)
        inputs.exchange(stack.names, weight)
        set_weights(exchanged, stack.names, weight)
    assert batches == len(stacks) * inputs.n_batches == len(stacks) * 3
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())
    for (key, tensor), (_, before) in zip(model.state_dict().items(), dense.state_dict().items(), strict=True):
        assert torch.equal(tensor, before), key


def test_all_at_once_they_are_those_of_the_dense_model() -> None:
    model, calibration = make_model("bert"), make_calibration("bert")
    stacks = find_stacks(model)
    inputs = layer_inputs(model, stacks, calibration, 100, sequential=False)
    grams = input_grams(model, stacks, calibration, 100)
    for stack in stacks:
        found = inputs.of(stack.names[0], lambda: None)
        inputs.exchange(stack.names, torch.zeros_like(stacked_weight(model, stack.names)))
        assert torch.equal(found.gram, grams[stack.names[0]])
        assert torch.equal(found.cross, found.gram)
    assert inputs.n_batches == 0


def test_no_layer_behind_the_one_looked_at_computes() -> None:
    model, calibration = make_model("bert"), make_calibration("bert")
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    model.classifier.register_forward_pre_hook(count)  # the copy has it, too
    inputs = layer_inputs(model, find_stacks(model), calibration, 100, sequential=True)
    for stack in find_stacks(model):
        inputs.of(stack.names[0], lambda: None)
    assert calls == 2 * len(find_stacks(model))  # of three batches the first, which tells how often a layer is called


def test_best_weight_is_the_least_squares_solution() -> None:
    """‖W X − W' X'‖² with the damping that holds W' to W, a hundredth of the mean diagonal."""
    weight, x = random(0, 5, N), random(1, N, 40)
    given = x + 0.3 * random(2, N, 40)
    gram = given @ given.T
    hold = (0.01 * gram.diagonal().mean()).sqrt() * torch.eye(N, dtype=torch.float64)
    truth = torch.linalg.lstsq(torch.cat([given.T, hold]), torch.cat([(weight @ x).T, hold @ weight.T])).solution.T
    found = best_weight(weight, gram, x @ given.T)
    torch.testing.assert_close(found, truth)
    error = (found @ given - weight @ x).norm()
    assert error < 0.9 * (weight @ given - weight @ x).norm()


def test_best_weight_of_the_same_inputs_is_the_weight_itself() -> None:
    weight, x = random(0, 5, N).float(), random(1, N, 4)  # that span less than N dimensions
    assert torch.equal(best_weight(weight, x @ x.T, x @ x.T), weight)
    nothing = torch.zeros(N, N, dtype=torch.float64)
    assert torch.equal(best_weight(weight, nothing, nothing), weight)


@pytest.mark.parametrize("name", ["ds", "drone"])
def test_the_model_comes_nearer_to_the_dense_one(name: str) -> None:
    """On its calibration data, where layers that are each the best for the dense inputs add up their errors."""
    calibration = make_calibration("bert", n_rows=60)
    answers = {}
    for sequential in (None, False, True):
        model = make_model("bert").float()
        if sequential is not None:
            size = (
                {"gamma": 0.3, "delta": 0.25, "data_aware": True, "iterations": 5} if name == "ds" else {"ratio": 3.0}
            )
            method = find_method(name).from_options(MethodOptions(**size, sequential=sequential))
            plan = method.plan(model)
            method.attach(model, plan, method.factorize(model, plan, calibration), "ft-f-ft")
            materialize(model)
        model.eval()
        with torch.no_grad():
            rows = [collate([feature], 0) for feature in calibration.features]
            hidden = [model.bert(row["input_ids"], row["attention_mask"]).last_hidden_state[0] for row in rows]
        answers[sequential] = torch.cat(hidden)
    errors = {way: float((answers[way] - answers[None]).norm() / answers[None].norm()) for way in (False, True)}
    assert errors[True] < 0.9 * errors[False]


def test_targets_are_what_stf_trains() -> None:
    model, calibration = make_model("bert").float(), make_calibration("bert")
    method = DenseSparse(CompressionConfig(gamma=0.4, delta=0.375), KSVDConfig(2, calibration_rows=9, sequential=True))
    plan = method.plan(model)
    before = stacked_weight(model, plan[-1][0].names).clone()
    factors = method.factorize(model, plan, calibration)
    method.attach(model, plan, factors, "ft-f-stf")
    assert factors[-1].target is not None
    target = torch.from_numpy(factors[-1].target)
    assert torch.equal(stacked_weight(model, plan[-1][0].names), target)
    assert not torch.equal(before, target)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--schedule", "ft-f"], True),
        (["--schedule", "ft-f", "--no-sequential"], False),
        (["--schedule", "ft-f", "--no-data-aware"], False),
        (["--steps", "1"], False),
        (["--steps", "1", "--sequential"], True),
    ],
)
def test_compress_is_sequential_where_nothing_is_trained(
    flags: list[str], expected: bool, tiny_bert: Path, sentiment_tsv: Path, tmp_path: Path
) -> None:
    sizes = ["--gamma", "0.4", "--delta", "0.375", "--block-size", "8", "--iterations", "1"]
    data = ["--model", str(tiny_bert), "--task", "classify", "--train-file", str(sentiment_tsv)]
    done = CliRunner().invoke(app, ["compress", *data, "--output", str(tmp_path / "small"), *sizes, *flags])
    assert done.exit_code == 0, done.output
    record = json.loads((tmp_path / "small" / "training.json").read_text())
    assert record["compression"]["ksvd"]["sequential"] is expected
    assert record["compression"]["ksvd"]["weigh_outputs"] is ("--no-data-aware" not in flags)


def test_what_cannot_be_followed_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--sequential follows training rows .* wants --data-aware too"):
        find_method("ds").from_options(MethodOptions(sequential=True))
    with pytest.raises(ConfigError, match=r"--weigh-outputs looks at training rows.* wants --data-aware too"):
        find_method("ds").from_options(MethodOptions(weigh_outputs=True))
    with pytest.raises(ConfigError, match="--weigh-outputs True means nothing to --method fwsvd"):
        find_method("fwsvd").from_options(MethodOptions(preset="2x", weigh_outputs=True))
    with pytest.raises(ConfigError, match="--sequential True means nothing to --method svd"):
        find_method("svd").from_options(MethodOptions(preset="2x", sequential=True))
    model, calibration = make_model("bert"), make_calibration("bert")
    with pytest.raises(ConfigError, match="nothing to calibrate on"):
        layer_inputs(model, find_stacks(model), replace(calibration, features=[]), 5, sequential=True)
    model.bert.embeddings.LayerNorm.bias.data[3] = torch.nan
    inputs = layer_inputs(model, find_stacks(model), calibration, 5, sequential=True)
    with pytest.raises(ConfigError, match=r"the inputs of bert.encoder.layer.0.* are not finite"):
        inputs.of(find_stacks(model)[0].names[0], lambda: None)
    assert not any(module._forward_pre_hooks for module in model.modules())
