"""Which cached features a later step of a schedule still reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import reduce
from itertools import chain, islice
from operator import or_

from duca_compile.core.steps import CacheKinds, Step, StepKind

LIVENESS_HORIZON = 256
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
    """The steps, each with what a later one reads, and with what any of the first 256 has to keep for later ones.

    For all but forecast steps; a full step replaces all. A stretch without one that is longer than 256
    steps keeps everything.
    """
    first = list(islice(steps, LIVENESS_HORIZON))
    kept = reduce(or_, _live(first), CacheKinds.NOTHING)
    stretch: list[Step] = []
    for step in chain(first, steps):
        if step.kind is StepKind.FULL or len(stretch) == LIVENESS_HORIZON:
            yield from _annotated(stretch, kept, CacheKinds.NOTHING if step.kind is StepKind.FULL else CacheKinds.ALL)
            stretch = []
        stretch.append(step)
    yield from _annotated(stretch, kept, CacheKinds.NOTHING)


def kept_until_last(steps: Iterator[Step]) -> Iterator[Step]:
    """The steps, where all is kept behind each but the last: full steps make differences of what they replace."""
    known = next(steps, None)
    while known is not None:
        coming = next(steps, None)
        yield known if coming is not None else replace(known, live=CacheKinds.NOTHING)
        known = coming


def _annotated(stretch: Sequence[Step], kept: CacheKinds, after: CacheKinds) -> Iterator[Step]:
    for step, live in zip(stretch, _live(stretch, after), strict=True):
        yield replace(step, kept=kept, live=live)


def _live(steps: Sequence[Step], after: CacheKinds = CacheKinds.NOTHING) -> list[CacheKinds]:
    """What is read after each step, where ``after`` is read after the last."""
    found = []
    for step in reversed(steps):
        found.append(after)
        after = (after & ~_REPLACES[step.kind]) | _READS[step.kind]
    return found[::-1]
