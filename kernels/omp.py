"""Sparse coding of a weight matrix over block dictionaries: native batch-OMP.

Block i of a weight (M, N) is its columns [i·B, (i+1)·B). Each of its M rows x is written as at most S atoms of
that block's dictionary (K, B): x ≈ Σ_s values[s] · dictionary[indices[s]]. The method is Rubinstein, Zibulevsky
and Elad, "Efficient Implementation of the K-SVD Algorithm using Batch Orthogonal Matching Pursuit" (2008);
csrc/omp_rows.cc tells how.
"""

import ctypes
import os
from typing import Any

import numpy as np
import numpy.typing as npt

from kernels.banks import bank_atoms, bank_sizes
from kernels.library import library

Float32Array = npt.NDArray[np.float32]
Int32Array = npt.NDArray[np.int32]

_ERROR_BYTES = 512


def batch_omp(
    weight: Float32Array,
    dictionary: Float32Array,
    n_nonzero: int,
    bank_limit: int | None = None,
    threads: int | None = None,
) -> tuple[Int32Array, Float32Array]:
    """Codes every row of every block with orthogonal matching pursuit.

    weight : (M, N) float32, C-contiguous; read in place, never copied.
    dictionary : (N/B, K, B) float32, C-contiguous, atoms of unit norm.
    n_nonzero : S, 1 ≤ S ≤ K.
    bank_limit : most codes of a row in one bank of atoms (banks.py); None: as many as there are.
    threads : how many to use; by default as many as the process may run on. Results do not depend on it.

    Returns indices (N/B, M, S) int32, in the order chosen, distinct within a row, and values (N/B, M, S)
    float32. Of atoms that correlate equally the lowest is chosen. A row whose residual vanishes early keeps S
    distinct indices; the spare ones have value 0. Raises ValueError on anything else than the above.
    """
    n_blocks, n_atoms = _check_operands(weight, dictionary)
    if not 1 <= n_nonzero <= n_atoms:
        raise ValueError(f"n_nonzero: expected 1 to {n_atoms} (atoms per block), got {n_nonzero}")
    limit = n_nonzero if bank_limit is None else bank_limit
    sizes = bank_sizes(n_atoms)
    if sum(min(limit, size) for size in sizes) < n_nonzero:
        raise ValueError(f"bank_limit: expected room for {n_nonzero} codes a row in {len(sizes)} banks, got {limit}")
    indices = np.empty((n_blocks, weight.shape[0], n_nonzero), np.int32)
    values = np.empty(indices.shape, np.float32)
    _run(library().dsformer_batch_omp, weight, dictionary, indices, values, limit, threads)
    return indices, values


def refit(
    weight: Float32Array, dictionary: Float32Array, indices: Int32Array, threads: int | None = None
) -> Float32Array:
    """Least-squares values on given supports.

    weight, dictionary, threads : as in `batch_omp`.
    indices : (N/B, M, S) int32, each in [0, K).

    Returns values (N/B, M, S) float32. An atom that depends on earlier ones of its support gets value 0.
    """
    n_blocks, n_atoms = _check_operands(weight, dictionary)
    _check_array("indices", indices, np.dtype(np.int32), 3)
    expected = (n_blocks, weight.shape[0])
    if indices.shape[:2] != expected or not 1 <= indices.shape[2] <= n_atoms:
        raise ValueError(f"indices: expected shape {(*expected, f'1..{n_atoms}')}, got {indices.shape}")
    if indices.min() < 0 or indices.max() >= n_atoms:
        raise ValueError(f"indices: expected numbers in [0, {n_atoms}), got {indices.min()} to {indices.max()}")
    values = np.empty(indices.shape, np.float32)
    _run(library().dsformer_refit, weight, dictionary, indices, values, indices.shape[2], threads)
    return values


def _check_operands(weight: Float32Array, dictionary: Float32Array) -> tuple[int, int]:
    """Returns (number of blocks, atoms per block)."""
    _check_array("weight", weight, np.dtype(np.float32), 2)
    _check_array("dictionary", dictionary, np.dtype(np.float32), 3)
    n_blocks, n_atoms, width = dictionary.shape
    if n_blocks * width != weight.shape[1]:
        raise ValueError(
            f"dictionary: {n_blocks} blocks of width {width} cover {n_blocks * width} columns, "
            f"but weight has {weight.shape[1]}"
        )
    return n_blocks, n_atoms


def _check_array(name: str, array: npt.NDArray[Any], dtype: np.dtype[Any], ndim: int) -> None:
    if not isinstance(array, np.ndarray) or array.dtype != dtype or array.ndim != ndim:
        got = f"{array.dtype} of {array.ndim}" if isinstance(array, np.ndarray) else type(array).__name__
        raise ValueError(f"{name}: expected a NumPy array of {dtype} of {ndim} dimensions, got {got}")
    if not array.flags.c_contiguous or not array.flags.aligned:
        raise ValueError(f"{name}: expected a C-contiguous array (it is used in place, without a copy)")
    if array.size == 0:
        raise ValueError(f"{name}: expected no empty dimension, got shape {array.shape}")


def _run(
    coder: Any,
    weight: Float32Array,
    dictionary: Float32Array,
    indices: Int32Array,
    values: Float32Array,
    limit: int,
    threads: int | None,
) -> None:
    if threads is None:
        threads = len(os.sched_getaffinity(0))
    if threads < 1:
        raise ValueError(f"threads: expected at least 1, got {threads}")
    error = ctypes.create_string_buffer(_ERROR_BYTES)
    status = coder(
        weight.ctypes.data,
        dictionary.ctypes.data,
        indices.ctypes.data,
        values.ctypes.data,
        *weight.shape,
        *dictionary.shape[:2],
        indices.shape[2],
        bank_atoms(dictionary.shape[1]),
        limit,
        threads,
        error,
        _ERROR_BYTES,
    )
    if status != 0:
        raise ValueError(error.value.decode())
