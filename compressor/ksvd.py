"""K-SVD: the single-shot factorization W ≈ S·D that training starts from.

All N/B blocks of a matrix are learnt at once. A sweep codes every row by OMP, then improves the dictionary by one of
two updates: MOD, the closed-form least squares ``D = (SᵀS)⁻¹SᵀW`` (Engan 1999), or approximate K-SVD, one power
step per atom on the rows that use it (Rubinstein 2008, section 3). ``update="auto"`` runs both and keeps, block by
block, the better one. MOD alone is the default: on all matrices of a MiniLM layer it ended 0.2 to 0.7 % lower (K-SVD
wins by as little on Gaussian noise) and is 3 to 14 times faster.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.config import ConfigError, KSVDConfig, LayerPlan
from compressor.omp import blocks, dense_codes, reconstruct, sparse_code

# Two atoms this parallel do one atom's work.
_DUPLICATE = 0.99
# Fewer users than this and an atom is worth less than the row that is represented worst.
_MIN_USERS = 2
# The ridge of the MOD step relative to the mean diagonal, for atoms that share their users.
_RIDGE = 1e-6


@dataclass(frozen=True)
class Factorization:
    """``dictionary`` (N/B, K, B) with unit atoms, ``indices`` (N/B, M, S) int64, ``values`` (N/B, M, S)."""

    dictionary: Tensor
    indices: Tensor
    values: Tensor

    def dense(self) -> Tensor:
        """S·D (M, N)."""
        return reconstruct(self.dictionary, self.indices, self.values)


@torch.no_grad()
def relative_error(weight: Tensor, approximation: Tensor) -> float:
    """‖W − Ŵ‖_F / ‖W‖_F (0 for a zero matrix)."""
    scale = weight.norm()
    return float((weight - approximation).norm() / scale) if scale > 0 else 0.0


def svd_error(weight: Tensor, inverse_ratio: float) -> tuple[int, float]:
    """Rank and relative error of the best low-rank factorization of the same size: r·(M + N) ≤ M·N/CR."""
    m, n = weight.shape
    rank = max(1, int(m * n * inverse_ratio / (m + n)))
    singular = torch.linalg.svdvals(weight.double())
    return rank, float((singular[rank:].square().sum() / singular.square().sum()).sqrt())


@torch.no_grad()
def factorize(
    weight: Tensor,
    plan: LayerPlan,
    config: KSVDConfig = KSVDConfig(),  # noqa: B008 - frozen
    on_sweep: Callable[[], None] = lambda: None,
) -> Factorization:
    """K-SVD of ``weight`` (M, N); ``on_sweep`` is called after each sweep, for a progress bar.

    Raises :class:`ConfigError` when the weights are not finite or do not have the planned shape.
    """
    if tuple(weight.shape) != (plan.out_features, plan.in_features):
        raise ConfigError(f"expected a weight of {(plan.out_features, plan.in_features)}, got {tuple(weight.shape)}")
    if not torch.isfinite(weight).all():
        raise ConfigError("the weight has entries that are not finite; the checkpoint is broken")
    weight = weight.detach().float().contiguous()
    updates = {"mod": [_mod], "ksvd": [_approximate_ksvd], "auto": [_mod, _approximate_ksvd]}[config.update]
    results = [_learn(weight, plan, config, update, on_sweep) for update in updates]
    errors = torch.stack([_block_errors(weight, result) for result in results])  # (updates, nb)
    best = errors.argmin(dim=0).tolist()
    return Factorization(
        *(
            torch.stack([getattr(results[which], part)[i] for i, which in enumerate(best)])
            for part in ("dictionary", "indices", "values")
        )
    )


Update = Callable[[Tensor, Tensor, Tensor], Tensor]


def _learn(
    weight: Tensor, plan: LayerPlan, config: KSVDConfig, update: Update, on_sweep: Callable[[], None]
) -> Factorization:
    generator = torch.Generator().manual_seed(config.seed)
    targets = blocks(weight, plan.block_size)
    dictionary = _rows_as_atoms(targets, plan.n_atoms, generator)
    best: Factorization | None = None
    best_errors = torch.full((plan.n_blocks,), torch.inf, device=weight.device)
    for sweep in range(config.iterations + 1):
        indices, values = sparse_code(weight, dictionary, plan.n_nonzero, plan.bank_limit)
        current = Factorization(dictionary, indices, values)
        errors = _block_errors(weight, current)
        # Replacing atoms may raise the error of one sweep: what leaves here is the best seen, block by block.
        best = current if best is None else _choose(errors < best_errors, current, best)
        best_errors = torch.minimum(errors, best_errors)
        if sweep < config.iterations:
            codes = dense_codes(indices, values, plan.n_atoms)
            dictionary = update(targets, dictionary, codes)
            dictionary = _replace_weak_atoms(targets, dictionary, codes)
        on_sweep()
    assert best is not None
    return best


def _choose(better: Tensor, new: Factorization, old: Factorization) -> Factorization:
    pick = better.view(-1, 1, 1)
    return Factorization(
        torch.where(pick, new.dictionary, old.dictionary),
        torch.where(pick, new.indices, old.indices),
        torch.where(pick, new.values, old.values),
    )


def _block_errors(weight: Tensor, result: Factorization) -> Tensor:
    difference = blocks(weight - result.dense(), result.dictionary.shape[2])
    return difference.square().sum(dim=(1, 2))


def _rows_as_atoms(targets: Tensor, n_atoms: int, generator: torch.Generator) -> Tensor:
    """Random distinct nonzero rows of each block, normalised; noise where a block has too few of them."""
    _, m, block_size = targets.shape
    atoms = []
    for block in targets:
        norms = block.norm(dim=1)
        order = torch.randperm(m, generator=generator).to(block.device)
        order = order[norms[order] > 0][:n_atoms]
        missing = n_atoms - len(order)
        noise = torch.randn(missing, block_size, generator=generator).to(block)
        atoms.append(torch.cat([block[order], noise]))
    return _normalised(torch.stack(atoms))


def _normalised(dictionary: Tensor) -> Tensor:
    return torch.nn.functional.normalize(dictionary, dim=2)


def _mod(targets: Tensor, dictionary: Tensor, codes: Tensor) -> Tensor:
    """D = (SᵀS)⁻¹SᵀW by Cholesky, then unit atoms; an atom nobody uses keeps its place."""
    transposed = codes.transpose(1, 2)
    solved = least_squares(transposed @ codes, transposed @ targets, _RIDGE)
    used = (codes != 0).any(dim=1).unsqueeze(2)
    return _normalised(torch.where(used & torch.isfinite(solved), solved, dictionary))


def least_squares(gram: Tensor, right: Tensor, ridge: float) -> Tensor:
    """``(SᵀS + ρ)⁻¹ right`` of each block, ``gram`` (N/B, K, K) being SᵀS; ρ is ``ridge`` of its mean diagonal."""
    gram.diagonal(dim1=1, dim2=2).add_(ridge * gram.diagonal(dim1=1, dim2=2).mean(dim=1, keepdim=True).clamp_min(1e-12))
    return torch.cholesky_solve(right, torch.linalg.cholesky(gram))


def _approximate_ksvd(targets: Tensor, dictionary: Tensor, codes: Tensor) -> Tensor:
    """One power step per atom: d ← Eᵀs/‖Eᵀs‖, s ← E·d, with E the error of its users without it."""
    dictionary, codes = dictionary.clone(), codes.clone()
    residual = targets - codes @ dictionary  # (nb, M, B)
    for k in range(dictionary.shape[1]):
        code = codes[:, :, k]
        old = dictionary[:, k]
        users = (code != 0).to(code.dtype)
        # Eᵀs without forming E: the residual's part plus the atom's own contribution.
        new = torch.einsum("nmb,nm->nb", residual, code) + old * code.square().sum(1, keepdim=True)
        norm = new.norm(dim=1, keepdim=True)
        new = torch.where(norm > 1e-12, new / norm.clamp_min(1e-12), old)
        new_code = (torch.einsum("nmb,nb->nm", residual, new) + code * (old * new).sum(1, keepdim=True)) * users
        residual += code.unsqueeze(2) * old.unsqueeze(1) - new_code.unsqueeze(2) * new.unsqueeze(1)
        dictionary[:, k] = new
        codes[:, :, k] = new_code
    return _normalised(dictionary)


def _replace_weak_atoms(targets: Tensor, dictionary: Tensor, codes: Tensor) -> Tensor:
    """Unused and duplicate atoms become the rows of the block that are represented worst."""
    n_atoms = dictionary.shape[1]
    users = (codes != 0).sum(dim=1)  # (nb, K)
    parallel = (dictionary @ dictionary.transpose(1, 2)).abs()
    duplicate = torch.tril(parallel, diagonal=-1).amax(dim=2) > _DUPLICATE
    weak = (users < _MIN_USERS) | duplicate
    if not weak.any():
        return dictionary
    dictionary = dictionary.clone()
    errors = (targets - codes @ dictionary).square().sum(dim=2)  # (nb, M)
    worst = errors.topk(min(n_atoms, errors.shape[1]), dim=1).indices
    for i in weak.any(dim=1).nonzero().flatten().tolist():
        places = weak[i].nonzero().flatten()[: worst.shape[1]]
        rows = targets[i, worst[i, : len(places)]]
        usable = rows.norm(dim=1) > 0
        dictionary[i, places[usable]] = rows[usable]
    return _normalised(dictionary)
