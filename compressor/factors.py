"""What a method leaves of a set of weights: plain arrays that a checkpoint keeps, a size counts and a graph takes.

`compressor.graph.Factors` is DSFormer's form; here are those of the other methods, which need standard operators only.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save

from compressor.files import replace_file
from compressor.graph import ModelProto, Storage, as_stored, put_chains


class WeightFactors(Protocol):
    """The compressed form of the weights of ``members``, which are module names.

    custom_op: whether its graph needs our operators. n_weights: of the members, uncompressed. bits: by eq. 11, that is
    float32 numbers plus what their indices take.
    """

    custom_op: ClassVar[bool]

    @property
    def members(self) -> tuple[str, ...]: ...

    @property
    def n_weights(self) -> int: ...

    @property
    def bits(self) -> float: ...

    def tensors(self) -> dict[str, NDArray[Any]]:
        """What a checkpoint keeps, by name."""

    @classmethod
    def from_tensors(cls, members: Sequence[str], tensors: Mapping[str, NDArray[Any]]) -> WeightFactors:
        """The way back from :meth:`tensors`."""

    def dense(self) -> NDArray[np.float32]:
        """The weights that it stands for, those of all members on top of one another, (M, N)."""

    def stored(self, storage: Storage) -> dict[str, NDArray[Any]]:
        """What the graph holds of it with this storage; its bytes are the second of the three sizes."""

    @staticmethod
    def put(model: ModelProto, factors: Sequence[Any], storage: Storage) -> None:
        """Put all of this kind into a graph in place of the members' MatMuls (whose weights are the effective ones)."""


def ratio(factors: Sequence[WeightFactors]) -> float:
    """The compression ratio by eq. 11 over all their weights; 1 of nothing."""
    bits = sum(factor.bits for factor in factors)
    return 32 * sum(factor.n_weights for factor in factors) / bits if bits else 1.0


def write_factors(path: Path, factors: Sequence[WeightFactors], method: str) -> None:
    """A safetensors file of what ``method`` made, for :func:`read_factors`."""
    named = ((f"{i}.{name}", array) for i, each in enumerate(factors) for name, array in each.tensors().items())
    tensors = {name: np.ascontiguousarray(array) for name, array in named}  # others are written in a wrong order
    members = json.dumps([each.members for each in factors])
    replace_file(path, save(tensors, {"method": method, "members": members}))


def read_factors(path: Path, kind: Callable[[str], type[WeightFactors]]) -> tuple[str, list[WeightFactors]]:
    """The method's name and its factors, ``kind`` being their type by that name."""
    with safe_open(str(path), "np") as file:
        about = file.metadata()
        method = about.get("method", "ds")  # files of before there were others do not name it
        parts: dict[int, dict[str, Any]] = defaultdict(dict)
        for name in file.keys():  # noqa: SIM118 - no mapping
            number, _, part = name.partition(".")
            parts[int(number)][part] = file.get_tensor(name)
        members = enumerate(json.loads(about["members"]))
        return method, [kind(method).from_tensors(names, parts[i]) for i, names in members]


@dataclass(frozen=True)
class LowRankFactors:
    """W (M, N) ≈ ``second`` (M, r) · ``first`` (r, N), both float32."""

    custom_op: ClassVar[bool] = False

    member: str
    first: NDArray[np.float32]
    second: NDArray[np.float32]

    @property
    def members(self) -> tuple[str, ...]:
        return (self.member,)

    @property
    def n_weights(self) -> int:
        return len(self.second) * int(self.first.shape[1])

    @property
    def bits(self) -> float:
        return 32 * (self.first.size + self.second.size)

    def tensors(self) -> dict[str, NDArray[Any]]:
        return {"first": self.first, "second": self.second}

    @classmethod
    def from_tensors(cls, members: Sequence[str], tensors: Mapping[str, NDArray[Any]]) -> LowRankFactors:
        return cls(members[0], tensors["first"], tensors["second"])

    def dense(self) -> NDArray[np.float32]:
        return self.second @ self.first

    def stored(self, storage: Storage) -> dict[str, NDArray[Any]]:
        return {name: as_stored(f"{self.member}.{name}", each, storage) for name, each in self.tensors().items()}

    @staticmethod
    def put(model: ModelProto, factors: Sequence[LowRankFactors], storage: Storage) -> None:
        put_chains(model, {each.member: {"first": each.first.T, "second": each.second.T} for each in factors})


@dataclass(frozen=True)
class MaskedFactors:
    """W (M, N) with ``kept`` weights in each group of ``group`` neighbours of a row, the others zero.

    ``values`` (M, N/group, kept) float32, and their places in the group, ``indices`` (M, N/group, kept) uint8.
    """

    custom_op: ClassVar[bool] = False

    member: str
    group: int
    values: NDArray[np.float32]
    indices: NDArray[np.uint8]

    @property
    def members(self) -> tuple[str, ...]:
        return (self.member,)

    @property
    def kept(self) -> int:
        return int(self.values.shape[2])

    @property
    def n_weights(self) -> int:
        return int(np.prod(self.values.shape[:2])) * self.group

    @property
    def bits(self) -> float:
        return self.values.size * (32 + index_bits(self.group))

    def dense(self) -> NDArray[np.float32]:
        """W (M, N)"""
        weight = np.zeros((*self.values.shape[:2], self.group), dtype=np.float32)
        np.put_along_axis(weight, self.indices.astype(np.int64), self.values, axis=2)
        return weight.reshape(len(weight), -1)

    def tensors(self) -> dict[str, NDArray[Any]]:
        """The indices packed to :func:`index_bits` each."""
        bits = np.unpackbits(self.indices[..., None], axis=-1)[..., 8 - index_bits(self.group) :]
        group = np.array([self.group], dtype=np.int32)
        return {"values": self.values, "packed_indices": np.packbits(bits), "group": group}

    @classmethod
    def from_tensors(cls, members: Sequence[str], tensors: Mapping[str, NDArray[Any]]) -> MaskedFactors:
        values, group = tensors["values"], int(tensors["group"].item())
        width = index_bits(group)
        bits = np.unpackbits(tensors["packed_indices"], count=values.size * width).reshape(*values.shape, width)
        indices = np.packbits(np.pad(bits, [(0, 0)] * values.ndim + [(8 - width, 0)]), axis=-1)[..., 0]
        return cls(members[0], group, values, indices)

    def stored(self, storage: Storage) -> dict[str, NDArray[Any]]:
        """The whole matrix: no standard operator multiplies by N:M weights without their zeros."""
        return {"weight": as_stored(self.member, self.dense(), storage)}

    @staticmethod
    def put(model: ModelProto, factors: Sequence[MaskedFactors], storage: Storage) -> None:
        """Nothing to do: the effective weights in the graph are the masked ones."""


def index_bits(group: int) -> int:
    """Bits that tell a place among ``group``."""
    return (group - 1).bit_length()
