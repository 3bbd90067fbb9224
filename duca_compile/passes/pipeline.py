"""The order of the passes, with lint and property checks between them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import fx

from duca_compile.analysis.closure import ancestors
from duca_compile.core.fx_utils import copy_graph, port_of, to_module
from duca_compile.core.ir import CapturedGraph, Facts, Variance
from duca_compile.core.ports import CACHES, Port, PortKind
from duca_compile.core.variants import Action, Variant, VariantSpec
from duca_compile.errors import InternalError
from duca_compile.passes.base import D, Draft, Pass, VariantDraft, returned
from duca_compile.passes.caching.cast import CastCaches
from duca_compile.passes.caching.forecast import Forecast
from duca_compile.passes.caching.output import RestoreOutput
from duca_compile.passes.caching.partial import RecomputeTokens
from duca_compile.passes.caching.predict import PredictStream
from duca_compile.passes.caching.probe import ResumeFromProbe
from duca_compile.passes.caching.relate import ForecastFromInputs
from duca_compile.passes.caching.residual import AddChanges
from duca_compile.passes.caching.reuse import ReuseBranches
from duca_compile.passes.caching.rows import KeepRows
from duca_compile.passes.caching.skip import SkipBlocks
from duca_compile.passes.exact.boundary import EmitBoundary
from duca_compile.passes.exact.changes import EmitChanges
from duca_compile.passes.exact.clean import Clean
from duca_compile.passes.exact.dead_code import RemoveDeadCode
from duca_compile.passes.exact.deduplicate import Deduplicate
from duca_compile.passes.exact.differences import EmitDifferences
from duca_compile.passes.exact.emit import EmitCaches
from duca_compile.passes.exact.empties import Empties
from duca_compile.passes.exact.hoist import Hoist, invariant_graph
from duca_compile.passes.exact.probe import EmitProbe
from duca_compile.passes.exact.relate import EmitRelations
from duca_compile.passes.exact.scores import EmitScores
from duca_compile.passes.exact.shapes import StaticShapes
from duca_compile.passes.exact.sums import EmitSums
from duca_compile.passes.exact.verification import VerifyForecast
from duca_compile.passes.exact.write_last import WriteLast
from duca_compile.passes.portable.logical_select import LogicalSelect
from duca_compile.passes.portable.real_pairs import RealPairs
from duca_compile.passes.portable.whole_copies import WholeCopies
from duca_compile.passes.portable.zero_memory import ZeroMemory

PREPARE: tuple[Pass[Draft], ...] = (Clean(), StaticShapes(), Empties(), Deduplicate(), RemoveDeadCode())
# Once for each capture that is exported, before the analyses.
FOR_EXPORT: tuple[Pass[Draft], ...] = (
    ZeroMemory(),
    RealPairs(),
    LogicalSelect(),
    WholeCopies(),
    Deduplicate(),
    RemoveDeadCode(),
)
# Results are emitted before values are replaced, so that a replacement also reaches what is returned. Partial
# branches come first of the replacements: their bodies are copied from the nodes that reuse leaves dead.
REWRITE: tuple[Pass[VariantDraft], ...] = (
    Hoist(),
    EmitProbe(),
    EmitCaches(),
    EmitChanges(),
    EmitDifferences(),
    EmitSums(),
    EmitBoundary(),
    EmitRelations(),
    KeepRows(),
    EmitScores(),
    VerifyForecast(),
    RecomputeTokens(),
    Forecast(),
    ForecastFromInputs(),
    ReuseBranches(),
    SkipBlocks(),
    AddChanges(),
    RestoreOutput(),
    ResumeFromProbe(),
    PredictStream(),
    CastCaches(),
    RemoveDeadCode(),
    WriteLast(),
)


def run_passes(draft: D, passes: Sequence[Pass[D]], observe: Callable[[D], None] = lambda draft: None) -> D:  # type: ignore[misc]
    """Applies ``passes`` in order; ``observe`` is called with the draft before the first one, and after each.

    Raises:
        InternalError: a pass lacks what it requires, or leaves a malformed graph.
    """
    observe(draft)
    for current in passes:
        missing = current.requires - draft.properties
        if missing:
            raise InternalError(f"{type(current).__name__} needs {sorted(missing)}, which no earlier pass ensures")
        if current.apply(draft):
            try:
                draft.graph.lint()
            except RuntimeError as error:
                raise InternalError(f"{type(current).__name__} left a malformed graph: {error}") from error
        draft.properties |= current.ensures
        observe(draft)
    return draft


def prepare(captured: CapturedGraph, more: Sequence[Pass[Draft]] = ()) -> CapturedGraph:
    """The captured graph without trace residue and repeated expressions, for the analyses to read.

    ``more`` are the passes that follow.
    """
    draft = Draft(copy_graph(captured.graph))
    run_passes(draft, (*PREPARE, *more))
    return replace(captured, graph=draft.graph)


def build_variant(
    captured: CapturedGraph,
    facts: Facts,
    spec: VariantSpec,
    observe: Callable[[VariantDraft], None] = lambda draft: None,
    cache_dtype: torch.dtype | None = None,
) -> Variant:
    """Rewrites a copy of the prepared graph as ``spec`` says; it shares the weights of the source model.

    Caches are kept in ``cache_dtype`` if that is narrower than their features. ``observe`` is called with the draft
    before the first pass, and after each.
    """
    results = [Port(PortKind.OUTPUT, place) for place in range(len(returned(captured.graph)))]
    draft = VariantDraft(copy_graph(captured.graph), facts, spec, results, cache_dtype)
    run_passes(draft, REWRITE, observe)
    pieces = frozenset(str(n.meta["piece"]) for n in draft.graph.nodes if "piece" in n.meta)
    fixed, per_token = variant_flops(draft.graph, facts)
    inputs = tuple(map(port_of, draft.graph.find_nodes(op="placeholder")))
    partial = {spec.tokens_input(branch.index) for branch in draft.branches(Action.PARTIAL)}
    return Variant(
        spec=spec,
        module=to_module(captured, draft.graph),
        inputs=inputs,
        outputs=tuple(draft.results),
        dynamic_inputs=tuple(port for port in inputs if port in partial),
        pieces=pieces,
        kept=_kept(draft),
        flops_fixed=fixed + _timestep_flops(captured.graph, facts, pieces),
        flops_per_token=per_token,
    )


def build_prologue(captured: CapturedGraph, facts: Facts) -> fx.GraphModule:
    """The module that computes the hoisted values once per request."""
    draft = Draft(invariant_graph(captured.graph, facts))
    return to_module(captured, run_passes(draft, (RemoveDeadCode(draws=False),)).graph)


def _kept(draft: VariantDraft) -> dict[Port, int]:
    """Bytes of each result that is kept for later steps."""
    kept: dict[Port, int] = {}
    for port, node in zip(draft.results, returned(draft.graph), strict=True):
        if port.kind in CACHES:
            value = node.meta["val"]
            kept[port] = value.numel() * value.element_size()
    return kept


def _timestep_flops(graph: fx.Graph, facts: Facts, pieces: frozenset[str]) -> int:
    """FLOPs of the timestep-only values that a variant reads. Every step needs them, whenever they are computed."""
    needed = {node for node in graph.nodes if node.name in pieces}
    needed = needed.union(*map(ancestors, needed))
    return sum(facts.flops[n.name] for n in needed if facts.variance[n.name] is Variance.TIMESTEP)


def variant_flops(graph: fx.Graph, facts: Facts) -> tuple[int, dict[int, float]]:
    """FLOPs of a rewritten graph: those of every call, and those per recomputed token of each branch, by its index."""
    fixed, per_token = 0, defaultdict[int, float](float)
    for node in graph.nodes:
        if "tokens_of" in node.meta:
            index, origin = node.meta["tokens_of"]
            per_token[index] += facts.flops[origin] / facts.branches[index].tokens
        else:
            counted = facts.flops.get(node.meta.get("copy_of", node.name), 0)
            fixed += node.meta.get("flops", counted)
    return fixed, dict(per_token)
