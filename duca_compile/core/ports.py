"""Ports: what goes into a variant and what comes out of it, by kind, and the names that files have for them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from functools import cache
from typing import ClassVar

from duca_compile.core.steps import CacheKinds


class PortKind(Enum):
    """What a port carries; the value is what its name begins with."""

    # Inputs
    ARGUMENT = "given"  # a tensor of the model's call
    HOISTED = "hoisted"  # a loop-invariant value
    ROW = "timestep"  # the timestep-only values of one dtype, packed into one dimension
    TOKENS = "tokens"  # int64 (batch, k): the tokens that partial branches recompute
    # Inputs that the number of the step determines: float32, of no dimensions or of one value for each batch row
    GAP = "forecast_gap"  # steps from the last full step to this one
    ORDERS = "forecast_orders"  # how many differences the full steps so far allow; the others stay zero
    FACTOR = "forecast_factor"  # what differences of one order count
    FULL_ROWS = "full_rows"  # bool (batch,): the batch rows that the full step is for; the caches of others stay
    # Caches: results of one step, and inputs of later ones
    BRANCH = "branch"  # the output of a branch before its gate
    BRANCH_INPUT = "input"  # what a branch reads
    SCALE = "scale"  # how far a branch moves for each unit that its input does: a number for each batch row
    CHANGE = "change"  # what a stretch of a stream's branches adds to it; numbered by its last branch
    STREAM_END = "stream_end"
    # Results
    OUTPUT = "output"  # one of the model's own
    SCORE = "score"  # the tokens' scores by the attention of a branch
    # Results from which an adaptive policy decides: float32, of one value for each batch row
    VERIFY_ERROR = "verify_error"  # how far a forecast is from what the last block computes of it
    PROBE_CHANGE = "probe_change"  # how much what the probe sees has changed
    # Results of a probe
    PROBE_SEEN = "probe_seen"  # what it sees; also a cache, which the next probe compares with
    PROBE_STREAM = "probe_stream"  # the stream behind it; an input of the variant that continues from there


# Tuples: to look for a member in one of so few is faster than to compute its hash.
FEATURES = (PortKind.BRANCH, PortKind.BRANCH_INPUT, PortKind.CHANGE, PortKind.STREAM_END)
WRITTEN = (*FEATURES, PortKind.SCALE)  # the caches that a result fills at once
CACHES = (*WRITTEN, PortKind.PROBE_SEEN)
MEASURES = (PortKind.VERIFY_ERROR, PortKind.PROBE_CHANGE, PortKind.PROBE_SEEN, PortKind.PROBE_STREAM)


@dataclass(frozen=True, eq=False)
class Port:
    """One input or result of variants.

    There is one object for each combination of the fields, so ports are compared and hashed by identity, which is as
    fast as it is for strings. What a result writes to and later steps read from is the same port.

    Attributes:
        kind: what it carries.
        of: which one of its kind: the name of an argument or of a value in the graph, a dtype, or the number of a
            branch, of an output or of a factor's order; empty where there is one.
        order: of a cache, the order of the difference that it holds; 0 is the feature itself.
    """

    kind: PortKind
    of: str | int = ""
    order: int = 0

    _known: ClassVar[dict[tuple[PortKind, str | int, int], Port]] = {}

    def __new__(cls, kind: PortKind, of: str | int = "", order: int = 0) -> Port:
        return cls._known.setdefault((kind, of, order), super().__new__(cls))

    def __reduce__(self) -> tuple[type[Port], tuple[PortKind, str | int, int]]:
        """Copies are the same object."""
        return Port, (self.kind, self.of, self.order)

    def difference(self, order: int) -> Port:
        """The cache of the difference of this order of what this cache holds; of order 0 it is this one."""
        return Port(self.kind, self.of, order)

    @property
    def key(self) -> Port | str:
        """What finds its value where those of the model's call are kept by name: the argument's name, or the port."""
        return str(self.of) if self.kind is PortKind.ARGUMENT else self

    @property
    def result_name(self) -> str:
        """Its name in files where it is a result."""
        name = self.kind.value if self.of == "" else f"{self.kind.value}_{self.of}"
        return f"{name}_d{self.order}" if self.order else name

    @property
    def input_name(self) -> str:
        """Its name in files where it is an input."""
        if self.kind is PortKind.ARGUMENT:
            return argument_name(str(self.of))
        return f"cache_{self.result_name}" if self.kind in CACHES else self.result_name

    def __str__(self) -> str:
        return self.result_name


STREAM_END = Port(PortKind.STREAM_END)
FORECAST_GAP = Port(PortKind.GAP)
FORECAST_ORDERS = Port(PortKind.ORDERS)
FORECAST_FACTORS = tuple(Port(PortKind.FACTOR, order) for order in range(1, 5))
FULL_ROWS = Port(PortKind.FULL_ROWS)
VERIFY_ERROR = Port(PortKind.VERIFY_ERROR)
PROBE_CHANGE = Port(PortKind.PROBE_CHANGE)
PROBE_SEEN = Port(PortKind.PROBE_SEEN)
PROBE_STREAM = Port(PortKind.PROBE_STREAM)


def argument(name: str) -> Port:
    """The input that is the model's argument of this name."""
    return Port(PortKind.ARGUMENT, name)


def hoisted(name: str) -> Port:
    """The input that carries the loop-invariant value of the node called ``name``."""
    return Port(PortKind.HOISTED, name)


@cache
def dead_kinds(live: CacheKinds) -> tuple[PortKind, ...]:
    """The kinds of the caches that are no longer read where only those that ``live`` stands for are."""
    if live is CacheKinds.NOTHING:
        return CACHES
    return (PortKind.STREAM_END,) * (not live.end) + (PortKind.BRANCH,) * (not live.branches)


def dead_caches(live: CacheKinds, caches: Iterable[Port]) -> tuple[Port, ...]:
    """Those of ``caches`` that are no longer read."""
    dead = dead_kinds(live)
    return tuple([port for port in caches if port.kind in dead])


# ---- names in files

_NUMBERED = (
    *(PortKind.TOKENS, PortKind.FACTOR, PortKind.OUTPUT, PortKind.SCORE),
    *(PortKind.BRANCH, PortKind.BRANCH_INPUT, PortKind.SCALE, PortKind.CHANGE),
)
_NAMED = {PortKind.HOISTED: ".+", PortKind.ROW: r"(?:b?float|u?int|complex)\w+|bool"}
_OF = dict.fromkeys(_NUMBERED, r"\d+") | _NAMED
_PATTERNS = {
    kind: re.compile(kind.value + (f"_({_OF[kind]})" if kind in _OF else "()") + r"(?:_d(\d+))?" * (kind in CACHES))
    for kind in PortKind
    if kind is not PortKind.ARGUMENT
}


def argument_name(name: str) -> str:
    """The name that files have for an argument: its own, unless another port could have it.

    No two arguments get the same name.
    """
    prefix = f"{PortKind.ARGUMENT.value}_"
    return f"{prefix}{name}" if name.startswith(prefix) or named_input(name) is not None else name


def named_input(name: str) -> Port | None:
    """The port whose name in files is ``name`` as an input, other than an argument; None where there is none."""
    return named_result(name.removeprefix("cache_"))


def named_result(name: str) -> Port | None:
    """The port whose name in files is ``name`` as a result; None where there is none."""
    for kind, pattern in _PATTERNS.items():
        if found := pattern.fullmatch(name):
            of, *order = found.groups()
            return Port(kind, int(of) if kind in _NUMBERED else of, int(order[0] or 0) if order else 0)
    return None
