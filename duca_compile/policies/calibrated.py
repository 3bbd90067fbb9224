"""Forecasts fitted to a model's own loop: where its full steps are, and the factor of each difference."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from duca_compile.core.files import atomic_write
from duca_compile.core.steps import Step, StepKind
from duca_compile.errors import PolicyError, UsageError
from duca_compile.policies.base import FittedFactors, Forecast, Policy
from duca_compile.policies.checks import check_number, check_whole

FORMAT = 1


@dataclass(frozen=True)
class Calibrated(Policy):
    """Full steps where they reduce the error most; fitted forecasts of the end of the stream in between.

    ``calibrate(...).policy(...)`` makes one, for loops of one length. A forecast is D_0 + f_1 D_1 + f_2 D_2 + ..., with
    the differences D_i of ``TaylorSeer(lite=True)`` (arXiv 2503.06923), and at the same cost. The factors f_i are not
    those of the Taylor series but those with the smallest squared error on the loops that were measured.

    Attributes:
        measured: for each step, its factors and the full step that it starts from; None for a full step. The first step
            must be full.
        max_order: the highest order of difference used, 1 to 4. Caches hold this many more tensors for each stream.
        error: root of the mean squared relative error of the forecasts on the loops that were measured.

    Raises:
        PolicyError: an invalid parameter.
    """

    measured: tuple[FittedFactors | None, ...]
    max_order: int = 2
    error: float = 0.0

    def __post_init__(self) -> None:
        check_whole("max_order", self.max_order, least=1, most=4)
        check_number("error", self.error, least=0)
        last = -1
        for step, fitted in enumerate(self.measured):
            if fitted is None:
                last = step
                continue
            for order, factor in enumerate(fitted.factors):
                check_number(f"measured[{step}].factors[{order}]", factor)
            if fitted.last_full != last or last < 0 or len(fitted.factors) > self.max_order:
                raise PolicyError(
                    f"measured[{step}]={fitted} is invalid: the full step before it is "
                    f"{last if last >= 0 else 'missing'}, and there are {self.max_order} orders at most"
                )
        if last < 0:
            raise PolicyError("measured has no full step: make the policy with calibrate()")

    @property
    def full_steps(self) -> tuple[int, ...]:
        """The numbers of the full steps, counted from 0."""
        return tuple(step for step, fitted in enumerate(self.measured) if fitted is None)

    @property
    def name(self) -> str:
        order = "" if self.max_order == 2 else f", order {self.max_order}"
        return f"calibrated ({len(self.full_steps)} of {len(self.measured)} full{order})"

    @property
    def forecast(self) -> Forecast:
        return Forecast(self.max_order, lite=True, first=0, measured=self.measured)

    def steps(self, total: int | None) -> Iterator[Step]:
        if total not in (None, len(self.measured)):
            raise PolicyError(
                f"this policy was calibrated for {len(self.measured)} steps, and there are {total}; "
                "calibrate the model for that number"
            )
        for fitted in self.measured:
            yield Step(StepKind.FULL if fitted is None else StepKind.FORECAST)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the policy to a JSON file, atomically.

        Raises:
            UsageError: the file cannot be written.
        """
        try:
            with atomic_write(Path(path)) as temporary:
                temporary.write_text(json.dumps({"format": FORMAT, **asdict(self)}) + "\n")
        except OSError as error:
            raise UsageError(f"cannot write {path}: {error.strerror}") from error

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Calibrated:
        """Reads a file that ``save`` wrote.

        Raises:
            UsageError: there is no such file, or it does not hold a calibrated policy.
        """
        try:
            fields = json.loads(Path(path).read_text())
            if fields.pop("format") != FORMAT:
                raise ValueError("another version of duca_compile wrote it")
            steps = (
                each and FittedFactors(each["last_full"], tuple(each["factors"])) for each in fields.pop("measured")
            )
            return Calibrated(tuple(steps), **fields)
        except OSError as error:
            raise UsageError(f"cannot read {path}: {error.strerror}") from error
        except (AttributeError, KeyError, TypeError, ValueError, PolicyError) as error:
            raise UsageError(f"{path} does not hold a calibrated policy: {error}; make one with calibrate()") from error
