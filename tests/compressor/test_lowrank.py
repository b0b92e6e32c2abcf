"""Each closed form against brute force in float64, its edges, and the order that the errors must keep."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from tiny import make_config
from torch import Tensor, nn
from transformers import BertForSequenceClassification

from compressor.config import ConfigError, MethodOptions
from compressor.data_aware import row_scales
from compressor.factors import LowRankFactors, ratio
from compressor.lowrank import DRONE, FWSVD, SVD, LowRankLinear, data_aware_svd, fisher_weighted_svd, truncated_svd

M, N = 7, 5
SEEDS = range(5)


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def product(pair: tuple[Tensor, Tensor]) -> Tensor:
    return pair[0] @ pair[1]


def brute_force(weight: Tensor, rank: int, left: Tensor, right: Tensor) -> float:
    """The least ‖L(W − AB)R‖ that alternating least squares finds from several random starts."""
    w, left, right = (each.numpy() for each in (weight, left, right))
    generator = np.random.default_rng(0)
    errors = []
    for _ in range(8):
        b = generator.standard_normal((rank, w.shape[1]))
        for _ in range(300):
            # L is diagonal with no zeros here, so it drops out of the step for A but for nothing else.
            a = np.linalg.lstsq((b @ right).T, (w @ right).T, rcond=None)[0].T
            b = np.linalg.lstsq(left @ a, left @ w, rcond=None)[0]
        errors.append(np.linalg.norm(left @ (w - a @ b) @ right))
    return float(min(errors))


@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("seed", SEEDS)
def test_svd_is_optimal(seed: int, rank: int) -> None:
    weight = random(seed, M, N)
    error = float((weight - product(truncated_svd(weight, rank))).norm())
    assert error == pytest.approx(brute_force(weight, rank, torch.eye(M), torch.eye(N)), rel=1e-6)


@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("seed", SEEDS)
def test_fwsvd_is_optimal_in_its_own_norm(seed: int, rank: int) -> None:
    weight, fisher = random(seed, M, N), random(seed + 100, M).square() + 0.01
    scale = torch.diag(fisher.sqrt())
    error = float((scale @ (weight - product(fisher_weighted_svd(weight, rank, fisher)))).norm())
    assert error == pytest.approx(brute_force(weight, rank, scale, torch.eye(N)), rel=1e-5)
    assert error <= float((scale @ (weight - product(truncated_svd(weight, rank)))).norm())
    assert error > 0


@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("seed", SEEDS)
def test_drone_is_optimal_on_its_inputs(seed: int, rank: int) -> None:
    weight, x = random(seed, M, N), random(seed + 100, N, 20) * torch.logspace(0, -1, N).double().unsqueeze(1)
    error = float(((weight - product(data_aware_svd(weight, rank, x @ x.T))) @ x).norm())
    assert error == pytest.approx(brute_force(weight, rank, torch.eye(M), x), rel=1e-5)
    assert error <= float(((weight - product(truncated_svd(weight, rank))) @ x).norm())
    assert error > 0


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("seed", SEEDS)
def test_drone_is_optimal_on_outputs_that_do_not_matter_alike(seed: int, rank: int) -> None:
    weight, x = random(seed, M, N), random(seed + 100, N, 20)
    importance = random(seed + 200, M).square()
    scale = torch.diag(row_scales(importance))
    found = product(data_aware_svd(weight, rank, x @ x.T, importance))
    error = float((scale @ (weight - found) @ x).norm())
    assert error == pytest.approx(brute_force(weight, rank, scale, x), rel=1e-5)
    assert error < float((scale @ (weight - product(data_aware_svd(weight, rank, x @ x.T))) @ x).norm())


@pytest.mark.parametrize("n_tokens", [1, 2, 3])
@pytest.mark.parametrize("seed", SEEDS)
def test_drone_on_inputs_that_span_little(seed: int, n_tokens: int) -> None:
    """As few tokens as ranks: nothing is lost on them, and what is left of the rank goes to the weight itself."""
    weight, x = random(seed, M, N), random(seed + 100, N, n_tokens)
    found = product(data_aware_svd(weight, 3, x @ x.T))
    plain = product(truncated_svd(weight, 3))
    assert float(((weight - found) @ x).norm()) < 1e-2 * float((weight @ x).norm())
    assert float(((weight - found) @ x).norm()) <= float(((weight - plain) @ x).norm())
    # The best of rank 3 that is exact on x: project x's images out first, then take the rest of the rank by SVD.
    seen = torch.linalg.qr(weight @ x)[0]
    rest = weight - seen @ (seen.T @ weight)
    best = float(torch.linalg.svdvals(rest)[3 - n_tokens :].norm())
    assert float((weight - found).norm()) == pytest.approx(best, rel=1e-2)


def test_weights_that_say_nothing_leave_plain_svd() -> None:
    weight = random(0, M, N)
    plain = product(truncated_svd(weight, 2))
    torch.testing.assert_close(product(fisher_weighted_svd(weight, 2, torch.zeros(M))), plain)
    torch.testing.assert_close(product(data_aware_svd(weight, 2, torch.zeros(N, N))), plain)


def test_rows_without_fisher_information_stay_finite_and_cost_the_others_nothing() -> None:
    weight, fisher = random(0, M, N), torch.tensor([1.0, 0.0, 2.0, 0.0, 0.0, 0.5, 0.0], dtype=torch.float64)
    second, first = fisher_weighted_svd(weight, 2, fisher)
    assert torch.isfinite(second).all()
    assert torch.isfinite(first).all()
    seen = fisher > 0
    scale = torch.diag(fisher[seen].sqrt())
    error = float((scale @ (weight - second @ first)[seen]).norm())
    assert error == pytest.approx(brute_force(weight[seen], 2, scale, torch.eye(N)), rel=1e-4)
    assert float((weight - second @ first)[~seen].norm()) < float(weight[~seen].norm())  # and something of the others


@pytest.mark.parametrize("method", ["svd", "fwsvd", "drone"])
def test_error_falls_with_size(method: str) -> None:
    weight, x, fisher = random(0, 12, 10), random(1, 10, 40), random(2, 12).square()
    weigh = {
        "svd": lambda e: e,
        "fwsvd": lambda e: fisher.sqrt().unsqueeze(1) * e,
        "drone": lambda e: e @ x,
    }[method]
    errors = []
    for rank in range(1, 11):
        pair = {
            "svd": lambda r: truncated_svd(weight, r),
            "fwsvd": lambda r: fisher_weighted_svd(weight, r, fisher),
            "drone": lambda r: data_aware_svd(weight, r, x @ x.T),
        }[method](rank)
        assert pair[0].shape == (12, rank)
        assert pair[1].shape == (rank, 10)
        errors.append(float(weigh(weight - product(pair)).norm()))
    assert all(later < earlier for earlier, later in pairwise(errors))
    assert errors[-1] < 1e-8 * float(weigh(weight).norm())


def test_columns_and_rows_are_as_long_as_each_other() -> None:
    for second, first in (
        truncated_svd(random(0, M, N), 3),
        fisher_weighted_svd(random(0, M, N), 3, random(1, M).square()),
        data_aware_svd(random(0, M, N), 3, random(1, N, N) @ random(1, N, N).T),
        truncated_svd(torch.zeros(M, N), 3),
    ):
        torch.testing.assert_close(second.norm(dim=0), first.norm(dim=1))
        assert torch.isfinite(second).all()


def test_the_layer_is_two_linear_layers() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(N, M)
    second, first = (each.float().numpy() for each in truncated_svd(linear.weight, 2))
    layer = LowRankLinear(linear, LowRankFactors("layer", first, second))
    x = torch.randn(3, N)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.effective_weight(), linear.bias))
    assert {name for name, _ in layer.named_parameters()} == {"first.weight", "second.weight", "second.bias"}
    layer(x).sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())


# --- sizes ---------------------------------------------------------------------------------------------------


@pytest.fixture
def model() -> BertForSequenceClassification:
    torch.manual_seed(0)
    return BertForSequenceClassification(make_config())


@pytest.mark.parametrize("asked", [{"preset": "2x"}, {"preset": "3.57x"}, {"ratio": 1.6}, {"ratio": 5.0}, {}])
def test_the_size_is_the_target_or_just_below(model: BertForSequenceClassification, asked: dict[str, object]) -> None:
    method = SVD.from_options(MethodOptions(**asked))  # type: ignore[arg-type]
    target = method.ratio
    assert target == {"2x": 2.0, "3.57x": 3.57}.get(str(asked.get("preset")), asked.get("ratio", 2.8))
    plan = method.plan(model)
    for each in plan:
        m, n = each.out_features, each.in_features
        assert each.rank * (m + n) * target <= m * n + 1e-6
        assert (each.rank + 1) * (m + n) * target > m * n
    factors = method.factorize(model, plan, None)  # type: ignore[arg-type] - it looks at no data
    assert ratio(factors) == pytest.approx(method.describe(plan, None)["ratio_eq11"], abs=1e-4)
    assert ratio(factors) >= target - 1e-6
    for factor in factors:
        assert factor.bits == 8 * sum(tensor.nbytes for tensor in factor.tensors().values())


@pytest.mark.parametrize(
    ("method", "options", "sentence"),
    [
        (SVD, {"ratio": 1.0}, "must be greater than 1, got 1.0"),
        (SVD, {"ratio": float("nan")}, "must be greater than 1, got nan"),
        (SVD, {"ratio": 2.0, "preset": "2x"}, "both set the size"),
        (SVD, {"preset": "9x"}, "unknown preset '9x'"),
        (SVD, {"gamma": 0.2}, "--gamma 0.2 means nothing to --method svd; its options are --preset, --ratio"),
        (SVD, {"calibration_rows": 8}, "--calibration-rows 8 means nothing to --method svd"),
        (DRONE, {"calibration_rows": 0}, "--calibration-rows must be at least 1"),
        (FWSVD, {"pattern": "1:4"}, "--pattern 1:4 means nothing to --method fwsvd"),
    ],
)
def test_options_that_cannot_work(method: type[SVD], options: dict[str, object], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        method.from_options(MethodOptions(**options))  # type: ignore[arg-type]


def test_a_target_below_rank_one_is_refused(model: BertForSequenceClassification) -> None:
    assert {each.rank for each in SVD(16.0).plan(model)} == {1}
    with pytest.raises(ConfigError, match="a ratio of 17 leaves its 32 × 32 weight less than rank 1, which is 16x"):
        SVD(17.0).plan(model)


def test_weights_that_are_not_finite_are_refused(model: BertForSequenceClassification) -> None:
    name = "bert.encoder.layer.1.output.dense"
    model.get_submodule(name).weight.data[0, 0] = torch.nan
    method = SVD(2.0)
    with pytest.raises(ConfigError, match=f"{name} has weights that are not finite"):
        method.factorize(model, method.plan(model), None)  # type: ignore[arg-type]


def test_factors_of_another_size_are_refused(model: BertForSequenceClassification) -> None:
    factors = SVD(2.0).factorize(model, SVD(2.0).plan(model), None)  # type: ignore[arg-type]
    other = SVD(4.0)
    with pytest.raises(ConfigError, match=r"has M, r, N of \(32, 8, 32\), but the ratio wants \(32, 4, 32\)"):
        other.attach(model, other.plan(model), factors, "ft-f-ft")
