"""Decisions of an adaptive policy for one guidance pass: one decider for all batch rows, or one for each group."""

from __future__ import annotations

from collections.abc import Sequence

from duca_compile.core.steps import Step
from duca_compile.core.tensors import Array
from duca_compile.errors import PolicyError
from duca_compile.policies.adaptive import AdaptivePolicy, Decider
from duca_compile.runtime.arrays import Arrays


class Decisions:
    """The deciders of one guidance pass. Steps are given for each batch row; with one decider they are all the same.

    Args:
        policy: makes the deciders.
        total: the number of steps of the request, if it is known.
        batch: the number of batch rows.
    """

    def __init__(self, policy: AdaptivePolicy, total: int | None, batch: int) -> None:
        groups = {"batch": 1, "pair": max(1, batch // 2), "row": batch}[policy.per]
        self._deciders: list[Decider] = [policy.decider(total) for _ in range(groups)]
        self._batch = batch

    def propose(self, index: int) -> list[Step]:
        """What step ``index`` would be, for each batch row."""
        return self._by_row([decider.propose(index) for decider in self._deciders])

    def decide(self, index: int, proposed: Sequence[Step], measured: Sequence[float]) -> list[Step]:
        """What step ``index`` is, for each batch row.

        Args:
            index: the step, counted from 0.
            proposed: what ``propose`` returned.
            measured: one value for each batch row, one for all, or none.
        """
        values = list(measured) * self._batch if len(measured) == 1 else list(measured)
        decided = []
        for group, decider in enumerate(self._deciders):
            group_values = values if len(self._deciders) == 1 else values[group :: len(self._deciders)]
            decided.append(decider.decide(index, proposed[group], _largest(group_values)))
        return self._by_row(decided)

    def _by_row(self, steps: list[Step]) -> list[Step]:
        """The step of each row's group. Row i is in group i modulo their number: pairs are rows i and i + batch / 2."""
        return [steps[row % len(steps)] for row in range(self._batch)]


def _largest(values: Sequence[float]) -> float | None:
    """The largest value, or NaN if any value is; None if there is none."""
    if not values:
        return None
    return next((value for value in values if value != value), max(values))


def merged(arrays: Arrays, full: Sequence[bool], computed: Sequence[Array], cheap: Sequence[Array]) -> list[Array]:
    """Each output with the batch rows of ``computed`` where ``full`` is true, and those of ``cheap`` elsewhere.

    Raises:
        PolicyError: an output does not have one row for each batch row.
    """
    for output in computed:
        if not output.shape or output.shape[0] != len(full):
            raise PolicyError(
                f"decide_per needs outputs with one row for each of the {len(full)} rows of the latent, and there is "
                f"one of shape {tuple(output.shape)}; use decide_per='batch'"
            )
    return [arrays.select_rows(full, new, old) for new, old in zip(computed, cheap, strict=True)]
