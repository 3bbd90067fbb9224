"""Runs all analyses and gathers their results."""

from __future__ import annotations

from duca_compile.analysis.cost import node_flops, uncounted_notes
from duca_compile.analysis.grid import token_grids
from duca_compile.analysis.latent import latent_arguments, rewritten_inputs
from duca_compile.analysis.residual import find_branches
from duca_compile.analysis.variance import timestep_input, variances
from duca_compile.core.fx_utils import value_shape
from duca_compile.core.ir import Branch, CapturedGraph, Facts


def analyze(captured: CapturedGraph, timestep: str | None = None, latent: str | None = None) -> Facts:
    """All facts about ``captured``; ``timestep`` and ``latent`` name these inputs where the graph does not show them.

    Raises:
        UsageError: ``timestep`` or ``latent`` is no argument of the call.
        StructureError: no timestep, no latent, or no residual stream.
    """
    graph = captured.graph
    time = timestep_input(graph, captured.inputs, timestep)
    latents = latent_arguments(captured, time, latent)
    changing = {*latents, *rewritten_inputs(captured)}
    variance = variances(graph, changing, time)
    flops, unknown = node_flops(graph)
    shapes = {node.name: value_shape(node) or () for node in graph.find_nodes(op="placeholder")}
    batch = shapes[latents[0]][0]
    branches, ends, streams, embeddings = find_branches(graph, variance, flops, batch, unknown.keys())
    return Facts(
        latents[0],
        time,
        variance,
        streams,
        branches,
        ends,
        flops,
        _notes(branches),
        uncounted_notes(unknown),
        changing=frozenset({*changing, time}),
        batch=batch,
        grids=token_grids(graph, branches),
        embeddings=embeddings,
        listed=captured.argument_paths.count(captured.argument_paths[captured.inputs.index(latents[0])]) > 1,
    )


def _notes(branches: tuple[Branch, ...]) -> tuple[str, ...]:
    """What was not understood: one note for all branches from the same source line with the same reason."""
    alike: dict[tuple[str, str | None], list[Branch]] = {}
    for branch in branches:
        if branch.kind == "mixing":
            alike.setdefault((branch.source, branch.mixing_reason), []).append(branch)
    return tuple(
        f"{same[0].path or 'model'}{f' and {len(same) - 1} like it' if len(same) > 1 else ''} ({source}): {reason}"
        for (source, reason), same in alike.items()
    )
