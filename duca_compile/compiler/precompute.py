"""What is precomputed outside of the steps: loop-invariant values, and rows of timestep-only values."""

from __future__ import annotations

from duca_compile.core.fx_utils import port_of, to_module
from duca_compile.core.ir import CapturedGraph, Facts
from duca_compile.core.ports import hoisted
from duca_compile.passes.base import Draft
from duca_compile.passes.exact.dead_code import RemoveDeadCode
from duca_compile.passes.exact.hoist import frontier, row_layout, row_port, timestep_graph
from duca_compile.passes.pipeline import build_prologue, run_passes
from duca_compile.runtime.torch.prologue import Prologue
from duca_compile.runtime.torch.rows import Rows


def make_prologue(captured: CapturedGraph, facts: Facts) -> Prologue:
    """Computes the loop-invariant values, once per request."""
    module = build_prologue(captured, facts)
    inputs = tuple(n.name for n in module.graph.nodes if n.op == "placeholder")
    outputs = tuple(hoisted(n.name) for n in frontier(captured.graph, facts))
    return Prologue(inputs, outputs, module)


def make_rows(captured: CapturedGraph, facts: Facts, needed: frozenset[str] | None = None) -> Rows:
    """Computes timestep-only values, as one row for each dtype: all of them, or those called ``needed``."""
    layout = row_layout(captured.graph, facts)
    if needed is None:
        needed = frozenset(piece.name for row in layout.values() for piece in row)
    draft = run_passes(Draft(timestep_graph(captured.graph, facts, needed)), (RemoveDeadCode(draws=False),))
    inputs = tuple(map(port_of, draft.graph.find_nodes(op="placeholder")))
    return Rows(facts.timestep, to_module(captured, draft.graph), inputs, tuple(map(row_port, layout)))
