"""Shortcuts from a model or a function to its captured graph, its facts and its variants."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn

from duca_compile.analysis import analyze
from duca_compile.compiler.behaviour import observe
from duca_compile.compiler.precompute import make_rows
from duca_compile.core.ir import CapturedGraph, Facts
from duca_compile.core.ports import Port, PortKind, hoisted
from duca_compile.core.variants import Action, FullVariant, PartialVariant, Scores, SkipVariant, Variant
from duca_compile.frontend.binder import Binder
from duca_compile.frontend.capture import capture
from duca_compile.passes.pipeline import build_prologue, build_variant, prepare

Value = TypeVar("Value")

COMPUTE, PARTIAL, REUSE, FORECAST = Action.COMPUTE, Action.PARTIAL, Action.REUSE, Action.FORECAST


def module(forward: Callable[..., Any], **children: nn.Module | Tensor) -> nn.Module:
    """A module in eval mode whose forward is ``forward(self, ...)``."""
    made = type("Function", (nn.Module,), {"forward": forward})()
    for name, child in children.items():
        setattr(made, name, child)
    return made.eval().requires_grad_(False)


def raw(model: nn.Module, **arguments: Tensor) -> CapturedGraph:
    return capture(model, Binder(model)((), arguments))


def analysed(model: nn.Module, **arguments: Tensor) -> tuple[CapturedGraph, Facts]:
    captured = prepare(raw(model, **arguments))
    observe(captured, dict(zip(captured.inputs, arguments.values(), strict=True)))
    return captured, analyze(captured)


def names(graph: fx.Graph, op: str) -> list[str]:
    """Names of the nodes whose operator is ``op``, in order."""
    return [n.name for n in graph.nodes if op in str(n.target)]


def node(graph: fx.Graph, name: str) -> fx.Node:
    return next(n for n in graph.nodes if n.name == name)


class Runner:
    """Builds and runs variants of one model by hand: the caches are the caller's."""

    def __init__(self, model: nn.Module, **arguments: Tensor) -> None:
        self.model = model
        self.captured, self.facts = analysed(model, **arguments)
        self._prologue = build_prologue(self.captured, self.facts)

    def variant(
        self, *actions: Action, skip: bool = False, scores: str | None = None, chosen_with: tuple[int, ...] = ()
    ) -> Variant:
        every = actions if len(actions) > 1 else actions * len(self.facts.branches)
        kind = None if scores is None else Scores(scores)
        spec = SkipVariant(leading(every), scores=kind) if skip else mixed(*every, scores=kind, chosen_with=chosen_with)
        return build_variant(self.captured, self.facts, spec)

    def run(self, variant: Variant, arguments: dict[str, Tensor], **extra: Tensor) -> dict[str, Tensor]:
        """Everything the variant returns, by name; ``extra`` are caches and token indices by the names of inputs."""
        call = dict(zip(self.captured.inputs, arguments.values(), strict=True))
        wanted = [n.name for n in self._prologue.graph.nodes if n.op == "placeholder"]
        produced = self._prologue(*[call[name] for name in wanted])
        order = [hoisted(n.name) for n in self._prologue.graph.output_node().all_input_nodes]
        outside = dict(zip(order, produced, strict=True))
        assert {port for port in variant.inputs if port.kind is PortKind.HOISTED} <= outside.keys()
        rows = make_rows(self.captured, self.facts)
        outside |= dict(zip(rows.outputs, rows.compute(call, outside), strict=True))
        values = by_input_name(outside) | call | extra
        results = variant.module(*[values[port.input_name] for port in variant.inputs])
        return by_result_name(dict(zip(variant.outputs, results, strict=True)))


def leading(actions: Sequence[Action]) -> int:
    """How many branches at the front are computed, where all others are reused."""
    count = actions.count(COMPUTE)
    assert [*actions] == [COMPUTE] * count + [REUSE] * (len(actions) - count)
    return count


def mixed(*actions: Action, chosen_with: Sequence[int] = (), **fields: Any) -> FullVariant | PartialVariant:
    """The variant that does this with each branch; ``chosen_with`` are the branches whose token inputs they read."""
    if set(actions) == {COMPUTE}:
        return FullVariant(**fields)
    tokens = chosen_with or range(len(actions))
    pairs = zip(actions, tokens, strict=True)
    return PartialVariant(tuple(Port(PortKind.TOKENS, i) if a is PARTIAL else a for a, i in pairs), **fields)


def by_input_name(values: Mapping[Port, Value]) -> dict[str, Value]:
    """The values by the names of their ports as inputs."""
    return {port.input_name: value for port, value in values.items()}


def by_result_name(values: Mapping[Port, Value]) -> dict[str, Value]:
    """The values by the names of their ports as results."""
    return {port.result_name: value for port, value in values.items()}


def names_of(ports: Iterable[Port]) -> list[str]:
    """The names of results."""
    return [port.result_name for port in ports]


def caches(results: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a full variant returned beside the output, under the names that other variants read it by."""
    return {f"cache_{name}": value for name, value in results.items() if not name.startswith(("output", "score"))}


def distinct_indices(batch: int, tokens: int, count: int, seed: int = 0) -> Tensor:
    """``count`` different token positions per row, in no order, another choice for each row."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(tokens, generator=generator)[:count] for _ in range(batch)])
