"""Whether tensors or arrays still hold the same values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import is_
from typing import Any

import numpy as np
from numpy import ndarray

# A torch.Tensor or a numpy array; one runtime has only one of them.
Array = Any


def same_values(one: Array, other: Array) -> bool:
    """Whether both have the same shape and values."""
    if isinstance(one, ndarray) or isinstance(other, ndarray):
        return np.array_equal(one, other)
    return bool(one.shape == other.shape and one.equal(other))


def version(tensor: Array) -> int:
    """How often the tensor was written in place; -1 for inference tensors and numpy arrays, which do not count that."""
    return -1 if isinstance(tensor, ndarray) or tensor.is_inference() else tensor._version


def on_host(tensor: Array) -> bool:
    """Whether its values can be read without waiting for a device."""
    return isinstance(tensor, ndarray) or bool(tensor.is_cpu)


def _reference(tensor: Array) -> Array:
    """The tensor itself, or a copy where writes to it are not counted and values can be compared on the host."""
    if isinstance(tensor, ndarray):
        return tensor.copy()
    return tensor.clone() if tensor.is_inference() and tensor.is_cpu else tensor


def unchanged(tensor: Array, known: Array, at_version: int) -> bool:
    """Whether it still holds what it held when ``known`` was remembered of it, at that version.

    Where writes are not counted, values are compared on the host; on an accelerator, identity counts.
    """
    if at_version >= 0:
        return tensor is known and tensor._version == at_version
    if on_host(tensor):
        return same_values(tensor, known)
    return tensor is known


def equal(tensor: Array, known: Array, at_version: int) -> bool:
    """Whether it holds what ``known`` held; reads the values of both where they are different objects."""
    if unchanged(tensor, known, at_version):
        return True
    return version(known) == at_version and tensor is not known and same_values(tensor, known)


@dataclass(frozen=True)
class TensorVersions:
    """Tensors at one time. The same objects, not written to since, hold the same values."""

    tensors: tuple[Array, ...]
    versions: tuple[int, ...]
    counted: bool  # whether all of them count in-place writes

    @staticmethod
    def of(tensors: Sequence[Array]) -> TensorVersions:
        """Remembers ``tensors``; later writes to numpy arrays do not change what is remembered."""
        versions = tuple(map(version, tensors))
        return TensorVersions(tuple(map(_reference, tensors)), versions, -1 not in versions)

    def matches(self, tensors: Sequence[Array]) -> bool:
        """Whether these are the same tensors and hold the same values. Runs at every call."""
        if len(tensors) != len(self.tensors):
            return False
        if self.counted:
            same = all(map(is_, tensors, self.tensors))
            return same and tuple([tensor._version for tensor in tensors]) == self.versions
        return all(map(unchanged, tensors, self.tensors, self.versions))
