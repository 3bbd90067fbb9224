"""Holds the token analysis to account: recomputing some tokens must give what computing all of them gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from duca_compile.graph import Action, Branch, CapturedGraph, Facts, VariantSpec, cache_input, tokens_input
from duca_compile.passes.pipeline import build_variant

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def verified(captured: CapturedGraph, facts: Facts, values: Mapping[str, Tensor]) -> Facts:
    """``facts`` with every branch that fails the equivariance check f(x[idx]) = f(x)[idx] marked as mixing.

    Runs one full and one partial evaluation eagerly on ``values``, the call's tensors and hoisted values by
    placeholder name.
    """
    partial = [b for b in facts.branches if b.pointwise]
    if not partial or any(value.is_meta for value in values.values()):
        return facts
    everything = VariantSpec((Action.COMPUTE,) * len(facts.branches))
    full = build_variant(captured, facts, everything)
    expected = dict(zip(full.outputs, full.module(*[values[n] for n in full.inputs]), strict=True))
    caches = {cache_input(b.slot): expected[b.slot].clone() for b in facts.branches}  # a partial step writes to them
    indices = {tokens_input(b.index): _some_tokens(b, expected[b.slot].device) for b in partial}
    spec = VariantSpec(tuple(Action.PARTIAL if b.pointwise else Action.REUSE for b in facts.branches))
    variant = build_variant(captured, facts, spec)
    known = {**values, **caches, **indices}
    try:
        found = dict(zip(variant.outputs, variant.module(*[known[n] for n in variant.inputs]), strict=True))
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # a body that cannot run on other token counts
        return _without_partial(facts, partial, f"it cannot run on some of its tokens ({error})")
    wrong = [b for b in partial if not _close(found[b.slot], expected[b.slot])]
    return _without_partial(facts, wrong, "recomputing some tokens gave other values than computing all of them")


def _without_partial(facts: Facts, wrong: list[Branch], reason: str) -> Facts:
    """``facts`` with the branches of ``wrong`` marked as mixing."""
    wrong_slots = {b.slot for b in wrong}
    branches = tuple(
        replace(b, kind="mixing", token_places=None, mixing_reason=reason) if b.slot in wrong_slots else b
        for b in facts.branches
    )
    notes = tuple(f"{b.path or 'model'} ({b.source}): {reason}" for b in wrong)
    return replace(facts, branches=branches, notes=facts.notes + notes)


def _some_tokens(branch: Branch, device: torch.device) -> Tensor:
    """A quarter of the tokens, spread unevenly and out of order, the same on every run."""
    count = max(1, branch.tokens // 4)
    generator = torch.Generator().manual_seed(branch.index)
    rows = [torch.randperm(branch.tokens, generator=generator)[:count] for _ in range(branch.shape[0])]
    return torch.stack(rows).to(device)


def _close(found: Tensor, expected: Tensor) -> bool:
    error, size = (found - expected).abs().max().float(), expected.abs().max().float()
    return bool(error <= _TOLERANCE.get(expected.dtype, 1e-4) * size)
