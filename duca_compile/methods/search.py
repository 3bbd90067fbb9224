"""Finds the full steps of a loop: by a shortest path (DPCache), or by running the loop (BudCache)."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from random import Random
from typing import Any

import numpy as np

from duca_compile.errors import PolicyError

Array = np.ndarray[Any, np.dtype[np.float64]]
Steps = tuple[int, ...]

NEAR = 3  # steps that a full step is moved by at most, in most moves


def shortest_path(errors: Array, count: int, first: int, gap: int) -> Steps:
    """The ``count`` full steps with the smallest sum of forecast errors (DPCache, arXiv 2602.22654).

    Exact for forecasts from two full steps: the state of the dynamic program is the last two of them.

    Args:
        errors: of the forecast of each step from any two earlier ones, (first one, second one, step); zero up to the
            second one.
        count: how many steps are full.
        first: how many of these are at the start, at least 2.
        gap: the most steps from one full step to the next, or to the end of the loop.

    Raises:
        PolicyError: so few full steps leave longer gaps.
    """
    steps = len(errors)
    sums = np.concatenate([np.zeros((steps, steps, 1)), np.cumsum(errors, 2)], 2)
    ahead = np.arange(steps + 1) - np.arange(steps)[:, None]
    cost = np.where((ahead > 0) & (ahead <= gap), sums, np.inf)  # (first, second, the next full one or the end)
    best = np.full((steps, steps), np.inf)
    best[first - 2, first - 1] = 0.0
    before: list[Any] = []
    for _ in range(count - first):
        through = best[:, :, None] + cost[:, :, :steps]
        before.append(through.argmin(0))
        best = through.min(0)
    total = best + cost[:, :, steps]
    if not np.isfinite(total).any():
        raise PolicyError(
            f"{count} full steps of {steps}, {first} of them at the start, leave gaps of more than {gap} steps; take "
            "more full steps, or allow longer gaps"
        )
    one, other = map(int, np.unravel_index(total.argmin(), total.shape))
    path = [other, one]
    for chosen in reversed(before):
        path.append(int(chosen[path[-1], path[-2]]))
    return tuple(sorted({*range(first), *path}))


class ClosedLoopSearch:
    """Looks for the full steps with the smallest loss by running loops: annealing, then climbing (arXiv 2606.13496).

    Args:
        loss: of a loop with these full steps.
        steps: how many steps the loop has.
        forced: how many full steps stay at the start.
        seed: of the random moves.
    """

    def __init__(self, loss: Callable[[Steps], float], steps: int, forced: int, seed: int) -> None:
        self._loss, self._steps, self._forced = loss, steps, forced
        self._random, self._known = Random(seed), dict[Steps, float]()

    @property
    def runs(self) -> int:
        """How many loops were run."""
        return len(self._known)

    def loss(self, full: Steps) -> float:
        """The loss of these full steps; a loop that ends in no number is infinitely bad."""
        if full not in self._known:
            loss = self._loss(full)
            self._known[full] = loss if math.isfinite(loss) else math.inf
        return self._known[full]

    def anneal(self, start: Steps, iterations: int, hot: float, cold: float) -> Steps:
        """The best full steps that were seen on a walk which takes ever fewer steps upwards."""
        now = best = start
        for iteration in range(iterations):
            temperature = hot * (cold / hot) ** (iteration / iterations)
            moved = self._moved(now)
            if self._random.random() < 0.1:
                moved = self._moved(moved)
            worse = self.loss(moved) - self.loss(now)
            if worse < 0 or self._random.random() < math.exp(-worse / temperature):
                now = moved
            best = min(best, now, key=self.loss)
        return best

    def climb(self, start: Steps, rounds: int) -> Steps:
        """The best of all neighbours, again and again, until none is better."""
        now = start
        for _ in range(rounds):
            best = min(self._neighbours(now), key=self.loss, default=now)
            if self.loss(best) >= self.loss(now):
                break
            now = best
        return now

    def _moved(self, full: Steps) -> Steps:
        """With one full step moved: in seven of ten cases near, else anywhere."""
        free = [step for step in range(self._forced, self._steps) if step not in full]
        if not free or len(full) <= self._forced:
            return full
        old = self._random.choice(full[self._forced :])
        near = [step for step in free if abs(step - old) <= NEAR]
        new = self._random.choice(near if near and self._random.random() < 0.7 else free)
        return _replaced(full, old, new)

    def _neighbours(self, full: Steps) -> Iterator[Steps]:
        for old in full[self._forced :]:
            for new in range(max(self._forced, old - NEAR), min(self._steps, old + NEAR + 1)):
                if new not in full:
                    yield _replaced(full, old, new)
        far = [self._moved(full) for _ in range(2)]
        yield from (moved for moved in far if moved != full)


def _replaced(full: Collection[int], old: int, new: int) -> Steps:
    return tuple(sorted({*full, new} - {old}))
