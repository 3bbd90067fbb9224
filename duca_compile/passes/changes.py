"""Makes full steps return what each residual stream gains from its start to its end."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from duca_compile.analysis.closure import closure
from duca_compile.graph import Branch, change_slot
from duca_compile.passes.base import ExactPass, VariantDraft
from duca_compile.passes.probe import probed_stream

aten = torch.ops.aten


@dataclass(frozen=True)
class EmitChanges(ExactPass[VariantDraft]):
    """Returns end - start of each stretch of a stream that a skip step needs the end of (TeaCache, arXiv 2411.19108)."""

    ensures = frozenset({"changes_emitted"})

    def apply(self, draft: VariantDraft) -> bool:
        if not draft.spec.change or not draft.spec.emit:
            return False
        new = {i: ends for i, ends in stretches(draft).items() if change_slot(i) not in draft.results}
        for index, (start, end) in new.items():
            with draft.graph.inserting_before(draft.graph.output_node()):
                change = draft.graph.call_function(aten.sub.Tensor, (end, start))
            change.meta["val"] = end.meta["val"]
            draft.add_result(change_slot(index), change)
        return bool(new)


def stretches(draft: VariantDraft) -> dict[int, tuple[fx.Node, fx.Node]]:
    """Where each stretch of a residual stream starts and ends, by the number of its last branch.

    A stream is one stretch, and more where something but its own branches reads a value in between (a long skip). Those
    whose end nothing reads, once no block is computed, are left out. The stream that the probe looked at starts there.
    """
    chains: dict[int, list[Branch]] = {}
    for branch in draft.facts.branches:
        chains.setdefault(branch.chain, []).append(branch)
    starts = {chain: draft.node(branches[0].stream) for chain, branches in chains.items()}
    if draft.spec.probe is not None:
        chain, starts[chain] = probed_stream(draft, draft.spec.probe)
        names = [branch.add for branch in chains[chain]]
        seen = names.index(starts[chain].name) + 1 if starts[chain].name in names else 0
        chains[chain] = chains[chain][seen:]
    adds = {draft.node(b.add): b.index for branches in chains.values() for b in branches}
    cuts = {draft.node(branches[-1].add) for branches in chains.values() if branches}
    while True:
        found: dict[fx.Node, fx.Node] = {}
        for chain, branches in chains.items():
            start = starts[chain]
            for end in [node for b in branches if (node := draft.node(b.add)) in cuts]:
                found[end], start = start, end
        reached = set(closure(draft.graph.output_node(), lambda n: [found[n]] if n in found else n.all_input_nodes))  # noqa: B023
        read = {node for node in adds if node in reached and node not in cuts}
        if not read:
            return {adds[end]: (start, end) for end, start in found.items() if end in reached}
        cuts |= read
