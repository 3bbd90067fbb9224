"""Timestep-only values, computed for one timestep, or for all timesteps of a request at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, fx

from duca_compile.core.ports import Port, argument
from duca_compile.runtime.dispatcher import RowsTooLargeError

MAX_BYTES = 2**28  # of the rows of one guidance pass; above it, each step computes its own


@dataclass(frozen=True)
class Rows:
    """Computes the timestep-only values of one graph, packed into one row for each dtype."""

    timestep: str  # the name of the timestep argument
    module: fx.GraphModule
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]

    def compute(self, call: Mapping[str, Tensor], hoisted: Mapping[Port, Tensor]) -> tuple[Tensor, ...]:
        """The rows of the call's own timestep."""
        return tuple(self.module.forward(*[_value(port, call, hoisted) for port in self.inputs]))

    def compute_all(
        self, call: Mapping[str, Tensor], hoisted: Mapping[Port, Tensor], times: tuple[float, ...]
    ) -> dict[float, tuple[Tensor, ...]]:
        """The rows of each of ``times``, if all batch rows have the same timestep.

        Raises:
            RowsTooLargeError: they would take more than ``MAX_BYTES``.
            Exception: an operator has no rule for ``torch.func.vmap``; whatever that raises.
        """
        timestep = call[self.timestep]
        time = argument(self.timestep)
        if not times or time not in self.inputs:
            return {}
        if (size := len(times) * self._bytes) > MAX_BYTES:
            raise RowsTooLargeError(
                f"for {len(times)} steps they would take {size >> 20} MiB, more than {MAX_BYTES >> 20} MiB; a "
                "smaller batch or fewer steps would fit"
            )
        values = torch.tensor(times, dtype=torch.float64, device=timestep.device).to(timestep.dtype)
        stacked = values.view(-1, *[1] * timestep.dim()).expand(-1, *timestep.shape)
        dims = tuple(0 if port is time else None for port in self.inputs)
        arguments = [stacked if port is time else _value(port, call, hoisted) for port in self.inputs]
        results = torch.func.vmap(self.module.forward, in_dims=dims)(*arguments)
        return dict(zip(times, zip(*[row.unbind() for row in results], strict=True), strict=True))

    @property
    def _bytes(self) -> int:
        (results,) = self.module.graph.output_node().args
        values = [node.meta["val"] for node in results]  # type: ignore[union-attr]
        return sum(prod(value.shape) * value.dtype.itemsize for value in values)


def _value(port: Port, call: Mapping[str, Tensor], hoisted: Mapping[Port, Tensor]) -> Tensor:
    return hoisted[port] if port in hoisted else call[str(port.of)]
