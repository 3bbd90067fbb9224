"""Runs calls uncached and with a policy, and measures them."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from duca_compile.backends.base import Backend
from duca_compile.compiler.budget import CacheOptions
from duca_compile.core.steps import StepKind
from duca_compile.drop_in import OptimizedModel, sharing_captures
from duca_compile.errors import UsageError
from duca_compile.explanation import Explanation
from duca_compile.methods.tuning.quality import REPEATS, Array, apart, arrays, check_results, peak_of, psnr, value_of
from duca_compile.methods.tuning.trials import Trial
from duca_compile.methods.tuning.wishes import Wish
from duca_compile.methods.tuning.workload import Workload
from duca_compile.policies import Policy, Uncached
from duca_compile.runtime.request import Executed

_SURE = 3  # steps of a kind from which their median is not that of one that compiled


@dataclass(frozen=True)
class Run:
    """One call that ran.

    Attributes:
        result: what it returned.
        seconds: its wall time; what it compiled counts.
        steps: seconds of each call of a model.
        history: what these calls were.
        cache_bytes: the most bytes that caches held.
    """

    result: Any
    seconds: float
    steps: tuple[float, ...]
    history: tuple[Executed, ...]
    cache_bytes: int

    @cached_property
    def step_seconds(self) -> dict[StepKind, float]:
        """Seconds of a call of the model of each kind, without what compiles at the first."""
        return quiet([executed.kind for executed in self.history], self.steps)

    @property
    def warm_seconds(self) -> float:
        """Wall time without what was compiled in it: each step takes what others of its kind take."""
        if len(self.steps) != len(self.history):
            return self.seconds
        around = self.seconds - sum(self.steps)
        return around + sum(self.step_seconds[executed.kind] for executed in self.history)

    @property
    def kinds(self) -> tuple[StepKind, ...]:
        """The kind of each step, in the pass that runs first."""
        first = self.history[0]
        same = [
            each for each in self.history if (each.pass_name, each.pass_index) == (first.pass_name, first.pass_index)
        ]
        return tuple(each.kind for each in same)


class Bench:
    """Measures policies on the calls of a workload.

    Args:
        workload: the calls.
        backend: what steps run on.
        timestep: name of the timestep argument; needed only if a graph does not show it.
        wish: says what is compared.

    Attributes:
        uncached: a run of each call without caching, after ``measure_uncached``.
        steps: the number of steps of a call.
        peak: what PSNR refers to.
    """

    def __init__(self, workload: Workload, backend: Backend, timestep: str | None, wish: Wish) -> None:
        self.workload, self.wish, self._timestep, self._backend = workload, wish, timestep, backend
        policy = Uncached()
        self._plain_requests = workload.requests(policy, None)
        self._plain = {
            name: OptimizedModel(model, policy, backend, self._plain_requests, timestep, CacheOptions())
            for name, model in workload.models.items()
        }
        self.uncached: list[Run] = []
        self.steps, self.peak = 0, 1.0
        self._wanted: list[list[Array]] = []

    def measure_uncached(self) -> Iterable[int]:
        """Runs each call uncached, and the first one twice; yields how many have run.

        Raises:
            UsageError: a call is not one loop, gives another result when it runs again, or differs from others in kind.
        """
        first = self.run_uncached(0)
        yield 1
        for number in range(len(self.workload)):
            self.uncached.append(self.run_uncached(number))
            self._wanted.append(arrays(self.uncached[-1].result))
            yield number + 2
            if number == 0:
                self._check_repeats(first)
        check_results(self._wanted)
        self.peak = peak_of(self._wanted) or 1.0
        counts = [run.history[-1].step + 1 for run in self.uncached]
        for number, count in enumerate(counts):
            if count != counts[0]:
                raise UsageError(
                    f"calls[{number}] has {count} steps, and calls[0] {counts[0]}: tune for each separately"
                )
        self.steps = counts[0]
        self._check_metric()

    def _check_repeats(self, first: Run) -> None:
        before, again = arrays(first.result), self._wanted[0]
        same = [array.shape for array in before] == [array.shape for array in again]
        if not same or apart(before, again) > REPEATS:
            raise UsageError(
                "calls[0] gave another result when it ran again, so no result shows what a cache changes: start it "
                "from the same noise each time (a generator among its arguments, or torch.manual_seed in sample)"
            )

    def _check_metric(self) -> None:
        metric = self.wish.metric
        if metric is None:
            return
        one, other = self.uncached[0].result, self.uncached[1].result
        same, different = value_of(metric, one, one), value_of(metric, other, one)
        if not same >= different:
            raise UsageError(
                f"metric gives {same:g} for a result and itself, and {different:g} for another call's result: "
                "larger must be closer, so return the negative of a distance"
            )

    def run_uncached(self, number: int) -> Run:
        run = self._run(self._plain, self._plain_requests, number)
        if len(run.history) < 2 or run.history[-1].step == 0:
            raise UsageError(
                f"calls[{number}] must run one denoising loop of at least two steps with the model that it is given; "
                f"it made {len(run.steps)} calls of the model, and {len(run.history)} of them belong to the last loop"
            )
        return run

    def time_uncached(self, number: int) -> None:
        """Times a call uncached again, since load on the machine may have changed."""
        self.uncached[number] = self.run_uncached(number)

    @cached_property
    def explanation(self) -> Explanation:
        """What the compiler found in the kind of call that has the most FLOPs."""
        found = [compiled for model in self._plain.values() for compiled in model._compiled.values()]
        name = type(next(iter(self.workload.models.values()))).__name__
        return max((Explanation(name, each.captured, each.facts, None) for each in found), key=lambda each: each.flops)

    @property
    def passes(self) -> int:
        """The number of guidance passes of a step."""
        return len({(each.pass_name, each.pass_index) for each in self.uncached[0].history})

    @property
    def device(self) -> str:
        """Where the first model is; for a GPU, its name."""
        weights = next(next(iter(self.workload.models.values())).parameters(), None)
        device = torch.device("cpu") if weights is None else weights.device
        return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)

    @property
    def seconds(self) -> float:
        """Wall time of an uncached call."""
        return statistics.median(run.seconds for run in self.uncached)

    def loop(self, policy: Policy) -> PolicyLoop:
        """What runs the calls with a policy."""
        return PolicyLoop(self, policy)

    def trial(self, policy: Policy, number: int) -> Trial:
        """Runs a call once with a policy."""
        run, uncached = self.loop(policy).run(number), self.uncached[number]
        return Trial(
            policy,
            number,
            self.quality(run.result, number),
            run.warm_seconds,
            uncached.warm_seconds,
            run.cache_bytes,
            "".join(kind.letter for kind in run.kinds),
            {kind.letter: seconds for kind, seconds in run.step_seconds.items()},
            uncached.step_seconds[StepKind.FULL],
        )

    def quality(self, result: Any, number: int) -> float:
        """How close the result of a call is to that of its uncached run."""
        metric = self.wish.metric
        if metric is None:
            return psnr(arrays(result), self._wanted[number], self.peak)
        return value_of(metric, result, self.uncached[number].result)

    def signature(self) -> list[list[float]]:
        """A few values of each uncached result, by which another process knows that it has the same calls."""
        return [_sample(arrays_) for arrays_ in self._wanted]

    def _run(self, drop_ins: Mapping[str, OptimizedModel], requests: Any, number: int) -> Run:
        requests.current().reset()
        with _Stopwatch(drop_ins.values()) as steps:
            started = time.perf_counter()
            result = self.workload.run(drop_ins, number)
            _synchronize()
            seconds = time.perf_counter() - started
        request = requests.current()
        run = Run(result, seconds, tuple(steps.seconds), tuple(request.history), request.cache_bytes)
        request.reset()
        return run


class PolicyLoop:
    """Runs calls with a policy; what the bench has captured and compiled is used again."""

    def __init__(self, bench: Bench, policy: Policy) -> None:
        self._bench, self.policy = bench, policy
        self._requests = bench.workload.requests(policy, bench.steps)
        self._drop_ins = {name: sharing_captures(plain, policy, self._requests) for name, plain in bench._plain.items()}

    def run(self, number: int) -> Run:
        return self._bench._run(self._drop_ins, self._requests, number)


class _Stopwatch:
    """Takes the time of each call of some models; on an accelerator, until its work is done."""

    def __init__(self, models: Iterable[OptimizedModel]) -> None:
        self._models, self._handles = list(models), list[RemovableHandle]()
        self.seconds: list[float] = []
        self._started = 0.0

    def __enter__(self) -> _Stopwatch:
        for model in self._models:
            self._handles.append(model.register_forward_pre_hook(self._start))
            self._handles.append(model.register_forward_hook(self._stop))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _start(self, *_: object) -> None:
        _synchronize()
        self._started = time.perf_counter()

    def _stop(self, *_: object) -> None:
        _synchronize()
        self.seconds.append(time.perf_counter() - self._started)


def _synchronize() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def _sample(values: list[Array]) -> list[float]:
    flat = values[0].reshape(-1)
    return [float(value) for value in flat[:: max(1, len(flat) // 16)][:16]]


def quiet(kinds: Iterable[StepKind], seconds: Iterable[float]) -> dict[StepKind, float]:
    """What a step of each kind takes, given the kind and the time of each; the first of a kind may have compiled."""
    times: dict[StepKind, list[float]] = defaultdict(list)
    for kind, each in zip(kinds, seconds, strict=False):
        times[kind].append(each)
    return {kind: statistics.median(each) if len(each) >= _SURE else min(each) for kind, each in times.items()}
