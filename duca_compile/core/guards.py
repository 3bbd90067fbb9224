"""What a graph takes for given of the values that forward reads in Python."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter

from torch import Tensor, fx

from duca_compile.core.tensors import same_values


@dataclass(frozen=True)
class Read:
    """Who reads values that depend on an input in Python: the first source line, and the modules' paths."""

    source: str
    paths: frozenset[str]


@dataclass(frozen=True)
class Readings:
    """All that forward's Python read in one call: how to compute it from the call's tensors, and what it was.

    The graph of that call is right for every call with the same readings, whatever the rest of its values.
    """

    module: fx.GraphModule  # computes them from the tensors at ``places`` of a call
    places: tuple[int, ...]
    values: tuple[Tensor, ...]

    @property
    def attributes(self) -> dict[str, Tensor]:
        """The model's own tensors that they depend on, by the names that the graph has for them."""
        names = {str(n.target) for n in self.module.graph.find_nodes(op="get_attr")}
        return {name: attrgetter(name)(self.module) for name in names}

    def hold(self, tensors: Sequence[Tensor]) -> bool:
        """Whether a call with these tensors reads the same."""
        try:
            now = self.module(*[tensors[place] for place in self.places])
        except (RuntimeError, IndexError):  # an earlier reading differs, and what follows does not fit it
            return False
        return all(map(same_values, now, self.values))
