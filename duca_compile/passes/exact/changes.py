"""Makes full steps return what each residual stream gains from its start to its end."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from duca_compile.core.ir import Branch
from duca_compile.core.ports import Port, PortKind
from duca_compile.core.variants import Changes, FullVariant
from duca_compile.frontend.operators import carried_value
from duca_compile.passes.base import ExactPass, VariantDraft
from duca_compile.passes.exact.probe import probed_stream

aten = torch.ops.aten


@dataclass(frozen=True)
class EmitChanges(ExactPass[VariantDraft]):
    """Returns end - start of each stretch of a stream whose end a skip step needs (TeaCache, arXiv 2411.19108)."""

    ensures = frozenset({"changes_emitted"})

    def apply(self, draft: VariantDraft) -> bool:
        if not isinstance(draft.spec, FullVariant) or draft.spec.keeps != Changes():
            return False
        wanted = {Port(PortKind.CHANGE, index): ends for index, ends in stretches(draft).items()}
        new = {port: ends for port, ends in wanted.items() if port not in draft.results}
        for port, (start, end) in new.items():
            with draft.graph.inserting_before(draft.graph.output_node()):
                change = draft.graph.call_function(aten.sub.Tensor, (end, start))
            change.meta["val"] = end.meta["val"]
            draft.add_result(port, change)
        return bool(new)


def stretches(draft: VariantDraft) -> dict[int, tuple[fx.Node, fx.Node]]:
    """The start and end of each stretch of a residual stream, by the index of the last branch in the stretch.

    A stream is one stretch, or several if something other than its own branches reads a value in between (a long skip).
    Stretches whose end nothing reads once no block is computed are left out. The probed stream starts after the probe.
    """
    chains: dict[int, list[Branch]] = {}
    for branch in draft.facts.branches:
        chains.setdefault(branch.chain, []).append(branch)
    starts = {chain: draft.node(branches[0].stream) for chain, branches in chains.items()}
    if draft.after is not None:
        chain, starts[chain] = probed_stream(draft, draft.after)
        add_names = [branch.add for branch in chains[chain]]
        probed = add_names.index(starts[chain].name) + 1 if starts[chain].name in add_names else 0
        chains[chain] = chains[chain][probed:]
    adds = {draft.node(b.add): b for branches in chains.values() for b in branches}
    ends: dict[int, list[fx.Node]] = {chain: [] for chain in chains}
    needed = {draft.graph.output_node()}
    for node in reversed(draft.graph.nodes):  # readers of a value come before it
        if node in needed and node in adds:
            chain = adds[node].chain
            ends[chain].insert(0, node)
            needed.add(starts[chain])
        elif node in needed:
            needed.update(node.all_input_nodes)
    pairs = [pair for chain in chains for pair in zip([starts[chain], *ends[chain]], ends[chain], strict=False)]
    return {adds[end].index: (carried_value(start), carried_value(end)) for start, end in pairs}
