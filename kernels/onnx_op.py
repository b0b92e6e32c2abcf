"""The ONNX ops as data: their names, and what DSLinear's weights must look like.

csrc/onnxruntime_ds_linear.cc checks the same when a session is made; here a producer of models finds out earlier.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from kernels.integers import LARGEST_SUM, LONGEST_ATOM, largest_sums

DOMAIN = "dsformer"
OP_TYPE = "DSLinear"
SINCE_VERSION = 1
INPUT_NAMES = (
    "X",
    "dictionary",
    "indices",
    "values",
    "bias",
    "scales",
    "residual",
    "norm_weight",
    "norm_bias",
)
ACTIVATIONS = ("none", "gelu")
ATTENTION_OP_TYPE = "Attention"
MAX_HEAD_WIDTH = 256
PRECISIONS = ("float32", "bfloat16")
MAX_ATOMS = 65536  # an index is at most uint16


def index_dtype(n_atoms: int) -> type[np.uint8] | type[np.uint16]:
    """The smallest type that numbers K atoms: uint8 up to 256 of them, else uint16."""
    if not 1 <= n_atoms <= MAX_ATOMS:
        raise ValueError(f"atoms per block: expected 1 to {MAX_ATOMS}, got {n_atoms}")
    return np.uint8 if n_atoms <= 256 else np.uint16


def check_weights(
    dictionary: npt.NDArray[Any],
    indices: npt.NDArray[Any],
    values: npt.NDArray[Any],
    bias: npt.NDArray[Any] | None = None,
    scales: npt.NDArray[Any] | None = None,
    norm_weight: npt.NDArray[Any] | None = None,
    norm_bias: npt.NDArray[Any] | None = None,
) -> None:
    """Raises ValueError unless the arrays are valid inputs of a DSLinear node.

    dictionary : (N/B, K, B) float32, float16, int16 or int8; indices : (N/B, M, S) uint8 or uint16, below K;
    values : (N/B, M, S), the dictionary's type; bias, norm_weight, norm_bias : (M,) float32;
    scales : (M,) float32, for integers only.
    """
    if dictionary.dtype not in (np.float32, np.float16, np.int16, np.int8):
        raise ValueError(f"dictionary: expected float32 or float16 or int16 or int8, got {dictionary.dtype}")
    if values.dtype != dictionary.dtype:
        raise ValueError(f"values: expected {dictionary.dtype}, that of dictionary, got {values.dtype}")
    if dictionary.ndim != 3 or dictionary.size == 0:
        raise ValueError(f"dictionary: expected shape (N/B, K, B), none of them 0, got {dictionary.shape}")
    n_blocks, n_atoms, _ = dictionary.shape
    if values.ndim != 3 or values.shape[0] != n_blocks or values.size == 0:
        raise ValueError(f"values: expected shape ({n_blocks}, M, S), none of them 0, got {values.shape}")
    if indices.dtype != index_dtype(n_atoms):
        wanted = np.dtype(index_dtype(n_atoms))
        raise ValueError(f"indices: expected {wanted} for {n_atoms} atoms, got {indices.dtype}")
    if indices.shape != values.shape:
        raise ValueError(f"indices: expected shape {values.shape}, that of values, got {indices.shape}")
    if indices.max() >= n_atoms:
        raise ValueError(f"indices: expected numbers below {n_atoms} (atoms per block), got {indices.max()}")
    for name, numbers in (("bias", bias), ("norm_weight", norm_weight), ("norm_bias", norm_bias), ("scales", scales)):
        if numbers is not None and (numbers.dtype != np.float32 or numbers.shape != values.shape[1:2]):
            raise ValueError(
                f"{name}: expected float32 of shape {values.shape[1:2]}, got {numbers.dtype} of {numbers.shape}"
            )
    if (norm_weight is None) != (norm_bias is None):
        raise ValueError("norm_weight and norm_bias: expected both or neither")
    if np.issubdtype(dictionary.dtype, np.integer):
        if scales is None:
            raise ValueError(f"scales: expected float32 of shape {values.shape[1:2]}, which integer weights need")
        if not np.isfinite(scales).all():
            raise ValueError(f"scales: expected finite numbers, got {scales[~np.isfinite(scales)][0]}")
    elif scales is not None:
        raise ValueError("scales: expected none, because only integer weights have them")
    if dictionary.dtype == np.int16:
        _check_sums(dictionary, indices, values)


def _check_sums(
    dictionary: npt.NDArray[Any],
    indices: npt.NDArray[Any],
    values: npt.NDArray[Any],
) -> None:
    squares = (dictionary.astype(np.int64) ** 2).sum(axis=2)
    if squares.max() > LONGEST_ATOM**2:
        block, atom = np.unravel_index(squares.argmax(), squares.shape)
        raise ValueError(
            f"dictionary: expected int16 atoms of norm {LONGEST_ATOM} at most, "
            f"but atom {atom} of block {block} is longer"
        )
    sums = largest_sums(dictionary, indices, values)
    if sums.max() > LARGEST_SUM:
        raise ValueError(
            f"values: expected rows whose sums stay below 2^31, "
            f"but those of row {sums.argmax()} can reach {sums.max():.3g}"
        )
