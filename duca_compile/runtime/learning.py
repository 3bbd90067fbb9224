"""What requests learn under ``Auto``: recorded while they run in full, then followed and watched."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from math import sqrt
from typing import Literal, NamedTuple, Protocol

from duca_compile.core.once import Once
from duca_compile.core.steps import Step
from duca_compile.core.tensors import Array
from duca_compile.policies.auto import (
    FEWEST_STEPS,
    FORECAST,
    FULL,
    MOST_FULL,
    PLAIN,
    TOLERANCE,
    Auto,
    Check,
    Learnt,
    PassProducts,
    RequestKind,
    learnt_from,
)
from duca_compile.policies.base import FittedFactors, Forecast
from duca_compile.policies.fitting import Products, in_terms_of
from duca_compile.runtime.arrays import size

log = logging.getLogger("duca_compile")

SAMPLED = 1 << 18  # values of a feature that are recorded at each step of a pass, at most
LEAST_SAMPLED = 1 << 10  # fewer say too little
MAX_RECORDED = 8  # passes of a request that are recorded; more, such as tiles, follow what these teach
MAX_LOOPS = 3  # loops of one kind that are learnt from together: the latest ones
MAX_KINDS = 64  # kinds whose loops are remembered
LEAST_COMPARED = 3  # full steps that tell how much forecasts err in what is left of the request
_ROUNDING = 1e-10  # of a squared relative error; below, nothing is said of forecasts
_MIB = 2**20

Reason = Literal["", "learning", "drift", "not worth it"]  # why a step of ``Auto`` is full, other than by the schedule


class Samples(Protocol):
    """The operations on features that learning needs."""

    def of(self, value: Array, most: int) -> Array:
        """A copy of at most ``most`` of its values, spread evenly; the same places for the same shape."""

    def products(self, samples: Sequence[Array]) -> Products:
        """The inner products of the samples of all steps."""

    def error(self, terms: Sequence[tuple[float, Array]], found: Array) -> float:
        """The squared distance of a sum of samples, each times its factor, to ``found``, relative to its square."""


class Stretch(NamedTuple):
    """A part of a loop, in which all passes start together.

    Attributes:
        start: its first step.
        stop: the step after its last one.
        passes: what was recorded.
    """

    start: int
    stop: int
    passes: Sequence[PassProducts]


class FullStep(NamedTuple):
    """What one full step of one pass computed.

    Attributes:
        key: of its captured shape and pass.
        step: the step.
        end: the end of the residual stream.
        output: the model's output.
        room: bytes that samples of the pass may take; None for no limit.
    """

    key: Hashable
    step: int
    end: Array
    output: Array
    room: int | None = None


@dataclass
class _Stream:
    """The samples of one pass, at the full steps so far."""

    most: int  # values of each sample
    steps: list[int] = field(default_factory=list)
    ends: list[Array] = field(default_factory=list)
    outputs: list[Array] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        return sum(map(size, (*self.ends, *self.outputs)))

    @property
    def is_whole(self) -> bool:
        return self.steps == list(range(self.steps[0], self.steps[-1] + 1))


class Learner:
    """What is known of each kind of request; all requests of an optimized model share it, in any thread.

    Args:
        policy: says how exact forecasts must be, and what is known at first.
    """

    def __init__(self, policy: Auto) -> None:
        self._policy = policy
        self._known = {each.kind: each for each in policy.known}
        self._loops: dict[RequestKind, list[Sequence[Stretch]]] = {}
        self._lock = threading.Lock()
        self._said = Once()

    @property
    def error(self) -> float:
        """The most that the error may be."""
        return self._policy.error

    def policy(self) -> Auto:
        """The policy with all that is known now."""
        with self._lock:
            return replace(self._policy, known=tuple(self._known.values()))

    def find(self, kind: RequestKind) -> Learnt | None:
        """What is known of a kind; None if it must be learnt first."""
        return self._known.get(kind)

    def forecast(self, learnt: Learnt) -> Forecast:
        """How the steps of what was learnt extrapolate."""
        return replace(self._policy.forecast, measured=learnt.measured)

    def forget(self, learnt: Learnt) -> None:
        """Learns a kind anew, since what is known of it does not hold."""
        with self._lock:
            if self._known.get(learnt.kind) is learnt:
                del self._known[learnt.kind]

    def learn(self, kind: RequestKind, loop: Sequence[Stretch]) -> None:
        """Learns from a loop, unless another request of the kind was quicker."""
        with self._lock:
            if kind in self._known:
                return
            alike = [known for known in self._loops.get(kind, []) if _bounds(known) == _bounds(loop)]
            loops = self._loops[kind] = [*alike, loop][-MAX_LOOPS:]
            if len(self._loops) > MAX_KINDS:
                del self._loops[next(iter(self._loops))]
            learnt = self._known[kind] = self._fitted(kind, loops)
        full = len(learnt.policy.full_steps)
        if learnt.caches:
            log.info(
                "auto: learnt from a request of %s: %d of %d steps are full, error %.3f (at most %.3f)",
                *(kind, full, kind.steps, learnt.error, self.error),
            )
        else:
            log.warning(
                "auto: requests of %s are computed in full: with %d%% of their steps in full, forecasts of the others "
                "would still err by more than error=%g. A larger error allows them",
                *(kind, 100 * MOST_FULL, self.error),
            )

    def _fitted(self, kind: RequestKind, loops: Sequence[Sequence[Stretch]]) -> Learnt:
        measured = list[FittedFactors | None]()
        checks, worst = list[Check](), 0.0
        for number, stretch in enumerate(loops[0]):
            passes = [loop[number].passes for loop in loops]
            factors, found, error = learnt_from(passes, self.error, self._policy.max_order)
            measured += [None if each is None else each.later(stretch.start) for each in factors]
            checks += [each.later(stretch.start) for each in found]
            worst = max(worst, error)
        return Learnt(kind, tuple(measured), tuple(checks), worst)

    def warn(self, subject: object, message: str, *values: object) -> None:
        """Logs a warning once for each subject."""
        if self._said.first(f"{message} {subject}"):
            log.warning(message, *values)


class Lesson:
    """What one request does: it records its full steps, or follows what is known of its kind.

    The kind is known once the first step is over, which is full in any case.

    Args:
        learner: what is known.
        total: the number of steps.
    """

    def __init__(self, learner: Learner, total: int) -> None:
        self._learner, self._total = learner, total
        self._kind: RequestKind | None = None
        self._learnt: Learnt | None = None
        self.forecast: Forecast | None = None  # how forecast steps extrapolate, once that is known
        self._streams: dict[Hashable, _Stream] = {}
        self._samples: Samples | None = None
        self._found: dict[int, list[float]] = {}  # squared errors of forecasts, by the full step and pass
        self.reason: Reason = ""  # why steps are full now, other than by what was learnt
        self._bytes = 0
        self._asked = 0  # the last step that was asked for
        if total < FEWEST_STEPS:
            self._do_not_cache()
            few = "auto: loops of %d steps are computed in full: forecasts need %d steps at least"
            learner.warn(total, few, total, FEWEST_STEPS)

    def _do_not_cache(self) -> None:
        self.reason = "not worth it"
        self._streams.clear()

    @property
    def bytes(self) -> int:
        """The most bytes that samples have held."""
        return self._bytes

    def step(self, index: int, kind: Callable[[], RequestKind]) -> Step:
        """What to do at a step. ``kind`` tells the kind of the request once the first step is over."""
        if self.reason == "not worth it":
            return PLAIN
        if index == 0:
            return FULL
        if self._kind is None:
            self._begin(kind())
            return self.step(index, kind)
        if index > self._asked:
            self._asked = index
            self._watch(index)
        learnt = self._learnt
        return FULL if learnt is None or self.reason or learnt.measured[index] is None else FORECAST

    def _begin(self, kind: RequestKind) -> None:
        self._kind, self._learnt = kind, self._learner.find(kind)
        if self._learnt is None:
            self.reason = "learning"
            needed = sum(stream.bytes for stream in self._streams.values()) * self._total
            log.info(
                "auto: a request of %s is computed in full and learnt from; the samples take %.1f MiB",
                *(kind, needed / _MIB),
            )
        elif not self._learnt.caches:
            self._do_not_cache()
        else:
            self.forecast = self._learner.forecast(self._learnt)
            for stream in self._streams.values():
                stream.ends.clear()

    def observe(self, samples: Samples, full: FullStep) -> float | None:
        """Records what a full step computed.

        Returns:
            The relative error of its forecast, where it is compared with one.
        """
        self._samples = samples
        if self.reason in ("drift", "not worth it") or full.step >= self._total:
            return None
        stream = self._streams.get(full.key)
        if stream is None:
            if len(self._streams) >= MAX_RECORDED:
                return None
            stream = self._streams[full.key] = _Stream(self._values(full))
        if stream.most < LEAST_SAMPLED:
            self._learner.warn("room", "auto: cache_budget_bytes leaves no room to learn from requests: all are full")
            self._do_not_cache()
            return None
        output = samples.of(full.output, stream.most)
        error = None if self._learnt is None else self._compared(samples, stream, full.step, output)
        stream.steps.append(full.step)
        stream.outputs.append(output)
        if self._learnt is None:
            stream.ends.append(samples.of(full.end, stream.most))
        else:
            kept = self._learnt.policy.max_order + 1
            del stream.steps[:-kept], stream.outputs[:-kept]
        self._bytes = max(self._bytes, sum(each.bytes for each in self._streams.values()))
        if full.step + 1 == self._total and all(each.steps[-1] != full.step - 1 for each in self._streams.values()):
            self.close()
        return error

    def _values(self, full: FullStep) -> int:
        """How many values a sample of a pass may have."""
        if full.room is None:
            return SAMPLED
        of_each: int = full.end.dtype.itemsize + full.output.dtype.itemsize
        return min(SAMPLED, max(0, full.room) // (self._total * of_each))

    def _compared(self, samples: Samples, stream: _Stream, step: int, output: Array) -> float | None:
        """The relative error of the forecast that this full step was not, if its pass has what it starts from."""
        check = None if self._learnt is None else self._learnt.check_at(step)
        if check is None or self._learnt is None:
            return None
        count = len(check.forecast.factors) + 1
        last = tuple(full for full in self._learnt.policy.full_steps if full < step)[-count:]
        if tuple(stream.steps[-count:]) != last:
            return None
        terms = zip(in_terms_of(last, check.forecast.factors).tolist(), stream.outputs[-count:], strict=True)
        found = samples.error([*terms], output)
        self._found.setdefault(step, []).append(found)
        return sqrt(found)

    def _watch(self, index: int) -> None:
        """Before a step, or after the last one: if the error is beyond what it may be, the rest is full."""
        learnt = self._learnt
        if learnt is None or self.reason:
            return
        error = self._expected_error(learnt)
        if error <= TOLERANCE * self._learner.error:  # false for NaN
            return
        log.warning(
            "auto: before step %d of a request of %s, its forecasts lead to an error of %.3f, where %.3f was learnt "
            "(error=%g was asked for): %sthe next request of this kind is learnt from, too",
            *(index, learnt.kind, error, learnt.error, self._learner.error),
            "" if index >= self._total else "the other steps are full, and ",
        )
        self.reason = "drift"
        self._streams.clear()
        self._learner.forget(learnt)

    def _expected_error(self, learnt: Learnt) -> float:
        """The error of the whole loop, from those of the forecasts that full steps were compared with so far.

        Forecasts before a full step err as much more than in the loop that was learnt from as the one in its place; and
        those still to come, as much more as all of these did on average.
        """
        known, seen, ratios = 0.0, 0.0, list[float]()
        for check in learnt.checks:
            if check.step in self._found:
                found = self._found[check.step]
                ratios.append((sum(found) / len(found) + _ROUNDING) / (check.expected + _ROUNDING))
                known += check.before * ratios[-1]
                seen += check.before
        usual = sum(map(sqrt, ratios)) / len(ratios) if len(ratios) >= LEAST_COMPARED else 1.0
        left = max(self._total * max(learnt.error**2, _ROUNDING) - seen, 0.0)
        return sqrt((known + left * usual**2) / self._total)

    def close(self) -> None:
        """At the end of the request: learns from what was recorded, if it is whole."""
        self._watch(self._total)
        streams, self._streams = [*self._streams.values()], {}
        samples, kind = self._samples, self._kind
        if samples is None or kind is None or self._learnt is not None or self.reason != "learning":
            return
        if max((stream.steps[-1] for stream in streams), default=0) < self._total - 1:
            return
        stretches = _stretches(streams, self._total)
        if stretches is None:
            self._learner.warn(
                kind,
                "auto: nothing can be learnt from requests of %s, which are computed in full: a guidance pass misses "
                "steps, or joins another one in mid-loop",
                kind,
            )
            return
        self._learner.learn(kind, [_recorded(samples, *stretch) for stretch in stretches])


def _bounds(loop: Sequence[Stretch]) -> list[tuple[int, int]]:
    return [(stretch.start, stretch.stop) for stretch in loop]


def _stretches(streams: Sequence[_Stream], total: int) -> list[tuple[int, int, list[_Stream]]] | None:
    """The parts of a loop in which all passes start together, as with experts for parts of it; None if there are none.

    A pass may end before its stretch does.
    """
    starts = sorted({stream.steps[0] for stream in streams})
    found = []
    for start, stop in zip(starts, [*starts[1:], total], strict=True):
        group = [stream for stream in streams if stream.steps[0] == start]
        if any(not stream.is_whole or stream.steps[-1] >= stop for stream in group):
            return None
        if all(stream.steps[-1] < stop - 1 for stream in group):
            return None
        found.append((start, stop, group))
    return found if starts and starts[0] == 0 else None


def _recorded(samples: Samples, start: int, stop: int, streams: Sequence[_Stream]) -> Stretch:
    steps = stop - start
    products = [(samples.products(each.ends), samples.products(each.outputs)) for each in streams]
    return Stretch(start, stop, [PassProducts(end.padded(steps), out.padded(steps)) for end, out in products])
