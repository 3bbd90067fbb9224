"""Makes full steps return what each residual stream gains from its start to its end."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from duca_compile.analysis.closure import closure
from duca_compile.graph import change_slot
from duca_compile.passes.base import ExactPass, VariantDraft
from duca_compile.passes.probe import probed_stream

aten = torch.ops.aten


@dataclass(frozen=True)
class EmitChanges(ExactPass[VariantDraft]):
    """Returns end - start of each stream whose end a skip step still needs (TeaCache, arXiv 2411.19108)."""

    ensures = frozenset({"changes_emitted"})

    def apply(self, draft: VariantDraft) -> bool:
        if not draft.spec.change or not draft.spec.emit:
            return False
        new = {chain: ends for chain, ends in stretches(draft).items() if change_slot(chain) not in draft.results}
        for chain, (start, end) in new.items():
            with draft.graph.inserting_before(draft.graph.output_node()):
                change = draft.graph.call_function(aten.sub.Tensor, (end, start))
            change.meta["val"] = end.meta["val"]
            draft.add_result(change_slot(chain), change)
        return bool(new)


def stretches(draft: VariantDraft) -> dict[int, tuple[fx.Node, fx.Node]]:
    """Where each stream starts and ends, of those whose end is needed once no block is computed.

    The stream that the probe looked at starts from there.
    """
    found: dict[int, tuple[fx.Node, fx.Node]] = {}
    for branch in draft.facts.branches:
        start, _ = found.get(branch.chain, (draft.node(branch.stream), None))
        found[branch.chain] = start, draft.node(branch.add)
    if draft.spec.probe is not None:
        chain, start = probed_stream(draft, draft.spec.probe)
        found[chain] = start, found[chain][1]
    starts = {end: start for start, end in found.values()}

    def needed(node: fx.Node) -> list[fx.Node]:
        return [starts[node]] if node in starts else node.all_input_nodes

    reached = set(closure(draft.graph.output_node(), needed))
    return {chain: ends for chain, ends in found.items() if ends[1] in reached}
