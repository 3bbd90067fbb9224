"""Binds the arguments of a call to forward's signature, and gives each kind of call a key."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Mapping
from numbers import Integral, Real
from operator import itemgetter
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_flatten_with_path

from duca_compile.errors import UsageError
from duca_compile.frontend.objects import LEAVES, flatten

_CLEAR, _VAGUE = ("timestep", "timesteps"), ("t", "time", "sigma")  # names of timesteps that may be given as numbers
_TENSOR_GUARDS: Any = getattr(torch._C._dynamo.guards, "TensorGuards", None)  # without it no call takes the fast path


class Key:
    """Identifies a kind of call. Its hash is kept, since every call looks itself up."""

    __slots__ = ("_hash", "_parts")

    def __init__(self, parts: tuple[Hashable, ...]) -> None:
        self._parts, self._hash = parts, hash(parts)

    @property
    def parts(self) -> tuple[Hashable, ...]:
        """The name of each argument, followed by what a capture specializes to; at the end, autocast's dtype."""
        return self._parts

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Key) and self._parts == other._parts)


class Call(NamedTuple):
    """The arguments of one call by name, its tensors, and its kind."""

    defaults: Mapping[str, Any]  # the default of each argument that has one
    given: Mapping[str, Any]
    tensors: tuple[Tensor, ...]
    key: Key

    @property
    def arguments(self) -> dict[str, Any]:
        return {**self.defaults, **self.given}

    def with_arguments(self, arguments: Mapping[str, Any]) -> Call:
        return self._replace(defaults={}, given=arguments)


class _LastCall(NamedTuple):
    """The last call, where the next one can be compared with it quickly: its arguments are tensors and plain values."""

    names: tuple[str, ...]
    tensors: Callable[
        [Mapping[str, Any]], tuple[Tensor, ...]
    ]  # picks them from the arguments, in the signature's order
    fit: Callable[..., bool]  # whether other tensors are of the same kinds
    values: tuple[tuple[str, type, Any], ...]
    device: str
    autocast: Hashable
    key: Key


class Binder:
    """Makes a ``Call`` of the arguments of one model's forward. Runs at every step, so the common case is short."""

    def __init__(self, model: nn.Module, timestep: str | None = None) -> None:
        self.signature = inspect.signature(model.forward)
        kinds = {name: parameter.kind for name, parameter in self.signature.parameters.items()}
        self._by_place = [name for name, kind in kinds.items() if kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
        self._defaults = {
            name: parameter.default
            for name, parameter in self.signature.parameters.items()
            if parameter.kind in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        }
        self._required = {name for name, value in self._defaults.items() if value is inspect.Parameter.empty}
        self._takes_others = inspect.Parameter.VAR_KEYWORD in kinds.values()
        self._by_name = inspect.Parameter.POSITIONAL_ONLY not in kinds.values()
        self._timesteps = (*_CLEAR, *_VAGUE) if timestep is None else (timestep,)
        self._last: _LastCall | None = None

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """Binds one call.

        Raises:
            UsageError: the arguments do not fit the signature; gives Python's own reason.
        """
        given = kwargs if not args else dict(zip(self._by_place, args, strict=False)) | kwargs
        unambiguous = not args or len(given) == len(args) + len(kwargs)
        if unambiguous and (call := self._like_last(given)) is not None:
            return call
        known = self._defaults.keys()
        fits = self._required <= given.keys() and (self._takes_others or given.keys() <= known)
        if not (fits and self._by_name and unambiguous):
            self._refuse(args, kwargs)
        arguments = {**self._defaults, **given}  # passing a default explicitly is the same call
        converted = self._convert_timestep(arguments)
        tensors: list[Tensor] = []
        key: list[Hashable] = []
        for name, value in arguments.items():
            key.append(name)
            if type(value) in LEAVES:
                _add(value, tensors, key)
            else:
                leaves, spec = flatten(value)
                key.append(spec)
                for leaf in leaves:
                    _add(leaf, tensors, key)
        autocast = _autocast(tensors[0].device.type) if tensors else None
        call = Call({}, arguments, tuple(tensors), Key((*key, autocast)))
        self._last = None if converted else _last_call(given, call, autocast)
        return call

    def _like_last(self, given: dict[str, Any]) -> Call | None:
        """The call, if it is of the same kind as the last one."""
        last = self._last
        if last is None or last.names != tuple(given):
            return None
        for name, cls, value in last.values:
            if type(given[name]) is not cls or given[name] != value:
                return None
        tensors = last.tensors(given)
        if not last.fit(*tensors):
            return None
        if last.autocast != _autocast(last.device):
            return None
        return Call(self._defaults, given, tensors, last.key)

    def _convert_timestep(self, arguments: dict[str, Any]) -> bool:
        """Makes a tensor of a timestep given as a number, or every step would be another kind of call.

        Integers become int64 and others float32, since a model may look integers up in a table; a loop that passes
        both makes two kinds of call. A number called ``t`` next to a timestep that is a tensor is an option.

        Returns whether there was such a timestep.
        """
        converted = False
        for name in self._timesteps:
            value = arguments.get(name)
            if not isinstance(value, Real) or isinstance(value, bool):
                continue
            if name in _VAGUE and any(isinstance(arguments.get(other), Tensor) for other in self._timesteps):
                continue
            arguments[name] = torch.tensor(int(value) if isinstance(value, Integral) else float(value))
            converted = True
        return converted

    def _refuse(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> NoReturn:
        try:
            self.signature.bind(*args, **kwargs)
        except TypeError as error:
            raise UsageError(f"the call does not fit the model's forward{self.signature}: {error}") from error
        positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL)
        name = next(name for name, each in self.signature.parameters.items() if each.kind in positional)
        raise UsageError(f"forward takes {name!r} by position only; make it a named parameter to optimize this model")


def _last_call(given: Mapping[str, Any], call: Call, autocast: Hashable) -> _LastCall | None:
    """None where comparing each argument does not tell whether another call is of the same kind."""
    tensors = tuple(name for name, value in call.arguments.items() if name in given and isinstance(value, Tensor))
    plain = all(type(value) in LEAVES for value in given.values()) and 1 < len(tensors) == len(call.tensors)
    if not plain or _TENSOR_GUARDS is None:
        return None
    values = tuple((name, type(value), value) for name, value in given.items() if name not in tensors)
    any_strides = [[None] * tensor.dim() for tensor in call.tensors]
    shapes = [[*tensor.shape] for tensor in call.tensors]
    fit = _TENSOR_GUARDS(*call.tensors, dynamic_dims_sizes=shapes, dynamic_dims_strides=any_strides)
    device = call.tensors[0].device.type
    return _LastCall(tuple(given), itemgetter(*tensors), fit.check, values, device, autocast, call.key)


def _add(leaf: Any, tensors: list[Tensor], key: list[Hashable]) -> None:
    if isinstance(leaf, Tensor):
        tensors.append(leaf)
    key.append(_leaf_kind(leaf))


def _leaf_kind(leaf: Any) -> Hashable:
    """What a capture specializes to: the shape, dtype and device of a tensor, any other value itself."""
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.dtype, leaf.device
    return type(leaf).__name__, leaf if isinstance(leaf, Hashable) else repr(leaf)


def _autocast(device: str) -> Hashable:
    """The dtype of autocast, which changes what the same graph computes; None where it is off."""
    enabled = device != "meta" and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if enabled else None


def tensor_names(call: Call) -> tuple[str, ...]:
    """The path of each tensor among the arguments, such as ``hidden_states`` or ``extra['size']``."""
    found = tree_flatten_with_path(call.arguments)[0]
    return tuple(keystr(path[:1])[2:-2] + keystr(path[1:]) for path, leaf in found if isinstance(leaf, Tensor))
