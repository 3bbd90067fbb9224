"""The array operations of the runtime for torch's tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from duca_compile.runtime.arrays import Array

if TYPE_CHECKING:
    import torch


class TorchArrays:
    """Tensors on one device."""

    def __init__(self, device: torch.device) -> None:
        import torch

        self._torch, self._device = torch, device

    def zeros(self, shape: tuple[int, ...]) -> Array:
        return self._torch.zeros(shape, device=self._device)

    def of(self, values: np.ndarray) -> Array:
        return self._torch.from_numpy(values).to(self._device, non_blocking=True)

    def dense(self, array: Array) -> Array:
        return array.contiguous()

    def unit(self, rows: Sequence[Array]) -> Array:
        return self._torch.nn.functional.normalize(self._torch.stack(list(rows)).float(), dim=-1)

    def top(self, scores: Array, count: int) -> Array:
        return scores.topk(count, dim=-1).indices

    def one_hot(self, places: Array, count: int) -> Array:
        return self._torch.nn.functional.one_hot(places, count).float()

    def take(self, array: Array, places: Array) -> Array:
        return array.gather(-1, places)

    def put(self, array: Array, places: Array, values: Array) -> Array:
        return array.scatter(-1, places, values)

    def choose(self, rows: Sequence[bool], new: Array, old: Array) -> Array:
        chosen = self._torch.tensor(rows).to(self._device)
        return self._torch.where(chosen.view(-1, *[1] * (new.dim() - 1)), new, old)
