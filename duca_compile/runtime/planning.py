"""From a policy's step to the variant it needs: which branch does what, and on how many tokens."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from duca_compile.core.ir import Branch, Facts, Role
from duca_compile.core.ports import Port
from duca_compile.core.steps import Kept, Probe, Step, StepKind
from duca_compile.core.variants import Action, VariantSpec
from duca_compile.errors import PolicyError
from duca_compile.policies.adaptive import AdaptivePolicy
from duca_compile.policies.base import Policy, Selection, TokenQuery
from duca_compile.runtime.selection import Tokens, check_grid

_ACTIONS = {
    StepKind.FULL: Action.COMPUTE,
    StepKind.PARTIAL: Action.PARTIAL,
    StepKind.REUSE: Action.REUSE,
    StepKind.SKIP: Action.REUSE,
    StepKind.FORECAST: Action.FORECAST,
    StepKind.PREDICT: Action.COMPUTE,
}


def plan_step(facts: Facts, policy: Policy, step: Step) -> tuple[VariantSpec, dict[int, int]]:
    """The variant that ``step`` needs, and how many tokens each of its partial branches recomputes."""
    counts: dict[int, int] = {}
    actions = tuple(_action(facts, policy, step, branch, counts) for branch in facts.branches)
    adaptive, forecast, selection = isinstance(policy, AdaptivePolicy), policy.forecast, policy.selection
    if policy.predictor is not None:
        names = frozenset(policy.predictor.weights) if step.kind is StepKind.PREDICT else frozenset[str]()
        return VariantSpec(actions, emit=step.kind is StepKind.FULL, lite=True, predict=names), counts
    lite = forecast is not None and forecast.lite
    scores = score_kind(policy) if Action.COMPUTE in actions else None
    # Where forecasts or changes are cached, only full steps fill the caches: between them they stay as they are.
    fills = step.kind is StepKind.FULL or (forecast is None and not adaptive)
    spec = VariantSpec(
        actions,
        skip=step.kind is StepKind.SKIP or (step.kind is StepKind.FORECAST and lite),
        scores=scores,
        paired=scores is not None and selection is not None and selection.paired,
        emit=policy.caches and fills,
        order=None if forecast is None else forecast.order,
        lite=lite,
        relational=forecast is not None and forecast.relational,
        chosen_with=_shared(facts, counts) if selection is not None and selection.shared else (),
        keeps=Kept.BRANCHES if adaptive else step.kept,
    )
    return (_adapted(spec, policy, step) if isinstance(policy, AdaptivePolicy) else spec), counts


def _adapted(spec: VariantSpec, policy: AdaptivePolicy, step: Step) -> VariantSpec:
    by_row = policy.per != "batch" and (step.kind is StepKind.FULL or spec.order is not None)
    measure = policy.measure
    if isinstance(measure, Probe):
        return replace(spec, probe=measure, change=policy.change, by_row=by_row)
    return replace(spec, verify=measure if step.verified else None, by_row=by_row)


def probe_spec(facts: Facts, policy: Policy) -> VariantSpec | None:
    """The variant that looks before a step is decided; None where the policy has none."""
    if not isinstance(policy, AdaptivePolicy) or not isinstance(policy.measure, Probe):
        return None
    actions, forecast = (Action.COMPUTE,) * len(facts.branches), policy.forecast
    compares = forecast is not None and policy.measure.of == "forecast"
    return VariantSpec(
        actions,
        emit=False,
        order=forecast.order if compares and forecast is not None else None,
        probe=policy.measure,
        probing=True,
        by_row=compares and policy.per != "batch",
    )


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


def score_output(facts: Facts, branch: Branch, scores: str | None, outputs: Collection[Port]) -> Port | None:
    """The output among ``outputs`` that holds the scores of the tokens of ``branch``; None where there is none."""
    source = facts.score_source(branch, scores)
    return source.score_slot if source is not None and source.score_slot in outputs else None


def score_kind(policy: Policy) -> str | None:
    """The token score that full steps must emit, or None where the selection needs none."""
    selection = policy.selection
    return None if selection is None or selection.kind == "random" else selection.kind


def not_recomputed(facts: Facts, policy: Policy) -> str | None:
    """What a policy's partial steps do otherwise than its numbers say, and what to do; None where nothing."""
    if policy.selection is None:
        return None
    mixing = [branch for branch in facts.branches if branch.kind == "mixing"]
    if mixing:
        return (
            f"partial steps compute {len(mixing)} of {len(facts.branches)} branches in full, for it is not understood "
            f"how their tokens could be computed apart: {'; '.join(facts.notes)}. These steps are slower, and no less "
            "exact. FORA and TaylorSeer replace such branches as a whole, and explain(...) gives the costs"
        )
    if not any(branch.pointwise for branch in facts.branches):
        return (
            "partial steps find no branch whose tokens can be computed apart, so they reuse every branch, as FORA's "
            "steps do; where that is too coarse, use TaylorSeer or a shorter interval"
        )
    return None


def check_selection(facts: Facts, policy: Policy) -> None:
    """Raises PolicyError where the policy's token scores cannot be had from this graph; names the branch."""
    kind = score_kind(policy)
    for branch in facts.branches:
        if policy.selection is not None and branch.pointwise and branch.role is not Role.TEXT:
            check_grid(policy.selection, tokens_of(facts, policy.selection, branch))
        if kind is not None and branch.pointwise and facts.score_source(branch, kind) is None:
            attention = "cross-attention" if kind == "entropy" else "self-attention"
            raise PolicyError(
                f"selection={kind!r} needs a {attention} (scaled_dot_product_attention) over the same "
                f"{branch.tokens} tokens before {branch.path or 'the branch'} at {branch.source}; "
                "use selection='random'"
            )
        if policy.selection is not None and policy.selection.paired and branch.shape[0] % 2:
            raise PolicyError(
                f"paired=True takes the first and the second half of the batch for the two halves of guidance, and "
                f"there are {branch.shape[0]} rows; call the model with both, or set paired=False"
            )


def check_rows(facts: Facts, policy: Policy) -> None:
    """Raises PolicyError where rows of the batch are to decide for themselves, and the graph has no such rows."""
    if not isinstance(policy, AdaptivePolicy) or policy.per == "batch":
        return
    odd = next((b for b in facts.branches if b.shape[0] != facts.batch), None)
    if odd is not None or len(facts.changing) > 2:
        where = f"{odd.path} has {odd.shape[0]} rows of {facts.batch}" if odd else "the latent is a list of tensors"
        raise PolicyError(
            f"decide_per={policy.per!r} needs values with one row for each row of the latent: {where}; "
            "use decide_per='batch'"
        )
    check_pairs(policy, facts.batch)


def check_pairs(policy: Policy, rows: int) -> None:
    """Raises PolicyError where both halves of a batch are to decide together, and there are no halves."""
    if isinstance(policy, AdaptivePolicy) and policy.per == "pair" and rows % 2:
        raise PolicyError(f"decide_per='pair' needs an even batch, and there are {rows} rows")


def tokens_of(facts: Facts, selection: Selection, branch: Branch) -> Tokens:
    """The tokens that the branch chooses from. How they lie may be unknown, and is no question of text."""
    grid = None if branch.role is Role.TEXT else selection.grid or facts.grids.get(branch.tokens)
    return Tokens(branch.shape[0], branch.tokens, grid if selection.patch_bonus else None)
