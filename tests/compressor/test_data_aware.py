"""Factorizing for outputs: against float64 truth, and never worse than plain K-SVD on the data it has seen."""

from __future__ import annotations

import pytest
import torch

from compressor.config import ConfigError, KSVDConfig, LayerPlan
from compressor.data_aware import factorize_outputs, metric_root, relative_output_error, row_scales
from compressor.ksvd import factorize
from compressor.omp import blocks, sparse_code

PLAN = LayerPlan(out_features=48, in_features=32, block_size=8, n_atoms=12, n_nonzero=2)
KSVD = KSVDConfig(iterations=8)


def inputs_like_a_layer(tokens: int = 400) -> torch.Tensor:
    """Correlated, with a few strong directions and a mean, (tokens, N) float64."""
    generator = torch.Generator().manual_seed(1)
    spectrum = torch.arange(1, 33, dtype=torch.float64) ** -1.0
    mixed = torch.linalg.qr(torch.randn(32, 32, generator=generator, dtype=torch.float64)).Q
    return torch.randn(tokens, 32, generator=generator, dtype=torch.float64) * spectrum @ mixed + 0.1


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(48, 32, generator=torch.Generator().manual_seed(2))


def test_root_is_upper_and_squares_to_the_damped_gram() -> None:
    x = inputs_like_a_layer()
    gram = x.T @ x
    root = metric_root(gram)
    assert torch.equal(root, root.triu())
    scaled = gram / gram.diagonal().mean()
    torch.testing.assert_close(root @ root.T, scaled + 0.01 * torch.eye(32, dtype=torch.float64))


def test_output_error_is_that_of_the_outputs(weight: torch.Tensor) -> None:
    x = inputs_like_a_layer()
    approximation = weight + 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(3))
    truth = ((weight - approximation).double() @ x.T).norm() / (weight.double() @ x.T).norm()
    assert relative_output_error(weight, approximation, x.T @ x) == pytest.approx(float(truth), rel=1e-6)
    assert relative_output_error(weight, approximation, torch.zeros(32, 32)) == 0.0


def test_outputs_come_nearer_than_by_the_weights_alone(weight: torch.Tensor) -> None:
    x = inputs_like_a_layer()
    gram = x.T @ x
    plain = relative_output_error(weight, factorize(weight, PLAN, KSVD).dense(), gram)
    aware = relative_output_error(weight, factorize_outputs(weight, PLAN, KSVD, gram).factorization.dense(), gram)
    assert aware < 0.8 * plain


def test_targets_make_good_what_earlier_blocks_did_wrong(weight: torch.Tensor) -> None:
    """W'_i is the best that columns i could be, given Ŵ before them: the least squares over X in float64."""
    x = inputs_like_a_layer()
    x = torch.cat([x, torch.eye(32, dtype=torch.float64) * (0.01 * (x.T @ x).diagonal().mean()).sqrt()])  # the damping
    start = factorize_outputs(weight, PLAN, KSVD, inputs_like_a_layer().T @ inputs_like_a_layer())
    done = start.factorization.dense().double()
    for first in range(0, 32, 8):
        wrong = x[:, :first] @ (weight.double() - done)[:, :first].T
        best = torch.linalg.lstsq(x[:, first:], x[:, first:] @ weight.double()[:, first:].T + wrong).solution[:8].T
        torch.testing.assert_close(start.target[:, first : first + 8].double(), best, rtol=1e-4, atol=1e-4)


def test_metric_makes_the_atoms_unit(weight: torch.Tensor) -> None:
    x = inputs_like_a_layer()
    start = factorize_outputs(weight, PLAN, KSVD, x.T @ x)
    atoms = start.factorization.dictionary @ start.metric
    torch.testing.assert_close(atoms.norm(dim=2), torch.ones(4, 12), rtol=1e-4, atol=1e-4)
    # Coded in the metric, the targets give these very factors.
    measured = (blocks(start.target, 8) @ start.metric).transpose(0, 1).flatten(1)
    error = (measured - (blocks(start.factorization.dense(), 8) @ start.metric).transpose(0, 1).flatten(1)).norm()
    assert error < measured.norm()


def test_outputs_that_matter_more_come_nearer(weight: torch.Tensor) -> None:
    x = inputs_like_a_layer()
    importance = torch.linspace(0, 1, 48, dtype=torch.float64) ** 4
    plain, weighed = (
        factorize_outputs(weight, PLAN, KSVD, x.T @ x, importance=given).factorization.dense()
        for given in (None, importance)
    )
    errors = [((weight - dense).double() @ x.T).square().sum(1) for dense in (plain, weighed)]
    assert float(errors[1] @ importance) < 0.95 * float(errors[0] @ importance)
    assert float(errors[1].sum()) > float(errors[0].sum())  # what the others pay


@pytest.mark.parametrize("importance", [torch.zeros(48), torch.full((48,), 1e-9)], ids=["none", "all the same"])
def test_outputs_that_matter_alike_are_not_weighed(weight: torch.Tensor, importance: torch.Tensor) -> None:
    x = inputs_like_a_layer()
    plain, found = (factorize_outputs(weight, PLAN, KSVD, x.T @ x, importance=each) for each in (None, importance))
    torch.testing.assert_close(found.factorization.dense(), plain.factorization.dense(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.target, plain.target, rtol=1e-4, atol=1e-4)


def test_a_row_is_coded_in_its_own_scale(weight: torch.Tensor) -> None:
    """The targets, coded with the dictionary in the metric and without weights, as STF does, give these very codes."""
    x = inputs_like_a_layer()
    importance = torch.rand(48, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    start = factorize_outputs(weight, PLAN, KSVD, x.T @ x, importance=importance)
    found, rows = start.factorization, (blocks(start.target, 8) @ start.metric)
    indices, values = sparse_code(rows.transpose(0, 1).flatten(1), found.dictionary @ start.metric, PLAN.n_nonzero)
    same = (indices.sort(2).values == found.indices.sort(2).values).all(2)
    assert float(same.float().mean()) > 0.98  # ties apart
    truth = values.gather(2, indices.argsort(2))[same]
    torch.testing.assert_close(found.values.gather(2, found.indices.argsort(2))[same], truth, rtol=1e-3, atol=1e-4)


def test_importance_is_relative_and_damped() -> None:
    scales = row_scales(torch.tensor([0.0, 1.0, 3.0]) * 1e-12)
    torch.testing.assert_close(scales, torch.tensor([0.01, 0.76, 2.26], dtype=torch.float64).sqrt())


def test_inputs_that_say_nothing_leave_the_weights(weight: torch.Tensor) -> None:
    start = factorize_outputs(weight, PLAN, KSVD, torch.zeros(32, 32, dtype=torch.float64))
    torch.testing.assert_close(start.target, weight)
    torch.testing.assert_close(start.metric, torch.eye(8).expand(4, 8, 8))


def test_one_row_of_data_is_enough(weight: torch.Tensor) -> None:
    x = inputs_like_a_layer(1)
    start = factorize_outputs(weight, PLAN, KSVD, x.T @ x)
    assert torch.isfinite(start.factorization.dense()).all()
    assert relative_output_error(weight, start.factorization.dense(), x.T @ x) < 0.5


def test_broken_inputs_are_refused(weight: torch.Tensor) -> None:
    gram = -torch.eye(32, dtype=torch.float64)
    gram[0, 0] = 100.0
    with pytest.raises(ConfigError, match="no positive Gram matrix"):
        factorize_outputs(weight, PLAN, KSVD, gram)
