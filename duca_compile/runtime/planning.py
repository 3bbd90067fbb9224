"""From a policy's step to the variant it needs: which branch does what, and on how many tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from duca_compile.core.ir import Branch, Facts, Role
from duca_compile.core.ports import Port, PortKind
from duca_compile.core.steps import CacheKinds, Probe, Step, StepKind, Verify
from duca_compile.core.variants import (
    Action,
    Boundary,
    Changes,
    ForecastVariant,
    FullVariant,
    Keeps,
    PartialVariant,
    PredictVariant,
    ProbeVariant,
    ReuseVariant,
    Scores,
    Series,
    SkipVariant,
    Variant,
    VariantSpec,
)
from duca_compile.errors import PolicyError
from duca_compile.policies.adaptive import AdaptivePolicy
from duca_compile.policies.base import Forecast, Policy, Selection, TokenQuery
from duca_compile.runtime.selection import TokenSet, check_grid

_COSTLY = 0.75  # the share of a full step's FLOPs from which on partial steps are not worth their error


def plan_step(facts: Facts, policy: Policy, step: Step) -> tuple[VariantSpec, dict[int, int]]:
    """The variant that ``step`` needs, and how many tokens each of its partial branches recomputes."""
    counts = _token_counts(facts, policy, step) if step.kind is StepKind.PARTIAL else {}
    leading = sum(branch.block < step.leading_full for branch in facts.branches)
    measure = policy.measure if isinstance(policy, AdaptivePolicy) else None
    after = measure if isinstance(measure, Probe) and measure.of != "latent" else None
    scores, keeps = _scores(policy), _kept_between(policy, step)
    match step.kind:
        case StepKind.FULL:
            return FullVariant(_kept_of_full(policy, step), scores, after, _by_row(policy)), counts
        case StepKind.PARTIAL:
            branches = _partial(facts, policy, leading, counts)
            return PartialVariant(branches, keeps, scores if Action.COMPUTE in branches else None, after), counts
        case StepKind.REUSE:
            return ReuseVariant(leading, keeps, scores if leading else None, after), counts
        case StepKind.SKIP:
            return SkipVariant(leading, keeps, scores if leading else None, after, policy.restores), counts
        case StepKind.FORECAST:
            verify = measure if isinstance(measure, Verify) and step.verified else None
            return ForecastVariant(_series(policy.forecast), leading, verify, after, _by_row(policy)), counts
        case StepKind.PREDICT:
            if policy.predictor is None:
                raise PolicyError(f"{policy.name} has predict steps but no predictor")
            return PredictVariant(frozenset(policy.predictor.weights)), counts


def probe_spec(policy: Policy) -> ProbeVariant | None:
    """The variant that measures before a step is decided; None if the policy has none."""
    if not isinstance(policy, AdaptivePolicy) or not isinstance(policy.measure, Probe):
        return None
    if policy.measure.of != "forecast":
        return ProbeVariant(policy.measure)
    return ProbeVariant(policy.measure, _series(policy.forecast).order, _by_row(policy))


def _kept_of_full(policy: Policy, step: Step) -> Keeps:
    if policy.predictor is not None:
        return CacheKinds.END
    if not policy.caches:
        return CacheKinds.NOTHING
    if policy.forecast is not None:
        return CacheKinds.NOTHING if step.kept is CacheKinds.NOTHING else _series(policy.forecast)
    if policy.restores != "end":
        return Changes() if policy.restores == "change" else Boundary()
    return CacheKinds.BRANCHES if isinstance(policy, AdaptivePolicy) else step.kept


def _kept_between(policy: Policy, step: Step) -> CacheKinds:
    """What steps other than full ones keep: nothing if only full steps fill the caches."""
    only_full = policy.forecast is not None or policy.predictor is not None or isinstance(policy, AdaptivePolicy)
    return CacheKinds.NOTHING if only_full or not policy.caches else step.kept


def _series(forecast: Forecast | None) -> Series:
    if forecast is None:
        raise PolicyError("a policy with forecast steps must say how they extrapolate: its `forecast` is None")
    sums = 0 if forecast.chebyshev is None else forecast.chebyshev.sums
    of: Literal["branches", "inputs", "end"] = (
        "end" if forecast.lite else "inputs" if forecast.relational else "branches"
    )
    return Series(forecast.order, of, sums, forecast.high_pass)


def _by_row(policy: Policy) -> bool:
    return isinstance(policy, AdaptivePolicy) and policy.per != "batch"


def _scores(policy: Policy) -> Scores | None:
    kind = score_kind(policy)
    return None if kind is None or policy.selection is None else Scores(kind, policy.selection.paired)


def _token_counts(facts: Facts, policy: Policy, step: Step) -> dict[int, int]:
    """How many tokens each branch recomputes; branches that recompute none are left out."""
    counts: dict[int, int] = {}
    for branch in facts.branches:
        if branch.pointwise and branch.kind != "mixing" and branch.block >= step.leading_full:
            query = TokenQuery(branch.block, facts.blocks, branch.kind, branch.tokens, branch.role is Role.TEXT)
            counts[branch.index] = policy.fresh_tokens(step, query)
    return {index: count for index, count in counts.items() if count > 0}


def _partial(
    facts: Facts, policy: Policy, leading: int, counts: Mapping[int, int]
) -> tuple[Literal[Action.COMPUTE, Action.REUSE] | Port, ...]:
    """What a partial step does with each branch; branches that mix their tokens are computed in full."""
    shared = policy.selection is not None and policy.selection.shared
    first: dict[tuple[int, ...], Port] = {}  # branches that choose equally many of the same tokens share an input

    def action(branch: Branch) -> Literal[Action.COMPUTE, Action.REUSE] | Port:
        if branch.index in counts:
            port = Port(PortKind.TOKENS, branch.index)
            return first.setdefault((branch.rows, branch.tokens, counts[branch.index]), port) if shared else port
        return Action.COMPUTE if branch.index < leading or branch.kind == "mixing" else Action.REUSE

    return tuple(map(action, facts.branches))


def score_output(facts: Facts, branch: Branch, variant: Variant) -> Port | None:
    """The output of a variant that holds the scores of the tokens of ``branch``; None if there is none."""
    spec = variant.spec
    if isinstance(spec, ForecastVariant | PredictVariant | ProbeVariant) or spec.scores is None:
        return None
    source = facts.score_source(branch, spec.scores.kind)
    return source.score_slot if source is not None and source.score_slot in variant.outputs else None


def score_kind(policy: Policy) -> str | None:
    """The kind of token score that full steps must return; None if the selection needs none."""
    selection = policy.selection
    return None if selection is None or selection.kind == "random" else selection.kind


def not_recomputed(facts: Facts, policy: Policy) -> str | None:
    """How a policy's partial steps deviate from its settings, and what to do about it; None if they do not."""
    if policy.selection is None:
        return None
    mixing = [branch for branch in facts.branches if branch.kind == "mixing"]
    if mixing:
        return (
            f"partial steps compute {len(mixing)} of {len(facts.branches)} branches in full, because it is not "
            f"understood how to compute their tokens separately: {'; '.join(facts.notes)}. These steps are slower, but "
            "no less exact. FORA and TaylorSeer replace such branches as a whole; explain(...) gives the costs"
        )
    if not any(branch.pointwise for branch in facts.branches):
        return (
            "partial steps find no branch whose tokens can be computed separately, so they reuse every branch, as FORA "
            "does; if that is too coarse, use TaylorSeer or a shorter interval"
        )
    return None


def costly_partial(share: float) -> str | None:
    """What to say of partial steps that have this share of a full step's FLOPs; None if they save enough."""
    if share < _COSTLY:
        return None
    return (
        f"a partial step has {share:.0%} of a full step's FLOPs, so it saves next to nothing: use FORA or TaylorSeer, "
        "which replace branches as a whole, or a lower fresh_ratio if that is what costs"
    )


def check_selection(facts: Facts, policy: Policy) -> None:
    """Raises PolicyError, naming the branch, if this graph cannot provide the policy's token scores."""
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
        if policy.selection is not None and policy.selection.paired and branch.rows % 2:
            raise PolicyError(
                "paired=True treats the two halves of the batch as the two halves of guidance, but the batch size is "
                f"{branch.rows}; call the model with both halves, or set paired=False"
            )


def check_rows(facts: Facts, policy: Policy) -> None:
    """Raises PolicyError if values are to be measured, or to decide, by batch row and some do not have these rows."""
    _check_measured_rows(facts, policy)
    if not isinstance(policy, AdaptivePolicy) or policy.per == "batch":
        return
    odd = next((b for b in facts.branches if b.shape[0] != facts.batch or _rows_are_behind(b)), None)
    if odd is not None or facts.listed:
        where = "the latent is a list of tensors"
        if odd is not None:
            found = f"a stream of {odd.layout}" if _rows_are_behind(odd) else f"{odd.shape[0]} rows, not {facts.batch}"
            where = f"{odd.path} has {found}"
        raise PolicyError(
            f"decide_per={policy.per!r} needs values with one row for each batch row of the latent: {where}; "
            "use decide_per='batch'"
        )
    check_pairs(policy, facts.batch)


def _check_measured_rows(facts: Facts, policy: Policy) -> None:
    """Raises PolicyError if norms of each batch row are needed of a stream whose first dimension is not the batch."""
    measure = policy.measure if isinstance(policy, AdaptivePolicy) else None
    inside = isinstance(measure, Verify) or (isinstance(measure, Probe) and measure.of != "latent")
    if not inside and not (policy.forecast is not None and policy.forecast.relational):
        return
    odd = next((b for b in facts.branches if not b.layout.rows_first and b.shape[0] != facts.batch), None)
    if odd is not None:
        raise PolicyError(
            f"{policy.name} measures each batch row, and the stream of {odd.path or 'the model'} is {odd.layout}; use "
            "a policy whose steps are known before the loop, such as DuCa or TaylorSeer"
        )


def _rows_are_behind(branch: Branch) -> bool:
    """Whether its batch rows lie along another dimension than the first."""
    return branch.rows > 1 and not branch.layout.rows_first


def check_pairs(policy: Policy, rows: int) -> None:
    """Raises PolicyError if both halves of a batch are to decide together but the batch is odd."""
    if isinstance(policy, AdaptivePolicy) and policy.per == "pair" and rows % 2:
        raise PolicyError(f"decide_per='pair' needs an even batch, and there are {rows} rows")


def tokens_of(facts: Facts, selection: Selection, branch: Branch) -> TokenSet:
    """The tokens that the branch chooses from; text has no grid, and that of other tokens may be unknown."""
    grid = None if branch.role is Role.TEXT else selection.grid or facts.grids.get(branch.tokens)
    return TokenSet(branch.rows, branch.tokens, grid if selection.patch_bonus else None)
