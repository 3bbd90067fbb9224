"""Whether tensors, or arrays, still hold what they held."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import is_
from typing import Any

import numpy as np
from numpy import ndarray

# A torch.Tensor or a numpy array; of one runtime all are of one kind.
Array = Any


def same_values(one: Array, other: Array) -> bool:
    """Whether both have the same shape and values."""
    if isinstance(one, ndarray) or isinstance(other, ndarray):
        return np.array_equal(one, other)
    return bool(one.shape == other.shape and one.equal(other))


def version(tensor: Array) -> int:
    """How often the tensor was written in place; -1 for inference tensors and numpy's arrays, which do not count."""
    return -1 if isinstance(tensor, ndarray) or tensor.is_inference() else tensor._version


def on_host(tensor: Array) -> bool:
    """Whether reading its values waits for no device."""
    return isinstance(tensor, ndarray) or bool(tensor.is_cpu)


def held(tensor: Array) -> Array:
    """It, or a copy where nothing would tell that it was written to and comparing does not wait for a device."""
    if isinstance(tensor, ndarray):
        return tensor.copy()
    return tensor.clone() if tensor.is_inference() and tensor.is_cpu else tensor


def unchanged(tensor: Array, known: Array, at_version: int) -> bool:
    """Whether it is the object that ``held`` gave ``known`` of, and still holds what it held.

    Where tensors do not count what is written to them, values are compared on a CPU; on an accelerator, the object
    counts.
    """
    if at_version >= 0:
        return tensor is known and tensor._version == at_version
    if on_host(tensor):
        return same_values(tensor, known)
    return tensor is known


def equal(tensor: Array, known: Array, at_version: int) -> bool:
    """Whether it holds what ``known`` held; reads both where they are different objects."""
    if unchanged(tensor, known, at_version):
        return True
    return version(known) == at_version and tensor is not known and same_values(tensor, known)


@dataclass(frozen=True)
class Sight:
    """Tensors as they were at one time: the same objects, not written to since, still hold the same."""

    tensors: tuple[Array, ...]
    versions: tuple[int, ...]
    counted: bool  # whether all of them count what is written to them

    @staticmethod
    def of(tensors: Sequence[Array]) -> Sight:
        """It is safe from what is written to arrays later."""
        versions = tuple(map(version, tensors))
        return Sight(tuple(map(held, tensors)), versions, -1 not in versions)

    def holds_of(self, tensors: Sequence[Array]) -> bool:
        """Whether these are they, and hold what they held; asked at every call."""
        if len(tensors) != len(self.tensors):
            return False
        if self.counted:
            same = all(map(is_, tensors, self.tensors))
            return same and tuple([tensor._version for tensor in tensors]) == self.versions
        return all(map(unchanged, tensors, self.tensors, self.versions))
