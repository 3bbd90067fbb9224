"""Runs all analyses and gathers their results."""

from __future__ import annotations

from duca_compile.analysis.cost import node_flops, uncounted_notes
from duca_compile.analysis.grid import token_grids
from duca_compile.analysis.residual import find_branches
from duca_compile.analysis.variance import latent_input, timestep_input, variances
from duca_compile.core.fx_utils import value_shape
from duca_compile.core.ir import Branch, CapturedGraph, Facts


def analyze(captured: CapturedGraph, timestep: str | None = None) -> Facts:
    """All facts about ``captured``; ``timestep`` names the timestep input where the graph does not show it.

    Raises:
        StructureError: no timestep, no latent, or no residual stream.
    """
    graph = captured.graph
    time = timestep_input(graph, captured.inputs, timestep)
    latent = latent_input(graph, captured.inputs, time)
    latent_path = captured.argument_paths[captured.inputs.index(latent)]
    latents = {name for name, path in zip(captured.inputs, captured.argument_paths, strict=True) if path == latent_path}
    variance = variances(graph, latents, time)
    flops, unknown = node_flops(graph)
    shapes = {node.name: value_shape(node) or () for node in graph.find_nodes(op="placeholder")}
    batch = shapes[latent][0]
    branches, ends, streams, embeddings = find_branches(graph, variance, flops, batch, unknown.keys())
    return Facts(
        latent,
        time,
        variance,
        streams,
        branches,
        ends,
        flops,
        _notes(branches),
        uncounted_notes(unknown),
        changing=frozenset(latents | {time}),
        batch=batch,
        grids=token_grids(graph, branches),
        embeddings=embeddings,
        listed=captured.argument_paths.count(latent_path) > 1,
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
