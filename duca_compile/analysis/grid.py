"""The grid of a stream's tokens, which a model flattens into the token axis."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod

from torch import fx

from duca_compile.analysis.closure import ancestors
from duca_compile.analysis.tokens import RESHAPES
from duca_compile.core.fx_utils import op_name, value_shape
from duca_compile.core.ir import Branch, Role


def token_grids(graph: fx.Graph, branches: Iterable[Branch]) -> Mapping[int, tuple[int, ...]]:
    """(height, width) or (frames, height, width) by number of tokens, for the latent's tokens of ``branches``.

    These are the stream's own dimensions, or those that the first reshape before the stream merges into that many
    entries. A model whose input is a sequence of tokens, such as FLUX, shows no grid and has no entry.
    """
    nodes = {node.name: node for node in graph.nodes}
    order = {node: place for place, node in enumerate(graph.nodes)}
    first: dict[int, Branch] = {}
    for branch in branches:
        if branch.role is not Role.TEXT:
            first.setdefault(branch.tokens, branch)
    found: dict[int, tuple[int, ...]] = {}
    for tokens, branch in first.items():
        if len(branch.layout.grid) in (2, 3):
            found[tokens] = branch.layout.grid
            continue
        stream = nodes[branch.stream]
        ahead = sorted((n for n in {stream, *ancestors(stream)} if op_name(n) in RESHAPES), key=order.__getitem__)
        grids = [grid for node in ahead if (grid := _merged(node, tokens))]
        if grids:
            found[tokens] = grids[0]
    return found


def _merged(node: fx.Node, tokens: int) -> tuple[int, ...] | None:
    """The two or three dimensions that the reshape merges into one, if that one has ``tokens`` entries."""
    before, after = value_shape(node.all_input_nodes[0]) or (), value_shape(node) or ()
    for place, size in enumerate(after):
        for start in range(len(before)):
            for count in (2, 3):
                merged = before[start : start + count]
                ahead = prod(before[:start]) == prod(after[:place])
                if size == tokens == prod(merged) and len(merged) == count and ahead:
                    return merged
    return None
