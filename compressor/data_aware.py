"""K-SVD for the outputs of a layer on calibration data, in place of its weights.

With the Gram matrix G = XXᵀ of the layer's inputs, an error Δ = W − Ŵ of the weights costs ‖ΔX‖² = tr(Δ G Δᵀ) at the
outputs. Let G = U Uᵀ with U *upper* triangular; the cost is then ‖ΔU‖², and its part in the columns of block i is

    ‖Σ_{k≤i} Δ_k U_ki‖²

Blocks are factorized in order. What those before i did wrong, block i makes good as far as it can: it aims at

    W'_i = W_i + (Σ_{k<i} Δ_k U_ki) U_ii⁻¹

in place of W_i, and is coded in the metric U_ii: by K-SVD of W'_i U_ii, whose dictionary times U_ii⁻¹ is the block's.
Within a block that is the whitening of SVD-LLM and CoSpaDi; from block to block it is the correction of GPTQ (Frantar
et al., "GPTQ: Accurate post-training quantization for generative pre-trained transformers", 2023), with dictionaries
in the place of rounding.

Not all outputs matter alike. With r_i² the importance of output i, how far the hidden states of the model move with it
(``calibration.output_importance``), the cost is ‖diag(r)ΔU‖²: rows are scaled by r_i, which does not change how one is
coded, but whom the dictionary serves. It is the row weight of FWSVD, of hidden states in the place of the task's loss.

The inputs may also be those that the layer gets once the layers before it are compressed (sequential.py): X' in the
place of X. Its outputs are still to be WX, and the best weights for that are

    W' = W·XX'ᵀ·(X'X'ᵀ)⁻¹

which are factorized in place of W, for X'. That makes good from layer to layer what the correction above makes good
from block to block; in quantization it is the asymmetric calibration of GPTAQ (Li et al., "GPTAQ: Efficient
finetuning-free quantization for asymmetric calibration", 2025).

STF goes on from there: W' are the weights that it moves, and it codes them in the same metric. The gradient of the
dictionary, Sᵀ(SD − W'), needs no metric, for the least squares that it seeks are the same in all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compressor.config import ConfigError, KSVDConfig, LayerPlan
from compressor.ksvd import Factorization, factorize

# Added to G's diagonal, of its mean: what the calibration data leaves undecided goes to the plain error of the weights.
_DAMPING = 0.01


@dataclass(frozen=True)
class Start:
    """A factorization, the weights it was made of (W', (M, N) float32), and its metric U_ii (N/B, B, B) float32."""

    factorization: Factorization
    target: Tensor
    metric: Tensor


def metric_root(gram: Tensor) -> Tensor:
    """U (N, N) float64, upper triangular, with U Uᵀ = ``gram`` damped and scaled to a mean diagonal of one."""
    mean = gram.diagonal().mean()
    if not mean > 0:  # inputs that are all zero
        return torch.eye(len(gram), dtype=torch.float64, device=gram.device)
    damped = gram.double() / mean
    damped.diagonal().add_(_DAMPING)
    lower, broken = torch.linalg.cholesky_ex(damped.flip(0, 1))
    if broken:
        raise ConfigError("the inputs of a layer have no positive Gram matrix; check the checkpoint and the data")
    root: Tensor = lower.flip(0, 1)
    return root


def row_scales(importance: Tensor) -> Tensor:
    """r (M,) float64: the root of the ``importance`` of outputs, relative to its mean and damped as a metric is."""
    mean = importance.double().mean()
    if not mean > 0:  # nothing depends on any of them
        return torch.ones_like(importance, dtype=torch.float64)
    return (importance.double() / mean + _DAMPING).sqrt()


@torch.no_grad()
def best_weight(weight: Tensor, gram: Tensor, cross: Tensor) -> Tensor:
    """W' (M, N) whose outputs on X' come nearest to those of ``weight`` (M, N) on X.

    ``gram`` X'X'ᵀ and ``cross`` XX'ᵀ are (N, N) float64. What they leave undecided stays as it is in ``weight``.
    """
    if torch.equal(cross, gram):  # the same inputs, of all layers where they are the dense model's
        return weight
    root = metric_root(gram)
    missing = weight.double() @ (cross - gram) / gram.diagonal().mean()  # metric_root has divided by it
    halfway = torch.linalg.solve_triangular(root.T, missing, upper=False, left=False)
    return (weight.double() + _times_inverse(halfway, root)).to(weight.dtype)


def relative_output_error(weight: Tensor, approximation: Tensor, gram: Tensor) -> float:
    """‖(W − Ŵ)X‖ / ‖WX‖ with ``gram`` XXᵀ (0 where the outputs are zero)."""
    weight, gram = weight.double(), gram.double()
    difference = weight - approximation
    scale = ((weight @ gram) * weight).sum()
    return float((((difference @ gram) * difference).sum() / scale).clamp_min(0).sqrt()) if scale > 0 else 0.0


@torch.no_grad()
def factorize_outputs(
    weight: Tensor,
    plan: LayerPlan,
    config: KSVDConfig,
    gram: Tensor,
    on_sweep: Callable[[], None] = lambda: None,
    importance: Tensor | None = None,
) -> Start:
    """K-SVD of ``weight`` (M, N) for inputs with the Gram matrix ``gram`` (N, N) and outputs of ``importance`` (M,).

    Without importance all outputs have the same. ``on_sweep`` is called after each sweep over a block. Raises
    :class:`ConfigError` as :func:`factorize` does.
    """
    root = metric_root(gram)
    scales = row_scales(importance) if importance is not None else torch.ones(len(weight)).to(root)
    weight = weight.detach().double() * scales.unsqueeze(1)
    target = weight.clone()
    carried = torch.zeros_like(target)  # ΔU of the blocks that are done
    block = replace(plan, in_features=plan.block_size)
    parts, metrics = [], []
    for first in range(0, plan.in_features, plan.block_size):
        columns = slice(first, first + plan.block_size)
        own = root[columns, columns]
        target[:, columns] += _times_inverse(carried[:, columns], own)
        found = factorize((target[:, columns] @ own).float(), block, config, on_sweep)
        found = replace(found, dictionary=_times_inverse(found.dictionary.double(), own).float())
        carried += (weight[:, columns] - found.dense()) @ root[columns]
        parts.append(found)
        metrics.append(own)
    together = Factorization(
        *(torch.cat([getattr(part, name) for part in parts]) for name in ("dictionary", "indices", "values"))
    )
    together = replace(together, values=together.values / scales.float().unsqueeze(1))
    return Start(together, (target / scales.unsqueeze(1)).float(), torch.stack(metrics).float())


def _times_inverse(x: Tensor, upper: Tensor) -> Tensor:
    """x · upper⁻¹"""
    solved: Tensor = torch.linalg.solve_triangular(upper, x, upper=True, left=False)
    return solved
