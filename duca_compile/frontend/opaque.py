"""Opaque submodules: they run as one operator each, since no trace can hold them.

A mixture of experts that counts its tokens on the host cannot be a graph, nor can a kernel that torch does not know.
Such a module runs unchanged, called by an operator of which only the results' shapes are known.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from math import prod
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten
from torch.utils.flop_counter import flop_registry

from duca_compile.core.fx_utils import int_operand
from duca_compile.core.lock import COMPILING
from duca_compile.core.tensors import version
from duca_compile.errors import CaptureError, InternalError
from duca_compile.frontend.offloading import Offloading

READS_CHANGING_VALUES = "reads values that change from step to step"  # the reason of modules that route tokens
Arguments = tuple[tuple[Any, ...], dict[str, Any]]  # of a call, by position and by name
_NOT_POINTWISE = ("reads ", "changes ")  # how reasons begin where results depend on all tokens, or on a state
_sites: WeakValueDictionary[int, CallSite] = WeakValueDictionary()
_numbers = itertools.count()
_FORWARD_AND_HOOKS = {
    "forward",
    *(name for name in vars(nn.Module()) if name.startswith(("_forward_hooks", "_forward_pre_hooks"))),
}


class ResultLayout(NamedTuple):
    """Shape, strides and dtype of a result. Compiled code relies on the strides; None means contiguous."""

    shape: tuple[Any, ...]
    stride: tuple[int, ...] | None
    dtype: torch.dtype

    def resized(self, dims: Mapping[int, tuple[int, Any]]) -> ResultLayout:
        """With other sizes: ``dims`` has, by dimension, the old size that it replaces and the new one."""
        shape = [dims[i][1] if i in dims and dims[i][0] == size else size for i, size in enumerate(self.shape)]
        return ResultLayout(tuple(shape), None, self.dtype)

    def empty(self, device: torch.device) -> Tensor:
        if self.stride is None:
            return torch.empty(self.shape, dtype=self.dtype, device=device)
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=device)

    def strided(self, tensor: Tensor) -> Tensor:
        if self.stride is None:
            return tensor.contiguous()
        return tensor if tensor.stride() == self.stride else self.empty(tensor.device).copy_(tensor)


class _Flops(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts FLOPs by torch's formulas. torch's own counter fails on operators that run functions."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        formula = flop_registry.get(getattr(func, "_overloadpacket", func))
        if formula is None and isinstance(func, torch._ops.OpOverload):
            with self:
                parts = func.decompose(*args, **kwargs)  # in inference mode, composite operators come here
            if parts is not NotImplemented:
                return parts
        results = func(*args, **kwargs)
        if formula is not None:
            self.total += int(formula(*args, **kwargs, out_val=results))
        return results


class CallSite:
    """One call of a module in the trace: its other arguments, and the layout of its results."""

    def __init__(
        self, forward: Callable[..., Any], module: nn.Module, path: str, reason: str, arguments: Arguments
    ) -> None:
        self.number = next(_numbers)
        self._forward, self._module, self.path, self.reason = forward, module, path, reason
        self._leaves, self._spec = tree_flatten(arguments)
        self._places = [i for i, leaf in enumerate(self._leaves) if isinstance(leaf, Tensor)]
        self.tensors = [self._leaves[i] for i in self._places]
        self._shapes = [tensor.shape for tensor in self.tensors]
        for place in self._places:
            self._leaves[place] = None  # from now on, the operator's operands are the values
        self.out_spec: TreeSpec | None = None
        self.tensor_places: list[int] = []
        self.out_layouts: list[ResultLayout] = []
        self.flops = 0
        self._draws = False
        _sites[self.number] = self

    def run(self, tensors: list[Tensor]) -> list[Tensor]:
        """Calls the module; waits while any thread captures or compiles, which may replace its weights by fakes."""
        with COMPILING:
            return self._run(tensors)

    def _run(self, tensors: list[Tensor]) -> list[Tensor]:
        leaves = list(self._leaves)
        for place, tensor in zip(self._places, tensors, strict=True):
            leaves[place] = tensor
        args, kwargs = tree_unflatten(leaves, self._spec)
        if self.out_spec is not None:
            results = self._unaliased(tree_flatten(self._forward(*args, **kwargs))[0], tensors)
            return [layout.strided(each) for each, layout in zip(results, self.layouts(tensors), strict=True)]
        return self._first_run(args, kwargs, tensors)

    def _first_run(self, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[Tensor]) -> list[Tensor]:
        """Runs the module for the trace, and notes what its results look like."""
        versions, random = list(map(version, tensors)), torch.get_rng_state()
        with _Flops() as flops:
            outputs, self.out_spec = tree_flatten(self._forward(*args, **kwargs))
        self._draws = not torch.equal(random, torch.get_rng_state())
        if versions != list(map(version, tensors)):
            raise CaptureError(f"{self._says} It writes to its arguments; clone them there first.")
        if not all(isinstance(output, Tensor | None) for output in outputs):
            raise CaptureError(f"{self._says} It returns something that is neither a tensor nor None.")
        self.tensor_places = [i for i, output in enumerate(outputs) if output is not None]
        self.flops = flops.total or self._guessed_flops
        results = self._unaliased(outputs, tensors)
        self.out_layouts = [ResultLayout(result.shape, result.stride(), result.dtype) for result in results]
        return results

    @property
    def _guessed_flops(self) -> int:
        """For kernels that torch cannot count: each weight is multiplied with each vector of the first operand once."""
        module, vectors = self._module, prod(self._shapes[0][:-1])
        if isinstance(module, nn.Linear):  # a packed weight has another shape
            return int(2 * vectors * module.in_features * module.out_features)
        return int(2 * vectors) * sum(weight.numel() for weight in module.parameters() if weight.dim() > 1)

    def layouts(self, tensors: list[Tensor]) -> list[ResultLayout]:
        """The layouts of its results, for operands with this many tokens."""
        dims = {
            dim: (known, size)
            for tensor, shape in zip(tensors, self._shapes, strict=True)
            for dim, (size, known) in enumerate(zip(tensor.shape, shape, strict=True))
            if not isinstance(size, int) or size != known
        }
        return [layout.resized(dims) for layout in self.out_layouts] if dims else self.out_layouts

    @property
    def may_be_pointwise(self) -> bool:
        """Whether the values of one call can show that it is pointwise: its results depend on nothing else."""
        return not self.reason.startswith(_NOT_POINTWISE)

    @property
    def runs_each_step(self) -> bool:
        """Whether equal operands may give other results: it draws random numbers, or has a state of its own."""
        return self._draws or (not self.may_be_pointwise and self.reason != READS_CHANGING_VALUES)

    @property
    def _says(self) -> str:
        return f"{self.path} {self.reason}, so it must run as one opaque operator."

    def rebuild(self, outputs: list[Tensor]) -> Any:
        """What the module returned, made from the operator's results."""
        if self.out_spec is None:
            raise InternalError(f"{self.path} has not run yet, so what it returns is unknown")
        leaves: list[Tensor | None] = [None] * self.out_spec.num_leaves
        for place, output in zip(self.tensor_places, outputs, strict=True):
            leaves[place] = output
        return tree_unflatten(leaves, self.out_spec)

    @staticmethod
    def _unaliased(outputs: list[Any], tensors: list[Tensor]) -> list[Tensor]:
        """The tensors, cloned where they share memory with operands, which no operator may return."""
        taken = {tensor.untyped_storage().data_ptr() for tensor in tensors}
        results = [output for output in outputs if output is not None]
        return [_cloned(result) if result.untyped_storage().data_ptr() in taken else result for result in results]


def _cloned(tensor: Tensor) -> Tensor:
    """A copy with the same strides, on which later operators rely; contiguous where entries overlap."""
    if any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)):
        return tensor.clone()
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device).copy_(tensor)


@torch.library.custom_op("duca_compile::opaque", mutates_args=())
def _opaque(tensors: list[Tensor], site: int) -> list[Tensor]:
    return _sites[site].run(tensors)


@_opaque.register_fake
def _(tensors: list[Tensor], site: int) -> list[Tensor]:
    return [layout.empty(tensors[0].device) for layout in _sites[site].layouts(tensors)]


opaque = torch.ops.duca_compile.opaque.default


class _HookedModule:
    """A module that an operator calls together with its hooks, which must not run in the trace."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._original = {name: value for name, value in vars(module).items() if name in _FORWARD_AND_HOOKS}
        self._patched: dict[str, Any] = {}

    def patch(self, forward: Callable[..., Any]) -> None:
        """Makes the module call ``forward`` alone, until it is put back."""
        self._patched = {name: OrderedDict[Any, Any]() for name in self._original} | {"forward": forward}
        vars(self._module).update(self._patched)

    def put_back(self) -> None:
        self._patched = {}
        self._restore()

    def _restore(self) -> None:
        vars(self._module).pop("forward", None)
        vars(self._module).update(self._original)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self._patched:
            return self._module(*args, **kwargs)
        self._restore()
        try:
            return self._module(*args, **kwargs)
        finally:
            vars(self._module).update(self._patched)


@contextmanager
def as_operators(model: nn.Module, paths: Mapping[str, str], offloaded: Offloading) -> Iterator[list[CallSite]]:
    """While open, each call of the modules at ``paths`` is one operator; yields the list of calls so far.

    ``paths`` also gives the reasons. A module inside of another one of them is part of that one.
    """
    sites: list[CallSite] = []

    def replacement(path: str, module: nn.Module, original: Callable[..., Any]) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            site = CallSite(original, module, path, paths[path], (args, kwargs))
            sites.append(site)
            outputs = opaque(site.tensors, site.number)
            site.tensors = []
            return site.rebuild(outputs)

        return forward

    with ExitStack() as undo:
        for path in sorted(paths):
            if any(path.startswith(f"{other}.") for other in paths):
                continue
            module = model.get_submodule(path)
            hooked = _HookedModule(module)
            undo.callback(hooked.put_back)
            hooked.patch(replacement(path, module, offloaded.around(module, hooked)))
        yield sites


def modules_like(model: nn.Module, path: str) -> frozenset[str]:
    """The paths of all modules of the same kind as the one at ``path``: what stops a trace there stops it in them."""
    kind = _kind(model.get_submodule(path))
    return frozenset(other for other, module in model.named_modules() if other and _kind(module) == kind)


def _kind(module: nn.Module) -> Any:
    hooks = {name for name, value in vars(module).items() if name in _FORWARD_AND_HOOKS and value}
    tables = [*module._parameters.items(), *module._buffers.items(), *module._modules.items()]
    return type(module), hooks, [(name, type(value)) for name, value in [*vars(module).items(), *tables]]


def site_of(node: fx.Node) -> CallSite:
    """The call that an ``opaque`` node makes."""
    return _sites[site_number(node)]


def site_number(node: fx.Node) -> int:
    """The number of the call that an ``opaque`` node makes."""
    return int_operand(node, 1)


def site_flops(node: fx.Node) -> int:
    """FLOPs of one call, counted when it was traced."""
    return site_of(node).flops
