"""Which cached features a later step of a schedule still reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import reduce
from itertools import chain, islice
from operator import or_

from duca_compile.core.steps import CacheKinds, Step, StepKind

LIVENESS_HORIZON = 256  # steps that are looked ahead
_READS = {
    StepKind.FULL: CacheKinds.NOTHING,
    StepKind.PARTIAL: CacheKinds.BRANCHES,
    StepKind.REUSE: CacheKinds.BRANCHES,
    StepKind.SKIP: CacheKinds.END,
    StepKind.PREDICT: CacheKinds.END,
}
_REPLACES = {
    StepKind.FULL: CacheKinds.ALL,
    StepKind.PARTIAL: CacheKinds.END,
    StepKind.REUSE: CacheKinds.END,
    StepKind.SKIP: CacheKinds.NOTHING,
    StepKind.PREDICT: CacheKinds.NOTHING,
}


def with_liveness(steps: Iterator[Step]) -> Iterator[Step]:
    """The steps, each with the kinds of caches that later ones read, and those that any step has to fill.

    The latter follow from the first ``LIVENESS_HORIZON`` steps. A full step replaces all caches; in a longer stretch
    without one, all caches count as read. Not for forecast steps.
    """
    first = list(islice(steps, LIVENESS_HORIZON))
    kept = reduce(or_, _live_after(first), CacheKinds.NOTHING)
    stretch: list[Step] = []
    for step in chain(first, steps):
        if step.kind is StepKind.FULL or len(stretch) == LIVENESS_HORIZON:
            yield from _annotated(stretch, kept, CacheKinds.NOTHING if step.kind is StepKind.FULL else CacheKinds.ALL)
            stretch = []
        stretch.append(step)
    yield from _annotated(stretch, kept, CacheKinds.NOTHING)


def kept_until_last(steps: Iterator[Step]) -> Iterator[Step]:
    """The steps, with all caches live after each but the last: full steps need what they replace, for differences."""
    step = next(steps, None)
    while step is not None:
        following = next(steps, None)
        yield step if following is not None else replace(step, live=CacheKinds.NOTHING)
        step = following


def _annotated(stretch: Sequence[Step], kept: CacheKinds, after: CacheKinds) -> Iterator[Step]:
    for step, live in zip(stretch, _live_after(stretch, after), strict=True):
        yield replace(step, kept=kept, live=live)


def _live_after(steps: Sequence[Step], after: CacheKinds = CacheKinds.NOTHING) -> list[CacheKinds]:
    """The kinds of caches that are read after each step, if those of ``after`` are read after the last."""
    live = []
    for step in reversed(steps):
        live.append(after)
        after = (after & ~_REPLACES[step.kind]) | _READS[step.kind]
    return live[::-1]
