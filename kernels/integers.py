"""A layer's weights as integers of 16 or 8 bits with one scale a row: W = diag(scales) Σ_i S_i D_i.

Integer multiply-adds use them as they are. FORMAT.md section 4 says what those of 16 bits must keep to, so that no sum
of a tier that computes in integers overflows; those of 8 bits are free.
"""

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from kernels.reference import dense_codes

# Norm of the longest atom.
LONGEST_ATOM = 1 << 14
# What a sum of products may reach.
LARGEST_SUM = 2**31 - 1
# Left of it for the rounding of the weights, which comes after the scales are chosen.
_ROOM = 0.99


def to_int16(
    dictionary: npt.NDArray[Any], indices: npt.NDArray[Any], values: npt.NDArray[Any]
) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.int16], npt.NDArray[np.float32]]:
    """dictionary (N/B, K, B), values (N/B, M, S) and scales (M,) of the 16-bit form.

    dictionary : (N/B, K, B); indices, values : (N/B, M, S); finite floats. Atoms may have any norm: it moves into the
    values. A row whose scale would be below float32's range becomes zero.
    """
    atoms = dictionary.astype(np.float64)
    norms = np.linalg.norm(atoms, axis=2)
    unit = LONGEST_ATOM - 0.5 * math.sqrt(atoms.shape[2])  # rounding adds at most half a unit a column
    atoms = np.rint(atoms * (unit / np.where(norms > 0, norms, 1.0))[:, :, None])
    codes = values * np.take_along_axis(norms[:, None, :], indices.astype(np.int64), axis=2) / unit

    with np.errstate(divide="ignore"):
        steps = np.minimum(
            np.iinfo(np.int16).max / np.abs(codes).max(axis=(0, 2)),
            _ROOM * LARGEST_SUM / largest_sums(atoms, indices, codes),
        )
    scales = (1.0 / steps).astype(np.float32)
    numbers = np.rint(codes * np.where(scales > 0, steps, 0.0)[:, None])
    return atoms.astype(np.int16), numbers.astype(np.int16), scales


def to_int8(
    dictionary: npt.NDArray[Any], indices: npt.NDArray[Any], values: npt.NDArray[Any]
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """dictionary (N/B, K, B), values (N/B, M, S) and scales (M,) of the 8-bit form; arguments as for to_int16.

    An atom's largest number becomes 127, as does the largest of a row's values.
    """
    atoms = dictionary.astype(np.float64)
    sizes = np.abs(atoms).max(axis=2)
    unit = np.where(sizes > 0, sizes, 1.0) / np.iinfo(np.int8).max
    codes = values * np.take_along_axis(unit[:, None, :], indices.astype(np.int64), axis=2)
    scales = (np.abs(codes).max(axis=(0, 2)) / np.iinfo(np.int8).max).astype(np.float32)
    steps = 1.0 / np.where(scales > 0, scales, 1.0)
    numbers = np.where((scales > 0)[:, None], np.rint(codes * steps[:, None]), 0.0)
    return np.rint(atoms / unit[:, :, None]).astype(np.int8), numbers.astype(np.int8), scales


def largest_sums(
    dictionary: npt.NDArray[Any], indices: npt.NDArray[Any], values: npt.NDArray[Any]
) -> npt.NDArray[np.float64]:
    """(M,) what each row's sum of products can reach for any token: (‖row of Σ S_i D_i‖ ‖x‖ + rounding) in integers.

    By Cauchy and Schwarz, with ‖x‖ at most √(N/B) · 2^15, products divided by 2^14, and half a unit of rounding each.
    """
    n_blocks, n_atoms, _ = dictionary.shape
    squares = np.zeros(values.shape[1])
    for block, rows, numbers in zip(dictionary, indices, values, strict=True):
        squares += ((dense_codes(rows, numbers, n_atoms) @ block.astype(np.float64)) ** 2).sum(axis=1)
    rounding = 0.5 * np.abs(values.astype(np.float64)).sum(axis=(0, 2))
    return np.asarray(np.sqrt(squares * n_blocks) * (2**15 / LONGEST_ATOM) + rounding)
