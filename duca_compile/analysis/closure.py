"""Ancestors and descendants of a node: what it is computed from, and what is computed from it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from heapq import heappop, heappush

from torch import fx


def descendants(node: fx.Node) -> Iterator[fx.Node]:
    """All nodes that are computed from ``node``, in order of discovery."""
    return closure(node, lambda n: n.users)


def ancestors(node: fx.Node) -> set[fx.Node]:
    """All nodes that ``node`` is computed from."""
    return set(closure(node, lambda n: n.all_input_nodes))


def closure(node: fx.Node, follow: Callable[[fx.Node], Iterable[fx.Node]]) -> Iterator[fx.Node]:
    """All nodes that ``follow`` leads to from ``node``, each once, in order of discovery."""
    seen: set[fx.Node] = set()
    stack: list[fx.Node] = [node]
    while stack:
        for other in follow(stack.pop()):
            if other not in seen:
                seen.add(other)
                stack.append(other)
                yield other


class Ancestors:
    """All nodes that ``node`` is computed from, found lazily: the walk goes back only as far as a question needs.

    A residual's body consists of a few nodes before its addition, however deep the model is, so a complete walk for
    each addition would make the analysis quadratic in depth.
    """

    def __init__(self, node: fx.Node, order: Mapping[fx.Node, int]) -> None:
        self._order = order
        self._found: set[fx.Node] = set()
        self._frontier: list[tuple[int, fx.Node]] = []  # a heap, last node first: found, but its inputs not yet
        self._find_inputs(node)

    def __contains__(self, node: fx.Node) -> bool:
        self._walk_to(node)
        return node in self._found

    def computed_from(self, node: fx.Node) -> set[fx.Node]:
        """The ancestors that are computed from ``node``."""
        self._walk_to(node)
        return set(closure(node, lambda n: self._found.intersection(n.users)))

    def _walk_to(self, node: fx.Node) -> None:
        last = self._order[node]
        while self._frontier and -self._frontier[0][0] > last:
            self._find_inputs(heappop(self._frontier)[1])

    def _find_inputs(self, node: fx.Node) -> None:
        for each in node.all_input_nodes:
            if each not in self._found:
                self._found.add(each)
                heappush(self._frontier, (-self._order[each], each))
