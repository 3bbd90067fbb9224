"""Chooses the tokens that a partial step recomputes (ToCa, arXiv 2410.05317, scores s1 to s4; DuCa's V-norm)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from math import prod
from typing import NamedTuple

import numpy as np

from duca_compile.core.tensors import Array
from duca_compile.errors import PolicyError
from duca_compile.policies.base import Selection
from duca_compile.runtime.arrays import Arrays


class TokenSet(NamedTuple):
    """A set of tokens that branches choose from. ``grid`` says how they lie, (frames,) height and width, where known.

    A patch bonus goes to tokens with a grid alone: text has none.
    """

    batch: int
    number: int
    grid: tuple[int, ...] | None = None


def check_grid(selection: Selection, tokens: TokenSet) -> None:
    """Raises PolicyError where a patch bonus is asked for and the grid is unknown or not tiled by patches."""
    _, count, grid = tokens
    patch = selection.patch
    if not selection.patch_bonus:
        return
    if grid is None:
        raise PolicyError(
            f"patch_bonus needs to know how the {count} tokens lie, which this model's graph does not show; say "
            "Selection(grid=(height, width)) or Selection(grid=(frames, height, width)), or set patch_bonus=0"
        )
    if prod(grid) != count:
        raise PolicyError(f"grid={grid} has {prod(grid)} places, and the model has {count} tokens")
    if grid[-2] % patch or grid[-1] % patch:
        raise PolicyError(
            f"patch_bonus needs a grid that {patch}x{patch} patches tile, and the {count} tokens lie as "
            f"{' x '.join(map(str, grid))}; set Selection(patch=...) to a divisor of both sides, or patch_bonus=0"
        )


SCORE_BYTES = 4  # of each score and staleness, in float32
AHEAD = 8  # steps that random tokens are drawn for at once


class TokenSelector:
    """Chooses tokens for the selectable branches of one pass, which are known by their position among them.

    Branches over the same tokens are scored together; ``tokens`` gives those of each branch. Random numbers
    are numpy's, whatever the arrays are, so that one seed makes the same choice in every runtime.
    """

    def __init__(self, selection: Selection, tokens: Sequence[TokenSet], arrays: Arrays) -> None:
        groups = {each: _Group(selection, count, each, arrays) for each, count in Counter(tokens).items()}
        self._groups = list(groups.values())
        self._places = [(groups[each], tokens[:i].count(each)) for i, each in enumerate(tokens)]
        self._split: dict[tuple[int, ...], list[tuple[_Group, list[int], list[int]]]] = {}

    def refresh(self, raw: Mapping[int, Array | None]) -> None:
        """Branches that were computed in full: ``raw`` maps their position to a new (batch, tokens) score."""
        scores = list(raw.values())
        for group, own, rows in self._by_group(tuple(raw)):
            group.refresh(dict(zip(rows, [scores[i] for i in own], strict=True)))

    def select(self, positions: Sequence[int], counts: Sequence[int], interval: int) -> list[Array | None]:
        """Token indices, int64 (batch, count), for each branch in ``positions``; the others grow one step staler.

        None where the count is 0 for all branches over the same tokens.
        """
        chosen: list[Array | None] = [None] * len(positions)
        for group, own, rows in self._by_group(tuple(positions)):
            for i, tokens in zip(own, group.select(rows, [counts[i] for i in own], interval), strict=False):
                chosen[i] = tokens
        return chosen

    @property
    def bytes(self) -> int:
        """Bytes of the scores and staleness, which are kept as long as the caches."""
        return sum(group.bytes for group in self._groups)

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

    def __init__(self, selection: Selection, branches: int, tokens: TokenSet, arrays: Arrays) -> None:
        self._selection = selection
        self._shape = (branches, tokens.batch, tokens.number)
        self._grid = tokens.grid
        self._arrays = arrays
        self._scores: Array | None = None
        self._staleness: Array | None = arrays.zeros(self._shape) if selection.staleness else None
        self._random = np.random.default_rng(selection.seed)
        self._stock: list[tuple[Array, ...]] = []  # random tokens for coming steps
        self._stocked = 0  # how many for each branch

    @property
    def bytes(self) -> int:
        held = [array for array in (self._staleness, self._scores) if array is not None]
        return len(held) * prod(self._shape) * SCORE_BYTES

    def refresh(self, raw: Mapping[int, Array | None]) -> None:
        if self._staleness is not None:
            self._staleness[self._rows(list(raw))] = 0
        scores = {position: score for position, score in raw.items() if score is not None}
        if self._selection.kind == "random" or not scores:
            return
        if self._scores is None:
            self._scores = self._arrays.zeros(self._shape)
        self._scores[self._rows(list(scores))] = self._arrays.normalized(list(scores.values()))

    def select(self, positions: list[int], counts: list[int], interval: int) -> Sequence[Array]:
        most = max(counts)
        stale = self._staleness
        if not most and stale is None:
            return ()
        bonus = self._grid is not None and self._selection.patch_bonus
        if self._selection.kind == "random" and stale is None and not bonus:
            drawn = self._drawn(most)
            if self._selection.shared:
                cut = {n: self._first(drawn[0], n) for n in set(counts)}
                return [cut[n] for n in counts]
            return [self._first(drawn[position], n) for position, n in zip(positions, counts, strict=True)]
        rows = self._rows(positions)
        score = self._base()[rows]
        if stale is not None:
            score = score + self._selection.staleness * stale[rows] / interval
        if self._selection.shared:
            score = self._arrays.zeros(score.shape) + score.mean(0)
        if bonus and most:
            score = self._favour_patches(score)
        order = self._arrays.top_indices(score, most)
        if stale is not None:
            self._age(stale, rows, order, counts)
        return [self._first(chosen, count) for chosen, count in zip(order, counts, strict=True)]

    def _first(self, tokens: Array, count: int) -> Array:
        return self._arrays.contiguous(tokens if count == tokens.shape[1] else tokens[:, :count])

    def _drawn(self, count: int) -> tuple[Array, ...]:
        """Random tokens, (batch, count) for each branch. Drawing for many steps takes little longer than for one."""
        if count != self._stocked or not self._stock:
            branches, batch, tokens = self._shape
            branches = 1 if self._selection.shared else branches
            steps = AHEAD if count == self._stocked else 1
            draws = self._random.random((steps, branches, 1, tokens), np.float32)
            order = np.argsort(draws, axis=-1)[..., :count]
            shared = np.repeat(order, batch, axis=2)
            self._stock, self._stocked = [tuple(step) for step in self._arrays.from_numpy(shared)], count
        return self._stock.pop()

    def _age(self, staleness: Array, rows: list[int] | slice, order: Array, counts: Sequence[int]) -> None:
        limit = self._arrays.from_numpy(np.array(counts).reshape(-1, 1, 1))
        rank = self._arrays.from_numpy(np.arange(order.shape[-1]))
        stale = staleness[rows] + 1
        kept = self._arrays.take(stale, order) * (rank >= limit)
        staleness[rows] = self._arrays.put(stale, order, kept)

    def _rows(self, positions: list[int]) -> list[int] | slice:
        """An index of the branches; a slice where it is all of them, which copies nothing."""
        return slice(None) if positions == list(range(self._shape[0])) else positions

    def _base(self) -> Array:
        if self._scores is not None:
            return self._scores
        branches, _, tokens = self._shape
        draw = self._random.random((branches, 1, tokens), np.float32)
        return self._arrays.from_numpy(np.broadcast_to(draw, self._shape).copy())

    def _favour_patches(self, score: Array) -> Array:
        """Multiplies the highest score of each patch, of each frame where there are several, by 1 + patch_bonus."""
        assert self._grid is not None
        patch, (height, width) = self._selection.patch, self._grid[-2:]
        cells = (*score.shape[:2], prod(self._grid[:-2]), height // patch, width // patch)
        grid = score.reshape(*cells[:-1], patch, cells[-1], patch).swapaxes(-3, -2)
        best = self._arrays.one_hot(grid.reshape(*cells, patch * patch).argmax(-1), patch * patch)
        boosted = grid * (1 + self._selection.patch_bonus * best.reshape(*cells, patch, patch))
        return boosted.swapaxes(-3, -2).reshape(score.shape)
