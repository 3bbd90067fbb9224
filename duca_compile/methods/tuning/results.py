"""What tuning found: a policy, what it gave on calls that did not choose it, and all that was tried."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from duca_compile.methods.tuning.search import Judged
from duca_compile.methods.tuning.trials import Trial
from duca_compile.methods.tuning.wishes import Wish
from duca_compile.policies import Policy


@dataclass(frozen=True)
class Conditions:
    """How it was measured.

    Attributes:
        target: class name of the pipeline or model.
        is_pipeline: whether it is a pipeline.
        steps: of a call.
        backend: name of the backend.
        device: of the model.
        torch: its version.
        threads: that it uses on a CPU.
        labels: the calls.
        choosing, judging: the numbers of the calls that chose, and of those that judged.
        uncached_seconds: of an uncached call.
        peak: what PSNR refers to.
        seconds: that tuning took.
        cut_short: whether its time ended before all that was promising was tried.
    """

    target: str
    is_pipeline: bool
    steps: int
    backend: str
    device: str
    torch: str
    threads: int
    labels: tuple[str, ...]
    choosing: tuple[int, ...]
    judging: tuple[int, ...]
    uncached_seconds: float
    peak: float
    seconds: float
    cut_short: bool


@dataclass(frozen=True)
class Findings:
    """What ``tune`` found.

    Attributes:
        policy: the setting that was chosen; where the wish is not met, the one that came closest.
        met: whether it meets the wish on the calls that judge.
        judged: the finalists on the calls that judge, the chosen one first.
        trials: all that was tried on the calls that choose.
        left_out: what was not tried, with the reason.
        wish: what was asked for.
        conditions: how it was measured.
        uncached: the uncached results of the calls that judge.
    """

    policy: Policy
    met: bool
    judged: tuple[Judged, ...]
    trials: tuple[Trial, ...]
    left_out: Mapping[str, str]
    wish: Wish
    conditions: Conditions
    uncached: tuple[Any, ...] = field(default=(), repr=False)

    @property
    def speedup(self) -> float:
        """The median speed-up over the uncached loop on the calls that judge."""
        return self.judged[0].outcome.speedup

    @property
    def quality(self) -> float:
        """The mean of the metric on the calls that judge: PSNR in dB, or a metric of your own."""
        return self.judged[0].outcome.quality

    @property
    def seconds(self) -> float:
        """Median wall time of a call."""
        return self.judged[0].outcome.seconds

    @property
    def cache_bytes(self) -> int:
        """The most bytes that caches held in a call."""
        return self.judged[0].outcome.cache_bytes

    @property
    def verdict(self) -> str:
        """Whether the wish is met, in a sentence."""
        found, how = self.judged[0], self.conditions
        low, high = min(found.speedups), max(found.speedups)
        figures = (
            f"{found.outcome.speedup:.2f} times as fast "
            f"({low:.2f} to {high:.2f} in {len(found.speedups)} pairs of runs), "
            f"{self.wish.metric_name} {self.wish.quality_text(found.outcome.quality)}, "
            f"on {counted(len(how.judging), 'call')} that did not choose it"
        )
        if self.met:
            return f"{self.policy.name}: {figures}"
        time = ", and the time ended before all were tried" if how.cut_short else ""
        missed = f"cannot: nothing that was tried gives {self.wish}{time}"
        return f"{missed}. What came closest is {self.policy.name}: {figures}"


def judged_cells(each: Judged, wish: Wish) -> list[str]:
    """The figures of a finalist, for a table."""
    found = each.outcome
    return [
        f"{found.speedup:.2f}x",
        f"{min(each.speedups):.2f} to {max(each.speedups):.2f}",
        wish.quality_text(found.quality),
        wish.quality_text(min(each.qualities)),
        f"{found.seconds:.2f} s",
        f"{found.cache_bytes / 2**20:.1f} MiB",
    ]


def trial_cells(trial: Trial, wish: Wish) -> list[str]:
    """The figures of a trial, for a table."""
    return [f"{trial.speedup:.2f}x", wish.quality_text(trial.quality), f"{trial.cache_bytes / 2**20:.1f} MiB"]


def best_first(trials: Sequence[Trial], call: int) -> list[Trial]:
    """The trials on one call, each setting once, the fastest first."""
    unique = {id(trial.policy): trial for trial in trials if trial.call == call}
    return sorted(unique.values(), key=lambda trial: -trial.speedup)


def counted(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
