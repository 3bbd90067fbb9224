"""Ports: the inputs and results of variants, by kind, and their names in files."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from functools import cache
from typing import ClassVar

from duca_compile.core.steps import CacheKinds


class PortKind(Enum):
    """What a port carries; the value is the prefix of its name."""

    # Inputs
    ARGUMENT = "given"  # a tensor of the model's call
    HOISTED = "hoisted"  # a loop-invariant value
    ROW = "timestep"  # the timestep-only values of one dtype, packed into one dimension
    TOKENS = "tokens"  # int64 (batch, k): the tokens that partial branches recompute
    # Inputs that depend on the step's number: float32, 0-dimensional or with one value for each batch row
    GAP = "forecast_gap"  # steps from the last full step to this one
    ORDERS = "forecast_orders"  # how many orders the full steps so far allow; higher differences stay zero
    FACTOR = "forecast_factor"  # the factor of the differences of one order
    SUM_WEIGHT = "forecast_weight"  # what a full step's feature is multiplied by before it is added to a sum
    SUM_FACTOR = "forecast_sum_factor"  # the factor of a sum in a forecast
    SUMMED = "forecast_summed"  # how many features the sums hold; if none, what they hold is left out
    FULL_ROWS = "full_rows"  # bool (batch,): the batch rows that a full step refreshes; others keep their caches
    # Caches: results of one step, and inputs of later ones
    BRANCH = "branch"  # the output of a branch before its gate
    BRANCH_INPUT = "input"  # the input of a branch
    SCALE = "scale"  # how far a branch moves relative to its input: a number for each batch row
    CHANGE = "change"  # what a stretch of a stream's branches adds to it; numbered by the last one
    LATENT = "boundary_latent"  # the model's latent at the last full step
    RESULT = "boundary_output"  # the model's output at the last full step
    RATE = "boundary_rate"  # how far the output moves with the latent, relative to its size: for each batch row
    STREAM_END = "stream_end"  # of the last stream; numbered, the value of a stream after a branch that outputs read
    SUM = "stream_sum"  # a weighted sum of the stream's ends at all full steps so far, in float32 or wider
    # Results
    OUTPUT = "output"  # one of the model's outputs
    SCORE = "score"  # the scores of the tokens from the attention of a branch
    # Results from which an adaptive policy decides: float32, one value for each batch row
    VERIFY_ERROR = "verify_error"  # how far a forecast is from what the last block computes
    PROBE_CHANGE = "probe_change"  # how much the probed value has changed
    # Results of a probe
    PROBE_SEEN = "probe_seen"  # the probed value; also a cache, with which the next probe compares
    PROBE_STREAM = "probe_stream"  # the stream after the probe; an input of the variant that continues from there


# Tuples rather than sets: searching so few members is faster than hashing one.
FEATURES = (PortKind.BRANCH, PortKind.BRANCH_INPUT, PortKind.CHANGE, PortKind.STREAM_END)
WRITTEN = (  # caches that a result of the same port fills
    *(*FEATURES, PortKind.SCALE, PortKind.SUM),
    *(PortKind.LATENT, PortKind.RESULT, PortKind.RATE),
)
CACHES = (*WRITTEN, PortKind.PROBE_SEEN)
NUMBERS = (
    *(PortKind.GAP, PortKind.ORDERS, PortKind.FACTOR),
    *(PortKind.SUM_WEIGHT, PortKind.SUM_FACTOR, PortKind.SUMMED, PortKind.FULL_ROWS),
)
MEASURES = (PortKind.VERIFY_ERROR, PortKind.PROBE_CHANGE, PortKind.PROBE_SEEN, PortKind.PROBE_STREAM)


@dataclass(frozen=True, eq=False)
class Port:
    """One input or result of variants.

    There is one object for each combination of the fields, so ports are compared and hashed by identity, which is as
    fast as for strings. A result that fills a cache and the input that reads this cache later are the same port.

    Attributes:
        kind: what it carries.
        of: which one of its kind: the name of an argument or of a value in the graph, a dtype, or the number of a
            branch, of an output, of a sum or of a factor's order; empty for kinds with a single port.
        order: of a cache, the order of the difference that it holds; 0 is the feature itself.
    """

    kind: PortKind
    of: str | int = ""
    order: int = 0

    _known: ClassVar[dict[tuple[PortKind, str | int, int], Port]] = {}

    def __new__(cls, kind: PortKind, of: str | int = "", order: int = 0) -> Port:
        return cls._known.setdefault((kind, of, order), super().__new__(cls))

    def __reduce__(self) -> tuple[type[Port], tuple[PortKind, str | int, int]]:
        """Copying and unpickling yield the same object."""
        return Port, (self.kind, self.of, self.order)

    def difference(self, order: int) -> Port:
        """The cache of the difference of this order of the same feature; order 0 is the feature itself."""
        return Port(self.kind, self.of, order)

    @property
    def key(self) -> Port | str:
        """The key of its value where the call's arguments are kept by name: the argument's name, or the port itself."""
        return str(self.of) if self.kind is PortKind.ARGUMENT else self

    @property
    def result_name(self) -> str:
        """Its name in files as a result."""
        name = self.kind.value if self.of == "" else f"{self.kind.value}_{self.of}"
        return f"{name}_d{self.order}" if self.order else name

    @property
    def input_name(self) -> str:
        """Its name in files as an input."""
        if self.kind is PortKind.ARGUMENT:
            return argument_name(str(self.of))
        return f"cache_{self.result_name}" if self.kind in CACHES else self.result_name

    def __str__(self) -> str:
        return self.result_name


STREAM_END = Port(PortKind.STREAM_END)
LATENT, RESULT, RATE = Port(PortKind.LATENT), Port(PortKind.RESULT), Port(PortKind.RATE)
FORECAST_GAP = Port(PortKind.GAP)
FORECAST_ORDERS = Port(PortKind.ORDERS)
FORECAST_FACTORS = tuple(Port(PortKind.FACTOR, order) for order in range(1, 5))
FORECAST_START = Port(PortKind.FACTOR, 0)  # of the feature itself; 1 unless there are sums
SUMMED = Port(PortKind.SUMMED)
FULL_ROWS = Port(PortKind.FULL_ROWS)
VERIFY_ERROR = Port(PortKind.VERIFY_ERROR)
PROBE_CHANGE = Port(PortKind.PROBE_CHANGE)
PROBE_SEEN = Port(PortKind.PROBE_SEEN)
PROBE_STREAM = Port(PortKind.PROBE_STREAM)


def argument(name: str) -> Port:
    """The input for the model's argument of this name."""
    return Port(PortKind.ARGUMENT, name)


def hoisted(name: str) -> Port:
    """The input that carries the loop-invariant value of the node called ``name``."""
    return Port(PortKind.HOISTED, name)


@cache
def dead_kinds(live: CacheKinds) -> tuple[PortKind, ...]:
    """The kinds of caches that no later step reads if later steps read only ``live``."""
    if live is CacheKinds.NOTHING:
        return CACHES
    return (PortKind.STREAM_END,) * (not live.end) + (PortKind.BRANCH,) * (not live.branches)


def dead_caches(live: CacheKinds, caches: Iterable[Port]) -> tuple[Port, ...]:
    """Those of ``caches`` that no later step reads if later steps read only ``live``."""
    dead = dead_kinds(live)
    return tuple([port for port in caches if port.kind in dead])


# ---- names in files

_NUMBERED = (
    *(PortKind.TOKENS, PortKind.FACTOR, PortKind.OUTPUT, PortKind.SCORE),
    *(PortKind.SUM, PortKind.SUM_WEIGHT, PortKind.SUM_FACTOR),
    *(PortKind.BRANCH, PortKind.BRANCH_INPUT, PortKind.SCALE, PortKind.CHANGE),
)
_NAMED = {PortKind.HOISTED: ".+", PortKind.ROW: r"(?:b?float|u?int|complex)\w+|bool"}
_OF = {
    **{kind: rf"_({pattern})" for kind, pattern in (dict.fromkeys(_NUMBERED, r"\d+") | _NAMED).items()},
    PortKind.STREAM_END: r"(?:_(\d+))?",
}
_PATTERNS = {
    kind: re.compile(kind.value + _OF.get(kind, "()") + r"(?:_d(\d+))?" * (kind in CACHES))
    for kind in PortKind
    if kind is not PortKind.ARGUMENT
}


def argument_name(name: str) -> str:
    """The name of an argument in files: its own, with a prefix if another port could have that name.

    Different arguments get different names.
    """
    prefix = f"{PortKind.ARGUMENT.value}_"
    return f"{prefix}{name}" if name.startswith(prefix) or named_input(name) is not None else name


def named_input(name: str) -> Port | None:
    """The port, other than an argument, whose input name in files is ``name``; None if there is none."""
    return named_result(name.removeprefix("cache_"))


def named_result(name: str) -> Port | None:
    """The port whose result name in files is ``name``; None if there is none."""
    for kind, pattern in _PATTERNS.items():
        if match := pattern.fullmatch(name):
            of, *order = match.groups()
            named = kind in _NAMED or not of
            return Port(kind, of or "" if named else int(of), int(order[0] or 0) if order else 0)
    return None
