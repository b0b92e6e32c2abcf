"""Sparse coding by orthogonal matching pursuit, on any device.

Every row of a block ``W_i`` (M × B) is written as S atoms of the dictionary ``D_i`` (K × B). On a CPU the native
batch-OMP of ``kernels`` does it; elsewhere the same greedy algorithm runs as batched tensor operations. Both are
Rubinstein, Zibulevsky and Elad, "Efficient Implementation of the K-SVD Algorithm using Batch Orthogonal Matching
Pursuit" (2008): the Gram matrix is computed once and residuals are never formed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

import kernels
from kernels.banks import bank_atoms

T = TypeVar("T")

# Floats the batched form may hold at once in its (rows, S, K) buffer: 64 Mi floats are 256 MiB.
_BUFFER_FLOATS = 64 * 2**20
# An atom whose part orthogonal to the chosen ones is below this (squared) adds nothing but rounding noise.
_MIN_PIVOT = 1e-6


def blocks(weight: Tensor, block_size: int) -> Tensor:
    """(M, N) → (N/B, M, B), a view."""
    return weight.reshape(weight.shape[0], -1, block_size).transpose(0, 1)


# (weight, dictionary, n_nonzero, bank_limit), the arguments of sparse_code; (weight, dictionary, indices), of refit.
CodeProblem: TypeAlias = tuple[Tensor, Tensor, int, int | None]
RefitProblem: TypeAlias = tuple[Tensor, Tensor, Tensor]


def sparse_code(
    weight: Tensor, dictionary: Tensor, n_nonzero: int, bank_limit: int | None = None
) -> tuple[Tensor, Tensor]:
    """Code ``weight`` (M, N) float32 over ``dictionary`` (N/B, K, B) with unit-norm atoms.

    Returns ``indices`` (N/B, M, S) int64, distinct within a row, and ``values`` (N/B, M, S) float32: the
    least-squares coefficients on that support. Rows that need fewer atoms carry zeros. ``bank_limit``: most codes of
    a row in one bank (kernels/banks.py); None: as many as there are.
    """
    return sparse_code_all([(weight, dictionary, n_nonzero, bank_limit)])[0]


@torch.no_grad()
def sparse_code_all(problems: Sequence[CodeProblem]) -> list[tuple[Tensor, Tensor]]:
    """:func:`sparse_code` of several matrices."""
    if problems[0][0].device.type != "cpu":
        return [sparse_code_batched(*problem) for problem in problems]
    calls = [
        partial(kernels.batch_omp, _array(weight), _array(dictionary), n_nonzero, bank_limit)
        for weight, dictionary, n_nonzero, bank_limit in problems
    ]
    return [(torch.from_numpy(indices).long(), torch.from_numpy(values)) for indices, values in _side_by_side(calls)]


def refit(weight: Tensor, dictionary: Tensor, indices: Tensor) -> Tensor:
    """Least-squares ``values`` (N/B, M, S) on given supports: what changes between two codings."""
    return refit_all([(weight, dictionary, indices)])[0]


@torch.no_grad()
def refit_all(problems: Sequence[RefitProblem]) -> list[Tensor]:
    """:func:`refit` of several matrices."""
    if problems[0][0].device.type != "cpu":
        return [_refit_batched(*problem) for problem in problems]
    calls = [
        partial(kernels.refit, _array(weight), _array(dictionary), _array(indices.to(torch.int32)))
        for weight, dictionary, indices in problems
    ]
    return [torch.from_numpy(values) for values in _side_by_side(calls)]


def _array(tensor: Tensor) -> Any:
    return tensor.detach().contiguous().numpy()


def _side_by_side(calls: Sequence[Callable[..., T]]) -> list[T]:
    """What native calls return, given their share of PyTorch's number of threads.

    After each parallel operation PyTorch's own threads spin for about a millisecond, on cores that ours want: native
    calls in turns with PyTorch's took twice as long. So all that PyTorch does comes first, and then all of them.
    """
    threads = torch.get_num_threads()
    each = max(1, threads // len(calls))
    if threads == 1 or len(calls) == 1:
        return [call(threads=each) for call in calls]
    with ThreadPoolExecutor(threads) as pool:
        return [future.result() for future in [pool.submit(call, threads=each) for call in calls]]


def _refit_batched(weight: Tensor, dictionary: Tensor, indices: Tensor) -> Tensor:
    """:func:`refit` as tensor operations."""
    targets = blocks(weight, dictionary.shape[2])  # (nb, M, B)
    nb, m, s = indices.shape
    atoms = dictionary.gather(1, indices.reshape(nb, m * s, 1).expand(-1, -1, dictionary.shape[2]))
    atoms = atoms.reshape(nb, m, s, -1)
    gram = atoms @ atoms.transpose(2, 3)
    gram.diagonal(dim1=2, dim2=3).add_(_MIN_PIVOT)
    right = atoms @ targets.unsqueeze(3)
    return torch.cholesky_solve(right, torch.linalg.cholesky(gram)).squeeze(3)


@torch.no_grad()
def sparse_code_batched(
    weight: Tensor, dictionary: Tensor, n_nonzero: int, bank_limit: int | None = None
) -> tuple[Tensor, Tensor]:
    """Batch-OMP as tensor operations, the form for accelerators; arguments as in :func:`sparse_code`.

    It keeps, for every row, the correlations T_j of each orthogonalized chosen atom with all atoms, so one step is
    a gather, two small products and an update; the coefficients come from one triangular solve at the end. The rows
    of all blocks go through it together, as many at once as the buffer of T_j has room for.
    """
    n_blocks, n_atoms, block_size = dictionary.shape
    transposed = dictionary.transpose(1, 2)
    gram = (dictionary @ transposed).flatten(0, 1)  # (nb·K, K)
    alpha = (blocks(weight.float(), block_size) @ transposed).flatten(0, 1)  # (nb·M, K)
    first = torch.arange(n_blocks, device=weight.device).mul_(n_atoms).repeat_interleave(len(weight))
    rows_at_once = max(1, _BUFFER_FLOATS // (n_nonzero * n_atoms))
    parts = [
        _code_rows(some, gram, starts, n_nonzero, bank_limit or n_nonzero)
        for some, starts in zip(torch.split(alpha, rows_at_once), torch.split(first, rows_at_once), strict=True)
    ]
    shape = (n_blocks, len(weight), n_nonzero)
    return torch.cat([part[0] for part in parts]).view(shape), torch.cat([part[1] for part in parts]).view(shape)


def _code_rows(alpha: Tensor, gram: Tensor, first: Tensor, n_nonzero: int, bank_limit: int) -> tuple[Tensor, Tensor]:
    """OMP of R rows: ``alpha`` (R, K) correlations with the atoms, ``gram`` (nb·K, K) of all blocks' atoms, ``first``
    (R,) where in it the atoms of a row's block begin."""
    rows, n_atoms = alpha.shape
    start = alpha.abs().amax(dim=1)
    everyone = torch.arange(rows, device=alpha.device)
    residual = alpha.clone()
    chosen = torch.zeros(rows, n_nonzero, dtype=torch.long, device=alpha.device)
    taken = torch.zeros(rows, n_atoms, dtype=torch.bool, device=alpha.device)
    orthogonal = alpha.new_zeros(rows, n_nonzero, n_atoms)  # T_j
    steps = alpha.new_zeros(rows, n_nonzero)  # coefficient along the j-th orthogonalized atom
    lower = torch.eye(n_nonzero, device=alpha.device).repeat(rows, 1, 1)  # chosen = lower · orthogonalized
    alive = start > 0
    bank = torch.arange(n_atoms, device=alpha.device) // bank_atoms(n_atoms)
    in_bank = torch.zeros(rows, int(bank[-1]) + 1, dtype=torch.long, device=alpha.device)
    for j in range(n_nonzero):
        score = residual.abs().masked_fill(taken | (in_bank >= bank_limit)[:, bank], -1.0)
        atom = score.argmax(dim=1)
        alive = alive & (score[everyone, atom] > 1e-7 * start)
        chosen[:, j] = atom
        taken[everyone, atom] = True
        in_bank[everyone, bank[atom]] += 1
        before = orthogonal[:, :j].gather(2, atom.view(-1, 1, 1).expand(-1, j, 1)).squeeze(2)  # (R, j)
        pivot = 1 - (before * before).sum(1)
        alive = alive & (pivot > _MIN_PIVOT)
        scale = pivot.clamp_min(_MIN_PIVOT).rsqrt()
        new = (gram[first + atom] - (before.unsqueeze(1) @ orthogonal[:, :j]).squeeze(1)) * scale.unsqueeze(1)
        step = torch.where(alive, residual[everyone, atom] * scale, 0.0)
        orthogonal[:, j] = new
        lower[:, j, :j] = before
        lower[:, j, j] = 1 / scale
        steps[:, j] = step
        residual = residual - step.unsqueeze(1) * new
    values = torch.linalg.solve_triangular(lower.transpose(1, 2), steps.unsqueeze(2), upper=True).squeeze(2)
    return chosen, values


def dense_codes(indices: Tensor, values: Tensor, n_atoms: int) -> Tensor:
    """Codes as (N/B, M, K) dense matrices; differentiable in ``values``."""
    shape = (*indices.shape[:2], n_atoms)
    return torch.zeros(shape, dtype=values.dtype, device=values.device).scatter(2, indices, values)


def reconstruct(dictionary: Tensor, indices: Tensor, values: Tensor, users: Users | None = None) -> Tensor:
    """S·D as one (M, N) matrix (paper eq. 8); differentiable in ``dictionary`` and ``values``.

    ``users``: of ``indices``, for the gradient of ``dictionary``, if they are known already.
    """
    product: Tensor = _Product.apply(dictionary, indices, values, users)  # type: ignore[no-untyped-call]
    return product


class _Product(torch.autograd.Function):
    """S·D from the S atoms that each row names: S multiply-adds an entry, where dense codes would take K."""

    @staticmethod
    def forward(ctx: Any, dictionary: Tensor, indices: Tensor, values: Tensor, users: Users | None) -> Tensor:
        ctx.save_for_backward(dictionary, indices, values)
        ctx.users = users
        _, n_rows, n_nonzero = indices.shape
        rows = nn.functional.embedding_bag(
            _numbered(indices, dictionary.shape[1]).view(-1, n_nonzero),
            dictionary.reshape(-1, dictionary.shape[2]),
            per_sample_weights=values.transpose(0, 1).reshape(-1, n_nonzero),
            mode="sum",
        )
        return rows.view(n_rows, -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        dictionary, indices, values = ctx.saved_tensors
        n_atoms, block_size = dictionary.shape[1:]
        to_dictionary = to_values = None
        if ctx.needs_input_grad[0]:
            to_dictionary = transposed_product(indices, values, gradient, n_atoms, ctx.users)
        if ctx.needs_input_grad[2]:
            to_values = (blocks(gradient, block_size) @ dictionary.transpose(1, 2)).gather(2, indices)
        return to_dictionary, None, to_values, None


@dataclass(frozen=True)
class Users:
    """Who uses which atom: ``order`` has the nonzeros of all blocks sorted by their atoms, ``rows`` the row of a block
    that each is in, ``first`` where in them those of each atom begin. Supports that stay need the sort once."""

    order: Tensor
    rows: Tensor
    first: Tensor

    @classmethod
    def of(cls, indices: Tensor, n_atoms: int) -> Users:
        """Of ``indices`` (N/B, M, S) into ``n_atoms`` atoms a block."""
        total = len(indices) * n_atoms
        atoms = _numbered(indices, n_atoms).flatten()
        # Small integers are sorted faster.
        order = atoms.to(torch.int16 if total < 2**15 else torch.int64).argsort(stable=True)
        users = torch.bincount(atoms, minlength=total)
        return cls(order, order // indices.shape[2], users.cumsum(0) - users)


def transposed_product(
    indices: Tensor, values: Tensor, matrix: Tensor, n_atoms: int, users: Users | None = None
) -> Tensor:
    """``Sᵀ·matrix`` of each block, (N/B, K, B), of a ``matrix`` (M, N); sums are in the order of the rows."""
    n_blocks = len(indices)
    users = users or Users.of(indices, n_atoms)
    sums = nn.functional.embedding_bag(
        users.rows,
        matrix.reshape(len(matrix) * n_blocks, -1),
        users.first,
        per_sample_weights=values.transpose(0, 1).flatten()[users.order],
        mode="sum",
    )
    return sums.view(n_blocks, n_atoms, -1)


def gram_of_codes(indices: Tensor, values: Tensor, n_atoms: int) -> Tensor:
    """SᵀS of each block, (N/B, K, K): S² products a row."""
    n_blocks = len(indices)
    rows = torch.arange(n_blocks, device=indices.device).mul_(n_atoms).view(-1, 1, 1) + indices
    places = rows.unsqueeze(3) * n_atoms + indices.unsqueeze(2)
    products = values.unsqueeze(3) * values.unsqueeze(2)
    sums = torch.zeros(n_blocks * n_atoms**2, dtype=values.dtype, device=values.device)
    return sums.index_add_(0, places.flatten(), products.flatten()).view(n_blocks, n_atoms, n_atoms)


def _numbered(indices: Tensor, n_atoms: int) -> Tensor:
    """(M, N/B, S): codes row by row of the matrix, atoms numbered through all blocks."""
    first = torch.arange(len(indices), device=indices.device).mul_(n_atoms)
    return (indices + first.view(-1, 1, 1)).transpose(0, 1).contiguous()
