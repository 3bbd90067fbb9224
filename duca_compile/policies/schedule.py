"""When full steps happen: at constant intervals, or at intervals that vary along the loop as in released code."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

from duca_compile.errors import PolicyError
from duca_compile.policies.checks import check_number, check_whole, known_total


@dataclass(frozen=True)
class Linear:
    """The line ``start + slope * x``, for x in [0, 1].

    Attributes:
        start: its value at 0.
        slope: its value at 1, less that at 0.

    Raises:
        PolicyError: a value that is not a finite number.
    """

    start: float
    slope: float = 0.0

    def __post_init__(self) -> None:
        check_number("start", self.start)
        check_number("slope", self.slope)

    def __call__(self, x: float) -> float:
        return self.start + self.slope * x


UNIT = Linear(1.0)
_INTERVALS = (2, 3, 4, 5, 6, 7, 8, 10, 12)


def intervals(steps: int) -> tuple[int, ...]:
    """The intervals worth trying in loops of this many steps, each of which leaves two full steps at least."""
    return tuple(interval for interval in _INTERVALS if interval < steps)


@dataclass(frozen=True)
class Moment:
    """The position of one step within its interval.

    Attributes:
        residue: steps since the last full one, under the interval in force before this step; 0 at a full step.
        late_residue: the same under the interval that a full step has just set.
        progress: the step's number over the number of steps, as in the released code.
    """

    residue: int
    late_residue: int
    progress: float


@dataclass(frozen=True)
class Interval:
    """Full steps every ``length`` steps, or at an interval that varies along the loop.

    Attributes:
        length: the nominal interval N, in steps.
        factor: if set, each full step sets the interval to round(N / factor(progress)), as in ToCa and DuCa on DiT.
        forced: (from, to, interval): where progress is in [from, to), this interval applies instead.
        descending: whether steps count down to 0, and progress falls from 1 to 0, as in the released DiT code; the
            pattern is then anchored at the last step. Otherwise steps count up from 0.
        first_full: how many steps at the start are full; the pattern counts from the last of them.

    Raises:
        PolicyError: an invalid parameter.
    """

    length: int
    factor: Linear | None = None
    forced: tuple[float, float, int] | None = None
    descending: bool = False
    first_full: int = 1

    def __post_init__(self) -> None:
        check_whole("interval", self.length, least=1)
        check_whole("first_full", self.first_full, least=1)
        if self.descending and self.first_full > 1:
            raise PolicyError(
                f"first_full={self.first_full} is invalid with descending=True: that pattern counts from the end"
            )
        if self.factor is not None and min(self.factor(0.0), self.factor(1.0)) <= 0:
            raise PolicyError(f"factor={self.factor} is invalid: it divides the interval, so it must stay above 0")
        if self.forced is not None:
            if len(self.forced) != 3:
                raise PolicyError(f"forced={self.forced!r} is invalid: it is (from, to, interval)")
            check_number("forced[0]", self.forced[0], least=0, most=1)
            check_number("forced[1]", self.forced[1], least=0, most=1)
            check_whole("forced[2]", self.forced[2], least=1)

    @property
    def needs_total(self) -> bool:
        """Whether the pattern depends on the number of steps."""
        return self.descending or self.factor is not None or self.forced is not None

    def moments(self, total: int | None) -> Iterator[Moment]:
        """The position of each of ``total`` steps; endless if ``total`` is None.

        Raises:
            PolicyError: the pattern depends on the number of steps, and ``total`` is None.
        """
        if self.needs_total:
            known_total("this schedule depends", total)
        interval, index, last_full = self.length, 0, self.first_full - 1
        while total is None or index < total:
            ordinal = total - 1 - index if self.descending and total is not None else index
            progress = ordinal / total if total is not None else 0.0
            residue = 0 if index <= last_full else (ordinal - last_full) % interval
            if residue == 0:
                interval = self._interval_at(progress)
            late = 0 if index <= last_full else (ordinal - last_full) % interval
            yield Moment(residue, late, progress)
            index += 1

    def _interval_at(self, progress: float) -> int:
        if self.forced is not None and self.forced[0] <= progress < self.forced[1]:
            return self.forced[2]
        return self.length if self.factor is None else max(1, round(self.length / self.factor(progress)))


def full_after_start(first_full_steps: int, interval: int, total: int | None) -> Iterator[bool]:
    """Whether each step is full: the first ones, and from the last of these on every ``interval``-th."""
    last = first_full_steps - 1
    for index in count() if total is None else range(total):
        yield index < last or (index - last) % interval == 0
