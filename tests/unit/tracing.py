"""Shortcuts from a model or a function to its captured graph, its facts and its variants."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from duca_compile.analysis import analyze
from duca_compile.compiler.precompute import make_rows
from duca_compile.core.ir import CapturedGraph, Facts
from duca_compile.core.variants import Action, Variant, VariantSpec
from duca_compile.frontend.binder import Binder
from duca_compile.frontend.capture import capture
from duca_compile.passes.pipeline import build_prologue, build_variant, prepare

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
        spec = actions if len(actions) > 1 else actions * len(self.facts.branches)
        return build_variant(self.captured, self.facts, VariantSpec(tuple(spec), skip, scores, chosen_with=chosen_with))

    def run(self, variant: Variant, arguments: dict[str, Tensor], **extra: Tensor) -> dict[str, Tensor]:
        """Everything the variant returns, by name; ``extra`` are caches and token indices by placeholder name."""
        call = dict(zip(self.captured.inputs, arguments.values(), strict=True))
        wanted = [n.name for n in self._prologue.graph.nodes if n.op == "placeholder"]
        hoisted = [n for n in variant.inputs if n.startswith("hoisted_")]
        produced = self._prologue(*[call[name] for name in wanted])
        order = ["hoisted_" + n.name for n in self._prologue.graph.output_node().all_input_nodes]
        values = call | dict(zip(order, produced, strict=True)) | extra
        assert set(hoisted) <= set(order)
        rows = make_rows(self.captured, self.facts)
        values |= dict(zip(rows.outputs, rows.compute(values, values), strict=True))
        results = variant.module(*[values[name] for name in variant.inputs])
        return dict(zip(variant.outputs, results, strict=True))


def caches(results: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a full variant returned beside the output, under the names that other variants read it by."""
    return {f"cache_{name}": value for name, value in results.items() if not name.startswith(("output", "score"))}


def distinct_indices(batch: int, tokens: int, count: int, seed: int = 0) -> Tensor:
    """``count`` different token positions per row, in no order, another choice for each row."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(tokens, generator=generator)[:count] for _ in range(batch)])
