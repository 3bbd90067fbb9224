"""From a policy's step to the variant it needs: which branch does what, and on how many tokens."""

from __future__ import annotations

from collections.abc import Collection

from duca_compile.errors import PolicyError
from duca_compile.graph import Action, Branch, Facts, Role, VariantSpec
from duca_compile.policies.base import Policy, Step, StepKind, TokenQuery
from duca_compile.runtime.selection import check_grid

_ACTIONS = {
    StepKind.FULL: Action.COMPUTE,
    StepKind.PARTIAL: Action.PARTIAL,
    StepKind.REUSE: Action.REUSE,
    StepKind.SKIP: Action.REUSE,
    StepKind.FORECAST: Action.FORECAST,
}


def plan_step(facts: Facts, policy: Policy, step: Step) -> tuple[VariantSpec, dict[int, int]]:
    """The variant that ``step`` needs, and how many tokens each of its partial branches recomputes."""
    counts: dict[int, int] = {}
    actions = tuple(_action(facts, policy, step, branch, counts) for branch in facts.branches)
    scores = score_kind(policy) if Action.COMPUTE in actions else None
    forecast = policy.forecast
    if forecast is None:
        shared = _shared(facts, counts) if policy.selection is not None and policy.selection.shared else ()
        return VariantSpec(
            actions, step.kind is StepKind.SKIP, scores, policy.caches, chosen_with=shared, keeps=step.kept
        ), counts
    skip = step.kind is StepKind.SKIP or (step.kind is StepKind.FORECAST and forecast.lite)
    emit = policy.caches and step.kind is StepKind.FULL  # between full steps, caches stay as the last one made them
    return VariantSpec(actions, skip, scores, emit, forecast.order, forecast.lite), counts


def _action(facts: Facts, policy: Policy, step: Step, branch: Branch, counts: dict[int, int]) -> Action:
    if branch.block < step.leading_full:
        return Action.COMPUTE
    if step.kind is not StepKind.PARTIAL:
        return _ACTIONS[step.kind]
    if branch.kind == "mixing":  # not understood, so computed in full
        return Action.COMPUTE
    if not branch.pointwise:
        return Action.REUSE
    query = TokenQuery(branch.block, facts.blocks, branch.kind, branch.tokens, branch.role is Role.TEXT)
    count = policy.fresh_tokens(step, query)
    if count <= 0:
        return Action.REUSE
    counts[branch.index] = count
    return Action.PARTIAL


def _shared(facts: Facts, counts: dict[int, int]) -> tuple[int, ...]:
    """For each branch the first that recomputes as many of the same number of tokens."""
    if not counts:
        return ()
    first: dict[tuple[int, ...], int] = {}
    return tuple(
        first.setdefault((*branch.shape[:2], counts[branch.index]), branch.index)
        if branch.index in counts
        else branch.index
        for branch in facts.branches
    )


def score_output(facts: Facts, branch: Branch, outputs: Collection[str]) -> str | None:
    """The output among ``outputs`` that holds the scores of the tokens of ``branch``; None where there is none."""
    source = facts.score_source(branch)
    return source.score_slot if source is not None and source.score_slot in outputs else None


def score_kind(policy: Policy) -> str | None:
    """The token score that full steps must emit, or None where the selection needs none."""
    selection = policy.selection
    return None if selection is None or selection.kind == "random" else selection.kind


def check_selection(facts: Facts, policy: Policy) -> None:
    """Raises PolicyError where the policy's token scores cannot be had from this graph; names the branch."""
    kind = score_kind(policy)
    for branch in facts.branches:
        if policy.selection is not None and branch.pointwise and branch.role is not Role.TEXT:
            check_grid(policy.selection, branch.tokens)
        if kind is not None and branch.pointwise and facts.score_source(branch) is None:
            raise PolicyError(
                f"selection={kind!r} needs a self-attention (scaled_dot_product_attention) over the same "
                f"{branch.tokens} tokens before {branch.path or 'the branch'} at {branch.source}; "
                "use selection='random'"
            )
