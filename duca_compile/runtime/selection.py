"""Chooses the tokens that a partial step recomputes (ToCa, arXiv 2410.05317, scores s1, s3 and s4; DuCa's V-norm)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isqrt

import torch
from torch import Tensor
from torch.nn import functional

from duca_compile.errors import PolicyError
from duca_compile.policies.base import Selection


class TokenSelector:
    """Scores and staleness of every selectable branch of one pass, as (branches, batch, tokens) tensors."""

    def __init__(self, selection: Selection, branches: int, batch: int, tokens: int, device: torch.device) -> None:
        """Raises PolicyError where a patch bonus is asked for and the tokens are not a square grid of patches."""
        self._selection = selection
        self._shape = (branches, batch, tokens)
        self._device = device
        self._scores: Tensor | None = None
        self._staleness = torch.zeros(self._shape, device=device)
        self._generator = torch.Generator(device).manual_seed(selection.seed)
        side = isqrt(tokens)
        if selection.patch_bonus and (side * side != tokens or side % selection.patch):
            raise PolicyError(
                f"patch_bonus needs a square token grid that {selection.patch}x{selection.patch} patches tile; "
                f"this model has {tokens} tokens. Set Selection(patch_bonus=0)."
            )

    def refresh(self, raw: Mapping[int, Tensor | None]) -> None:
        """Branches that were computed in full: ``raw`` maps their position to a new (batch, tokens) score."""
        for position, score in raw.items():
            if score is not None and self._selection.kind != "random":
                if self._scores is None:
                    self._scores = torch.zeros(self._shape, device=self._device)
                self._scores[position] = functional.normalize(score.float(), dim=-1)
            self._staleness[position] = 0

    def select(self, positions: Sequence[int], counts: Sequence[int], interval: int) -> list[Tensor]:
        """Token indices, int64 (batch, count), for each branch in ``positions``; the others grow one step staler."""
        rows = list(positions)
        score = self._base(rows) + self._selection.staleness * self._staleness[rows] / interval
        if self._selection.patch_bonus:
            score = self._favour_patches(score)
        order = score.topk(max(counts), dim=-1).indices
        limit = torch.tensor(counts, device=self._device).view(-1, 1, 1)
        rank = torch.arange(order.shape[-1], device=self._device)
        stale = self._staleness[rows] + 1
        kept = stale.gather(-1, order)
        self._staleness[rows] = stale.scatter(-1, order, torch.where(rank < limit, 0.0, kept))
        return [order[i, :, :count].contiguous() for i, count in enumerate(counts)]

    def _base(self, rows: list[int]) -> Tensor:
        branches, batch, tokens = self._shape
        if self._scores is not None:
            return self._scores[rows]
        draw = torch.rand(branches, 1, tokens, generator=self._generator, device=self._device)
        return draw[rows].expand(-1, batch, -1)

    def _favour_patches(self, score: Tensor) -> Tensor:
        """Multiplies the highest score of each patch by 1 + patch_bonus."""
        patch = self._selection.patch
        side = isqrt(score.shape[-1])
        branches, batch, tokens = score.shape
        cells = (branches, batch, side // patch, side // patch)
        grid = score.reshape(branches, batch, side // patch, patch, side // patch, patch).transpose(3, 4)
        best = functional.one_hot(grid.reshape(*cells, patch * patch).argmax(-1), patch * patch)
        boosted = grid * (1 + self._selection.patch_bonus * best.view(*cells, patch, patch))
        return boosted.transpose(3, 4).reshape(branches, batch, tokens)
