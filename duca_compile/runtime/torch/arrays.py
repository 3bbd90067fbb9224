"""The runtime's array operations for torch tensors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from duca_compile.core.tensors import Array


class TorchArrays:
    """Array operations on tensors of one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def zeros(self, shape: tuple[int, ...]) -> Array:
        return torch.zeros(shape, device=self._device)

    def from_numpy(self, values: np.ndarray) -> Array:
        return torch.from_numpy(values).to(self._device, non_blocking=True)

    def contiguous(self, array: Array) -> Array:
        return array.contiguous()

    def normalized(self, rows: Sequence[Array]) -> Array:
        return torch.nn.functional.normalize(torch.stack(list(rows)).float(), dim=-1)

    def top_indices(self, scores: Array, count: int) -> Array:
        return scores.topk(count, dim=-1).indices

    def one_hot(self, indices: Array, count: int) -> Array:
        return torch.nn.functional.one_hot(indices, count).float()

    def take(self, array: Array, indices: Array) -> Array:
        return array.gather(-1, indices)

    def put(self, array: Array, indices: Array, values: Array) -> Array:
        return array.scatter(-1, indices, values)

    def select_rows(self, mask: Sequence[bool], new: Array, old: Array) -> Array:
        chosen = torch.tensor(mask).to(self._device)
        return torch.where(chosen.view(-1, *[1] * (new.dim() - 1)), new, old)
