"""The batched form, the native form and least squares agree; reconstruction is differentiable."""

import pytest
import torch

from compressor import omp
from compressor.omp import (
    blocks,
    dense_codes,
    gram_of_codes,
    reconstruct,
    refit,
    sparse_code,
    sparse_code_batched,
    transposed_product,
)


def problem(m: int, n: int, k: int, b: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(m, n, generator=generator)
    return weight, torch.nn.functional.normalize(torch.randn(n // b, k, b, generator=generator), dim=2)


@pytest.mark.parametrize(("m", "n", "k", "b", "s"), [(17, 24, 11, 8, 3), (64, 64, 48, 32, 6), (5, 8, 9, 8, 8)])
@pytest.mark.parametrize("at_once", [None, 7], ids=["together", "in parts"])
def test_batched_and_native_agree(
    m: int, n: int, k: int, b: int, s: int, at_once: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if at_once:  # rows of two blocks in one part
        monkeypatch.setattr(omp, "_BUFFER_FLOATS", at_once * s * k)
    weight, dictionary = problem(m, n, k, b)
    native, native_values = sparse_code(weight, dictionary, s)
    batched, batched_values = sparse_code_batched(weight, dictionary, s)
    assert torch.equal(native.sort(2).values, batched.sort(2).values)
    torch.testing.assert_close(
        reconstruct(dictionary, native, native_values),
        reconstruct(dictionary, batched, batched_values),
        rtol=1e-4,
        atol=1e-4,
    )


def test_batched_and_native_keep_to_the_same_limit() -> None:
    weight, dictionary = problem(50, 64, 288, 32)
    native, values = sparse_code(weight, dictionary, 8, bank_limit=4)
    batched, _ = sparse_code_batched(weight, dictionary, 8, bank_limit=4)
    assert torch.equal(native.sort(2).values, batched.sort(2).values)
    in_bank = torch.nn.functional.one_hot(native // 96, 3).sum(2)
    assert in_bank.max() == 4
    free, _ = sparse_code(weight, dictionary, 8)
    assert torch.nn.functional.one_hot(free // 96, 3).sum(2).max() > 4
    assert values.abs().min() > 0


def test_refit_is_least_squares() -> None:
    weight, dictionary = problem(20, 16, 12, 8)
    indices, values = sparse_code(weight, dictionary, 3)
    torch.testing.assert_close(refit(weight, dictionary, indices), values, rtol=1e-4, atol=1e-5)
    moved = torch.nn.functional.normalize(dictionary + 0.1 * torch.randn_like(dictionary), dim=2)
    refitted = refit(weight, moved, indices)
    atoms = moved[1][indices[1, 7]]
    expected = torch.linalg.lstsq(atoms.T.double(), weight[7, 8:].double().unsqueeze(1)).solution.squeeze(1)
    torch.testing.assert_close(refitted[1, 7].double(), expected, rtol=1e-3, atol=1e-4)


def test_zero_rows_get_valid_codes() -> None:
    weight, dictionary = problem(6, 8, 9, 8)
    weight[2] = 0
    for indices, values in (sparse_code(weight, dictionary, 4), sparse_code_batched(weight, dictionary, 4)):
        assert values[0, 2].abs().max() == 0
        assert len(set(indices[0, 2].tolist())) == 4


def test_products_with_codes_are_those_of_dense_ones() -> None:
    """S·D and Sᵀ·E, with atoms that nobody uses; 300 blocks of 120 atoms are too many for two-byte numbers."""
    for m, n, k, b in ((40, 24, 11, 8), (5, 600, 120, 2)):
        weight, dictionary = problem(m, n, k, b)
        indices, values = sparse_code(weight, dictionary, 3)
        dense = dense_codes(indices, values, k)
        product = (dense @ dictionary).transpose(0, 1).flatten(1)
        torch.testing.assert_close(reconstruct(dictionary, indices, values), product)
        expected = dense.transpose(1, 2) @ blocks(weight, b)
        torch.testing.assert_close(transposed_product(indices, values, weight, k), expected)
        torch.testing.assert_close(gram_of_codes(indices, values, k), dense.transpose(1, 2) @ dense)


def test_reconstruct_gradients() -> None:
    weight, dictionary = problem(4, 6, 5, 3)
    indices, values = sparse_code(weight, dictionary, 2)
    factors = (dictionary.double().requires_grad_(), values.double().requires_grad_())
    assert torch.autograd.gradcheck(lambda d, v: reconstruct(d, indices, v), factors)
    assert dense_codes(indices, values, 5).count_nonzero() == values.count_nonzero()
