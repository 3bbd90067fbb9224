"""The few array operations of the runtime, for torch tensors and numpy arrays; the latter need no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from duca_compile.core.tensors import Array


class Arrays(Protocol):
    """Operations on float32 scores and int64 indices; all arrays of one object are on one device."""

    def zeros(self, shape: tuple[int, ...]) -> Array:
        """A float32 array of zeros."""

    def from_numpy(self, values: np.ndarray) -> Array:
        """The values on the device; they may share memory."""

    def contiguous(self, array: Array) -> Array:
        """The array in contiguous memory."""

    def normalized(self, rows: Sequence[Array]) -> Array:
        """The arrays stacked as float32, each divided by its norm along the last axis."""

    def top_indices(self, scores: Array, count: int) -> Array:
        """The indices of the ``count`` highest scores along the last axis, the highest first."""

    def one_hot(self, indices: Array, count: int) -> Array:
        """A float32 array with a new last axis of ``count`` classes."""

    def take(self, array: Array, indices: Array) -> Array:
        """The entries at ``indices`` along the last axis."""

    def put(self, array: Array, indices: Array, values: Array) -> Array:
        """A copy, with ``values`` at ``indices`` along the last axis."""

    def select_rows(self, mask: Sequence[bool], new: Array, old: Array) -> Array:
        """The batch rows of ``new`` where ``mask`` is true, and of ``old`` elsewhere; also for results of an engine."""


class NumpyArrays:
    """Arrays in the host's memory."""

    def zeros(self, shape: tuple[int, ...]) -> Array:
        return np.zeros(shape, np.float32)

    def from_numpy(self, values: np.ndarray) -> Array:
        return values

    def contiguous(self, array: Array) -> Array:
        return np.ascontiguousarray(array)

    def normalized(self, rows: Sequence[Array]) -> Array:
        stacked = np.stack(rows).astype(np.float32)
        return stacked / np.maximum(np.linalg.norm(stacked, axis=-1, keepdims=True), np.float32(1e-12))

    def top_indices(self, scores: Array, count: int) -> Array:
        return np.argsort(-scores, axis=-1, kind="stable")[..., :count]

    def one_hot(self, indices: Array, count: int) -> Array:
        return np.eye(count, dtype=np.float32)[indices]

    def take(self, array: Array, indices: Array) -> Array:
        return np.take_along_axis(array, indices, -1)

    def put(self, array: Array, indices: Array, values: Array) -> Array:
        copy = array.copy()
        np.put_along_axis(copy, indices, values, -1)
        return copy

    def select_rows(self, mask: Sequence[bool], new: Array, old: Array) -> Array:
        new_values, old_values = _host(new), _host(old)
        return np.where(np.array(mask).reshape(-1, *[1] * (new_values.ndim - 1)), new_values, old_values)


def _host(array: Array) -> np.ndarray:
    """The result of an engine, a tensor or a value of ONNX Runtime, as a numpy array."""
    if isinstance(array, np.ndarray):
        return array
    values: np.ndarray = (array.cpu() if hasattr(array, "cpu") else array).numpy()
    return values


def size(array: Array) -> int:
    """The bytes of an array; those of ONNX Runtime have no ``nbytes``."""
    return int(array.nbytes if hasattr(array, "nbytes") else array.tensor_size_in_bytes())
