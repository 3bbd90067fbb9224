"""The dtype of caches, their budget, and what a request allocates in total."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import torch

from duca_compile.analysis.memory import peak_bytes
from duca_compile.core.ir import CapturedGraph, Facts
from duca_compile.core.ports import Port, dead_kinds
from duca_compile.core.variants import Variant, VariantSpec
from duca_compile.errors import PolicyError, UsageError
from duca_compile.passes.caching.predict import with_predictor
from duca_compile.passes.exact.hoist import frontier, row_layout
from duca_compile.passes.pipeline import build_variant
from duca_compile.policies.adaptive import AdaptivePolicy
from duca_compile.policies.base import Policy
from duca_compile.policies.checks import check_whole
from duca_compile.policies.end_only import EndOnly
from duca_compile.policies.liveness import LIVENESS_HORIZON
from duca_compile.runtime.planning import plan_step, probe_spec, score_kind
from duca_compile.runtime.selection import SCORE_BYTES

log = logging.getLogger("duca_compile")

NARROW = torch.bfloat16


@dataclass(frozen=True)
class CacheOptions:
    """The dtype and the memory budget of caches.

    Attributes:
        dtype: of the caches; None for the dtype of the features.
        budget: the most bytes that the caches of one guidance pass may hold; None for no limit.

    Raises:
        UsageError: ``dtype`` is not a floating-point type.
        PolicyError: ``budget`` is not a whole number of bytes.
    """

    dtype: torch.dtype | None = None
    budget: int | None = None

    def __post_init__(self) -> None:
        if self.dtype is not None and not (isinstance(self.dtype, torch.dtype) and self.dtype.is_floating_point):
            raise UsageError(f"cache_dtype={self.dtype!r} is invalid: it must be a floating-point torch.dtype")
        if self.budget is not None:
            check_whole("cache_budget_bytes", self.budget, least=0)


@dataclass(frozen=True)
class Fit:
    """A policy and the dtype of its caches (None: that of the features), with the most bytes that these hold."""

    policy: Policy
    dtype: torch.dtype | None
    bytes: int


def fitted(
    captured: CapturedGraph, facts: Facts, policy: Policy, options: CacheOptions, total: int | None
) -> tuple[Policy, torch.dtype | None]:
    """The first policy and cache dtype that fit the budget: as requested, else in bfloat16, else with a single cache.

    Raises:
        PolicyError: the budget is too small for all of these; the message says how much the smallest needs.
    """
    if options.budget is None or not policy.caches:
        return policy, options.dtype
    tried: list[Fit] = []
    for candidate, dtype in _candidates(policy, options.dtype):
        tried.append(
            Fit(candidate, dtype, cache_bytes(facts, candidate, variants(captured, facts, candidate, dtype, total)))
        )
        if tried[-1].bytes <= options.budget:
            _report(tried, options.budget)
            return candidate, dtype
    least = min(tried, key=lambda fit: fit.bytes)
    raise PolicyError(
        f"cache_budget_bytes={options.budget} is too small for {policy.name}, whose caches hold {tried[0].bytes} bytes "
        f"in one guidance pass of this call; the least is {least.bytes} bytes, for {least.policy.name} with caches in "
        f"{_dtype_name(least.dtype)}. Allow that much, or use policy='none', which caches nothing"
    )


def variants(
    captured: CapturedGraph, facts: Facts, policy: Policy, dtype: torch.dtype | None, total: int | None
) -> list[Variant]:
    """All variants that the policy's steps need, built but not compiled."""
    captured = with_predictor(captured, facts, policy.predictor)
    steps = dict.fromkeys(islice(policy.planned(total), LIVENESS_HORIZON))
    probe = probe_spec(policy)
    specs = [*(plan_step(facts, policy, step)[0] for step in steps), *([] if probe is None else [probe])]
    return [build_variant(captured, facts, spec, cache_dtype=dtype) for spec in dict.fromkeys(specs)]


def cache_bytes(facts: Facts, policy: Policy, built: Iterable[Variant]) -> int:
    """The most bytes that the caches and token scores of one guidance pass hold if it runs the ``built`` variants."""
    held: dict[Port, int] = {}
    for variant in built:
        held.update(variant.kept)
    selection = policy.selection
    kinds = 0 if selection is None else (selection.staleness > 0) + (score_kind(policy) is not None)
    scored = sum(branch.rows * branch.tokens for branch in facts.branches if branch.pointwise)
    return sum(held.values()) + kinds * scored * SCORE_BYTES


def peak_of_request(captured: CapturedGraph, facts: Facts, policy: Policy, total: int | None) -> int:
    """The most bytes that one guidance pass of a request with ``total`` steps holds at once in eager mode."""
    captured = with_predictor(captured, facts, policy.predictor)
    known: dict[tuple[VariantSpec, tuple[int, ...]], tuple[Variant, int]] = {}
    held: dict[Port, int] = {}
    most = 0
    for step in policy.planned(total):
        spec, counts = plan_step(facts, policy, step)
        key = spec, tuple(counts.values())
        if key not in known:
            variant = build_variant(captured, facts, spec)
            sizes = {spec.tokens_input(i): (facts.branches[i].rows, count) for i, count in counts.items()}
            known[key] = variant, peak_bytes(variant.module, sizes)
        variant, allocated = known[key]
        replaced = {slot for slot in variant.kept if slot not in variant.inputs}
        most = max(most, allocated + sum(size for slot, size in held.items() if slot not in replaced))
        dead = dead_kinds(step.live)
        held = {slot: size for slot, size in {**held, **variant.kept}.items() if slot.kind not in dead}
    hoisted = [node.meta["val"] for node in frontier(captured.graph, facts)]
    rows = row_layout(captured.graph, facts).items()
    outside: int = sum(value.numel() * value.element_size() for value in hoisted)
    return most + outside + sum(row[-1].stop * dtype.itemsize for dtype, row in rows)


def _candidates(policy: Policy, dtype: torch.dtype | None) -> Iterator[tuple[Policy, torch.dtype | None]]:
    # A predictor reads only the end of the stream anyway.
    unique = isinstance(policy, AdaptivePolicy) or policy.predictor is not None
    for candidate in (policy,) if unique else (policy, EndOnly(policy)):
        yield candidate, dtype
        if dtype is None or dtype.itemsize > NARROW.itemsize:
            yield candidate, NARROW


def _report(tried: list[Fit], budget: int) -> None:
    requested, chosen = tried[0], tried[-1]
    if chosen is not requested:
        log.warning(
            "the caches of %s would hold %d bytes, more than cache_budget_bytes=%d; running %s with caches in %s, "
            "which hold %d",
            requested.policy.name,
            requested.bytes,
            budget,
            chosen.policy.name,
            _dtype_name(chosen.dtype),
            chosen.bytes,
        )


def _dtype_name(dtype: torch.dtype | None) -> str:
    return "the dtype of the features" if dtype is None else str(dtype).removeprefix("torch.")
