"""Rebuilds the model's own output object from the flat results of a graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor
from torch.utils._pytree import SUPPORTED_NODES, TreeSpec, tree_unflatten


@dataclass(frozen=True)
class OutputLayout:
    """The structure of the model's output object, whose tensors a graph returns as a flat sequence."""

    spec: TreeSpec
    constants: Mapping[int, Any]  # leaf position -> value, for leaves that are not tensors

    @cached_property
    def _flat(self) -> Callable[[Sequence[Tensor]], Any] | None:
        """A faster way than the general one, where the output is one container of tensors, as most are."""
        if self.constants or self.spec.num_nodes != self.spec.num_leaves + 1:
            return None
        unflatten, context = SUPPORTED_NODES[self.spec.type].unflatten_fn, self.spec.context
        return lambda tensors: unflatten(tensors, context)

    def rebuild(self, tensors: Sequence[Tensor]) -> Any:
        """The output object with these tensors as its leaves."""
        if self._flat is not None:
            return self._flat(tensors)
        if not self.constants:
            return tree_unflatten(tensors, self.spec)
        rest = iter(tensors)
        leaves = [self.constants[i] if i in self.constants else next(rest) for i in range(self.spec.num_leaves)]
        return tree_unflatten(leaves, self.spec)
