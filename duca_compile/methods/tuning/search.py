"""Tries the promising settings on the calls that choose, then lets other calls judge."""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from duca_compile.errors import DucaError, PolicyError, first_line
from duca_compile.methods.tuning.candidates import Candidate, Candidates, Costs
from duca_compile.methods.tuning.measuring import Bench, Run
from duca_compile.methods.tuning.trials import Journal, Trial
from duca_compile.methods.tuning.wishes import MARGIN, Outcome, Wish
from duca_compile.policies import Policy

log = logging.getLogger("duca_compile")

PROMOTED = 6  # settings that the first call passes on to the other calls that choose
FINALISTS = 3  # settings that are run on the calls that judge; the first of them is the answer
ROUNDS = 3  # timings of each finalist at least, in turn with the uncached loop
RACE = 0.7  # share of the time for trials on the first call, where several choose
REFRESH = 8  # trials after which the uncached loop is timed again
REFRESH_NOISY = 2  # the same on a machine whose uncached times differ by more than NOISY
NOISY = 1.1
SLACK = 1.1  # estimates are taken for this much too low before they rule a setting out

Tell = Callable[[str, float], None]  # shows what is done, and how much of the phase is
Phase = Callable[[float], Tell]  # starts a phase of this size


@dataclass
class Arm:
    """One series in the race: between ``low`` and ``high`` lie the settings that are still worth trying."""

    series: tuple[Candidate, ...]
    low: int = -1
    high: int = 0
    trials: list[Trial] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.high = len(self.series)


@dataclass(frozen=True)
class Judged:
    """A finalist on the calls that judge.

    Attributes:
        policy: the setting.
        outcome: its quality and times on average; its speed-up is the median of those of pairs of runs.
        qualities: of each call.
        speedups: of each pair of an uncached run and one of its own, in turn.
        letters: the kinds of its steps in the last run.
        results: what each call returned.
    """

    policy: Policy
    outcome: Outcome
    qualities: tuple[float, ...]
    speedups: tuple[float, ...]
    letters: str
    results: tuple[Any, ...]


class Search:
    """The race of all series.

    Args:
        bench: measures.
        wish: what is asked for.
        candidates: what may be tried; what fails is noted there.
        journal: trials so far.
        choosing: the numbers of the calls that choose.
        seconds: how long trials may take.
        tell: shows what is tried.

    Attributes:
        trials: all trials on the calls that choose.
        cut_short: whether the deadline ended the race.
    """

    def __init__(
        self,
        bench: Bench,
        wish: Wish,
        candidates: Candidates,
        journal: Journal,
        choosing: Sequence[int],
        seconds: float,
        tell: Tell,
    ) -> None:
        self._bench, self._wish, self._candidates, self._journal = bench, wish, candidates, journal
        self._choosing, self._tell = choosing, tell
        self._deadline = time.monotonic() + seconds * (1 if len(choosing) == 1 else RACE)
        self._last, self._seconds = time.monotonic() + seconds, seconds
        first = bench.uncached[0]
        around = first.warm_seconds - sum(first.step_seconds[each.kind] for each in first.history)
        mean = (first.warm_seconds - around) / bench.steps
        self._costs = Costs(around, mean, bench.passes)
        self.trials: list[Trial] = []
        self.cut_short = False
        self._run_trials = 0
        times = [run.warm_seconds for run in bench.uncached]
        self._refresh = REFRESH_NOISY if max(times) > NOISY * min(times) else REFRESH

    def race(self) -> list[Trial]:
        """Tries settings.

        Returns:
            A trial of each of the best ones, the best first.

        Raises:
            PolicyError: everything that was tried failed.
        """
        arms = [Arm(series) for series in map(self._allowed, self._candidates.series) if series]
        while arms:
            arms = [arm for arm in arms if self._advance(arm)]
            arms = [arm for arm in arms if arm.trials and arm.low + 1 < arm.high]
            arms = sorted(arms, key=self._promise, reverse=True)[: max(2, math.ceil(len(arms) / 2))]
        self._deadline = self._last
        if not self.trials:
            self._try_closest()
        return self._promoted()

    def _try_closest(self) -> None:
        """Where nothing can meet the wish by the analysis: tries what comes closest, so that there is an answer."""

        def missed(candidate: Candidate) -> tuple[float, float]:
            most = self._wish.max_cache_bytes
            beyond = 0 if most is None else max(0, self._costs.cache_bytes(candidate) - most)
            return float(beyond), -self._costs.speedup(candidate)

        best = [min(series, key=missed) for series in self._candidates.series]
        for candidate in sorted(best, key=missed)[:FINALISTS]:
            self._tried(candidate, self._choosing[0])

    def _allowed(self, series: tuple[Candidate, ...]) -> tuple[Candidate, ...]:
        """The series without settings whose caches are too large by the analysis."""
        most = self._wish.max_cache_bytes
        if most is None:
            return series
        for each in series:
            if (size := self._costs.cache_bytes(each)) > most:
                self._candidates.left_out[each.policy.name] = f"its caches hold {size:,} bytes"
        return tuple(each for each in series if self._costs.cache_bytes(each) <= most)

    def _advance(self, arm: Arm) -> bool:
        """Tries the next setting of an arm; whether there was one, and time for it."""
        place = self._next(arm)
        if place is None:
            return False
        candidate = arm.series[place]
        trial = self._tried(candidate, self._choosing[0])
        if trial is None:
            return False
        arm.trials.append(trial)
        self._costs.learn(candidate, trial)
        if self._enough(trial) == self._wish.wants_speed:
            arm.high = place
        else:
            arm.low = place
        return True

    def _enough(self, trial: Trial) -> bool:
        """Whether a trial is fast enough, or, where only quality is asked for, close enough."""
        if self._wish.wants_speed:
            return trial.speedup >= self._least_speedup * (1 + MARGIN)
        least = self._wish.min_quality or 0.0
        return trial.quality >= least + MARGIN * abs(least)

    def _promise(self, arm: Arm) -> float:
        """An arm's quality at the speed that is needed, or its speed at that quality; where it is unknown, a bound."""
        enough = [self._value(trial) for trial in arm.trials if self._enough(trial)]
        return max(enough) if enough else min(map(self._value, arm.trials))

    def _value(self, trial: Trial) -> float:
        return trial.quality if self._wish.wants_speed else trial.speedup

    @property
    def _least_speedup(self) -> float:
        return self._wish.least_speedup(self._bench.seconds)

    def _next(self, arm: Arm) -> int | None:
        """The place of the setting to try: the slowest one that may be fast enough, or one in the middle."""
        least = self._least_speedup
        if not self._wish.wants_speed:
            least = max([least, *(t.speedup for t in self.trials if self._wish.shortfall(_outcome([t]), MARGIN) <= 0)])
        open_ = [
            place for place in range(arm.low + 1, arm.high) if self._costs.speedup(arm.series[place]) * SLACK >= least
        ]
        if not open_:
            if not arm.trials and arm.series:
                self._leave_out(arm.series, least)
            return None
        if not self._wish.wants_speed or not arm.series[open_[0]].fixed:
            return open_[len(open_) // 2]
        fast = (place for place in open_ if self._costs.speedup(arm.series[place]) >= least * (1 + MARGIN))
        return next(fast, open_[-1])

    def _leave_out(self, series: tuple[Candidate, ...], least: float) -> None:
        fastest = max(map(self._costs.speedup, series))
        self._candidates.left_out[f"{series[0].policy.name} to {series[-1].policy.name}"] = (
            f"at most {fastest:.2f} times as fast, and {least:.2f} is needed"
        )

    def _tried(self, candidate: Candidate, number: int) -> Trial | None:
        """The trial of a setting on a call, from the journal or made now; None if it fails or there is no time."""
        trial = self._journal.find(candidate.policy, number)
        if trial is None:
            expected = self._bench.seconds / self._costs.speedup(candidate)
            if self.trials and time.monotonic() + expected > self._deadline:
                self.cut_short = True
                return None
            self._tell(f"trying {candidate.policy.name}", self._seconds - max(0.0, self._last - time.monotonic()))
            trial = self._made(candidate.policy, number)
            if trial is None:
                return None
            self._journal.add(trial)
        self.trials.append(trial)
        return trial

    def _made(self, policy: Policy, number: int) -> Trial | None:
        if self._run_trials % self._refresh == self._refresh - 1:
            self._bench.time_uncached(number)
        self._run_trials += 1
        try:
            return self._bench.trial(policy, number)
        except (DucaError, torch.OutOfMemoryError) as error:
            self._candidates.left_out[policy.name] = first_line(error)
            log.info("tune leaves out %s: %s", policy.name, first_line(error))
            return None

    def _rank_of_one(self, trial: Trial) -> tuple[float, ...]:
        return self._wish.rank(_outcome([trial]))

    def _promoted(self) -> list[Trial]:
        """The best settings by more and more of the calls that choose, half of them each time."""
        by_name = {id(each.policy): each for series in self._candidates.series for each in series}
        best = sorted(self.trials, key=self._rank_of_one)[:PROMOTED]
        seen = {id(trial.policy): [trial] for trial in best}
        ranked, used = list(seen), 1
        while used < len(self._choosing) and ranked:
            numbers = self._choosing[used : 2 * used]
            for key in ranked:
                made = [self._tried(by_name[key], number) for number in numbers]
                seen[key] += [trial for trial in made if trial is not None]
            used += len(numbers)
            complete = [key for key in ranked if len(seen[key]) == used]
            if not complete:
                break
            ranked = sorted(complete, key=lambda key: self._rank(seen[key]))
            keep = max(FINALISTS, math.ceil(len(ranked) / 2))
            ranked = ranked[:keep]
        if not seen:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in self._candidates.left_out.items())
            raise PolicyError(f"no setting runs on this model ({reasons})")
        most = max(map(len, seen.values()))
        ranked = sorted((key for key in seen if len(seen[key]) == most), key=lambda key: self._rank(seen[key]))
        return [seen[key][0] for key in ranked]

    def _rank(self, trials: Sequence[Trial]) -> tuple[float, ...]:
        """By all calls, with a margin as large as the calls differ."""
        least = self._wish.min_quality
        margin = MARGIN
        if least and len(trials) > 1:
            qualities = [trial.quality for trial in trials if math.isfinite(trial.quality)]
            spread = statistics.stdev(qualities) if len(qualities) > 1 else 0.0
            margin = max(margin, spread / abs(least))
        return self._wish.rank(_outcome(trials), margin)


def _outcome(trials: Sequence[Trial]) -> Outcome:
    return Outcome(
        mean_quality([trial.quality for trial in trials]),
        statistics.median(trial.speedup for trial in trials),
        statistics.median(trial.seconds for trial in trials),
        max(trial.cache_bytes for trial in trials),
    )


def mean_quality(values: Sequence[float]) -> float:
    """The mean; minus infinity if a result had no quality at all."""
    return -math.inf if -math.inf in values else statistics.mean(values)


def judge(bench: Bench, finalists: Sequence[Policy], judging: Sequence[int], phase: Phase) -> list[Judged]:
    """Runs finalists and the uncached loop in turn on the calls that judge, so that load affects all equally."""
    loops = [bench.loop(policy) for policy in finalists]
    turns = [number for _ in range(math.ceil(ROUNDS / len(judging))) for number in judging]
    tell = phase((len(turns) + 1) * len(loops))
    runs: list[list[tuple[float, Run]]] = [[] for _ in loops]  # of each, with the time of the uncached loop before it
    for done, loop in enumerate(loops):
        tell(f"warming up {loop.policy.name}", done)
        loop.run(judging[0])
    for turn, number in enumerate(turns):
        plain = bench.run_uncached(number).seconds
        for place, loop in enumerate(loops):
            tell(f"judging {loop.policy.name}", (turn + 1) * len(loops) + place)
            runs[place].append((plain, loop.run(number)))
    return [_judged(bench, loop.policy, judging, each) for loop, each in zip(loops, runs, strict=True)]


def _judged(bench: Bench, policy: Policy, judging: Sequence[int], runs: Sequence[tuple[float, Run]]) -> Judged:
    results = tuple(run.result for _, run in runs[: len(judging)])
    qualities = tuple(bench.quality(result, number) for result, number in zip(results, judging, strict=True))
    speedups = tuple(plain / run.seconds for plain, run in runs)
    seconds, last = statistics.median(run.seconds for _, run in runs), runs[-1][1]
    outcome = Outcome(mean_quality(qualities), statistics.median(speedups), seconds, last.cache_bytes)
    letters = "".join(kind.letter for kind in last.kinds)
    return Judged(policy, outcome, qualities, speedups, letters, results)
