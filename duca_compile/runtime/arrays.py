"""The few array operations of the runtime, for torch's tensors and for numpy's arrays; numpy needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from duca_compile.core.tensors import Array


class Arrays(Protocol):
    """Operations on float32 scores and int64 indices; all of an object's arrays are on one device."""

    def zeros(self, shape: tuple[int, ...]) -> Array:
        """float32."""

    def from_numpy(self, values: np.ndarray) -> Array:
        """A copy on the device, or the same memory."""

    def contiguous(self, array: Array) -> Array:
        """It with contiguous memory."""

    def normalized(self, rows: Sequence[Array]) -> Array:
        """Stacked as float32, each divided by its norm along the last axis."""

    def top_indices(self, scores: Array, count: int) -> Array:
        """The places of the ``count`` highest along the last axis, the highest first."""

    def one_hot(self, places: Array, count: int) -> Array:
        """float32, with a new last axis."""

    def take(self, array: Array, places: Array) -> Array:
        """The entries at ``places`` along the last axis."""

    def put(self, array: Array, places: Array, values: Array) -> Array:
        """A copy, with ``values`` at ``places`` along the last axis."""

    def select_rows(self, rows: Sequence[bool], new: Array, old: Array) -> Array:
        """The rows of ``new`` where ``rows`` says so, and of ``old`` elsewhere; what an engine returned will do."""


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

    def one_hot(self, places: Array, count: int) -> Array:
        return np.eye(count, dtype=np.float32)[places]

    def take(self, array: Array, places: Array) -> Array:
        return np.take_along_axis(array, places, -1)

    def put(self, array: Array, places: Array, values: Array) -> Array:
        copy = array.copy()
        np.put_along_axis(copy, places, values, -1)
        return copy

    def select_rows(self, rows: Sequence[bool], new: Array, old: Array) -> Array:
        one, other = _host(new), _host(old)
        return np.where(np.array(rows).reshape(-1, *[1] * (one.ndim - 1)), one, other)


def _host(array: Array) -> np.ndarray:
    """What an engine returned, a tensor or a value of ONNX Runtime, as a numpy array."""
    if isinstance(array, np.ndarray):
        return array
    found: np.ndarray = (array.cpu() if hasattr(array, "cpu") else array).numpy()
    return found


def size(array: Array) -> int:
    """Its bytes; arrays of ONNX Runtime have no attribute for that."""
    return int(array.nbytes if hasattr(array, "nbytes") else array.tensor_size_in_bytes())
