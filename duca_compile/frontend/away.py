"""Weights that hooks bring for each call of a module and take away behind it: offloaded, or stored in a narrow type.

A graph must not hold what such a hook brings: that would be a second copy of the weights, and a stale one. So the
trace goes without the hook, and a weight is made by an operator, of what the hook makes it of, whenever a step needs
it. Hooks and weights stay as they are, and no thread waits for another. Known are those of diffusers and accelerate.
"""

from __future__ import annotations

import functools
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.utils._pytree import tree_map_only

from duca_compile.core.lock import COMPILING

_weights: WeakValueDictionary[int, Away] = WeakValueDictionary()
_numbers = itertools.count()
_LIBRARIES = ("diffusers", "accelerate")
_PLACING = {"AlignDevicesHook", "CpuOffload"}
Given = tuple[tuple[Any, ...], dict[str, Any]]  # the arguments of a call
_MOVERS = {  # of diffusers and accelerate: hooks whose state says nothing of what forward computes
    "AlignDevicesHook", "CpuOffload", "LayerExecutionTrackerHook", "LayerwiseCastingHook",
    "LazyPrefetchGroupOffloadingHook",
}  # fmt: skip


class Place(NamedTuple):
    """Where a module keeps a weight: one of its two tables, and a name in it."""

    module: nn.Module
    table: dict[str, Any]
    name: str

    def kept(self) -> Tensor:
        tensor: Tensor = self.table[self.name]
        return tensor


class Away:
    """One weight, and the hooks that make it of what its module keeps in its place, the outermost first."""

    def __init__(self, path: str, place: Place, hooks: tuple[Hook, ...]) -> None:
        self.number, self.path, self.place, self.hooks = next(_numbers), path, place, hooks
        value = self.read()
        self.device, self.like = value.device, value.to("meta")
        _weights[self.number] = self

    def read(self) -> Tensor:
        """The weight as forward sees it, in memory of its own."""
        kept = self.place.kept()
        if isinstance(kept, FakeTensor | FunctionalTensor):  # another thread traces the model, and will put it back
            with COMPILING:
                kept = self.place.kept()
        value = kept.detach()
        for hook in self.hooks:
            value = hook.make(self.place, kept, value)
        return value.clone() if _share(value, kept) else value

    def __str__(self) -> str:
        return f"{self.path} by {', '.join(hook.name for hook in self.hooks)}"


def _share(one: Tensor, other: Tensor) -> bool:
    return not other.is_meta and one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


@torch.library.custom_op("duca_compile::fetch", mutates_args=())
def _fetch(number: int) -> Tensor:
    return _weights[number].read()


@_fetch.register_fake
def _(number: int) -> Tensor:
    like, device = _weights[number].like, _weights[number].device
    return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=device)


fetch = torch.ops.duca_compile.fetch.default


def fetched(node: fx.Node) -> Away:
    """The weight that a node reads."""
    number = node.args[0]
    assert isinstance(number, int)
    return _weights[number]


class Hook(ABC):
    """What brings weights to a module. It is asked for one weight at a time, and for no change of the module."""

    def __init__(self, module: nn.Module, hook: Any, device: Any = None) -> None:
        self.module, self.hook, self.name, self._device = module, hook, type(hook).__name__, device

    @abstractmethod
    def places(self) -> Iterator[Place]:
        """The weights that it brings when its module is called."""

    @abstractmethod
    def make(self, place: Place, kept: Tensor, value: Tensor) -> Tensor:
        """The weight, of what the module keeps in its place and of what hooks further out have made of that."""

    def before(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """What is left of it in a trace: it brings the arguments to where its module computes."""
        return tree_map_only(Tensor, self._moved, (args, kwargs))

    def _moved(self, tensor: Tensor) -> Tensor:
        return tensor if self._device is None or tensor.device == self._device else tensor.to(self._device)


class Casting(Hook):
    """Layerwise casting."""

    def places(self) -> Iterator[Place]:
        yield from _all_places(self.module)

    def make(self, place: Place, kept: Tensor, value: Tensor) -> Tensor:
        return value.to(self.hook.compute_dtype) if value.is_floating_point() or value.is_complex() else value


class Group(Hook):
    """Group offloading of diffusers, to memory or to a file."""

    def places(self) -> Iterator[Place]:
        group = self.hook.group
        for module in [self.module] if self.module in group.modules else group.modules:
            yield from _all_places(module)
        own = set(map(id, (*group.parameters, *group.buffers)))
        yield from (place for place in _own_places(self.module) if id(place.kept()) in own)

    def make(self, place: Place, kept: Tensor, value: Tensor) -> Tensor:
        group = self.hook.group
        if group.offload_to_disk_path is None:
            return value.to(group.onload_device)
        from safetensors import safe_open

        with safe_open(group.safetensors_file_path, framework="pt", device=str(group.onload_device)) as file:
            stored: Tensor = file.get_tensor(group.tensor_to_key[kept])
        return stored


class Aligned(Hook):
    """Offloading of accelerate: its module keeps tensors without memory, and the hook a map of what they stand for."""

    def places(self) -> Iterator[Place]:
        for place in _all_places(self.module) if self.hook.place_submodules else _own_places(self.module):
            buffer = place.table is not place.module._parameters
            left = not self.hook.offload_buffers or place.name in place.module._non_persistent_buffers_set
            if not (buffer and left):
                yield place

    def make(self, place: Place, kept: Tensor, value: Tensor) -> Tensor:
        path = next(path for path, module in self.module.named_modules() if module is place.module)
        stored: Tensor = self.hook.weights_map[f"{path}.{place.name}".lstrip(".")]
        made = stored.to(value.dtype).to(self.hook.execution_device)
        return stored.clone() if made is stored else made


class Whole(Hook):
    """Brings a whole model to its device, where it stays: nothing is left to do in a trace."""

    def places(self) -> Iterator[Place]:
        yield from ()

    def make(self, place: Place, kept: Tensor, value: Tensor) -> Tensor:
        return value


def _own_places(module: nn.Module) -> Iterator[Place]:
    for table in (module._parameters, module._buffers):
        yield from (Place(module, table, name) for name, tensor in table.items() if tensor is not None)


def _all_places(module: nn.Module) -> Iterator[Place]:
    for each in module.modules():
        yield from _own_places(each)


def hooks_of(module: nn.Module) -> list[Any]:
    """The hooks of diffusers and accelerate that a module has, the outermost first."""
    own = vars(module)
    first = own.get("_hf_hook")
    registry = own.get("_diffusers_hook")
    found = [] if first is None else list(getattr(first, "hooks", (first,)))
    return found if registry is None else [*found, *(registry.hooks[name] for name in reversed(registry._hook_order))]


def _kind(hook: object) -> str:
    """The name of its class, or of the one that it derives from, in diffusers or accelerate; "" where it has none."""
    own = (cls.__name__ for cls in type(hook).__mro__ if cls.__module__.partition(".")[0] in _LIBRARIES)
    return next(own, "")


def bringing(module: nn.Module) -> list[Hook]:
    """Those of its hooks that bring weights and take them away."""
    found: list[Hook] = []
    for hook in hooks_of(module):
        name = _kind(hook)
        if name == "LayerwiseCastingHook":
            found.append(Casting(module, hook))
        elif name == "GroupOffloadingHook":
            found.append(Group(module, hook, hook.group.onload_device))
        elif name == "AlignDevicesHook" and hook.offload:
            found.append(Aligned(module, hook, torch.device(hook.execution_device)))
        elif name == "CpuOffload":
            found.append(Whole(module, hook))
    return found


def settings(hook: object) -> tuple[Any, ...] | None:
    """All that counts of a hook that moves weights; what it holds besides changes with each call. None of another."""
    name = _kind(hook)
    if name == "GroupOffloadingHook":
        group = vars(hook)["group"]
        return name, group.onload_device, group.offload_to_disk_path, len(group.modules), len(group.parameters)
    if name not in _MOVERS:
        return None
    own = vars(hook)
    return name, *(str(own.get(each)) for each in ("compute_dtype", "execution_device", "offload", "offload_buffers"))


@dataclass(frozen=True)
class Brought:
    """What hooks bring to a model: single weights, or whole modules where weights are of a kind of their own."""

    weights: dict[int, list[Away]]  # by the identity of the module whose call brings them
    hooks: list[Hook]
    operators: dict[str, str]  # paths and reasons

    def around(self, module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        """``forward`` of a module that runs as it is, with the weights that hooks of modules around it bring."""
        inside = set(map(id, module.modules()))
        outer = [each for key, weights in self.weights.items() if key not in inside for each in weights]
        needed = [weight for weight in outer if id(weight.place.module) in inside]
        return functools.partial(_with_weights, needed, forward) if needed else forward


def _with_weights(weights: list[Away], forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    kept = [weight.place.kept() for weight in weights]
    try:
        for weight in weights:
            weight.place.table[weight.place.name] = weight.read()
        return forward(*args, **kwargs)
    finally:
        for weight, tensor in zip(weights, kept, strict=True):
            weight.place.table[weight.place.name] = tensor


def brought(model: nn.Module) -> Brought:
    """Looks through the hooks of ``model`` and its submodules; reads each weight that they bring once."""
    paths = {id(module): path for path, module in model.named_modules()}
    places: dict[tuple[int, str], Place] = {}
    chains: dict[tuple[int, str], list[Hook]] = {}
    called: dict[int, list[tuple[int, str]]] = {}
    operators: dict[str, str] = {}
    found: list[Hook] = []
    for path, module in model.named_modules():
        hooks = bringing(module)
        mine = {(id(place.module), place.name): place for hook in hooks for place in hook.places()}
        if any(type(place.kept()) not in (Tensor, nn.Parameter) for place in mine.values()):
            operators[path] = f"its weights are of a kind of their own, and {hooks[0].name} brings them"
            continue
        for hook in hooks:
            for place in hook.places():
                chains.setdefault((id(place.module), place.name), []).append(hook)
        places |= mine
        found += hooks
        called[id(module)] = list(mine)
    weights = {
        key: Away(f"{paths[key[0]]}.{key[1]}".lstrip("."), place, tuple(chains[key])) for key, place in places.items()
    }
    return Brought({each: [weights[key] for key in keys] for each, keys in called.items()}, found, operators)


def entered(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Given:
    """The arguments of a call, after what hooks of the model itself do before one: bring it to its device, for one.

    Weights that are taken away behind each call are not brought: they are read where they are.
    """
    brings = {id(hook.hook): hook for hook in bringing(model) if not isinstance(hook, Whole)}
    for hook in hooks_of(model):
        if id(hook) in brings:
            args, kwargs = brings[id(hook)].before(model, *args, **kwargs)
        elif _kind(hook) in _PLACING:
            args, kwargs = hook.pre_forward(model, *args, **kwargs)
    return args, kwargs


def left(model: nn.Module, output: Any) -> Any:
    """What a call returns, after what hooks of the model itself do behind one: bring it to where the arguments were."""
    placing = [hook for hook in hooks_of(model) if _kind(hook) in _PLACING and not getattr(hook, "offload", False)]
    for hook in placing:
        output = hook.post_forward(model, output)
    return output


def has_hooks(model: nn.Module) -> bool:
    return "_hf_hook" in model.__dict__ or "_diffusers_hook" in model.__dict__


@contextmanager
def reading(model: nn.Module, found: Brought, operators: Collection[str]) -> Iterator[None]:
    """While open, these hooks do nothing, and what forward reads of their weights are results of operators.

    Not so within the modules at ``operators``, which run as they are.
    """
    as_they_are = {id(module) for path in operators for module in model.get_submodule(path).modules()}
    with ExitStack() as undo:
        for hook in found.hooks:
            if id(hook.module) not in as_they_are:
                undo.enter_context(_silenced(hook))
        for module in model.modules():
            own = found.weights.get(id(module))
            if own and id(module) not in as_they_are:
                undo.enter_context(_swapped(module, own))
        yield


def read_late(graph: fx.Graph) -> tuple[Away, ...]:
    """Moves the reading of each weight to right before its first use; returns those that are read."""
    found = []
    for node in graph.find_nodes(op="call_function", target=fetch):
        if not node.users:
            graph.erase_node(node)
            continue
        found.append(fetched(node))
        next(each for each in graph.nodes if each in node.users).prepend(node)
    return tuple(found)


@contextmanager
def _silenced(hook: Hook) -> Iterator[None]:
    """Both libraries look their hooks up at each call: accelerate on the hook, diffusers on a reference to it."""
    held = hook.hook.fn_ref if hasattr(hook.hook, "fn_ref") else hook.hook
    before = {name: vars(held)[name] for name in ("pre_forward", "post_forward") if name in vars(held)}
    held.pre_forward, held.post_forward = hook.before, lambda _module, output: output
    try:
        yield
    finally:
        del held.pre_forward, held.post_forward
        vars(held).update(before)


@contextmanager
def _swapped(module: nn.Module, weights: list[Away]) -> Iterator[None]:
    """Puts operators' results in the places of ``weights`` while ``module`` runs."""
    kept: list[list[Any]] = []

    def enter(*_: Any) -> None:
        kept.append([weight.place.kept() for weight in weights])
        for weight in weights:
            weight.place.table[weight.place.name] = fetch(weight.number)

    def leave(*_: Any) -> None:
        for weight, tensor in zip(weights, kept.pop(), strict=True):
            weight.place.table[weight.place.name] = tensor

    handles = [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        while kept:  # forward has failed
            leave()
