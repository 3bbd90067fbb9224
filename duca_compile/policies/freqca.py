"""FreqCa (arXiv 2510.08669): low frequencies of the stream's end are reused, high ones are forecast."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import get_args

from duca_compile.core.steps import HighPass, Step, StepKind, Transform
from duca_compile.errors import PolicyError
from duca_compile.policies.base import Forecast, Policy, Series
from duca_compile.policies.checks import check_number, check_whole
from duca_compile.policies.schedule import full_after_start, intervals


@dataclass(frozen=True)
class FreqCa(Policy):
    """Full steps at a fixed interval; in between, forecasts of the end of the stream without its low frequencies.

    Low frequencies of neighbouring steps are alike, so those of the last full step are reused. High ones follow a
    smooth curve, so they are forecast as in ``HiCache``. Full steps filter the differences, once; a forecast is their
    sum and costs no more than with ``HiCache(lite=True)``. Source: arXiv 2510.08669.

    Attributes:
        interval: number of steps from one full step to the next.
        scale: of the Hermite polynomials, above 0.
        first_full_steps: how many steps at the start are full.
        transform: "dct", over the grid of the tokens (released for FLUX); or "fft", over the tokens in a row (released
            for Qwen-Image).
        cutoff: frequencies up to this share of the highest one are low, from 0 to 1.
        grid: layout of the tokens, (height, width), for "dct"; needed only if the graph does not show it.

    Raises:
        PolicyError: an invalid parameter. When steps are planned: the grid is needed, and not known.
    """

    interval: int = 6
    scale: float = 0.71
    first_full_steps: int = 3
    transform: Transform = "dct"
    cutoff: float = 0.1
    grid: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        check_whole("interval", self.interval, least=1)
        check_number("scale", self.scale, least=0)
        check_whole("first_full_steps", self.first_full_steps, least=1)
        check_number("cutoff", self.cutoff, least=0, most=1)
        if not self.scale:
            raise PolicyError("scale=0 is invalid: it must be above 0")
        if self.transform not in get_args(Transform):
            raise PolicyError(f"transform={self.transform!r} is unknown; choose 'dct' or 'fft'")
        if self.grid is not None:
            if self.transform == "fft" or len(self.grid) != 2:
                raise PolicyError(f"grid={self.grid!r} is invalid: it is (height, width), for transform='dct'")
            for i, size in enumerate(self.grid):
                check_whole(f"grid[{i}]", size, least=1)

    @classmethod
    def settings(cls, steps: int) -> tuple[Series, ...]:
        return tuple(tuple(cls(n, transform=transform) for n in intervals(steps)) for transform in get_args(Transform))

    @property
    def name(self) -> str:
        return f"FreqCa (N={self.interval}, {self.transform})"

    @property
    def forecast(self) -> Forecast:
        high_pass = HighPass(self.transform, self.cutoff, self.grid)
        return Forecast(2, lite=True, first=self.first_full_steps - 1, hermite=self.scale, high_pass=high_pass)

    def steps(self, total: int | None) -> Iterator[Step]:
        for full in full_after_start(self.first_full_steps, self.interval, total):
            yield Step(StepKind.FULL if full else StepKind.FORECAST, self.interval)
