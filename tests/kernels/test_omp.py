"""Batch-OMP against scikit-learn, and its behaviour at the edges."""

import numpy as np
import pytest
from sklearn.linear_model import orthogonal_mp_gram

from kernels import batch_omp, refit
from kernels.banks import BANK_ATOMS, QUAD, bank_atoms, bank_limit


def unit_atoms(rng, n_blocks, n_atoms, width):
    atoms = rng.standard_normal((n_blocks, n_atoms, width))
    return (atoms / np.linalg.norm(atoms, axis=-1, keepdims=True)).astype(np.float32)


def problem(rows, n_blocks, n_atoms, width, seed=0):
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((rows, n_blocks * width)).astype(np.float32)
    return weight, unit_atoms(rng, n_blocks, n_atoms, width)


def dense_codes(indices, values, n_atoms):
    """(N/B, M, S) indices and values as dense (N/B, M, K) codes."""
    codes = np.zeros((*indices.shape[:2], n_atoms))
    np.put_along_axis(codes, indices, values, axis=2)
    return codes


def approximation(dictionary, indices, values):
    """Σ_i S_i D_i, (M, N) float64."""
    codes = dense_codes(indices, values, dictionary.shape[1])
    return np.concatenate(list(codes @ dictionary.astype(np.float64)), axis=1)


@pytest.mark.parametrize(
    ("rows", "n_blocks", "n_atoms", "width", "n_nonzero"),
    [
        (1, 1, 2, 1, 1),
        (7, 3, 17, 5, 3),
        (129, 2, 48, 32, 6),
        (300, 1, 96, 64, 12),
        (64, 2, 150, 33, 13),
        (40, 1, 384, 64, 18),
    ],
)
def test_equals_scikit_learn(rows, n_blocks, n_atoms, width, n_nonzero):
    weight, dictionary = problem(rows, n_blocks, n_atoms, width)
    indices, values = batch_omp(weight, dictionary, n_nonzero)
    assert (indices.dtype, values.dtype) == (np.int32, np.float32)
    assert indices.shape == values.shape == (n_blocks, rows, n_nonzero)
    codes = dense_codes(indices, values, n_atoms)
    for i in range(n_blocks):
        atoms = dictionary[i].astype(np.float64)
        block = weight[:, i * width : (i + 1) * width].astype(np.float64)
        expected = orthogonal_mp_gram(atoms @ atoms.T, atoms @ block.T, n_nonzero_coefs=n_nonzero)
        expected = expected.reshape(n_atoms, rows).T
        np.testing.assert_array_equal(codes[i] != 0, expected != 0)
        np.testing.assert_allclose(codes[i], expected, atol=1e-4)


def limited_omp(atoms, x, n_nonzero, limit):
    """The plain algorithm: least squares anew for each support, atoms of full banks passed over."""
    size = bank_atoms(len(atoms))
    support, residual = [], x
    for _ in range(n_nonzero):
        correlations = np.abs(atoms @ residual)
        full = [bank for bank in range(-(-len(atoms) // size)) if sum(k // size == bank for k in support) >= limit]
        correlations[[k for k in range(len(atoms)) if k in support or k // size in full]] = -1
        support.append(int(correlations.argmax()))
        values = np.linalg.lstsq(atoms[support].T, x, rcond=None)[0]
        residual = x - values @ atoms[support]
    return dict(zip(support, values, strict=True))


@pytest.mark.parametrize(("n_atoms", "n_nonzero", "limit"), [(384, 8, 4), (259, 9, 3), (144, 6, 4), (96, 8, 8)])
def test_limited_codes_equal_the_plain_algorithm(n_atoms, n_nonzero, limit):
    weight, dictionary = problem(40, 2, n_atoms, 32, seed=5)
    indices, values = batch_omp(weight, dictionary, n_nonzero, bank_limit=limit)
    codes = dense_codes(indices, values, n_atoms)
    limited = 0
    for i in range(2):
        for row in range(40):
            block = weight[row, i * 32 : (i + 1) * 32].astype(np.float64)
            expected = limited_omp(dictionary[i].astype(np.float64), block, n_nonzero, limit)
            assert set(np.flatnonzero(codes[i, row])) == set(expected)
            np.testing.assert_allclose([codes[i, row, k] for k in expected], list(expected.values()), atol=1e-4)
            limited += set(expected) != set(limited_omp(dictionary[i].astype(np.float64), block, n_nonzero, n_nonzero))
    assert (limited > 0) == (n_atoms > BANK_ATOMS)  # the limit was felt


def test_a_limit_without_room_is_refused():
    weight, dictionary = problem(3, 2, 200, 8)
    with pytest.raises(ValueError, match="bank_limit: expected room for 7 codes a row in 2 banks, got 3"):
        batch_omp(weight, dictionary, 7, bank_limit=3)


@pytest.mark.parametrize("n_atoms", [1, 48, 96, 128, 129, 144, 192, 288, 384, 416, 1000, 65536])
@pytest.mark.parametrize("n_nonzero", [1, 4, 6, 8, 12, 18])
def test_banks_are_even_and_their_limit_leaves_room(n_atoms, n_nonzero):
    n_nonzero = min(n_nonzero, n_atoms)
    size, limit = bank_atoms(n_atoms), bank_limit(n_atoms, n_nonzero)
    n_banks = -(-n_atoms // size)
    assert size <= BANK_ATOMS
    assert n_banks == -(-n_atoms // BANK_ATOMS)
    assert limit * n_banks >= n_nonzero
    assert limit == n_nonzero or (limit % QUAD == 0 and limit * n_banks >= 1.25 * n_nonzero)


def test_support_as_large_as_the_block_reproduces_it():
    weight, dictionary = problem(50, 2, 24, 16)
    indices, values = batch_omp(weight, dictionary, 16)
    np.testing.assert_allclose(approximation(dictionary, indices, values), weight, atol=1e-3)


def test_support_larger_than_the_block_stays_distinct_and_finite():
    weight, dictionary = problem(20, 1, 12, 4)
    indices, values = batch_omp(weight, dictionary, 12)
    assert (np.sort(indices, axis=2) == np.arange(12)).all()
    np.testing.assert_allclose(approximation(dictionary, indices, values), weight, atol=1e-3)


def test_zero_rows_get_distinct_indices_and_zero_values():
    weight, dictionary = problem(5, 2, 20, 8)
    weight[3] = 0
    indices, values = batch_omp(weight, dictionary, 4)
    assert (values[:, 3] == 0).all()
    assert (indices[:, 3] == np.arange(4)).all()
    assert (values[:, :3] != 0).all()


def test_a_row_that_is_one_atom_stops_early():
    weight, dictionary = problem(6, 1, 20, 8)
    weight[2] = 3 * dictionary[0, 11]
    indices, values = batch_omp(weight, dictionary, 5)
    assert indices[0, 2].tolist() == [11, 0, 1, 2, 3]
    np.testing.assert_allclose(values[0, 2], [3, 0, 0, 0, 0], rtol=1e-6)


def test_duplicate_atoms_take_the_lowest_and_never_both():
    weight, dictionary = problem(100, 1, 30, 16)
    dictionary[0, 15:] = dictionary[0, :15]
    indices, values = batch_omp(weight, dictionary, 15)
    used = np.where(values != 0, indices, -1)
    assert used.max() < 15
    assert all(len(set(row)) == 15 for row in indices[0].tolist())
    assert np.isfinite(values).all()


def test_atoms_of_one_line_stop_the_row():
    dictionary = np.tile(np.float32([[[0.6, 0.8]]]), (1, 5, 1))
    dictionary[0, 1::2] *= -1
    indices, values = batch_omp(np.float32([[1.0, 0.5]]), dictionary, 3)
    assert indices.tolist() == [[[0, 1, 2]]]
    np.testing.assert_allclose(values, [[[1.0, 0, 0]]], rtol=1e-6)


def test_result_does_not_depend_on_threads():
    weight, dictionary = problem(700, 3, 48, 32)
    one, three = (batch_omp(weight, dictionary, 6, threads=n) for n in (1, 3))
    np.testing.assert_array_equal(one[0], three[0])
    np.testing.assert_array_equal(one[1], three[1])


def test_weight_scale_does_not_matter():
    weight, dictionary = problem(60, 1, 48, 32)
    indices, values = batch_omp(weight, dictionary, 6)
    for scale in (2.0**-60, 2.0**60):
        scaled = batch_omp(weight * np.float32(scale), dictionary, 6)
        np.testing.assert_array_equal(scaled[0], indices)
        np.testing.assert_array_equal(scaled[1], values * np.float32(scale))


@pytest.mark.parametrize("rows", [1, 7, 8, 9, 90, 130])  # around what is refitted together, and a task
@pytest.mark.parametrize(("n_atoms", "width", "n_nonzero"), [(48, 32, 7), (2, 1, 1), (17, 9, 3), (40, 33, 13)])
def test_refit_is_least_squares_on_the_support(rows, n_atoms, width, n_nonzero):
    weight, dictionary = problem(rows, 2, n_atoms, width)
    rng = np.random.default_rng(1)
    atoms = np.tile(np.arange(n_atoms, dtype=np.int32), (2, rows, 1))
    indices = rng.permuted(atoms, axis=2)[:, :, :n_nonzero].copy()
    values = refit(weight, dictionary, indices)
    for i, r in np.ndindex(2, rows):
        atoms = dictionary[i, indices[i, r]].astype(np.float64)
        row = weight[r, i * width : (i + 1) * width].astype(np.float64)
        expected = np.linalg.lstsq(atoms.T, row, rcond=None)[0]
        np.testing.assert_allclose(values[i, r], expected, atol=1e-4)


def test_refit_gives_dependent_atoms_nothing():
    weight, dictionary = problem(4, 1, 10, 8)
    dictionary[0, 7] = dictionary[0, 2]
    indices = np.tile(np.int32([2, 5, 7, 5]), (1, 4, 1))
    values = refit(weight, dictionary, indices)
    assert (values[..., 2:] == 0).all()
    np.testing.assert_array_equal(values[..., :2], refit(weight, dictionary, indices[..., :2].copy()))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "code",
    [lambda w, d: batch_omp(w, d, 3), lambda w, d: refit(w, d, np.zeros((2, 300, 1), np.int32))],
    ids=["batch_omp", "refit"],
)
def test_numbers_that_are_not_finite_are_refused(bad, code):
    weight, dictionary = problem(300, 2, 20, 8)
    weight[257, 9] = bad
    with pytest.raises(ValueError, match="weight row 257, block 1: expected finite numbers"):
        code(weight, dictionary)


def test_atoms_must_be_unit():
    weight, dictionary = problem(3, 2, 20, 8)
    dictionary[1, 4] *= 2
    with pytest.raises(ValueError, match="dictionary block 1, atom 4: expected norm 1, got 2"):
        batch_omp(weight, dictionary, 3)
    dictionary[1, 4] = np.nan
    with pytest.raises(ValueError, match=r"dictionary block 1, atom 4: expected norm 1, got -?nan"):
        batch_omp(weight, dictionary, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w, d: (w.astype(np.float64), d, 3), "weight: expected a NumPy array of float32 of 2"),
        (lambda w, d: (w.tolist(), d, 3), "weight: expected a NumPy array of float32 of 2"),
        (lambda w, d: (w[:, ::2], d, 3), "weight: expected a C-contiguous array"),
        (lambda w, d: (w[:0], d, 3), "weight: expected no empty dimension"),
        (lambda w, d: (w, d[0], 3), "dictionary: expected a NumPy array of float32 of 3"),
        (lambda w, d: (w, d[:1].copy(), 3), "1 blocks of width 8 cover 8 columns, but weight has 16"),
        (lambda w, d: (w, d, 0), "n_nonzero: expected 1 to 20"),
        (lambda w, d: (w, d, 21), "n_nonzero: expected 1 to 20"),
        (lambda w, d: (w, d, 3, None, 0), "threads: expected at least 1"),
    ],
)
def test_wrong_operands_are_refused_in_a_sentence(change, message):
    with pytest.raises(ValueError, match=message):
        batch_omp(*change(*problem(3, 2, 20, 8)))


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        (np.zeros((2, 3, 4), np.int64), "indices: expected a NumPy array of int32"),
        (np.zeros((2, 2, 4), np.int32), "indices: expected shape"),
        (np.full((2, 3, 4), 20, np.int32), r"indices: expected numbers in \[0, 20\), got 20 to 20"),
        (np.full((2, 3, 4), -1, np.int32), r"indices: expected numbers in \[0, 20\), got -1 to -1"),
    ],
)
def test_wrong_indices_are_refused_in_a_sentence(indices, message):
    with pytest.raises(ValueError, match=message):
        refit(*problem(3, 2, 20, 8), indices)
