"""Forecasts that were measured on a model's own loop: where the full steps are, and what each difference counts."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from duca_compile.core.files import atomic_write
from duca_compile.core.steps import Step, StepKind
from duca_compile.errors import PolicyError, UsageError
from duca_compile.policies.base import Forecast, Measured, Policy
from duca_compile.policies.checks import check_number, check_whole

FORMAT = 1


@dataclass(frozen=True)
class Calibrated(Policy):
    """Full steps where they were found to be worth most; in between, measured forecasts of the end of the stream.

    ``calibrate(...).policy(...)`` makes one, for loops of one length. A forecast is D_0 + f_1 D_1 + f_2 D_2 and so on,
    as with ``TaylorSeer(lite=True)`` and at the same cost; the factors f are those of the smallest squared error on the
    loops that were measured, in place of Taylor's.

    Attributes:
        measured: for each step its factors and the full step before it; None makes it a full step, as the first must
            be.
        max_order: the highest difference used, 1 to 4; caches hold this many tensors more for each stream.
        error: root of the mean squared relative error of the forecasts in the loops that were measured.

    Raises:
        PolicyError: impossible numbers.
    """

    measured: tuple[Measured | None, ...]
    max_order: int = 2
    error: float = 0.0

    def __post_init__(self) -> None:
        check_whole("max_order", self.max_order, least=1, most=4)
        check_number("error", self.error, least=0)
        last = -1
        for step, each in enumerate(self.measured):
            last = step if each is None else last
            for order, factor in enumerate(() if each is None else each.factors):
                check_number(f"measured[{step}].factors[{order}]", factor)
            if each is not None and (each.last_full != last or last < 0 or len(each.factors) > self.max_order):
                raise PolicyError(
                    f"measured[{step}]={each} is impossible: the full step before it is "
                    f"{last if last >= 0 else 'missing'}, and there are {self.max_order} orders at most"
                )
        if last < 0:
            raise PolicyError("measured has no full step: make it with calibrate()")

    @property
    def full_steps(self) -> tuple[int, ...]:
        """Their numbers, from 0 on."""
        return tuple(step for step, each in enumerate(self.measured) if each is None)

    @property
    def name(self) -> str:
        return f"calibrated ({len(self.full_steps)} of {len(self.measured)} full)"

    @property
    def forecast(self) -> Forecast:
        return Forecast(self.max_order, lite=True, first=0, measured=self.measured)

    def steps(self, total: int | None) -> Iterator[Step]:
        if total not in (None, len(self.measured)):
            raise PolicyError(
                f"this policy was calibrated for {len(self.measured)} steps, and there are {total}; "
                "calibrate the model for that number"
            )
        for each in self.measured:
            yield Step(StepKind.FULL if each is None else StepKind.FORECAST)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a JSON file; whole or not at all.

        Raises:
            UsageError: it cannot be written.
        """
        try:
            with atomic_write(Path(path)) as temporary:
                temporary.write_text(json.dumps({"format": FORMAT, **asdict(self)}) + "\n")
        except OSError as error:
            raise UsageError(f"cannot write {path}: {error.strerror}") from error

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Calibrated:
        """Reads what ``save`` wrote.

        Raises:
            UsageError: there is no such file, or it is something else.
        """
        try:
            found = json.loads(Path(path).read_text())
            if found.pop("format") != FORMAT:
                raise ValueError("it is of another version of duca_compile")
            steps = (each and Measured(each["last_full"], tuple(each["factors"])) for each in found.pop("measured"))
            return Calibrated(tuple(steps), **found)
        except OSError as error:
            raise UsageError(f"cannot read {path}: {error.strerror}") from error
        except (AttributeError, KeyError, TypeError, ValueError, PolicyError) as error:
            raise UsageError(f"{path} holds no calibrated policy: {error}; make it with calibrate()") from error
