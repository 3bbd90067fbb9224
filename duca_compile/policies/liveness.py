"""Which cached features a later step of a schedule still reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import reduce
from itertools import chain, islice
from operator import or_

from duca_compile.core.steps import Kept, Step, StepKind

LIVENESS_STEPS = 256  # how far ahead it is asked whether a cache is read again
_READS = {
    StepKind.FULL: Kept.NOTHING,
    StepKind.PARTIAL: Kept.BRANCHES,
    StepKind.REUSE: Kept.BRANCHES,
    StepKind.SKIP: Kept.END,
    StepKind.PREDICT: Kept.END,
}
_REPLACES = {
    StepKind.FULL: Kept.ALL,
    StepKind.PARTIAL: Kept.END,
    StepKind.REUSE: Kept.END,
    StepKind.SKIP: Kept.NOTHING,
    StepKind.PREDICT: Kept.NOTHING,
}


def with_liveness(steps: Iterator[Step]) -> Iterator[Step]:
    """The steps, each with what a later one reads, and with what any of the first 256 has to keep for later ones.

    For all but forecast steps; a full step replaces all. A stretch without one that is longer than 256
    steps keeps everything.
    """
    first = list(islice(steps, LIVENESS_STEPS))
    kept = reduce(or_, _live(first), Kept.NOTHING)
    stretch: list[Step] = []
    for step in chain(first, steps):
        if step.kind is StepKind.FULL or len(stretch) == LIVENESS_STEPS:
            yield from _annotated(stretch, kept, Kept.NOTHING if step.kind is StepKind.FULL else Kept.ALL)
            stretch = []
        stretch.append(step)
    yield from _annotated(stretch, kept, Kept.NOTHING)


def until_the_last(steps: Iterator[Step]) -> Iterator[Step]:
    """The steps, where all is kept behind each but the last: full steps make differences of what they replace."""
    known = next(steps, None)
    while known is not None:
        coming = next(steps, None)
        yield known if coming is not None else replace(known, live=Kept.NOTHING)
        known = coming


def _annotated(stretch: Sequence[Step], kept: Kept, after: Kept) -> Iterator[Step]:
    for step, live in zip(stretch, _live(stretch, after), strict=True):
        yield replace(step, kept=kept, live=live)


def _live(steps: Sequence[Step], after: Kept = Kept.NOTHING) -> list[Kept]:
    """What is read after each step, where ``after`` is read after the last."""
    found = []
    for step in reversed(steps):
        found.append(after)
        after = (after & ~_REPLACES[step.kind]) | _READS[step.kind]
    return found[::-1]
