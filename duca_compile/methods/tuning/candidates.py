"""The settings of all methods that fit the model, and the least that each must cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from torch import nn

from duca_compile.core.steps import StepKind
from duca_compile.errors import DucaError, PolicyError, first_line
from duca_compile.explanation import Explanation, ScheduleReport
from duca_compile.methods.calibration import calibration_of
from duca_compile.methods.ratios import ratios_of
from duca_compile.methods.recording import Recorder, SampleLoop
from duca_compile.methods.tuning.measuring import Bench
from duca_compile.methods.tuning.trials import Trial
from duca_compile.policies import Auto, MagCache, Policy
from duca_compile.policies.base import Series
from duca_compile.policies.named import POLICIES
from duca_compile.runtime.loops import LoopSchedule

MEASURED_LOOPS = 2  # at most: more prompts change what is measured little


@dataclass(frozen=True)
class Candidate:
    """A setting that may be tried.

    Attributes:
        policy: the policy.
        schedule: its steps, by the analysis.
    """

    policy: Policy
    schedule: ScheduleReport

    @property
    def fixed(self) -> bool:
        """Whether its steps are known before the loop; else ``schedule`` has the cheapest possible."""
        return not self.schedule.adaptive


@dataclass
class Candidates:
    """All candidates, in series, and what was left out.

    Attributes:
        series: each from the closest to the uncached loop to the fastest.
        left_out: what cannot be tried, with the reason.
    """

    series: list[tuple[Candidate, ...]] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)

    def add(self, made: Iterable[Series], explanation: Explanation, steps: int) -> None:
        """Adds the settings of some series that fit the model."""
        for policies in made:
            fitting = []
            for policy in policies:
                try:
                    fitting.append(Candidate(policy, explanation.schedule(policy, steps)))
                except PolicyError as error:
                    self.left_out[policy.name] = str(error)
            if fitting:
                self.series.append(tuple(fitting))


def named_series(given: Sequence[str | Policy] | None, steps: int) -> list[Series]:
    """The series of the methods with these names, and each policy object on its own; of all methods for None.

    Names of methods that must be measured first have none.

    Raises:
        PolicyError: a name is unknown, or "auto".
    """
    if given is None:
        return [series for kind in dict.fromkeys(POLICIES.values()) for series in kind.settings(steps)]
    found: list[Series] = []
    for each in given:
        if isinstance(each, Auto) or each == "auto":
            raise PolicyError("policies names 'auto', which has no settings to try: it learns while it runs")
        if isinstance(each, Policy):
            found.append((each,))
        elif each not in MEASURED:
            if each not in POLICIES:
                raise PolicyError(f"policies names {each!r}; the names are {sorted({*MEASURED, *POLICIES})}")
            found += POLICIES[each].settings(steps)
    return found


@dataclass(frozen=True)
class Loops:
    """Uncached loops of the model that settings are measured on.

    Attributes:
        model: the model.
        sample: runs one of them.
        count: how many there are.
        timestep: name of the timestep argument, where the graph does not show it.
        schedule: what knows the steps of a pipeline.
    """

    model: nn.Module
    sample: SampleLoop
    count: int
    timestep: str | None
    schedule: LoopSchedule | None


def _calibrated(loops: Loops) -> tuple[Series, ...]:
    recorder = Recorder(loops.model, loops.sample, loops.timestep, whole=False, schedule=loops.schedule)
    return calibration_of(recorder, loops.count).settings()


def _magcache(loops: Loops) -> tuple[Series, ...]:
    recorder = Recorder(
        loops.model, loops.sample, loops.timestep, whole=False, keeps="changes", schedule=loops.schedule
    )
    ratios = ratios_of(recorder, loops.count)
    pairs = zip((0.03, 0.06, 0.12, 0.24, 0.5), (2, 3, 4, 6, 8), strict=True)
    return (tuple(MagCache(ratios, threshold, most) for threshold, most in pairs),)


MEASURED: dict[str, Callable[[Loops], tuple[Series, ...]]] = {  # by loops of the model
    "calibrated": _calibrated,
    "magcache": _magcache,
}


def add_measured(
    candidates: Candidates, names: Iterable[str], bench: Bench, choosing: Sequence[int], timestep: str | None
) -> None:
    """Adds the settings of methods that are measured on the calls that choose; where that fails, the reason."""
    workload = bench.workload
    for method in names:
        if len(workload.models) > 1:
            candidates.left_out[method] = "only loops of one model can be measured"
            continue
        ((name, model),) = workload.models.items()

        def sample(drop_in: nn.Module, number: int, name: str = name) -> object:
            return workload.run({name: drop_in}, choosing[number])

        loops = Loops(model, sample, min(MEASURED_LOOPS, len(choosing)), timestep, workload.schedule())
        try:
            candidates.add(MEASURED[method](loops), bench.explanation, bench.steps)
        except DucaError as error:
            candidates.left_out[method] = first_line(error)


class Costs:
    """Estimates what a candidate takes. Fresh estimates are by FLOPs alone; what ran raises those of its kinds.

    Args:
        around: seconds of a call outside of the model.
        full: seconds of an uncached step.
        passes: guidance passes of a step.
    """

    def __init__(self, around: float, full: float, passes: int) -> None:
        self._around, self._full, self._passes = max(0.0, around), full, passes
        self._beyond: dict[StepKind, float] = {}  # what a step takes beyond its FLOPs, as a share of a full step

    def speedup(self, candidate: Candidate) -> float:
        """The most that it can gain."""
        report = candidate.schedule
        shares = (step.flops / report.uncached_flops + self._beyond.get(step.kind, 0.0) for step in report.steps)
        plain = self._around + len(report.steps) * self._full
        return plain / (self._around + sum(shares) * self._full)

    def cache_bytes(self, candidate: Candidate) -> int:
        """The bytes of all passes, if they are alike."""
        return candidate.schedule.cache_bytes * self._passes

    def learn(self, candidate: Candidate, trial: Trial) -> None:
        """Takes note of what steps took."""
        report = candidate.schedule
        for kind in StepKind:
            alike = [step.flops / report.uncached_flops for step in report.steps if step.kind is kind]
            taken = trial.step_seconds.get(kind.letter)
            if alike and taken is not None and kind is not StepKind.FULL:
                full = max(trial.full_seconds, trial.step_seconds.get(StepKind.FULL.letter, 0.0))
                beyond = max(0.0, taken / full - sum(alike) / len(alike))
                self._beyond[kind] = min(beyond, self._beyond.get(kind, beyond))
