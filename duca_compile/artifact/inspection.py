"""Shows what an artifact holds."""

from __future__ import annotations

from math import prod

from rich.console import Group

from duca_compile.artifact.manifest import Graph, Manifest, TensorSpec
from duca_compile.core.tables import Fields, FigureTable

_BYTES = {"float64": 8, "int64": 8, "float32": 4, "int32": 4, "bfloat16": 2, "float16": 2, "int16": 2}  # else 1
_OPERATORS = 5  # the most frequent ones, which are listed


def describe(found: Manifest) -> Group:
    """The model, its call, the schedule, and a table of the graphs."""
    source, schedule, weights = found.source, found.schedule, found.weights
    letters = "".join(schedule.plans[place].step.kind.letter for place in schedule.steps)
    cheapest = "; decided while they run, these are the cheapest" if found.policy.rule is not None else ""
    graphs = sum(graph.file.bytes for graph in found.graphs.values())
    per_row = _cache_bytes(found)
    lines = {
        "model": f"{source.model}, {source.parameters:,} parameters, {found.precision}",
        "made with": ", ".join(f"{name} {version}" for name, version in found.versions.items()),
        "format": found.format if found.opset is None else f"{found.format}, opset {found.opset}",
        "call": ", ".join(f"{spec.name}: {_kind(spec)}" for spec in found.inputs),
        "built in": ", ".join(f"{name}={value!r}" for name, value in found.signature.options.items()) or "-",
        "policy": found.policy.name,
        "schedule": f"{letters[:100]}{'...' * (len(letters) > 100)} ({len(letters)} steps{cheapest})",
        "weights": f"{weights.file.bytes:,} bytes, {len(weights.chunks)} tensors (the model: {source.weight_bytes:,})",
        "graphs": f"{graphs:,} bytes",
        "caches": f"{len(found.caches)} tensors, {per_row:,} bytes for each row of a call",
    }
    return Group(Fields(lines), _graphs(found))


def _graphs(found: Manifest) -> FigureTable:
    names = ("graph", "bytes", "nodes", "inputs", "outputs", "FLOPs per row", "operators")
    table = FigureTable(*names, wrapped={"operators"})
    for name, graph in found.graphs.items():
        flops = [run.flops for run in found.schedule.runs if found.variants[run.variant].graph == name]
        table.add_row(
            name,
            f"{graph.file.bytes:,}",
            str(sum(graph.operators.values())),
            str(len(graph.inputs)),
            str(len(graph.outputs)),
            f"{max(each.fixed + each.per_row for each in flops):.3g}" if flops else "-",
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


def _cache_bytes(found: Manifest) -> int:
    """What one more row adds; a cache without rows counts as a whole."""
    return sum(prod(spec.at(1)) * _BYTES.get(spec.dtype, 1) for spec in found.caches)
