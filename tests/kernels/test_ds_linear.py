"""DSLinear in ONNX Runtime beyond the products themselves (test_tiers.py): shapes, tails, extreme tokens, threads."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from cases import EDGE_CASES, ROUNDED_ERRORS, Case
from ds_model import one_node_model, session

from kernels import reference

MAX_INT16_ERROR = ROUNDED_ERRORS["avx512vnni", "int16"]
MAX_INT8_ERROR = ROUNDED_ERRORS["avx512vbmi", "int8"]


@pytest.mark.parametrize(
    ("x_shape", "x", "inferred"),
    [
        (["tokens", 51], (7, 51), ["tokens", 53]),
        ([51], (51,), [53]),
        ([2, "a", "b", 51], (2, 3, 4, 51), [2, "a", "b", 53]),
        (["batch", None, 51], (2, 3, 51), []),  # a size with neither number nor name: nothing is inferred
        (["batch", "sequence", None], (2, 3, 51), ["batch", "sequence", 53]),
    ],
)
def test_any_rank_and_its_inferred_shape(x_shape, x, inferred):
    case = next(case for case in EDGE_CASES if case.name == "odd")
    arrays = case.arrays()
    model = session(one_node_model(arrays, x_shape))
    assert model.get_outputs()[0].shape == inferred
    inputs = np.random.default_rng(2).standard_normal(x).astype(np.float32)
    y = model.run(None, {"X": inputs})[0]
    np.testing.assert_allclose(y, reference.ds_linear(inputs, **arrays), rtol=1e-4, atol=1e-4)


def test_gelu_is_exact_over_its_whole_range():
    """Identity dictionary and codes, so that Y = gelu(X), far into both tails."""
    eye = np.eye(8, dtype=np.float32)[None]
    arrays = {"dictionary": eye, "indices": np.arange(8, dtype=np.uint8).reshape(1, 8, 1)}
    arrays["values"] = np.ones((1, 8, 1), np.float32)
    x = np.concatenate([np.linspace(-8, 8, 4000), [0, -0.0, -1e4, 1e4, -3e38, 3e38, 1e-30, -1e-30]])
    x = x.astype(np.float32).reshape(-1, 8)
    y = session(one_node_model(arrays, activation="gelu", x_shape=["tokens", 8])).run(None, {"X": x})[0]
    with np.errstate(over="ignore"):
        expected = reference.ds_linear(x, **arrays, activation="gelu")
    # erf is within 3.1e-7, and is multiplied by x / 2.
    assert (np.abs(y - expected) <= np.maximum(2.5e-7 * np.abs(x), 1e-37)).all()
    assert (y[-1] == [0, 0, 0, 1e4, 0, np.float32(3e38), y[-1, 6], y[-1, 7]]).all()


@pytest.mark.parametrize("name", ["odd", "odd-int16", "odd-int8"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_in_its_token(name, bad):
    case = next(case for case in EDGE_CASES if case.name == name)
    x = np.random.default_rng(3).standard_normal((1, 20, 51)).astype(np.float32)
    model = session(one_node_model(case.arrays()))
    clean = model.run(None, {"X": x})[0]
    x[0, 4, 10] = bad
    y = model.run(None, {"X": x})[0]
    assert not np.isfinite(y[0, 4]).all()
    np.testing.assert_array_equal(np.delete(y, 4, axis=1), np.delete(clean, 4, axis=1))


@pytest.mark.parametrize("size", [0.0, 1e-36, 1e-25, 1e-6, 1e6, 1e30])
@pytest.mark.parametrize(("name", "allowed"), [("odd-int16", 2e-3), ("odd-int8", 4e-2)])
def test_integers_follow_tokens_of_any_size(size, name, allowed):
    """Tokens are scaled one by one: a large neighbour does not round a small one away."""
    case = next(case for case in EDGE_CASES if case.name == name)
    arrays = case._replace(bias=False).arrays()
    x = np.random.default_rng(5).standard_normal((20, 51)).astype(np.float32)
    x[::2] *= np.float32(size)
    x[1, :17] = 0  # a block of zeros beside others
    y = session(one_node_model(arrays, x_shape=["tokens", 51])).run(None, {"X": x})[0]
    expected = reference.ds_linear(x, **arrays)
    largest = np.abs(expected).max(axis=1, keepdims=True)
    # Tokens shorter than 1e-33 (int16), or with no number above 1e-30 (int8), count as zero.
    assert (np.abs(y - expected) <= allowed * largest + (1e-30 if name == "odd-int16" else 1e-28)).all()


@pytest.mark.parametrize(("storage", "allowed"), [("int16", MAX_INT16_ERROR), ("int8", MAX_INT8_ERROR)])
def test_no_sum_of_integers_overflows(storage, allowed):
    """Tokens along the rows of W, all blocks as long as each other: the largest sums that there can be."""
    case = Case("worst", 12, 16, 24, 32, 8, storage=storage, bias=False)
    arrays = case.arrays()
    rows = np.zeros((32, 192))
    for i in range(12):
        codes = reference.dense_codes(arrays["indices"][i], arrays["values"][i], 24)
        block = codes @ arrays["dictionary"][i].astype(np.float64)
        rows[:, i * 16 : (i + 1) * 16] = block / np.linalg.norm(block, axis=1, keepdims=True)
    x = np.concatenate([rows, -rows]).astype(np.float32)
    y = session(one_node_model(arrays, x_shape=["tokens", 192])).run(None, {"X": x})[0]
    expected = reference.ds_linear(x, **arrays)
    assert np.abs(y - expected).max() < allowed * np.abs(expected).max()


def test_int8_codes_may_all_be_as_large_as_they_can():
    """Each value, atom and token at the end of its range, the same sign everywhere, in a long row."""
    arrays = {
        "dictionary": np.full((40, 3, 64), 127, np.int8),
        "indices": np.tile(np.arange(3, dtype=np.uint8), (40, 20, 200)),
        "values": np.full((40, 20, 600), 127, np.int8),
        "scales": np.full(20, 1e-6, np.float32),
    }
    x = np.concatenate([np.ones((1, 2560)), -np.ones((1, 2560))]).astype(np.float32)
    y = session(one_node_model(arrays, x_shape=["tokens", 2560])).run(None, {"X": x})[0]
    np.testing.assert_allclose(y, reference.ds_linear(x, **arrays), rtol=1e-2)


def test_one_session_serves_growing_and_shrinking_inputs_from_two_threads():
    case = EDGE_CASES[0]
    arrays = case.arrays()
    model = session(one_node_model(arrays), threads=2)
    rng = np.random.default_rng(4)
    xs = [rng.standard_normal((1, t, 768)).astype(np.float32) for t in (1, 200, 3, 129, 64, 16, 150, 2)]
    alone = [model.run(None, {"X": x})[0] for x in xs]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(lambda x: model.run(None, {"X": x})[0], xs * 3))
    for y, wanted in zip(together, alone * 3, strict=True):
        np.testing.assert_array_equal(y, wanted)


@pytest.mark.parametrize("storage", ["float32", "int16", "int8"])
def test_a_hundred_thousand_tokens_on_more_threads_than_cores(storage):
    """Hundreds of groups of tiles, whose tasks the threads take from one list."""
    case = Case("odd", 3, 17, 37, 53, 5, storage=storage, residual=True, norm=True)
    arrays = case.arrays()
    model = one_node_model(arrays, inputs=("X", "residual"))
    rng = np.random.default_rng(3)
    x = rng.standard_normal((1, 100_000, 51)).astype(np.float32)
    residual = rng.standard_normal((1, 100_000, 53)).astype(np.float32)
    one, many = (session(model, threads).run(None, {"X": x, "residual": residual})[0] for threads in (1, 16))
    np.testing.assert_array_equal(one, many)
    some = slice(None, None, 997)
    wanted = reference.ds_linear(x[:, some], residual=residual[:, some], **arrays)
    allowed = MAX_INT8_ERROR if storage == "int8" else MAX_INT16_ERROR
    assert np.abs(many[:, some] - wanted).max() < allowed * np.abs(wanted).max()
