"""The straight-through rule of algorithm 1, stacking, frozen supports, and the way back to plain layers."""

import copy

import pytest
import torch
from tiny import make_config
from torch import nn
from transformers import BertForSequenceClassification, DistilBertConfig, DistilBertForSequenceClassification

from compressor.config import CompressionConfig, ConfigError, KSVDConfig
from compressor.layers import find_stacks, materialize, stacked_weight
from compressor.omp import blocks, dense_codes
from compressor.stf import (
    FactorizedLinear,
    code_model,
    code_stacks,
    factorize_model,
    plan_model,
    pull_to_products,
    stacks_of,
)

CONFIG = CompressionConfig(gamma=0.4, delta=0.375, block_size=8)


@pytest.fixture
def model() -> BertForSequenceClassification:
    torch.manual_seed(0)
    return BertForSequenceClassification(make_config()).eval()


def inputs() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.tensor([[2, 5, 6, 7, 3]]), "attention_mask": torch.ones(1, 5, dtype=torch.long)}


def test_gradients_follow_algorithm_1(model: BertForSequenceClassification) -> None:
    """grad W is the gradient at S·D passed straight through; grad D = Sᵀ(SD − W), whole stack, once."""
    factorize_model(model, CONFIG, KSVDConfig(2))
    stack = stacks_of(model)[0]
    weight = stacked_weight(model, stack.names).detach().clone()
    model(**inputs()).logits[0, 0].backward()

    error = blocks(stack.dense() - weight, 8)
    codes = dense_codes(stack.indices, stack.values, stack.plan.n_atoms)
    torch.testing.assert_close(stack.dictionary.grad, codes.transpose(1, 2) @ error)
    straight = torch.cat([model.get_submodule(name).weight.grad for name in stack.names])

    plain = materialize(model)
    plain(**inputs()).logits[0, 0].backward()
    at_product = torch.cat([plain.get_submodule(name).weight.grad for name in stack.names])
    torch.testing.assert_close(straight, at_product, rtol=1e-4, atol=1e-6)


def test_dictionary_gradient_is_that_of_half_the_squared_error(model: BertForSequenceClassification) -> None:
    factorize_model(model, CONFIG, KSVDConfig(1))
    stack = stacks_of(model)[3]
    weight = stacked_weight(model, stack.names).detach()
    model(**inputs()).logits.sum().backward()
    free = stack.dictionary.detach().clone().requires_grad_()
    product = (dense_codes(stack.indices, stack.values, stack.plan.n_atoms) @ free).transpose(0, 1).flatten(1)
    (0.5 * (weight - product).square().sum()).backward()
    torch.testing.assert_close(stack.dictionary.grad, free.grad)


@pytest.mark.parametrize("change", ["coded", "loaded", "moved"])
def test_dictionary_gradient_follows_supports_that_change(model: BertForSequenceClassification, change: str) -> None:
    """The order of the nonzeros is kept from step to step, but not beyond the supports that it is of."""
    stack = factorize_model(model, CONFIG, KSVDConfig(1))[0]
    model(**inputs()).logits.sum().backward()
    stack.dictionary.grad = None
    if change == "coded":
        for name in stack.names:
            nn.init.normal_(model.get_submodule(name).weight)
        assert code_model(model) > 0.1
    else:
        indices = stack.indices.roll(3, dims=1)
        code_model(model, afresh=False)
        if change == "loaded":
            model.load_state_dict({**model.state_dict(), "factorized_stacks.0.indices": indices})
        else:
            stack.indices = indices
    model(**inputs()).logits.sum().backward()
    error = blocks(stack.dense() - stacked_weight(model, stack.names).detach(), 8)
    codes = dense_codes(stack.indices, stack.values, stack.plan.n_atoms)
    torch.testing.assert_close(stack.dictionary.grad, codes.transpose(1, 2) @ error)


def test_dictionary_gradient_is_collected_once_a_step(model: BertForSequenceClassification) -> None:
    """Two micro-batches after one coding give grad W twice and grad D once; so do no-grad passes between them."""
    stack = factorize_model(model, CONFIG, KSVDConfig(1))[0]
    with torch.no_grad():
        model(**inputs())
    model(**inputs()).logits.sum().backward()
    once = stack.dictionary.grad.clone()
    straight = model.get_submodule(stack.names[0]).weight.grad.clone()
    model(**inputs()).logits.sum().backward()
    torch.testing.assert_close(stack.dictionary.grad, once)
    torch.testing.assert_close(model.get_submodule(stack.names[0]).weight.grad, 2 * straight)
    code_model(model, afresh=False)
    model(**inputs()).logits.sum().backward()
    torch.testing.assert_close(stack.dictionary.grad, 2 * once, rtol=1e-3, atol=1e-5)


def test_coding_afresh_follows_the_weights_and_refit_keeps_supports(model: BertForSequenceClassification) -> None:
    stacks = factorize_model(model, CONFIG, KSVDConfig(2))
    assert code_model(model) == pytest.approx(0.0, abs=0.02)  # nothing moved, so next to nothing changes
    with torch.no_grad():
        for name in stacks[0].names:
            weight = model.get_submodule(name).weight
            weight.copy_(torch.randn_like(weight))
    supports = stacks[0].indices.clone()
    assert code_model(model, afresh=False) == 0.0
    assert torch.equal(stacks[0].indices, supports)
    assert code_model(model) > 0.01
    assert not torch.equal(stacks[0].indices, supports)


@pytest.mark.parametrize("afresh", [True, False])
def test_coding_does_not_depend_on_threads(model: BertForSequenceClassification, afresh: bool) -> None:
    """With several, matrices are coded side by side."""
    stacks = factorize_model(model, CONFIG, KSVDConfig(1))
    with torch.no_grad():
        for name in (name for stack in stacks for name in stack.names):
            weight = model.get_submodule(name).weight
            weight.add_(0.3 * torch.randn_like(weight))
    threads, found = torch.get_num_threads(), []
    for number in (1, 3):
        copied = copy.deepcopy(model)
        try:
            torch.set_num_threads(number)
            code_model(copied, afresh=afresh)
        finally:
            torch.set_num_threads(threads)
        found.append([(stack.indices, stack.values) for stack in stacks_of(copied)])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])
    assert not torch.equal(found[0][0][1], stacks[0].values)


@pytest.mark.parametrize("afresh", [True, False])
def test_codes_in_a_metric_are_its_least_squares(model: BertForSequenceClassification, afresh: bool) -> None:
    """What is left of a row is orthogonal, in the metric, to its atoms; and atoms have unit length in it."""
    stack = factorize_model(model, CONFIG, KSVDConfig(2))[0]
    weight = stacked_weight(model, stack.names).detach()
    stack.metric = torch.randn(stack.plan.n_blocks, 8, 8, generator=torch.Generator().manual_seed(0)).triu()
    code_stacks([stack], [weight], afresh=afresh)
    atoms = stack.dictionary @ stack.metric
    torch.testing.assert_close(atoms.norm(dim=2), torch.ones(atoms.shape[:2]))
    left = blocks(weight - stack.dense(), 8) @ stack.metric
    along = (left @ atoms.transpose(1, 2)).gather(2, stack.indices)
    scale = (blocks(weight, 8) @ stack.metric).norm(dim=2, keepdim=True)
    assert (along / scale).abs().max() < 1e-3


@pytest.mark.parametrize("with_metric", [False, True])
def test_hysteresis_keeps_supports_that_are_nearly_as_good(
    model: BertForSequenceClassification, with_metric: bool
) -> None:
    """Row by row: the fresh support where it lowers the error by more than the share, else the old one, refitted."""
    stack = factorize_model(model, CONFIG, KSVDConfig(2))[0]
    weight = stacked_weight(model, stack.names).detach() + 0.02 * torch.randn(stack.plan.out_features, 32)
    if with_metric:
        stack.metric = torch.randn(stack.plan.n_blocks, 8, 8, generator=torch.Generator().manual_seed(0)).triu()
    start = {name: tensor.clone() for name, tensor in stack.state_dict().items()}

    def coded(**how: object) -> tuple[torch.Tensor, torch.Tensor, float]:
        """Supports, errors of the rows, flips."""
        stack.load_state_dict(start)
        (flips,) = code_stacks([stack], [weight], **how)  # type: ignore[arg-type]
        left = blocks(weight - stack.dense(), 8) @ (stack.metric if with_metric else torch.eye(8))
        return stack.indices.clone(), left.norm(dim=2), flips

    old, old_errors, _ = coded(afresh=False)
    fresh, fresh_errors, fresh_flips = coded()
    mixed, mixed_errors, mixed_flips = coded(hysteresis=0.05)
    better = fresh_errors < 0.95 * old_errors
    assert 0 < better.float().mean() < 1
    assert torch.equal(mixed, torch.where(better.unsqueeze(2), fresh, old))
    torch.testing.assert_close(mixed_errors, torch.where(better, fresh_errors, old_errors))
    assert 0 < mixed_flips < fresh_flips
    assert coded(hysteresis=0.999)[2] < mixed_flips


def test_closed_form_step_of_the_dictionary(model: BertForSequenceClassification) -> None:
    """A whole step ends at the least squares, half of one half-way; an atom that nobody uses stays."""
    stack = factorize_model(model, CONFIG, KSVDConfig(2))[1]
    weight = stacked_weight(model, stack.names).detach() + 0.1 * torch.randn(32, 32)
    stack.values[:, :, 0] = torch.where(stack.indices[:, :, 0] == 3, 0.0, stack.values[:, :, 0])
    for place in range(1, stack.plan.n_nonzero):
        stack.values.data[:, :, place][stack.indices[:, :, place] == 3] = 0.0
    start = stack.dictionary.detach().clone()

    def error() -> float:
        return float((weight - stack.dense()).square().sum())

    errors = [error()]
    for share in (0.5, 1.0):
        with torch.no_grad():
            stack.dictionary.copy_(start)
        stack.solve_dictionary(weight, share)
        errors.append(error())
    assert errors[2] < errors[1] < errors[0]
    assert errors[1] - errors[2] == pytest.approx((errors[0] - errors[2]) / 4, rel=0.05)  # the error is quadratic
    assert torch.equal(stack.dictionary[:, 3], start[:, 3])
    stack.solve_dictionary(weight, 1.0)
    assert error() == pytest.approx(errors[2], rel=1e-2)


def test_pull_is_relative_to_the_gradient(model: BertForSequenceClassification) -> None:
    factorize_model(model, CONFIG, KSVDConfig(1))
    stack = stacks_of(model)[0]
    model(**inputs()).logits[0, 0].backward()
    weights = [model.get_submodule(name).weight for name in stack.names]
    task = torch.cat([weight.grad for weight in weights])
    weight = stacked_weight(model, stack.names).detach()
    pull_to_products(model, 0.3)
    pulled = torch.cat([weight.grad for weight in weights])
    expected = 0.3 * task.norm() / weight.norm() * (weight - stack.dense())
    torch.testing.assert_close(pulled - task, expected, rtol=1e-3, atol=1e-7)


def test_frozen_supports_train_by_true_gradients(model: BertForSequenceClassification) -> None:
    stacks = factorize_model(model, CONFIG, KSVDConfig(1))
    for stack in stacks:
        stack.freeze_supports()
    stack = stacks[1]
    model(**inputs()).logits[0, 0].backward()
    step = 1e-2
    gradient = stack.values.grad[0, 3, 1].item()
    with torch.no_grad():
        stack.values[0, 3, 1] += step
        up = model(**inputs()).logits[0, 0].item()
        stack.values[0, 3, 1] -= 2 * step
        down = model(**inputs()).logits[0, 0].item()
    assert gradient == pytest.approx((up - down) / (2 * step), rel=5e-2, abs=1e-4)
    assert stack.dictionary.grad.abs().sum() > 0


def test_materialized_model_answers_the_same(model: BertForSequenceClassification) -> None:
    factorize_model(model, CONFIG, KSVDConfig(2))
    before = model(**inputs()).logits
    plain = materialize(model)
    assert not any(isinstance(module, FactorizedLinear) for module in plain.modules())
    torch.testing.assert_close(plain(**inputs()).logits, before)
    assert set(plain.state_dict()) == set(BertForSequenceClassification(make_config()).state_dict())


def test_stacks_of_other_architectures() -> None:
    config = DistilBertConfig(vocab_size=30, dim=32, n_layers=2, n_heads=4, hidden_dim=64)
    stacks = find_stacks(DistilBertForSequenceClassification(config))
    assert len(stacks) == 8
    assert stacks[0].names[0].endswith("attention.q_lin")
    with pytest.raises(ConfigError, match="not a model of the BERT family"):
        find_stacks(nn.Sequential(nn.Linear(4, 4)))


def test_plans_use_the_head_size_by_default(model: BertForSequenceClassification) -> None:
    plans = plan_model(model, CompressionConfig(gamma=0.4, delta=0.375))
    assert {plan.block_size for _, plan in plans} == {8}
    assert plans[0][1].out_features == 96  # Q, K and V on top of one another
