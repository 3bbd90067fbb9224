"""How a graph's flat results become the model's own output."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor
from torch.utils._pytree import SUPPORTED_NODES, TreeSpec, tree_unflatten


@dataclass(frozen=True)
class OutputLayout:
    """How the flat tensors a graph returns become the model's own output object."""

    spec: TreeSpec
    constants: Mapping[int, Any]  # leaf position -> value, for leaves that are not tensors

    @cached_property
    def _flat(self) -> Callable[[Sequence[Tensor]], Any] | None:
        """Makes the output where it is one container of tensors, as most are: a walk of the tree takes longer."""
        if self.constants or self.spec.num_nodes != self.spec.num_leaves + 1:
            return None
        unflatten, context = SUPPORTED_NODES[self.spec.type].unflatten_fn, self.spec.context
        return lambda tensors: unflatten(tensors, context)

    def rebuild(self, tensors: Sequence[Tensor]) -> Any:
        if self._flat is not None:
            return self._flat(tensors)
        if not self.constants:
            return tree_unflatten(tensors, self.spec)
        rest = iter(tensors)
        leaves = [self.constants[i] if i in self.constants else next(rest) for i in range(self.spec.num_leaves)]
        return tree_unflatten(leaves, self.spec)
