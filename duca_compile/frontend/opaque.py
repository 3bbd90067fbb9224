"""Submodules that run as one operator: what no trace can hold.

A mixture of experts that counts its tokens on the host cannot be a graph, nor can a kernel that torch knows nothing of.
The module that does so stays as it is, behind an operator of which only the results' shapes are known.
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
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten
from torch.utils.flop_counter import FlopCounterMode

from duca_compile.core.lock import COMPILING
from duca_compile.core.tensors import version
from duca_compile.errors import CaptureError
from duca_compile.frontend.away import Brought

READS = "reads values that change from step to step"  # of all reasons, the one that makes tokens depend on others
Given = tuple[tuple[Any, ...], dict[str, Any]]  # the arguments of a call
_BY_MORE = ("reads ", "changes ")  # how reasons begin where a module goes by values of all tokens, or by its own state
_sites: WeakValueDictionary[int, CallSite] = WeakValueDictionary()
_numbers = itertools.count()
_AROUND = {
    "forward",
    *(name for name in vars(nn.Module()) if name.startswith(("_forward_hooks", "_forward_pre_hooks"))),
}


class Like(NamedTuple):
    """The kind of a result; what is compiled goes by its strides. Without them it is contiguous."""

    shape: tuple[Any, ...]
    stride: tuple[int, ...] | None
    dtype: torch.dtype

    def resized(self, dims: Mapping[int, tuple[int, Any]]) -> Like:
        """With another size in each of these dimensions where it has the known one."""
        shape = [dims[i][1] if i in dims and dims[i][0] == size else size for i, size in enumerate(self.shape)]
        return Like(tuple(shape), None, self.dtype)

    def empty(self, device: torch.device) -> Tensor:
        if self.stride is None:
            return torch.empty(self.shape, dtype=self.dtype, device=device)
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=device)

    def strided(self, tensor: Tensor) -> Tensor:
        if self.stride is None:
            return tensor.contiguous()
        return tensor if tensor.stride() == self.stride else self.empty(tensor.device).copy_(tensor)


class CallSite:
    """One call of a module in the trace: what is around the tensors, and what it returned then."""

    def __init__(self, forward: Callable[..., Any], module: nn.Module, path: str, reason: str, given: Given) -> None:
        self.number = next(_numbers)
        self._forward, self._module, self.path, self.reason = forward, module, path, reason
        args, kwargs = given
        self._leaves, self._spec = tree_flatten((args, kwargs))
        self._places = [i for i, leaf in enumerate(self._leaves) if isinstance(leaf, Tensor)]
        self.tensors = [self._leaves[i] for i in self._places]
        self._shapes = [tensor.shape for tensor in self.tensors]
        for place in self._places:
            self._leaves[place] = None  # the values are the operator's operands from now on
        self.out_spec: TreeSpec | None = None
        self.tensor_places: list[int] = []
        self.out_like: list[Like] = []
        self.flops = 0
        self._draws = False
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
            own = self._owned(tree_flatten(self._forward(*args, **kwargs))[0], tensors)
            return [like.strided(each) for each, like in zip(own, self.likes(tensors), strict=True)]
        versions, random = list(map(version, tensors)), torch.get_rng_state()
        with FlopCounterMode(display=False) as counter:
            outputs, self.out_spec = tree_flatten(self._forward(*args, **kwargs))
        self._draws = not torch.equal(random, torch.get_rng_state())
        if versions != list(map(version, tensors)):
            raise CaptureError(f"{self._says} It writes to its arguments; clone them there first.")
        if not all(isinstance(output, Tensor | None) for output in outputs):
            raise CaptureError(f"{self._says} It returns what is neither a tensor nor None.")
        self.tensor_places = [i for i, output in enumerate(outputs) if output is not None]
        self.flops = int(counter.get_total_flops()) or self._guessed_flops
        own = self._owned(outputs, tensors)
        self.out_like = [Like(output.shape, output.stride(), output.dtype) for output in own]
        return own

    @property
    def _guessed_flops(self) -> int:
        """Of a kernel that torch cannot count: each weight meets each vector of the first operand once."""
        module, rows = self._module, prod(self._shapes[0][:-1])
        if isinstance(module, nn.Linear):  # a packed weight has another shape
            return int(2 * rows * module.in_features * module.out_features)
        return int(2 * rows) * sum(weight.numel() for weight in module.parameters() if weight.dim() > 1)

    def likes(self, tensors: list[Tensor]) -> list[Like]:
        """The kinds of its results, for operands with this many tokens."""
        dims = {
            dim: (known, size)
            for tensor, shape in zip(tensors, self._shapes, strict=True)
            for dim, (size, known) in enumerate(zip(tensor.shape, shape, strict=True))
            if not isinstance(size, int) or size != known
        }
        return [like.resized(dims) for like in self.out_like] if dims else self.out_like

    @property
    def may_be_pointwise(self) -> bool:
        """Whether values of one call may tell what it does to each token: not where more than these counts."""
        return not self.reason.startswith(_BY_MORE)

    @property
    def runs_each_step(self) -> bool:
        """Whether equal operands need not give equal results: it draws random numbers, or has a state of its own."""
        return self._draws or (not self.may_be_pointwise and self.reason != READS)

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
        return [_cloned(result) if result.untyped_storage().data_ptr() in taken else result for result in results]


def _cloned(tensor: Tensor) -> Tensor:
    """With the same strides, by which the operators behind it go, where these do not overlap."""
    if any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)):
        return tensor.clone()
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device).copy_(tensor)


@torch.library.custom_op("duca_compile::opaque", mutates_args=())
def _opaque(tensors: list[Tensor], site: int) -> list[Tensor]:
    return _sites[site].run(tensors)


@_opaque.register_fake
def _(tensors: list[Tensor], site: int) -> list[Tensor]:
    return [like.empty(tensors[0].device) for like in _sites[site].likes(tensors)]


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
def as_operators(model: nn.Module, paths: Mapping[str, str], brought: Brought) -> Iterator[list[CallSite]]:
    """While open, each call of the modules at ``paths`` is one operator; yields the calls as they come.

    ``paths`` gives the reasons, too. A module within another one of them is a part of that.
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
            whole = _Whole(module)
            undo.callback(whole.put_back)
            whole.patch(replacement(path, module, brought.around(module, whole)))
        yield sites


def alike(model: nn.Module, path: str) -> frozenset[str]:
    """The paths of the modules of the kind of the one at ``path``: what stops a trace in one does in the others."""
    kind = _kind(model.get_submodule(path))
    return frozenset(other for other, module in model.named_modules() if other and _kind(module) == kind)


def _kind(module: nn.Module) -> Any:
    hooks = {name for name, value in vars(module).items() if name in _AROUND and value}
    tables = [*module._parameters.items(), *module._buffers.items(), *module._modules.items()]
    return type(module), hooks, [(name, type(value)) for name, value in [*vars(module).items(), *tables]]


def site_of(node: fx.Node) -> CallSite:
    return _sites[site_number(node)]


def site_number(node: fx.Node) -> int:
    number = node.args[1]
    assert isinstance(number, int)
    return number


def site_flops(node: fx.Node) -> int:
    """FLOPs of one call, counted when it was traced."""
    return site_of(node).flops
