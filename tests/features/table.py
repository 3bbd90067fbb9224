"""Cases of the page "what is followed and what is not": ``python -m tests.features.table`` writes docs/followed.md.

A case runs a model as a user would under one condition, and returns what it gave and what the source gives by itself.
Its outcome is observed, never declared alone: a case that differs without an error or a warning fails its test.
"""

from __future__ import annotations

import importlib
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
from rich.progress import track
from torch.utils._pytree import tree_leaves

from duca_compile.core.tensors import same_values
from duca_compile.errors import DucaError

PAGE = Path(__file__).parents[2] / "docs" / "followed.md"
PARTS = ("state", "untraced", "loops", "types")
HEAD = """# What is followed, and what is not

Models run under many conditions: hooks are set, weights are quantized or elsewhere, loops are unusual. The rule is that
the result of a full step is the model's own, or that an error or a warning says what is not followed. Each row is a
case of the test suite (`tests/features`), with a tiny model with random weights on a CPU, policy `"none"` and the eager
backend unless it says otherwise. `python -m tests.features.table` writes this page from what it observes.

- **works**: every result equals the model's own, bit for bit.
- **refused**: an error says what is wrong and what to do; nothing was computed.
- **not followed, with a warning**: it runs, and a warning says what it does not follow.

| area | condition | outcome | note |
|---|---|---|---|
"""


class Outcome(Enum):
    WORKS = "works"
    REFUSED = "refused"
    WARNED = "not followed, with a warning"


@dataclass(frozen=True)
class Feature:
    """One row of the page. ``run`` returns what was computed and what the source computes; trees of tensors."""

    library: str
    name: str
    outcome: Outcome
    says: str  # what an error or a warning must say
    note: str
    slow: bool
    run: Callable[[], tuple[Any, Any]]


FEATURES: dict[str, Feature] = {}


def feature(
    library: str, name: str, outcome: Outcome = Outcome.WORKS, *, says: str = "", note: str = "", slow: bool = True
) -> Callable[[Callable[[], tuple[Any, Any]]], Callable[[], tuple[Any, Any]]]:
    """Adds a case to the page. ``slow`` keeps it out of the quick suite."""

    def add(run: Callable[[], tuple[Any, Any]]) -> Callable[[], tuple[Any, Any]]:
        FEATURES[f"{run.__module__.rpartition('.')[2]}-{run.__name__}"] = Feature(
            library, name, outcome, says, note, slow, run
        )
        return run

    return add


@contextmanager
def said() -> Iterator[list[str]]:
    """What duca_compile warns of meanwhile, in its log and by Python's warnings."""
    messages: list[str] = []

    class Collects(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    handler, log = Collects(logging.WARNING), logging.getLogger("duca_compile")
    log.addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield messages
    finally:
        log.removeHandler(handler)
        messages.extend(str(each.message) for each in caught if each.category is RuntimeWarning)


def observed(case: Feature) -> tuple[Outcome, str]:
    """What became of the case, and what was said. Raises AssertionError where it differs silently."""
    with said() as messages:
        try:
            found, own = case.run()
        except DucaError as error:
            return Outcome.REFUSED, str(error)
    text = "\n".join(messages)
    pairs = list(zip(tree_leaves(found), tree_leaves(own), strict=True))
    if pairs and all(same_values(a, b) for a, b in pairs):
        return Outcome.WORKS, text
    assert messages, "the result is not the model's own, and nothing says so"
    return Outcome.WARNED, text


def load() -> dict[str, Feature]:
    """All cases, in the order of the page."""
    for part in PARTS:
        importlib.import_module(f"tests.features.{part}")
    return FEATURES


def cases() -> list[Any]:
    return [pytest.param(case, id=name, marks=[pytest.mark.slow] if case.slow else []) for name, case in load().items()]


def row(case: Feature, outcome: Outcome) -> str:
    return f"| {case.library} | {case.name} | {outcome.value} | {case.note} |\n"


if __name__ == "__main__":
    import tests.features.table as this  # the parts register with this module under its own name

    PAGE.write_text(HEAD + "".join(row(case, observed(case)[0]) for case in track(list(this.load().values()))))
