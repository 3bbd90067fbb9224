"""Runs every analysis and gathers what they found."""

from __future__ import annotations

from duca_compile.analysis.cost import node_flops
from duca_compile.analysis.residual import find_branches
from duca_compile.analysis.variance import latent_input, timestep_input, variances
from duca_compile.graph import CapturedGraph, Facts


def analyze(captured: CapturedGraph, timestep: str | None = None) -> Facts:
    """All facts of ``captured``; ``timestep`` names the timestep input where it cannot be told from the graph.

    Raises:
        StructureError: no timestep, no latent, or no residual stream.
    """
    graph = captured.graph
    time = timestep_input(graph, captured.inputs, timestep)
    latent = latent_input(graph, captured.inputs, time)
    own_list = captured.lists[captured.inputs.index(latent)]
    latents = {name for name, each in zip(captured.inputs, captured.lists, strict=True) if each == own_list}
    variance = variances(graph, latents, time)
    flops = node_flops(graph)
    branches, stream_end, streams = find_branches(graph, variance, flops)
    notes = tuple(
        f"{b.path or 'model'} ({b.kind}, {b.source}): computed or reused whole, since {b.mixing_reason}"
        for b in branches
        if b.kind == "mixing"
    )
    return Facts(latent, time, variance, streams, branches, stream_end, flops, notes, frozenset(latents | {time}))
