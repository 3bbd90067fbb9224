"""Values that no step changes, computed once per request."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, fx


@dataclass(frozen=True)
class Prologue:
    """Computes the loop-invariant values from the call's invariant inputs."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    module: fx.GraphModule

    def compute(self, call: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """They are contiguous, as compiled code wants them."""
        values = self.module.forward(*[call[name] for name in self.inputs])
        return {name: value.contiguous() for name, value in zip(self.outputs, values, strict=True)}
