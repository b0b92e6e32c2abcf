"""Several processes that train one model, as ``torchrun`` or ``accelerate launch`` starts them.

All hold the whole model and take the same steps: each reads its share of a batch, and the gradients are added up.
What one process does for all (K-SVD, measuring, files) is done by the first, and the others get the outcome. In a
process of its own everything here is a formality.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import increment_version

T = TypeVar("T")

# The others wait for the first while it factorizes or measures, which may take hours.
_PATIENCE = timedelta(days=7)


def join() -> None:
    """Meet the others that the launcher has started, by what it left in the environment; alone, do nothing."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return
    # Its functions hold the group that there is when they are first imported, as a default of theirs. Held, a group
    # keeps its threads after leave(), and one that still runs when the interpreter ends aborts the process.
    import torch.distributed.nn.functional

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=_PATIENCE)


def leave() -> None:
    """Part from the others; alone, do nothing."""
    if dist.is_initialized():
        dist.destroy_process_group()


def count() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_first() -> bool:
    return rank() == 0


def from_first(make: Callable[[], T]) -> T:
    """What ``make`` returns, or the exception that it raises, in the first process; the others do not call it."""
    if count() == 1:
        return make()
    outcome: list[Any] = [None, None]
    if is_first():
        try:
            outcome[0] = make()
        except Exception as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0, device=torch.device("cpu"))
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]  # type: ignore[no-any-return]


def from_all(value: T) -> list[T]:
    """The ``value`` of every process, by rank."""
    values: list[Any] = [value]
    if count() > 1:
        values *= count()
        dist.all_gather_object(values, value)
    return values


def broadcast(tensors: Sequence[Tensor], source: int = 0) -> None:
    """Give all processes the ``tensors`` of one, in place."""
    if count() > 1:
        for tensor in tensors:
            dist.broadcast(tensor.detach(), source)
            increment_version(tensor)  # it has changed, which is not counted by itself


def add_up(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor, in place, by its sum over all processes; the sums are the same bits everywhere."""
    if count() > 1:
        together = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(together)
        for tensor, total in zip(tensors, torch.split(together, [tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(total.view_as(tensor))


def share_out(costs: Sequence[float]) -> list[int]:
    """Which process does each piece of work, so that all have about as much to do: dear ones first, to the idlest."""
    load = [0.0] * count()
    owners = [0] * len(costs)
    for piece in sorted(range(len(costs)), key=lambda piece: -costs[piece]):
        owners[piece] = load.index(min(load))
        load[owners[piece]] += costs[piece]
    return owners
