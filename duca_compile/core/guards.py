"""Guards on the values that forward reads in Python, and to which a graph is therefore specialized."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter

from torch import Tensor, fx

from duca_compile.core.tensors import same_values


@dataclass(frozen=True)
class ValueRead:
    """Where Python reads values that depend on an input: the first source line, and the paths of all modules."""

    source: str
    paths: frozenset[str]


@dataclass(frozen=True)
class ValueGuards:
    """All values that Python code of forward read in one call, and a graph that computes them from a call's tensors.

    The graph captured from that call is valid for every call that reads the same values.
    """

    module: fx.GraphModule  # computes the values from the call's tensors at ``places``
    places: tuple[int, ...]
    values: tuple[Tensor, ...]

    @property
    def attributes(self) -> dict[str, Tensor]:
        """The model's own tensors that the values depend on, by their names in the graph."""
        names = {str(n.target) for n in self.module.graph.find_nodes(op="get_attr")}
        return {name: attrgetter(name)(self.module) for name in names}

    def hold(self, tensors: Sequence[Tensor]) -> bool:
        """Whether forward reads the same values from a call with these tensors."""
        try:
            now = self.module(*[tensors[place] for place in self.places])
        except (RuntimeError, IndexError):  # an earlier value differs, and later operators do not fit it
            return False
        return all(map(same_values, now, self.values))
