"""The names of the inputs and results that variants have beside a call's own."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

from duca_compile.core.steps import CacheKinds

STREAM_END = "stream_end"
BRANCH = "branch_"
SCALE = "scale_"  # how far a branch moves for each unit that its input does: a number for each row
# 0-dimensional float32 inputs of the variants of policies that forecast (TaylorSeer).
FORECAST_GAP = "forecast_gap"  # steps from the last full step to this one
FORECAST_ORDERS = "forecast_orders"  # how many differences the full steps so far allow; the others stay zero
FORECAST_FACTORS = tuple(f"forecast_factor_{i}" for i in range(1, 5))  # what differences of each order count
# Of adaptive policies. What decisions are made from is float32 and has one value for each row.
FULL_ROWS = "full_rows"  # input, bool (batch,): the rows that the full step is for; the caches of others stay
VERIFY_ERROR = "verify_error"  # result: how far a forecast is from what the last block computes of it
PROBE_CHANGE = "probe_change"  # result: how much what the probe looks at has changed
PROBE_SEEN = "probe_seen"  # result: what it looked at; the cache of the same name is what it compares with
PROBE_STREAM = "probe_stream"  # result, and input of the variant that goes on from there
MEASURED = frozenset({VERIFY_ERROR, PROBE_CHANGE, PROBE_SEEN, PROBE_STREAM})


def cache_input(slot: str) -> str:
    """Name of the placeholder that carries the cached value of ``slot``."""
    return f"cache_{slot}"


# What the names of the inputs that variants have beside a call's own begin with.
RESERVED = (
    cache_input(""),
    "forecast_",
    FULL_ROWS,
    "hoisted_",
    "probe_",
    "timestep_bfloat",
    "timestep_float",
    "tokens_",
)


def difference_slot(slot: str, order: int) -> str:
    """The slot of the difference of this order of what ``slot`` holds; of order 0 it is ``slot`` itself."""
    return f"{slot}_d{order}" if order else slot


@cache
def dead_slots(live: CacheKinds) -> tuple[str, ...]:
    """What the slots begin with whose caches are read no more, where caches of the kinds ``live`` are."""
    if live is CacheKinds.NOTHING:
        return ("",)
    return (STREAM_END,) * (not live.end) + (BRANCH,) * (not live.branches)


def dead_caches(live: CacheKinds, names: Iterable[str]) -> tuple[str, ...]:
    """Those of the placeholders ``names`` whose caches are read no more."""
    dead = tuple(map(cache_input, dead_slots(live)))
    return tuple(name for name in names if name.startswith(dead))


def is_written(result: str) -> bool:
    """Whether a result of this name fills a cache at once: all but the model's own, scores and measures."""
    return not result.startswith(("output_", "score_")) and result not in MEASURED


def is_cache(result: str) -> bool:
    """Whether a result of this name is kept until the next step; what a probe has seen is, once it was compared."""
    return result == PROBE_SEEN or is_written(result)


def change_slot(index: int) -> str:
    """The slot of what a stretch of a stream's branches, of which this is the last, add to it together."""
    return f"change_{index}"
