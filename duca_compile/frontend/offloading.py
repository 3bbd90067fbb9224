"""Weights that hooks materialize for each call of a module and release afterwards: offloaded, or in a narrow type.

A graph must not hold a materialized weight: that would be a second copy, and soon a stale one. So the model is traced
without the hooks, and an operator fetches the weight from where the hook would get it, whenever a step needs it. Hooks
and stored weights are not changed, and no thread waits for another. The hooks of diffusers and accelerate are known.
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

from duca_compile.core.fx_utils import int_operand
from duca_compile.core.lock import COMPILING

_weights: WeakValueDictionary[int, FetchedWeight] = WeakValueDictionary()
_numbers = itertools.count()
_LIBRARIES = ("diffusers", "accelerate")
_PLACING = {"AlignDevicesHook", "CpuOffload"}
Arguments = tuple[tuple[Any, ...], dict[str, Any]]  # of a call, by position and by name
_MOVERS = {  # of diffusers and accelerate: hooks whose state does not affect what forward computes
    "AlignDevicesHook", "CpuOffload", "LayerExecutionTrackerHook", "LayerwiseCastingHook",
    "LazyPrefetchGroupOffloadingHook",
}  # fmt: skip


class Location(NamedTuple):
    """Where a module stores a weight: its table of parameters or of buffers, and the name there."""

    module: nn.Module
    table: dict[str, Any]
    name: str

    def stored(self) -> Tensor:
        """What is there now: a placeholder or narrow tensor between calls, the weight during a call."""
        tensor: Tensor = self.table[self.name]
        return tensor


class FetchedWeight:
    """One weight, and the hooks that materialize it from what its module stores, the outermost first."""

    def __init__(self, path: str, location: Location, hooks: tuple[Hook, ...]) -> None:
        self.number, self.path, self.location, self.hooks = next(_numbers), path, location, hooks
        value = self.read()
        self.device, self.like = value.device, value.to("meta")
        _weights[self.number] = self

    def read(self) -> Tensor:
        """The weight as forward sees it, in memory of its own."""
        stored = self.location.stored()
        if isinstance(stored, FakeTensor | FunctionalTensor):  # another thread traces the model, and will restore it
            with COMPILING:
                stored = self.location.stored()
        value = stored.detach()
        for hook in self.hooks:
            value = hook.materialize(self.location, stored, value)
        return value.clone() if _share(value, stored) else value

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


def fetched(node: fx.Node) -> FetchedWeight:
    """The weight that a ``fetch`` node reads."""
    return _weights[int_operand(node, 0)]


class Hook(ABC):
    """A hook that materializes weights of a module; here one at a time, and without changing the module."""

    def __init__(self, module: nn.Module, hook: Any, device: Any = None) -> None:
        self.module, self.hook, self.name, self._device = module, hook, type(hook).__name__, device

    @abstractmethod
    def locations(self) -> Iterator[Location]:
        """The weights that it materializes when its module is called."""

    @abstractmethod
    def materialize(self, location: Location, stored: Tensor, value: Tensor) -> Tensor:
        """The weight, from what the module stores and from ``value``, what outer hooks made of that."""

    def before(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """What remains of the hook in a trace: it moves the arguments to the device where its module computes."""
        return tree_map_only(Tensor, self._moved, (args, kwargs))

    def _moved(self, tensor: Tensor) -> Tensor:
        return tensor if self._device is None or tensor.device == self._device else tensor.to(self._device)


class Casting(Hook):
    """Layerwise casting of diffusers."""

    def locations(self) -> Iterator[Location]:
        yield from _all_locations(self.module)

    def materialize(self, location: Location, stored: Tensor, value: Tensor) -> Tensor:
        return value.to(self.hook.compute_dtype) if value.is_floating_point() or value.is_complex() else value


class Group(Hook):
    """Group offloading of diffusers, to memory or to a file."""

    def locations(self) -> Iterator[Location]:
        group = self.hook.group
        for module in [self.module] if self.module in group.modules else group.modules:
            yield from _all_locations(module)
        single = set(map(id, (*group.parameters, *group.buffers)))
        yield from (each for each in _direct_locations(self.module) if id(each.stored()) in single)

    def materialize(self, location: Location, stored: Tensor, value: Tensor) -> Tensor:
        group = self.hook.group
        if group.offload_to_disk_path is None:
            return value.to(group.onload_device)
        from safetensors import safe_open

        with safe_open(group.safetensors_file_path, framework="pt", device=str(group.onload_device)) as file:
            weight: Tensor = file.get_tensor(group.tensor_to_key[stored])
        return weight


class Aligned(Hook):
    """Offloading of accelerate: the module stores tensors without memory, and the hook maps names to the weights."""

    def locations(self) -> Iterator[Location]:
        for each in _all_locations(self.module) if self.hook.place_submodules else _direct_locations(self.module):
            is_buffer = each.table is not each.module._parameters
            stays = not self.hook.offload_buffers or each.name in each.module._non_persistent_buffers_set
            if not (is_buffer and stays):
                yield each

    def materialize(self, location: Location, stored: Tensor, value: Tensor) -> Tensor:
        path = next(path for path, module in self.module.named_modules() if module is location.module)
        offloaded: Tensor = self.hook.weights_map[f"{path}.{location.name}".lstrip(".")]
        weight = offloaded.to(value.dtype).to(self.hook.execution_device)
        return offloaded.clone() if weight is offloaded else weight


class Whole(Hook):
    """Moves a whole model to its device, where it stays, so that nothing remains to be done in a trace."""

    def locations(self) -> Iterator[Location]:
        yield from ()

    def materialize(self, location: Location, stored: Tensor, value: Tensor) -> Tensor:
        return value


def _direct_locations(module: nn.Module) -> Iterator[Location]:
    for table in (module._parameters, module._buffers):
        yield from (Location(module, table, name) for name, tensor in table.items() if tensor is not None)


def _all_locations(module: nn.Module) -> Iterator[Location]:
    for each in module.modules():
        yield from _direct_locations(each)


def hooks_of(module: nn.Module) -> list[Any]:
    """The hooks of diffusers and accelerate on a module, the outermost first."""
    attributes = vars(module)
    first = attributes.get("_hf_hook")
    registry = attributes.get("_diffusers_hook")
    found = [] if first is None else list(getattr(first, "hooks", (first,)))
    return found if registry is None else [*found, *(registry.hooks[name] for name in reversed(registry._hook_order))]


def _kind(hook: object) -> str:
    """The name of the hook's class in diffusers or accelerate, or of its base there; "" where it has none."""
    names = (cls.__name__ for cls in type(hook).__mro__ if cls.__module__.partition(".")[0] in _LIBRARIES)
    return next(names, "")


def offloading_hooks(module: nn.Module) -> list[Hook]:
    """Those of its hooks that materialize weights and release them."""
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


def hook_settings(hook: object) -> tuple[Any, ...] | None:
    """The settings of a hook that moves weights; its other state changes at each call. None for any other hook."""
    name = _kind(hook)
    if name == "GroupOffloadingHook":
        group = vars(hook)["group"]
        return name, group.onload_device, group.offload_to_disk_path, len(group.modules), len(group.parameters)
    if name not in _MOVERS:
        return None
    settings = ("compute_dtype", "execution_device", "offload", "offload_buffers")
    return name, *(str(vars(hook).get(each)) for each in settings)


@dataclass(frozen=True)
class Offloading:
    """What hooks materialize in a model: single weights, or whole modules where weights are of special types."""

    weights: dict[int, list[FetchedWeight]]  # by the id of the module whose call materializes them
    hooks: list[Hook]
    operators: dict[str, str]  # paths of the modules that must be opaque, with the reasons

    def around(self, module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        """``forward`` of an opaque module, with the weights that hooks of enclosing modules materialize."""
        inside = set(map(id, module.modules()))
        outer = [each for key, weights in self.weights.items() if key not in inside for each in weights]
        needed = [weight for weight in outer if id(weight.location.module) in inside]
        return functools.partial(_with_weights, needed, forward) if needed else forward


def _with_weights(weights: list[FetchedWeight], forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    stored = [weight.location.stored() for weight in weights]
    try:
        for weight in weights:
            weight.location.table[weight.location.name] = weight.read()
        return forward(*args, **kwargs)
    finally:
        for weight, tensor in zip(weights, stored, strict=True):
            weight.location.table[weight.location.name] = tensor


def find_offloading(model: nn.Module) -> Offloading:
    """Inspects the hooks of ``model`` and its submodules, and reads each weight that they materialize once."""
    paths = {id(module): path for path, module in model.named_modules()}
    locations: dict[tuple[int, str], Location] = {}
    chains: dict[tuple[int, str], list[Hook]] = {}
    by_module: dict[int, list[tuple[int, str]]] = {}
    operators: dict[str, str] = {}
    all_hooks: list[Hook] = []
    for path, module in model.named_modules():
        hooks = offloading_hooks(module)
        found = {(id(each.module), each.name): each for hook in hooks for each in hook.locations()}
        if any(type(each.stored()) not in (Tensor, nn.Parameter) for each in found.values()):
            operators[path] = f"has weights of a special type that {hooks[0].name} materializes"
            continue
        for hook in hooks:
            for each in hook.locations():
                chains.setdefault((id(each.module), each.name), []).append(hook)
        locations |= found
        all_hooks += hooks
        by_module[id(module)] = list(found)
    weights = {
        key: FetchedWeight(f"{paths[key[0]]}.{key[1]}".lstrip("."), location, tuple(chains[key]))
        for key, location in locations.items()
    }
    return Offloading({id_: [weights[key] for key in keys] for id_, keys in by_module.items()}, all_hooks, operators)


def before_call(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """The arguments of a call, after what hooks of the model itself do before it, such as moving it to its device.

    Weights that would be released after the call are not materialized: steps fetch them from where they are stored.
    """
    materializing = {id(hook.hook): hook for hook in offloading_hooks(model) if not isinstance(hook, Whole)}
    for hook in hooks_of(model):
        if id(hook) in materializing:
            args, kwargs = materializing[id(hook)].before(model, *args, **kwargs)
        elif _kind(hook) in _PLACING:
            args, kwargs = hook.pre_forward(model, *args, **kwargs)
    return args, kwargs


def after_call(model: nn.Module, output: Any) -> Any:
    """The output of a call, after what hooks of the model itself do with it: move it to the arguments' device."""
    placing = [hook for hook in hooks_of(model) if _kind(hook) in _PLACING and not getattr(hook, "offload", False)]
    for hook in placing:
        output = hook.post_forward(model, output)
    return output


def has_hooks(model: nn.Module) -> bool:
    """Whether diffusers or accelerate have put hooks on the model itself."""
    return "_hf_hook" in model.__dict__ or "_diffusers_hook" in model.__dict__


@contextmanager
def as_fetches(model: nn.Module, offloading: Offloading, operators: Collection[str]) -> Iterator[None]:
    """While open, these hooks do nothing, and forward gets their weights as results of ``fetch`` operators.

    The modules at the paths ``operators``, which are opaque, keep their hooks.
    """
    opaque = {id(module) for path in operators for module in model.get_submodule(path).modules()}
    with ExitStack() as undo:
        for hook in offloading.hooks:
            if id(hook.module) not in opaque:
                undo.enter_context(_disabled(hook))
        for module in model.modules():
            weights = offloading.weights.get(id(module))
            if weights and id(module) not in opaque:
                undo.enter_context(_fetching(module, weights))
        yield


def sink_fetches(graph: fx.Graph) -> tuple[FetchedWeight, ...]:
    """Moves each ``fetch`` to right before its first use and drops unused ones; returns the weights that are left."""
    found = []
    for node in graph.find_nodes(op="call_function", target=fetch):
        if not node.users:
            graph.erase_node(node)
            continue
        found.append(fetched(node))
        next(each for each in graph.nodes if each in node.users).prepend(node)
    return tuple(found)


@contextmanager
def _disabled(hook: Hook) -> Iterator[None]:
    """Replaces the methods that are looked up at each call: by accelerate on the hook, by diffusers on a reference."""
    target = hook.hook.fn_ref if hasattr(hook.hook, "fn_ref") else hook.hook
    before = {name: vars(target)[name] for name in ("pre_forward", "post_forward") if name in vars(target)}
    target.pre_forward, target.post_forward = hook.before, lambda _module, output: output
    try:
        yield
    finally:
        del target.pre_forward, target.post_forward
        vars(target).update(before)


@contextmanager
def _fetching(module: nn.Module, weights: list[FetchedWeight]) -> Iterator[None]:
    """Puts results of ``fetch`` in place of ``weights`` while ``module`` runs."""
    stored: list[list[Any]] = []

    def enter(*_: Any) -> None:
        stored.append([weight.location.stored() for weight in weights])
        for weight in weights:
            weight.location.table[weight.location.name] = fetch(weight.number)

    def leave(*_: Any) -> None:
        for weight, tensor in zip(weights, stored.pop(), strict=True):
            weight.location.table[weight.location.name] = tensor

    handles = [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        while stored:  # forward has failed
            leave()
