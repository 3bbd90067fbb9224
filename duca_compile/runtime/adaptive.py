"""Who decides of a batch, and what was decided: one decider for all rows, or one for each row or pair of rows."""

from __future__ import annotations

from collections.abc import Sequence

from duca_compile.core.steps import Step
from duca_compile.core.tensors import Array
from duca_compile.errors import PolicyError
from duca_compile.policies.adaptive import AdaptivePolicy, Decider
from duca_compile.runtime.arrays import Arrays


class Decisions:
    """The deciders of one pass. All steps are by row; where there is one decider they are the same."""

    def __init__(self, policy: AdaptivePolicy, total: int | None, batch: int) -> None:
        groups = {"batch": 1, "pair": max(1, batch // 2), "row": batch}[policy.per]
        self._deciders: list[Decider] = [policy.decider(total) for _ in range(groups)]
        self._batch = batch

    def propose(self, index: int) -> list[Step]:
        """What each row's step ``index`` is to be."""
        return self._by_row([decider.propose(index) for decider in self._deciders])

    def decide(self, index: int, proposed: Sequence[Step], measured: Sequence[float]) -> list[Step]:
        """What each row's step is; ``measured`` has a value for each row, one for all, or none."""
        values = list(measured) * self._batch if len(measured) == 1 else list(measured)
        chosen = []
        for group, decider in enumerate(self._deciders):
            own = values if len(self._deciders) == 1 else values[group :: len(self._deciders)]
            chosen.append(decider.decide(index, proposed[group], _largest(own)))
        return self._by_row(chosen)

    def _by_row(self, steps: list[Step]) -> list[Step]:
        """Row i belongs to group i modulo their number: pairs are rows i and i + batch / 2."""
        return [steps[row % len(steps)] for row in range(self._batch)]


def _largest(values: Sequence[float]) -> float | None:
    """The strictest; one that is no number is stricter than all."""
    if not values:
        return None
    return next((value for value in values if value != value), max(values))


def merged(arrays: Arrays, full: Sequence[bool], computed: Sequence[Array], cheap: Sequence[Array]) -> list[Array]:
    """Each result with the rows of ``computed`` where the row's step is full, and of ``cheap`` elsewhere.

    Raises:
        PolicyError: a result has no rows.
    """
    for each in computed:
        if not each.shape or each.shape[0] != len(full):
            raise PolicyError(
                f"decide_per needs outputs with one row for each of the {len(full)} rows of the latent, and there is "
                f"one of {tuple(each.shape)}; use decide_per='batch'"
            )
    return [arrays.select_rows(full, new, old) for new, old in zip(computed, cheap, strict=True)]
