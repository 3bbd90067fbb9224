"""SpeCa, speculative feature caching (arXiv 2509.11628): forecasts are drafts, which the last block verifies."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import Literal

from duca_compile.core.steps import Step, StepKind, Verify
from duca_compile.errors import PolicyError
from duca_compile.policies.adaptive import AdaptivePolicy, DecidePer, Decider, check_per
from duca_compile.policies.base import Forecast, Series
from duca_compile.policies.checks import check_number, check_whole


@dataclass(frozen=True)
class SpeCa(AdaptivePolicy):
    """After a full step, features are drafted by Taylor series until a draft fails its verification.

    The error of a draft is that of the last block's output: the forecast one, compared with that computed from the
    drafted stream. If the error exceeds the threshold, the draft is discarded and the step is computed in full. The
    threshold at step i of T is ``base_threshold * decay_rate ** ((i + 1) / T)``. Source: arXiv 2509.11628.

    Attributes:
        max_order: the highest order of difference that drafts use, 0 to 4, as in TaylorSeer.
        base_threshold: the largest accepted error at the start of the loop.
        decay_rate: the factor that the threshold falls by, exponentially, over the whole loop. Unless it is 1, the
            number of steps must be known.
        min_threshold: the threshold is never lower than this.
        min_taylor_steps: how many drafts after each full step are accepted without verification.
        max_taylor_steps: the most drafts in a row, whatever their error.
        first_full_steps: how many steps at the start are full.
        compat: "paper" is as above. "released" is the authors' code: the first step after a full one is always a draft,
            every draft is used, and its error decides the next step. The error is then the elementwise relative
            difference, averaged over the whole batch.
        verify_of: what is compared. "stream": the end of the stream (released for DiT). "branch": the output of the
            last branch before its gate (released for FLUX and HunyuanVideo).
        decide_per: who decides. "batch": if the draft of one batch row fails, all rows are computed in full. "row":
            each row keeps or discards its draft on its own. "pair": rows i and i + batch / 2 do so together, the two
            halves of guidance. With "row" and "pair", a result does not depend on what else is in the batch.

    Raises:
        PolicyError: an invalid parameter. When steps are planned: the number of steps is needed, and not known.
    """

    max_order: int = 2
    base_threshold: float = 0.1
    decay_rate: float = 0.01
    min_threshold: float = 0.0
    min_taylor_steps: int = 0
    max_taylor_steps: int = 8
    first_full_steps: int = 3
    compat: Literal["paper", "released"] = "paper"
    verify_of: Literal["stream", "branch"] = "stream"
    decide_per: DecidePer = "batch"

    def __post_init__(self) -> None:
        check_whole("max_order", self.max_order, least=0, most=4)
        check_number("base_threshold", self.base_threshold, least=0)
        check_number("decay_rate", self.decay_rate, least=0, most=1)
        check_number("min_threshold", self.min_threshold, least=0)
        check_whole("min_taylor_steps", self.min_taylor_steps, least=0)
        check_whole("max_taylor_steps", self.max_taylor_steps, least=1)
        check_whole("first_full_steps", self.first_full_steps, least=1)
        check_per(self.decide_per)
        if self.compat not in ("paper", "released"):
            raise PolicyError(f"compat={self.compat!r} is unknown; choose 'paper' or 'released'")
        if self.verify_of not in ("stream", "branch"):
            raise PolicyError(f"verify_of={self.verify_of!r} is unknown; choose 'stream' or 'branch'")
        if self.compat == "released" and self.decide_per != "batch":
            raise PolicyError("compat='released' takes one error for the whole batch; set decide_per='batch'")

    @classmethod
    def settings(cls, steps: int) -> tuple[Series, ...]:
        return (tuple(cls(base_threshold=error) for error in (0.03, 0.1, 0.3, 1.0, 3.0)),)

    @property
    def name(self) -> str:
        released = ", as released" if self.compat == "released" else ""
        return f"SpeCa (threshold {self.base_threshold:g}, order {self.max_order}{released})"

    @property
    def forecast(self) -> Forecast:
        return Forecast(self.max_order, first=self.first_full_steps - 1)

    @property
    def measure(self) -> Verify:
        return Verify("relative_l1" if self.compat == "released" else "norm_ratio", self.verify_of)

    @property
    def per(self) -> DecidePer:
        return self.decide_per

    @property
    def choices(self) -> tuple[Step, ...]:
        unseen = max(
            self.min_taylor_steps, int(self.compat == "released")
        )  # drafts after a full step that are not verified
        drafts = {False: unseen > 0, True: unseen < self.max_taylor_steps}
        return Step(StepKind.FULL), *(Step(StepKind.FORECAST, verified=seen) for seen, may in drafts.items() if may)

    def decider(self, total: int | None) -> Decider:
        self.threshold(0, total)  # raises PolicyError if it needs the number of steps
        return _ReleasedDecider(self, total) if self.compat == "released" else _DraftDecider(self, total)

    def steps(self, total: int | None) -> Iterator[Step]:
        decider = self.decider(total)
        for index in count() if total is None else range(total):
            yield decider.decide(index, decider.propose(index), 0.0)

    def threshold(self, index: int, total: int | None) -> float:
        """The largest accepted error at step ``index``, counted from 0.

        Raises:
            PolicyError: it depends on the number of steps, and ``total`` is None.
        """
        if self.decay_rate == 1:
            return max(self.base_threshold, self.min_threshold)
        if total is None:
            raise PolicyError(
                "SpeCa's threshold falls over the loop, so it depends on the number of steps; pass "
                "optimize(..., num_inference_steps=50) (the number your scheduler runs), or set decay_rate=1"
            )
        progress = min(1.0, (index + 1) / total)
        return max(float(self.base_threshold * self.decay_rate**progress), self.min_threshold)


class _DraftDecider(Decider):
    """The paper's rule: a draft's own error decides its step. A pass that joins late starts with full steps, too."""

    def __init__(self, policy: SpeCa, total: int | None) -> None:
        self._policy, self._total = policy, total
        self._started: int | None = None  # the step at which the pass joined
        self._drafts = 0

    def propose(self, index: int) -> Step:
        if self._started is None:
            self._started = index
            return Step(StepKind.FULL)
        return self._next(index, index - self._started < self._policy.first_full_steps)

    def _next(self, index: int, warming_up: bool) -> Step:
        if warming_up or self._drafts >= self._policy.max_taylor_steps:
            return Step(StepKind.FULL)
        return Step(StepKind.FORECAST, verified=self._drafts >= self._policy.min_taylor_steps)

    def decide(self, index: int, proposed: Step, measured: float | None) -> Step:
        full = proposed.kind is StepKind.FULL or self._rejects(index, proposed, measured)
        self._drafts = 0 if full else self._drafts + 1
        return Step(StepKind.FULL) if full else proposed

    def _rejects(self, index: int, proposed: Step, measured: float | None) -> bool:
        if not proposed.verified or measured is None:
            return False
        return not measured <= self._policy.threshold(index, self._total)  # false for NaN


class _ReleasedDecider(_DraftDecider):
    """The released rule: the error of the last verified draft decides the next step."""

    def __init__(self, policy: SpeCa, total: int | None) -> None:
        super().__init__(policy, total)
        self._error: float | None = None

    def _next(self, index: int, warming_up: bool) -> Step:
        if self._drafts == 0:  # right after a full step, also among the first ones
            self._error = None
            return Step(StepKind.FORECAST)
        step = super()._next(index, warming_up)
        if step.verified and self._error is not None and self._error > self._policy.threshold(index, self._total):
            return Step(StepKind.FULL)
        return step

    def _rejects(self, index: int, proposed: Step, measured: float | None) -> bool:
        if proposed.verified and measured is not None:
            self._error = measured
        return False
