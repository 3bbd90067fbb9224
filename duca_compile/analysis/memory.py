"""What one run of a variant allocates at most, found by running it with tensors that have no memory."""

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


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all storages that operators make, from when they are made until they are freed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._held: dict[int, weakref.ref[Any]] = {}

    def ignore(self, tensors: Sequence[Tensor]) -> None:
        """These are there before the run: neither they nor views of them are counted."""
        self._held.update({t.untyped_storage()._cdata: weakref.ref(t) for t in tensors})

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
        if key in self._held:
            return

        def free(_: object) -> None:
            self._held.pop(key, None)
            self.live -= size

        self._held[key] = weakref.ref(storage, free)
        self.live += size
        self.peak = max(self.peak, self.live)


def peak_bytes(module: fx.GraphModule, sizes: Mapping[Port, tuple[int, ...]]) -> int:
    """The most that one eager run of ``module`` allocates at once, its results included and its inputs not.

    ``sizes`` are the shapes of inputs whose shape differs from the one in the graph. Without what kernels allocate for
    themselves, which is little.
    """
    inputs = module.graph.find_nodes(op="placeholder")
    watch = _Watch()
    with FakeTensorMode() as mode, torch.no_grad():
        given = tuple(_like(node.meta["val"], sizes.get(port_of(node))) for node in inputs)
        named = (*module.named_parameters(), *module.named_buffers())
        weights = {name: cast(Tensor, mode.from_tensor(tensor)) for name, tensor in named}
        watch.ignore([*given, *weights.values()])
        with watch:
            functional_call(module, weights, given)
    return watch.peak


def _like(value: Tensor, shape: tuple[int, ...] | None) -> Tensor:
    if shape is not None:
        return torch.empty(shape, dtype=value.dtype, device=value.device)
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
