"""Chooses the tokens that a partial step recomputes.

The scores are s1 to s4 of ToCa (arXiv 2410.05317), and the value norms of DuCa (arXiv 2412.18911).
"""

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
    """The tokens that one or more branches choose from.

    Attributes:
        batch: the number of batch rows.
        number: the number of tokens in each row.
        grid: how they are laid out, (height, width) or (frames, height, width), if it is known. A patch bonus applies
            only to tokens with a grid; text has none.
    """

    batch: int
    number: int
    grid: tuple[int, ...] | None = None


def check_grid(selection: Selection, tokens: TokenSet) -> None:
    """Checks that the tokens can get a patch bonus, if the selection has one.

    Raises:
        PolicyError: the grid is unknown, or patches do not tile it.
    """
    _, count, grid = tokens
    patch = selection.patch
    if not selection.patch_bonus:
        return
    if grid is None:
        raise PolicyError(
            f"patch_bonus needs the layout of the {count} tokens, which this model's graph does not show; say "
            "Selection(grid=(height, width)) or Selection(grid=(frames, height, width)), or set patch_bonus=0"
        )
    if prod(grid) != count:
        raise PolicyError(f"grid={grid} has {prod(grid)} places, and the model has {count} tokens")
    if grid[-2] % patch or grid[-1] % patch:
        raise PolicyError(
            f"patch_bonus needs a grid that {patch}x{patch} patches tile, and the grid of the {count} tokens is "
            f"{' x '.join(map(str, grid))}; set Selection(patch=...) to a divisor of both sides, or patch_bonus=0"
        )


SCORE_BYTES = 4  # of each score and each staleness, in float32
STEPS_AHEAD = 8  # steps that random tokens are drawn for at once


class TokenSelector:
    """Chooses tokens for the selectable branches of one guidance pass.

    A branch is known by its selector position, its index among the selectable branches. Branches over the same tokens
    are scored together. Random numbers come from numpy, whatever the arrays are, so that a seed makes the same choice
    in every runtime.

    Args:
        selection: how tokens are chosen.
        tokens: the tokens of each selectable branch.
        arrays: the array operations.
    """

    def __init__(self, selection: Selection, tokens: Sequence[TokenSet], arrays: Arrays) -> None:
        groups = {each: _Group(selection, count, each, arrays) for each, count in Counter(tokens).items()}
        self._groups = list(groups.values())
        self._members = [(groups[each], tokens[:i].count(each)) for i, each in enumerate(tokens)]
        self._split: dict[tuple[int, ...], list[tuple[_Group, list[int], list[int]]]] = {}

    def refresh(self, raw: Mapping[int, Array | None]) -> None:
        """Takes the new scores of branches that were computed in full.

        Args:
            raw: for each of their selector positions a (batch, tokens) score, or None if the selection needs none.
        """
        scores = list(raw.values())
        for group, indices, members in self._by_group(tuple(raw)):
            group.refresh(dict(zip(members, [scores[i] for i in indices], strict=True)))

    def select(self, positions: Sequence[int], counts: Sequence[int], interval: int) -> list[Array | None]:
        """Chooses the tokens to recompute; all other tokens of these branches grow one step staler.

        Args:
            positions: selector positions of the branches.
            counts: how many tokens of each to recompute.
            interval: steps from one full step to the next, which staleness is relative to.

        Returns:
            For each branch, token indices, int64 (batch, count); None where the count is 0 for all branches over the
            same tokens.
        """
        chosen: list[Array | None] = [None] * len(positions)
        for group, indices, members in self._by_group(tuple(positions)):
            selected = group.select(members, [counts[i] for i in indices], interval)
            for i, tokens in zip(indices, selected, strict=False):
                chosen[i] = tokens
        return chosen

    @property
    def bytes(self) -> int:
        """Bytes of the scores and staleness, which are kept as long as the caches."""
        return sum(group.bytes for group in self._groups)

    def _by_group(self, positions: tuple[int, ...]) -> list[tuple[_Group, list[int], list[int]]]:
        """For each group, the indices into ``positions`` of its branches, and their numbers within the group."""
        if positions not in self._split:
            split: dict[_Group, tuple[list[int], list[int]]] = {}
            for i, position in enumerate(positions):
                group, member = self._members[position]
                indices, members = split.setdefault(group, ([], []))
                indices.append(i)
                members.append(member)
            self._split[positions] = [(group, indices, members) for group, (indices, members) in split.items()]
        return self._split[positions]


class _Group:
    """Scores and staleness of the branches over the same tokens, as (branches, batch, tokens) arrays."""

    def __init__(self, selection: Selection, branches: int, tokens: TokenSet, arrays: Arrays) -> None:
        self._selection = selection
        self._shape = (branches, tokens.batch, tokens.number)
        self._grid = tokens.grid if selection.patch_bonus else None
        self._arrays = arrays
        self._scores: Array | None = None
        self._staleness: Array | None = arrays.zeros(self._shape) if selection.staleness else None
        self._random = np.random.default_rng(selection.seed)
        self._drawn: list[tuple[Array, ...]] = []  # random tokens for steps to come
        self._drawn_count = 0  # how many of them for each branch

    @property
    def bytes(self) -> int:
        held = [array for array in (self._staleness, self._scores) if array is not None]
        return len(held) * prod(self._shape) * SCORE_BYTES

    def refresh(self, raw: Mapping[int, Array | None]) -> None:
        if self._staleness is not None:
            self._staleness[self._index(list(raw))] = 0
        scores = {member: score for member, score in raw.items() if score is not None}
        if self._selection.kind == "random" or not scores:
            return
        if self._scores is None:
            self._scores = self._arrays.zeros(self._shape)
        self._scores[self._index(list(scores))] = self._arrays.normalized(list(scores.values()))

    def select(self, members: list[int], counts: list[int], interval: int) -> Sequence[Array]:
        most = max(counts)
        if not most and self._staleness is None:
            return ()
        if self._selection.kind == "random" and self._staleness is None and self._grid is None:
            return self._select_random(members, counts, most)
        return self._select_best(members, counts, most, interval)

    def _select_random(self, members: list[int], counts: list[int], most: int) -> Sequence[Array]:
        drawn = self._draw(most)
        if self._selection.shared:
            cut = {count: self._first(drawn[0], count) for count in set(counts)}
            return [cut[count] for count in counts]
        return [self._first(drawn[member], count) for member, count in zip(members, counts, strict=True)]

    def _select_best(self, members: list[int], counts: list[int], most: int, interval: int) -> Sequence[Array]:
        index, stale = self._index(members), self._staleness
        score = self._base_scores()[index]
        if stale is not None:
            score = score + self._selection.staleness * stale[index] / interval
        if self._selection.shared:
            score = self._arrays.zeros(score.shape) + score.mean(0)
        if self._grid is not None and most:
            score = self._favour_patches(score, self._grid)
        order = self._arrays.top_indices(score, most)
        if stale is not None:
            self._age(stale, index, order, counts)
        return [self._first(tokens, count) for tokens, count in zip(order, counts, strict=True)]

    def _first(self, tokens: Array, count: int) -> Array:
        return self._arrays.contiguous(tokens if count == tokens.shape[1] else tokens[:, :count])

    def _draw(self, count: int) -> tuple[Array, ...]:
        """Random tokens, (batch, count) for each branch. Drawing for many steps takes little longer than for one."""
        if count != self._drawn_count or not self._drawn:
            branches, batch, tokens = self._shape
            branches = 1 if self._selection.shared else branches
            steps = STEPS_AHEAD if count == self._drawn_count else 1
            draws = self._random.random((steps, branches, 1, tokens), np.float32)
            order = np.argsort(draws, axis=-1)[..., :count]
            repeated = np.repeat(order, batch, axis=2)
            self._drawn = [tuple(step) for step in self._arrays.from_numpy(repeated)]
            self._drawn_count = count
        return self._drawn.pop()

    def _age(self, staleness: Array, index: list[int] | slice, order: Array, counts: Sequence[int]) -> None:
        limit = self._arrays.from_numpy(np.array(counts).reshape(-1, 1, 1))
        rank = self._arrays.from_numpy(np.arange(order.shape[-1]))
        stale = staleness[index] + 1
        kept = self._arrays.take(stale, order) * (rank >= limit)
        staleness[index] = self._arrays.put(stale, order, kept)

    def _index(self, members: list[int]) -> list[int] | slice:
        """An index of these branches; a slice if it is all of them, which copies nothing."""
        return slice(None) if members == list(range(self._shape[0])) else members

    def _base_scores(self) -> Array:
        if self._scores is not None:
            return self._scores
        branches, _, tokens = self._shape
        draw = self._random.random((branches, 1, tokens), np.float32)
        return self._arrays.from_numpy(np.broadcast_to(draw, self._shape).copy())

    def _favour_patches(self, score: Array, token_grid: tuple[int, ...]) -> Array:
        """Multiplies the highest score of each patch, in each frame if there are several, by 1 + patch_bonus."""
        patch, (height, width) = self._selection.patch, token_grid[-2:]
        cells = (*score.shape[:2], prod(token_grid[:-2]), height // patch, width // patch)
        grid = score.reshape(*cells[:-1], patch, cells[-1], patch).swapaxes(-3, -2)
        best = self._arrays.one_hot(grid.reshape(*cells, patch * patch).argmax(-1), patch * patch)
        boosted = grid * (1 + self._selection.patch_bonus * best.reshape(*cells, patch, patch))
        return boosted.swapaxes(-3, -2).reshape(score.shape)
