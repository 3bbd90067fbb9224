"""Chooses the tokens that a partial step recomputes (ToCa, arXiv 2410.05317, scores s1, s3 and s4; DuCa's V-norm)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from math import isqrt

import numpy as np

from duca_compile.errors import PolicyError
from duca_compile.policies.base import Selection
from duca_compile.runtime.arrays import Array, Arrays


def check_grid(selection: Selection, tokens: int) -> None:
    """Raises PolicyError where a patch bonus is asked for and the tokens are not a square grid of patches."""
    side, patch = isqrt(tokens), selection.patch
    if selection.patch_bonus and (side * side != tokens or side % patch):
        raise PolicyError(
            f"patch_bonus needs a square token grid that {patch}x{patch} patches tile; "
            f"this model has {tokens} tokens. Set Selection(patch_bonus=0)."
        )


AHEAD = 8  # steps that random tokens are drawn for at once


class TokenSelector:
    """Chooses tokens for the selectable branches of one pass, which are known by their position among them.

    Branches over the same tokens are scored together; ``shapes`` gives (batch, tokens) of each branch. Random numbers
    are numpy's, whatever the arrays are, so that one seed makes the same choice in every runtime.
    """

    def __init__(self, selection: Selection, shapes: Sequence[tuple[int, int]], arrays: Arrays) -> None:
        counts = Counter(shapes)
        groups = {shape: _Group(selection, count, *shape, arrays) for shape, count in counts.items()}
        self._groups = list(groups.values())
        self._places = [(groups[shape], shapes[:i].count(shape)) for i, shape in enumerate(shapes)]
        self._split: dict[tuple[int, ...], list[tuple[_Group, list[int], list[int]]]] = {}

    def refresh(self, raw: Mapping[int, Array | None]) -> None:
        """Branches that were computed in full: ``raw`` maps their position to a new (batch, tokens) score."""
        scores = list(raw.values())
        for group, own, rows in self._by_group(tuple(raw)):
            group.refresh(dict(zip(rows, [scores[i] for i in own], strict=True)))

    def select(self, positions: Sequence[int], counts: Sequence[int], interval: int) -> list[Array | None]:
        """Token indices, int64 (batch, count), for each branch in ``positions``; the others grow one step staler.

        None where the count is 0 for all branches over the same tokens. Raises PolicyError where a patch bonus is
        asked for and the tokens are not a square grid of patches.
        """
        chosen: list[Array | None] = [None] * len(positions)
        for group, own, rows in self._by_group(tuple(positions)):
            for i, tokens in zip(own, group.select(rows, [counts[i] for i in own], interval), strict=False):
                chosen[i] = tokens
        return chosen

    def _by_group(self, positions: tuple[int, ...]) -> list[tuple[_Group, list[int], list[int]]]:
        """For each group the indices into ``positions`` that are its own, and their rows in it."""
        if positions not in self._split:
            found: dict[_Group, tuple[list[int], list[int]]] = {}
            for i, position in enumerate(positions):
                group, row = self._places[position]
                own, rows = found.setdefault(group, ([], []))
                own.append(i)
                rows.append(row)
            self._split[positions] = [(group, own, rows) for group, (own, rows) in found.items()]
        return self._split[positions]


class _Group:
    """Scores and staleness of branches over the same tokens, as (branches, batch, tokens) arrays."""

    def __init__(self, selection: Selection, branches: int, batch: int, tokens: int, arrays: Arrays) -> None:
        self._selection = selection
        self._shape = (branches, batch, tokens)
        self._arrays = arrays
        self._scores: Array | None = None
        self._staleness = arrays.zeros(self._shape)
        self._random = np.random.default_rng(selection.seed)
        self._stock: list[tuple[Array, ...]] = []  # random tokens for coming steps
        self._stocked = 0  # how many for each branch

    def refresh(self, raw: Mapping[int, Array | None]) -> None:
        self._staleness[self._rows(list(raw))] = 0
        scores = {position: score for position, score in raw.items() if score is not None}
        if self._selection.kind == "random" or not scores:
            return
        if self._scores is None:
            self._scores = self._arrays.zeros(self._shape)
        self._scores[self._rows(list(scores))] = self._arrays.unit(list(scores.values()))

    def select(self, positions: list[int], counts: list[int], interval: int) -> Sequence[Array]:
        most = max(counts)
        if not most and not self._selection.staleness:
            return ()
        if self._selection.kind == "random" and not self._selection.staleness and not self._selection.patch_bonus:
            drawn = self._drawn(most)
            own = [drawn[0 if self._selection.shared else position] for position in positions]
            return [each if n == most else self._arrays.dense(each[:, :n]) for each, n in zip(own, counts, strict=True)]
        rows = self._rows(positions)
        score = self._base()[rows]
        if self._selection.staleness:
            score = score + self._selection.staleness * self._staleness[rows] / interval
        if self._selection.shared:
            score = self._arrays.zeros(score.shape) + score.mean(0)
        if self._selection.patch_bonus and most:
            score = self._favour_patches(score)
        order = self._arrays.top(score, most)
        if self._selection.staleness:
            self._age(rows, order, counts)
        return [self._arrays.dense(chosen[:, :count]) for chosen, count in zip(order, counts, strict=True)]

    def _drawn(self, count: int) -> tuple[Array, ...]:
        """Random tokens, (batch, count) for each branch. Drawing for many steps takes little longer than for one."""
        if count != self._stocked or not self._stock:
            branches, batch, tokens = self._shape
            branches = 1 if self._selection.shared else branches
            steps = AHEAD if count == self._stocked else 1
            draws = self._random.random((steps, branches, 1, tokens), np.float32)
            order = np.argsort(draws, axis=-1)[..., :count]
            shared = np.repeat(order, batch, axis=2)
            self._stock, self._stocked = [tuple(step) for step in self._arrays.of(shared)], count
        return self._stock.pop()

    def _age(self, rows: list[int] | slice, order: Array, counts: Sequence[int]) -> None:
        limit = self._arrays.of(np.array(counts).reshape(-1, 1, 1))
        rank = self._arrays.of(np.arange(order.shape[-1]))
        stale = self._staleness[rows] + 1
        kept = self._arrays.take(stale, order) * (rank >= limit)
        self._staleness[rows] = self._arrays.put(stale, order, kept)

    def _rows(self, positions: list[int]) -> list[int] | slice:
        """An index of the branches; a slice where it is all of them, which copies nothing."""
        return slice(None) if positions == list(range(self._shape[0])) else positions

    def _base(self) -> Array:
        if self._scores is not None:
            return self._scores
        branches, _, tokens = self._shape
        draw = self._random.random((branches, 1, tokens), np.float32)
        return self._arrays.of(np.broadcast_to(draw, self._shape).copy())

    def _favour_patches(self, score: Array) -> Array:
        """Multiplies the highest score of each patch by 1 + patch_bonus."""
        patch = self._selection.patch
        branches, batch, tokens = score.shape
        check_grid(self._selection, tokens)
        side = isqrt(tokens)
        cells = (branches, batch, side // patch, side // patch)
        grid = score.reshape(branches, batch, side // patch, patch, side // patch, patch).swapaxes(3, 4)
        best = self._arrays.one_hot(grid.reshape(*cells, patch * patch).argmax(-1), patch * patch)
        boosted = grid * (1 + self._selection.patch_bonus * best.reshape(*cells, patch, patch))
        return boosted.swapaxes(3, 4).reshape(branches, batch, tokens)
