"""Masks keep the largest of each group, SR-STE's gradient is its formula, and the count holds the index bits."""

from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from tiny import make_config
from torch import nn
from transformers import BertForSequenceClassification

from compressor.config import ConfigError, MethodOptions
from compressor.factors import MaskedFactors, ratio
from compressor.nm import NM, MaskedLinear, largest_mask


@pytest.mark.parametrize(("kept", "group"), [(2, 4), (1, 4), (2, 8), (1, 2), (3, 5)])
def test_masks_keep_exactly_the_largest(kept: int, group: int) -> None:
    weight = torch.randn(6, 8 * group, generator=torch.Generator().manual_seed(0))
    weight[0] = 0.0  # ties keep their number, too
    weight[1] = weight[1].sign()
    mask = largest_mask(weight, kept, group)
    for row in range(6):
        for start in range(0, 8 * group, group):
            chosen = mask[row, start : start + group].numpy()
            values = weight[row, start : start + group].abs().numpy()
            truth = np.argsort(-values, kind="stable")[:kept]
            assert sorted(np.flatnonzero(chosen)) == sorted(truth)


def masked(decay: float | None) -> MaskedLinear:
    torch.manual_seed(0)
    return MaskedLinear(nn.Linear(8, 6), 2, 4, decay)


def test_sr_ste_gradient_is_its_formula() -> None:
    """grad W = g + λ·(1 − mask)·W, with g the gradient at the masked weight, straight through."""
    layer, x = masked(0.3), torch.randn(5, 8)
    target = torch.randn(5, 6)
    (layer(x) - target).square().sum().backward()

    mask = largest_mask(layer.weight.detach(), 2, 4).float()
    free = (layer.weight.detach() * mask).requires_grad_()
    (nn.functional.linear(x, free, layer.bias.detach()) - target).square().sum().backward()
    weight = layer.weight.detach()
    torch.testing.assert_close(layer.weight.grad, free.grad + 0.3 * (1 - mask) * weight)
    assert (layer.weight.grad[mask == 0] != 0).all()


def test_sr_ste_moves_its_mask_and_asp_does_not() -> None:
    for decay, moves in ((0.3, True), (None, False)):
        layer = masked(decay)
        before = layer.mask().clone()
        with torch.no_grad():
            layer.weight.copy_(torch.randn(6, 8))
        assert torch.equal(layer.mask(), before) is not moves
        assert torch.equal(layer.effective_weight() != 0, layer.mask())


def test_asp_gives_masked_weights_no_gradient() -> None:
    layer = masked(None)
    layer(torch.randn(5, 8)).sum().backward()
    assert (layer.weight.grad[~layer.mask()] == 0).all()
    assert (layer.weight.grad[layer.mask()] != 0).all()


@pytest.mark.parametrize(
    ("pattern", "size"), [("2:4", 1.8824), ("1:4", 3.7647), ("4:8", 1.8286), ("2:8", 3.6571), ("1:2", 1.9394)]
)
def test_the_size_is_the_pattern_s(pattern: str, size: float) -> None:
    torch.manual_seed(0)
    model = BertForSequenceClassification(make_config())
    method = NM.from_options(MethodOptions(pattern=pattern))
    plan = method.plan(model)
    factors = method.factorize(model, plan, None)  # type: ignore[arg-type] - it looks at no data
    assert len(factors) == 12
    assert ratio(factors) == pytest.approx(size, abs=1e-4)
    assert method.describe(plan, None)["ratio_eq11"] == size
    for factor in factors:
        tensors = factor.tensors()
        assert factor.bits == 8 * (tensors["values"].nbytes + tensors["packed_indices"].nbytes)
        again = MaskedFactors.from_tensors(factor.members, tensors)
        np.testing.assert_array_equal(again.dense(), factor.dense())
        weight = model.get_submodule(factor.member).weight.detach()
        mask = largest_mask(weight, method.kept, method.group)
        np.testing.assert_array_equal(factor.dense(), (weight * mask).numpy())


def test_error_falls_with_size() -> None:
    weight = torch.randn(16, 32, generator=torch.Generator().manual_seed(0))
    for group in (4, 8):
        errors = [float((weight * ~largest_mask(weight, kept, group)).norm()) for kept in range(1, group)]
        assert all(later < earlier for earlier, later in pairwise(errors))
    # The best of all masks of the pattern, by trying each on each group.
    masks = torch.tensor(list(combinations(range(4), 2)))
    kept = weight.reshape(-1, 4)[:, masks].square().sum(dim=2).amax(dim=1).sum()
    best = float((weight.square().sum() - kept).sqrt())
    assert float((weight * ~largest_mask(weight, 2, 4)).norm()) == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize("options", [{"ratio": 1.88}, {"ratio": 32 / 17}, {"pattern": "1:4", "ratio": 3.76}])
def test_the_pattern_s_own_size_may_be_asked_for(options: dict[str, object]) -> None:
    assert NM.from_options(MethodOptions(**options)).group == 4  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"ratio": 2.0}, "2:4 sparsity is 1.88x, whatever the model, and cannot be 2x"),
        ({"preset": "2.8x"}, "cannot be 2.8x; leave out --preset and --ratio, or choose another --pattern"),
        ({"pattern": "2of4"}, "must be N:M, as 2:4, got '2of4'"),
        ({"pattern": "4:4"}, "needs 0 < N < M ≤ 256, got 4:4"),
        ({"pattern": "0:4"}, "needs 0 < N < M"),
        ({"sparse_decay": -1.0}, "--sparse-decay must be 0 or more"),
        ({"delta": 0.5}, "--delta 0.5 means nothing to --method nm"),
    ],
)
def test_options_that_cannot_work(options: dict[str, object], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        NM.from_options(MethodOptions(**options))  # type: ignore[arg-type]


def test_a_pattern_that_does_not_fit_a_layer_is_refused() -> None:
    model = BertForSequenceClassification(make_config())
    with pytest.raises(ConfigError, match=r"query: in_features 32 is not divisible by 5"):
        NM(3, 5).plan(model)


def test_weights_that_are_not_finite_are_refused() -> None:
    model = BertForSequenceClassification(make_config())
    model.get_submodule("bert.encoder.layer.0.intermediate.dense").weight.data[0, 0] = torch.inf
    with pytest.raises(ConfigError, match=r"intermediate\.dense has weights that are not finite"):
        NM().factorize(model, NM().plan(model), None)  # type: ignore[arg-type]


def test_factors_of_another_pattern_are_refused() -> None:
    model = BertForSequenceClassification(make_config())
    factors = NM().factorize(model, NM().plan(model), None)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="has 2:4, but 1:4 is wanted"):
        NM(1, 4).attach(model, NM(1, 4).plan(model), factors, "ft-f-ft")
