"""Submodules that run as one operator, since their Python depends on values that change from step to step.

A mixture of experts that counts its tokens on the host cannot be a graph. The module that does so stays as it is,
behind an operator of which only the results' shapes are known.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten
from torch.utils.flop_counter import FlopCounterMode

from duca_compile.errors import CaptureError
from duca_compile.lock import COMPILING
from duca_compile.runtime.clock import version

_sites: WeakValueDictionary[int, CallSite] = WeakValueDictionary()
READS = "reads values that change from step to step"
_numbers = itertools.count()
_AROUND = {
    "forward",
    *(name for name in vars(nn.Module()) if name.startswith(("_forward_hooks", "_forward_pre_hooks"))),
}


class CallSite:
    """One call of a module in the trace: what is around the tensors, and what it returned then."""

    def __init__(
        self, forward: Callable[..., Any], path: str, reason: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self.number = next(_numbers)
        self._forward, self.path, self.reason = forward, path, reason
        self._leaves, self._spec = tree_flatten((args, kwargs))
        self._places = [i for i, leaf in enumerate(self._leaves) if isinstance(leaf, Tensor)]
        self.tensors = [self._leaves[i] for i in self._places]
        for place in self._places:
            self._leaves[place] = None  # the values are the operator's operands from now on
        self.out_spec: TreeSpec | None = None
        self.tensor_places: list[int] = []
        self.out_like: list[Tensor] = []
        self.flops = 0
        _sites[self.number] = self

    def run(self, tensors: list[Tensor]) -> list[Tensor]:
        """Calls the module; not while any thread captures or compiles, which may swap its weights for fakes."""
        with COMPILING:
            return self._run(tensors)

    def _run(self, tensors: list[Tensor]) -> list[Tensor]:
        leaves = list(self._leaves)
        for place, tensor in zip(self._places, tensors, strict=True):
            leaves[place] = tensor
        args, kwargs = tree_unflatten(leaves, self._spec)
        if self.out_spec is not None:
            return self._owned(tree_flatten(self._forward(*args, **kwargs))[0], tensors)
        versions = list(map(version, tensors))
        with FlopCounterMode(display=False) as counter:
            outputs, self.out_spec = tree_flatten(self._forward(*args, **kwargs))
        if versions != list(map(version, tensors)):
            raise CaptureError(f"{self._says} It writes to its arguments; clone them there first.")
        if not all(isinstance(output, Tensor | None) for output in outputs):
            raise CaptureError(f"{self._says} It returns what is neither a tensor nor None.")
        self.tensor_places = [i for i, output in enumerate(outputs) if output is not None]
        self.flops = int(counter.get_total_flops())
        own = self._owned(outputs, tensors)
        self.out_like = [torch.empty_like(output, device="meta") for output in own]
        return own

    @property
    def _says(self) -> str:
        return f"{self.path} {self.reason}, so it must stand for itself as one operator."

    def rebuild(self, outputs: list[Tensor]) -> Any:
        """What the module returned, of the operator's results."""
        assert self.out_spec is not None
        leaves: list[Tensor | None] = [None] * self.out_spec.num_leaves
        for place, output in zip(self.tensor_places, outputs, strict=True):
            leaves[place] = output
        return tree_unflatten(leaves, self.out_spec)

    @staticmethod
    def _owned(outputs: list[Any], tensors: list[Tensor]) -> list[Tensor]:
        """The tensors; an operator must not return its operands."""
        taken = {tensor.untyped_storage().data_ptr() for tensor in tensors}
        results = [output for output in outputs if output is not None]
        return [result.clone() if result.untyped_storage().data_ptr() in taken else result for result in results]


@torch.library.custom_op("duca_compile::opaque", mutates_args=())
def _opaque(tensors: list[Tensor], site: int) -> list[Tensor]:
    return _sites[site].run(tensors)


@_opaque.register_fake
def _(tensors: list[Tensor], site: int) -> list[Tensor]:
    device = tensors[0].device
    likes = _sites[site].out_like
    return [torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=device) for like in likes]


opaque = torch.ops.duca_compile.opaque.default


class _Whole:
    """A module with its hooks, from behind the operator that stands for it: these must not run in the trace."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._own = {name: value for name, value in vars(module).items() if name in _AROUND}
        self._patched: dict[str, Any] = {}

    def patch(self, forward: Callable[..., Any]) -> None:
        self._patched = {name: OrderedDict[Any, Any]() for name in self._own} | {"forward": forward}
        vars(self._module).update(self._patched)

    def put_back(self) -> None:
        self._patched = {}
        self._restore()

    def _restore(self) -> None:
        vars(self._module).pop("forward", None)
        vars(self._module).update(self._own)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self._patched:
            return self._module(*args, **kwargs)
        self._restore()
        try:
            return self._module(*args, **kwargs)
        finally:
            vars(self._module).update(self._patched)


@contextmanager
def as_operators(model: nn.Module, paths: Mapping[str, str]) -> Iterator[list[CallSite]]:
    """While open, each call of the modules at ``paths`` is one operator; yields the calls as they come.

    ``paths`` gives the reasons, too. A module within another one of them is a part of that.
    """
    sites: list[CallSite] = []

    def replacement(path: str, original: Any) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            site = CallSite(original, path, paths[path], args, kwargs)
            sites.append(site)
            outputs = opaque(site.tensors, site.number)
            site.tensors = []
            return site.rebuild(outputs)

        return forward

    with ExitStack() as undo:
        for path in sorted(paths):
            if any(path.startswith(f"{other}.") for other in paths):
                continue
            whole = _Whole(model.get_submodule(path))
            undo.callback(whole.put_back)
            whole.patch(replacement(path, whole))
        yield sites


def site_number(node: fx.Node) -> int:
    number = node.args[1]
    assert isinstance(number, int)
    return number


def site_flops(node: fx.Node) -> int:
    """FLOPs of one call, counted when it was traced."""
    return _sites[site_number(node)].flops
