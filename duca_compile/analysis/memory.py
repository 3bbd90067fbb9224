"""The peak memory of one run of a variant, found by running it with tensors that have no memory."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensorMode
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from duca_compile.core.fx_utils import port_of
from duca_compile.core.ports import Port


class _AllocationCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all storages that operators allocate, until they are freed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def ignore(self, tensors: Sequence[Tensor]) -> None:
        """Does not count these, which exist before the run, nor views of them."""
        self._known.update({t.untyped_storage()._cdata: weakref.ref(t) for t in tensors})

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return

        def free(_: object) -> None:
            self._known.pop(key, None)
            self.live -= size

        self._known[key] = weakref.ref(storage, free)
        self.live += size
        self.peak = max(self.peak, self.live)


def peak_bytes(module: fx.GraphModule, sizes: Mapping[Port, tuple[int, ...]]) -> int:
    """The most bytes that one eager run of ``module`` allocates at once, including its results but not its inputs.

    ``sizes`` has the shapes of inputs where they differ from those in the graph. What kernels allocate for themselves,
    which is little, is not counted.
    """
    inputs = module.graph.find_nodes(op="placeholder")
    counter = _AllocationCounter()
    with FakeTensorMode() as mode, torch.no_grad():
        arguments = tuple(_like(node.meta["val"], sizes.get(port_of(node))) for node in inputs)
        named = (*module.named_parameters(), *module.named_buffers())
        weights = {name: cast(Tensor, mode.from_tensor(tensor)) for name, tensor in named}
        counter.ignore([*arguments, *weights.values()])
        with counter:
            functional_call(module, weights, arguments)
    return counter.peak


def _like(value: Tensor, shape: tuple[int, ...] | None) -> Tensor:
    if shape is not None:
        return torch.empty(shape, dtype=value.dtype, device=value.device)
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
