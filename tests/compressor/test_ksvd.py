"""K-SVD reaches the errors it should, on noise and on structure, and keeps its promises about atoms."""

import pytest
import torch

from compressor.config import ConfigError, KSVDConfig, LayerPlan
from compressor.ksvd import factorize, relative_error, svd_error


@pytest.mark.parametrize("update", ["mod", "ksvd"])
def test_gaussian_fixture(update: str) -> None:
    """i.i.d. Gaussian 768 × 64, K = 96, S = 12: structure-free, so the error is known to a hundredth."""
    weight = torch.randn(768, 64, generator=torch.Generator().manual_seed(0))
    result = factorize(weight, LayerPlan(768, 64, 64, 96, 12), KSVDConfig(15, update))  # type: ignore[arg-type]
    assert relative_error(weight, result.dense()) <= 0.42
    torch.testing.assert_close(result.dictionary.norm(dim=2), torch.ones(1, 96))


def test_auto_keeps_the_better_update_of_each_block() -> None:
    weight = torch.randn(96, 32, generator=torch.Generator().manual_seed(1))
    plan = LayerPlan(96, 32, 8, 12, 3)

    def block_errors(update: str) -> torch.Tensor:
        result = factorize(weight, plan, KSVDConfig(4, update))  # type: ignore[arg-type]
        return (weight - result.dense()).unflatten(1, (4, 8)).norm(dim=(0, 2))

    expected = torch.minimum(block_errors("mod"), block_errors("ksvd"))
    torch.testing.assert_close(block_errors("auto"), expected)


def test_recovers_a_planted_dictionary_better_than_svd() -> None:
    generator = torch.Generator().manual_seed(2)
    atoms = torch.nn.functional.normalize(torch.randn(24, 16, generator=generator), dim=1)
    codes = torch.zeros(400, 24)
    codes.scatter_(1, torch.rand(400, 24, generator=generator).topk(2, dim=1).indices, 1.0)
    codes *= torch.randn(400, 24, generator=generator)
    weight = codes @ atoms
    plan = LayerPlan(400, 16, 16, 24, 2)
    error = relative_error(weight, factorize(weight, plan, KSVDConfig(30)).dense())
    assert error < 0.15
    assert error < svd_error(weight, plan.inverse_ratio)[1] / 3


def test_error_falls_with_nonzeros_and_sweeps() -> None:
    weight = torch.randn(128, 32, generator=torch.Generator().manual_seed(3))
    by_nonzeros = [
        relative_error(weight, factorize(weight, LayerPlan(128, 32, 16, 24, s), KSVDConfig(3)).dense())
        for s in (1, 2, 4, 8, 16)
    ]
    assert by_nonzeros == sorted(by_nonzeros, reverse=True)
    assert by_nonzeros[-1] < 1e-4  # S = B: every block is represented exactly
    plan = LayerPlan(128, 32, 16, 24, 3)
    by_sweeps = [relative_error(weight, factorize(weight, plan, KSVDConfig(n)).dense()) for n in (1, 3, 9)]
    assert by_sweeps == sorted(by_sweeps, reverse=True)


def test_degenerate_weights() -> None:
    plan = LayerPlan(20, 16, 8, 10, 3)
    zero = factorize(torch.zeros(20, 16), plan, KSVDConfig(2))
    assert zero.dense().abs().max() == 0
    same = torch.ones(20, 16)  # every row alike: all atoms but one are duplicates
    assert relative_error(same, factorize(same, plan, KSVDConfig(3)).dense()) < 1e-5
    broken = torch.ones(20, 16)
    broken[3, 4] = torch.nan
    with pytest.raises(ConfigError, match="not finite"):
        factorize(broken, plan)
    with pytest.raises(ConfigError, match="expected a weight"):
        factorize(torch.ones(16, 20), plan)
