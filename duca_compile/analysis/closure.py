"""What a value is computed from, and what is computed from it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from heapq import heappop, heappush

from torch import fx


def descendants(node: fx.Node) -> Iterator[fx.Node]:
    """All that is computed from ``node``, as it is met."""
    return closure(node, lambda n: n.users)


def ancestors(node: fx.Node) -> set[fx.Node]:
    """All that ``node`` is computed from."""
    return set(closure(node, lambda n: n.all_input_nodes))


def closure(node: fx.Node, follow: Callable[[fx.Node], Iterable[fx.Node]]) -> Iterator[fx.Node]:
    """What ``follow`` leads to from ``node``, each once and as it is met."""
    seen: set[fx.Node] = set()
    stack: list[fx.Node] = [node]
    while stack:
        for other in follow(stack.pop()):
            if other not in seen:
                seen.add(other)
                stack.append(other)
                yield other


class Ancestors:
    """All that ``node`` is computed from, walked back through the graph no further than it is asked about.

    A residual's body is a few nodes before its add, however deep the model is, so a whole walk for each add would make
    the analysis quadratic in depth.
    """

    def __init__(self, node: fx.Node, order: Mapping[fx.Node, int]) -> None:
        self._order = order
        self._met: set[fx.Node] = set()
        self._ahead: list[tuple[int, fx.Node]] = []  # a heap: met, with inputs that are not looked at yet, last first
        self._meet_inputs(node)

    def __contains__(self, node: fx.Node) -> bool:
        self._walk_to(node)
        return node in self._met

    def behind(self, node: fx.Node) -> set[fx.Node]:
        """Those that are computed from ``node``."""
        self._walk_to(node)
        return set(closure(node, lambda n: self._met.intersection(n.users)))

    def _walk_to(self, node: fx.Node) -> None:
        last = self._order[node]
        while self._ahead and -self._ahead[0][0] > last:
            self._meet_inputs(heappop(self._ahead)[1])

    def _meet_inputs(self, node: fx.Node) -> None:
        for each in node.all_input_nodes:
            if each not in self._met:
                self._met.add(each)
                heappush(self._ahead, (-self._order[each], each))
