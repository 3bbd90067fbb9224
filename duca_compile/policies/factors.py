"""The factors of forecasts: numbers that the steps alone determine.

Every forecast is a sum of cached values, each times a factor. Full steps keep differences D_0, D_1, ... of a feature,
weighted sums of it, or both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import factorial

import numpy as np

from duca_compile.errors import PolicyError
from duca_compile.policies.checks import check_number, check_whole

MOST_SUMS = 9


def taylor(distance: float, order: int) -> tuple[float, ...]:
    """The factors of D_1, D_2, ... in a Taylor series: distance^i / i!."""
    return tuple(distance**i / factorial(i) for i in range(1, order + 1))


def hermite(distance: float, order: int, scale: float) -> tuple[float, ...]:
    """Those of scaled Hermite polynomials: scale^i H_i(scale * distance) / i! (HiCache, arXiv 2508.16984).

    H_1 = 2x and H_2 = 4x^2 - 2. Differences run forward in the order of sampling, and so does ``distance``.
    """
    x = scale * distance
    before, values = 1.0, [2 * x]
    for i in range(1, order):
        values.append(2 * x * values[-1] - 2 * i * before)
        before = values[-2]
    return tuple(scale**i * value / factorial(i) for i, value in enumerate(values[:order], 1))


@dataclass(frozen=True)
class Chebyshev:
    """A series of Chebyshev polynomials of the step, fitted to the features of all full steps (Spectrum).

    The fit is a ridge regression. It needs no feature by itself but the sums of all of them, each times T_m at its
    step, for m from 0 to ``degree``. Source: arXiv 2603.01623.

    Attributes:
        degree: the highest polynomial.
        ridge: the penalty on the square of each coefficient, that of T_0 included.
        share: the weight of the series in a forecast; the rest is the line through the last two full steps.

    Raises:
        PolicyError: an invalid parameter.
    """

    degree: int = 4
    ridge: float = 0.1
    share: float = 1.0

    def __post_init__(self) -> None:
        check_whole("degree", self.degree, least=1, most=MOST_SUMS - 1)
        check_number("ridge", self.ridge, least=0)
        check_number("share", self.share, least=0, most=1)
        if not self.ridge or not self.share:
            raise PolicyError(
                f"ridge={self.ridge!r}, share={self.share!r} is invalid: both must be above 0; the line alone is "
                "TaylorSeer(max_order=1, lite=True)"
            )

    @property
    def sums(self) -> int:
        """How many weighted sums full steps keep."""
        return self.degree + 1

    def values(self, step: int, total: int) -> tuple[float, ...]:
        """T_0 to T_degree at a step of ``total``; all steps lie in [-1, 1)."""
        x = 2 * step / total - 1
        values = [1.0, x]
        while len(values) < self.sums:
            values.append(2 * x * values[-1] - values[-2])
        return tuple(values)

    def factors(self, step: int, full: Sequence[int], total: int) -> tuple[float, ...]:
        """The factor of each sum in the value of the series at ``step``, if these are the full steps so far."""
        rows = np.array([self.values(each, total) for each in full]).reshape(-1, self.sums)
        gram = rows.T @ rows + self.ridge * np.eye(self.sums)
        found, *_ = np.linalg.lstsq(gram, np.array(self.values(step, total)), rcond=None)  # a tiny ridge may round away
        return tuple(found.tolist())
