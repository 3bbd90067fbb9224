"""What a pass is, and the draft that passes rewrite."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import ClassVar, Generic, TypeVar, cast

import torch
from torch import fx

from duca_compile.core.fx_utils import add_placeholder, port_of
from duca_compile.core.ir import Branch, Facts
from duca_compile.core.ports import Port
from duca_compile.core.steps import Probe
from duca_compile.core.variants import (
    Action,
    ForecastVariant,
    FullVariant,
    PredictVariant,
    ProbeVariant,
    VariantSpec,
)
from duca_compile.errors import InternalError, PolicyError


def returned(graph: fx.Graph) -> tuple[fx.Node, ...]:
    """The nodes that a graph returns. Raises InternalError if it returns anything else."""
    (results,) = graph.output_node().args
    if not isinstance(results, tuple) or not all(isinstance(node, fx.Node) for node in results):
        raise InternalError(f"a graph must return a tuple of nodes, not {results!r}")
    return cast("tuple[fx.Node, ...]", results)


def check_one_end(facts: Facts, what: str, instead: str = "") -> None:
    """Raises PolicyError if the outputs read several streams; ``what`` says who needs the end of a single one."""
    if (other := facts.other_end) is not None:
        raise PolicyError(
            f"{what} the end of one stream, and the model's results also read the stream behind "
            f"{other.path or 'the model'} at {other.source}; use another policy{instead}"
        )


@dataclass
class Draft:
    """A working copy of a graph; ``properties`` holds what the passes so far have ensured."""

    graph: fx.Graph
    properties: set[str] = field(default_factory=set, kw_only=True)


@dataclass
class VariantDraft(Draft):
    """The draft of a variant; ``results`` are the ports of what the graph returns, in order."""

    facts: Facts
    spec: VariantSpec
    results: list[Port]
    cache_dtype: torch.dtype | None = None  # of caches, if it is narrower than that of their features

    def __post_init__(self) -> None:
        self._nodes: dict[str, fx.Node] = {n.name: n for n in self.graph.nodes}
        self._inputs: dict[Port, fx.Node] = {port_of(n): n for n in self.graph.find_nodes(op="placeholder")}

    def node(self, name: str) -> fx.Node:
        try:
            return self._nodes[name]
        except KeyError:
            raise InternalError(f"node {name!r} is no longer in the graph") from None

    def branches(self, action: Action) -> list[Branch]:
        return [branch for branch in self.facts.branches if self.spec.action(branch.index) is action]

    @property
    def by_row(self) -> bool:
        """Whether the numbers of forecasts differ by batch row."""
        return isinstance(self.spec, FullVariant | ForecastVariant | ProbeVariant) and self.spec.by_row

    @property
    def after(self) -> Probe | None:
        """The probe of the same step that the variant continues from."""
        return None if isinstance(self.spec, PredictVariant | ProbeVariant) else self.spec.after

    def find_input(self, port: Port) -> fx.Node | None:
        """The placeholder of this port, if there is one."""
        return self._inputs.get(port)

    def input(self, port: Port, value: torch.Tensor) -> fx.Node:
        """The placeholder of this port, added if it is missing; ``value`` (fake or meta) gives its shape and dtype."""
        if port not in self._inputs:
            with self.graph.inserting_after(self._last_input()):
                self._inputs[port] = add_placeholder(self.graph, port, value)
        return self._inputs[port]

    def _last_input(self) -> fx.Node:
        inputs: list[fx.Node] = [n for n in self.graph.nodes if n.op == "placeholder"]
        return inputs[-1]

    def inserting_after(self, node: fx.Node) -> AbstractContextManager[None]:
        """The insertion point for nodes computed from ``node``: right after it, and after all inputs."""
        return self.graph.inserting_after(self._last_input() if node.op == "placeholder" else node)

    def add_result(self, port: Port, node: fx.Node) -> None:
        self.graph.output_node().args = ((*returned(self.graph), node),)
        self.results.append(port)


D = TypeVar("D", bound=Draft, contravariant=True)


class Pass(ABC, Generic[D]):
    """One rewrite. Its dataclass fields are its options; ``apply`` must report truthfully whether anything changed."""

    requires: ClassVar[frozenset[str]] = frozenset()
    ensures: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def apply(self, draft: D) -> bool:
        """Rewrites ``draft`` in place; returns whether it changed."""


class ExactPass(Pass[D]):
    """A rewrite that keeps every result bit for bit."""


class PortablePass(Pass[Draft]):
    """A rewrite for exports, into operators that more engines have; results stay the same but for rounding."""


class CachingPass(Pass[VariantDraft]):
    """A rewrite that replaces values by cached ones, which are those of an earlier step."""
