"""Loop-invariant values, computed once per request."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, fx

from duca_compile.core.ports import Port


@dataclass(frozen=True)
class Prologue:
    """Computes the loop-invariant values from the call's invariant inputs."""

    inputs: tuple[str, ...]  # the names of the call's invariant arguments
    outputs: tuple[Port, ...]
    module: fx.GraphModule

    def compute(self, call: Mapping[str, Tensor]) -> dict[Port, Tensor]:
        """The values by port; they are contiguous, as compiled code expects."""
        values = self.module.forward(*[call[name] for name in self.inputs])
        return {port: value.contiguous() for port, value in zip(self.outputs, values, strict=True)}
