"""The ops in plain NumPy, float64: what every tier is measured against."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt

Float64Array = npt.NDArray[np.float64]

_erf = np.vectorize(math.erf, otypes=[np.float64])


def ds_linear(
    x: npt.NDArray[Any],
    dictionary: npt.NDArray[Any],
    indices: npt.NDArray[Any],
    values: npt.NDArray[Any],
    bias: npt.NDArray[Any] | None = None,
    scales: npt.NDArray[Any] | None = None,
    residual: npt.NDArray[Any] | None = None,
    norm_weight: npt.NDArray[Any] | None = None,
    norm_bias: npt.NDArray[Any] | None = None,
    norm_epsilon: float = 1e-5,
    activation: str = "none",
) -> Float64Array:
    """y = activation(scales · Σ_i S_i (D_i x_i) + bias) + residual, then layer normalization over the features.

    x : (..., N); dictionary : (N/B, K, B); indices, values : (N/B, M, S); bias, scales, norm_weight, norm_bias : (M,);
    residual : (..., M). activation : "none" or "gelu" (exact, with erf). norm_epsilon : added to the variance.
    Returns (..., M).
    """
    n_blocks, n_atoms, width = dictionary.shape
    y = np.zeros((*x.shape[:-1], values.shape[1]))
    for i in range(n_blocks):
        block = x[..., i * width : (i + 1) * width].astype(np.float64)
        products = block @ dictionary[i].astype(np.float64).T  # (..., K)
        y += products @ dense_codes(indices[i], values[i], n_atoms).T
    if scales is not None:
        y *= scales
    if bias is not None:
        y += bias
    if activation == "gelu":
        y = 0.5 * y * (1 + _erf(y / math.sqrt(2)))
    elif activation != "none":
        raise ValueError(f"activation: expected none or gelu, got {activation!r}")
    if residual is not None:
        y = y + residual
    if norm_weight is not None and norm_bias is not None:
        variance = y.var(axis=-1, keepdims=True)
        y = (y - y.mean(axis=-1, keepdims=True)) / np.sqrt(variance + norm_epsilon) * norm_weight + norm_bias
    return np.asarray(y, np.float64)


def attention(qkv: npt.NDArray[Any], num_heads: int, mask: npt.NDArray[Any] | None = None) -> Float64Array:
    """softmax(q kᵀ / √width) v of each text and head, without the keys that are masked.

    qkv : (batch, tokens, 3 · heads · width), all queries, then all keys, then all values;
    mask : (batch, tokens), zero where a key is left out. A text without keys gives zeros.
    Returns (batch, tokens, heads · width).
    """
    batch, tokens, columns = qkv.shape
    width = columns // (3 * num_heads)
    q, k, v = qkv.astype(np.float64).reshape(batch, tokens, 3, num_heads, width).transpose(2, 0, 3, 1, 4)
    scores = q @ k.swapaxes(-1, -2) / math.sqrt(width)  # (batch, heads, queries, keys)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True, initial=-np.inf)) if tokens else scores
    if mask is not None:
        weights = weights * (mask[:, None, None, :] != 0)
    sums = weights.sum(axis=-1, keepdims=True)
    y = weights @ v / np.where(sums > 0, sums, 1.0)
    return np.asarray(y.transpose(0, 2, 1, 3).reshape(batch, tokens, num_heads * width))


def dense_codes(indices: npt.NDArray[Any], values: npt.NDArray[Any], n_atoms: int) -> Float64Array:
    """Codes (M, S) of one block as a dense matrix (M, K); values of a repeated index add up."""
    codes = np.zeros((indices.shape[0], n_atoms))
    rows = np.arange(indices.shape[0])[:, None]
    np.add.at(codes, (rows, indices.astype(np.int64)), values.astype(np.float64))
    return codes
