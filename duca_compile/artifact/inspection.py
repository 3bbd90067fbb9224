"""Shows what an artifact holds."""

from __future__ import annotations

from math import prod

from rich.console import Group

from duca_compile.artifact.manifest import ITEM_BYTES, Graph, Manifest, TensorSpec
from duca_compile.core.tables import Fields, FigureTable

_OPERATORS = 5  # how many are listed, the most frequent first
_STEPS = 100  # how many letters of a schedule are shown


def describe(manifest: Manifest) -> Group:
    """The model, how it is called, the schedule, and a table of the graphs."""
    source, schedule, weights = manifest.source, manifest.schedule, manifest.weights
    letters = "".join(schedule.plans[place].step.kind.letter for place in schedule.steps)
    cheapest = "; decided while they run; these are the cheapest" if manifest.policy.rule is not None else ""
    graphs = sum(graph.file.bytes for graph in manifest.graphs.values())
    per_row = _cache_bytes(manifest)
    lines = {
        "model": f"{source.model}, {source.parameters:,} parameters, {manifest.precision}",
        "made with": ", ".join(f"{name} {version}" for name, version in manifest.versions.items()),
        "format": manifest.format if manifest.opset is None else f"{manifest.format}, opset {manifest.opset}",
        "call": ", ".join(f"{spec.name}: {_kind(spec)}" for spec in manifest.inputs),
        "built in": ", ".join(f"{name}={value!r}" for name, value in manifest.signature.options.items()) or "-",
        "policy": manifest.policy.name,
        "schedule": f"{letters[:_STEPS]}{'...' * (len(letters) > _STEPS)} ({len(letters)} steps{cheapest})",
        "weights": f"{weights.file.bytes:,} bytes, {len(weights.chunks)} tensors (the model: {source.weight_bytes:,})",
        "graphs": f"{graphs:,} bytes",
        "caches": f"{len(manifest.caches)} tensors, {per_row:,} bytes for each row of a call",
    }
    return Group(Fields(lines), _graphs(manifest))


def _graphs(manifest: Manifest) -> FigureTable:
    names = ("graph", "bytes", "nodes", "inputs", "outputs", "FLOPs per row", "operators")
    table = FigureTable(*names, wrapped={"operators"})
    for name, graph in manifest.graphs.items():
        flops = [run.flops for run in manifest.schedule.runs if manifest.variants[run.variant].graph == name]
        table.add_row(
            name,
            f"{graph.file.bytes:,}",
            str(sum(graph.operators.values())),
            str(len(graph.inputs)),
            str(len(graph.outputs)),
            f"{max(cost.fixed + cost.per_row for cost in flops):.3g}" if flops else "-",
            _operators(graph),
        )
    return table


def _operators(graph: Graph) -> str:
    listed = list(graph.operators.items())
    rest = sum(number for _, number in listed[_OPERATORS:])
    shown = [f"{number} {name}" for name, number in listed[:_OPERATORS]]
    return ", ".join([*shown, f"{rest} others"] if rest else shown)


def _kind(spec: TensorSpec) -> str:
    return f"{spec.dtype}[{', '.join(map(str, spec.shape))}]"


def _cache_bytes(manifest: Manifest) -> int:
    """What one more batch row adds; a cache without batch rows counts as a whole."""
    return sum(prod(spec.at(1)) * ITEM_BYTES[spec.dtype] for spec in manifest.caches)
