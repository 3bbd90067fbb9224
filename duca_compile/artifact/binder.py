"""Binds the arguments of a call to an artifact's inputs, and arranges its outputs as the model returns them."""

from __future__ import annotations

import sys
from collections import namedtuple
from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from numbers import Integral, Real
from typing import Any

import numpy as np

from duca_compile.artifact.manifest import Manifest, Size, TensorSpec
from duca_compile.core.tensors import Array
from duca_compile.errors import UsageError


class Binder:
    """Binds the tensors of a call to the graphs' inputs, and checks their dtypes and shapes."""

    def __init__(self, manifest: Manifest) -> None:
        self._signature = manifest.signature
        specs = {spec.name: spec for spec in manifest.inputs}
        self._arguments = [argument for argument in manifest.signature.arguments if argument.input in specs]
        self._latent = specs[manifest.signature.latent]
        # By the name of the input: its spec, and the argument as messages show it.
        self._inputs = {each.input: (specs[each.input], _shown(each.path)) for each in self._arguments}
        self._tensors = {argument.path for argument in manifest.signature.arguments}
        self._fixed = manifest.signature.fixed
        # By the name of the input, where only its values count: it may be no input of a graph.
        self._read = [argument for argument in manifest.signature.arguments if argument.input in self._fixed]

    def __call__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[dict[str, Array], int]:
        """The tensors of one call by input, and its batch size. Raises UsageError if the arguments do not fit."""
        parameters = self._signature.parameters
        if len(args) > len(parameters):
            raise UsageError(f"{len(args)} arguments are too many; the model takes {', '.join(parameters)}")
        call = {**dict(zip(parameters, args, strict=False)), **kwargs}
        if len(call) < len(args) + len(kwargs):
            raise UsageError("an argument is given twice, by position and by name")
        self._check_options(call)
        self._check_fixed(call)
        values = {argument.input: _follow(call, argument.path) for argument in self._arguments}
        values[self._latent.name] = _contiguous(values[self._latent.name])
        batch = self._batch(values[self._latent.name])
        return {name: _checked(*self._inputs[name], value, batch) for name, value in values.items()}, batch

    def _check_fixed(self, call: Mapping[str, Any]) -> None:
        """Raises UsageError if an argument that forward reads in Python has other values than at export."""
        for argument in self._read:
            if content_hash(_follow(call, argument.path)) != self._fixed[argument.input]:
                raise UsageError(
                    f"{_shown(argument.path)} has other values than at export. The model's Python code reads them, so "
                    "the artifact is for those values alone: export the model again with these"
                )

    def _batch(self, latent: Array) -> int:
        first = self._latent.shape[0]
        if not isinstance(first, Size):
            return first
        if not latent.ndim:
            raise UsageError(f"{self._inputs[self._latent.name][1]} has no batch dimension")
        return int(latent.shape[0])

    def _check_options(self, call: Mapping[str, Any]) -> None:
        """Raises UsageError if an argument other than a tensor is unknown, or differs from the exported one."""
        for path, value in _leaves(call):
            if path in self._tensors:
                continue
            name = ".".join(map(str, path))
            if name not in self._signature.options:
                raise UsageError(f"unknown argument {name!r}; the model takes {', '.join(self._signature.parameters)}")
            exported = self._signature.options[name]
            if value != exported:
                raise UsageError(f"{name}={value!r}: the artifact was exported with {exported!r}, which is fixed")


def content_hash(value: Any) -> str:
    """The hash of the type, the shape and the values of an array, or of a torch tensor, which gives the same."""
    array = _contiguous(value)
    kind = f"{array.dtype} {tuple(array.shape)}".removeprefix("torch.").encode()
    if not isinstance(array, np.ndarray):  # numpy lacks some of torch's types, but not their bytes
        array = array.cpu().reshape(-1).view(sys.modules["torch"].uint8).numpy()
    return sha256(kind + array.tobytes()).hexdigest()


def _leaves(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """The values in nested dictionaries, lists and tuples, each with its path."""
    if isinstance(value, Mapping | list | tuple):
        for key, part in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _leaves(part, (*path, key))
    else:
        yield path, value


def _shown(path: tuple[str | int, ...]) -> str:
    """An argument as messages show it: the path to it in the call."""
    return ".".join(map(str, path))


def _follow(call: Mapping[str, Any], path: tuple[str | int, ...]) -> Any:
    value: Any = call
    for key in path:
        try:
            value = value[key]
        except (KeyError, IndexError, TypeError):
            raise UsageError(f"the argument {_shown(path)} is missing") from None
    return value


def _contiguous(value: Any) -> Array:
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        if value.requires_grad and torch.is_grad_enabled():
            raise UsageError(
                "an argument requires a gradient, but an artifact is for inference only: call the model itself to "
                "compute gradients; else call the artifact under torch.no_grad(), or detach() the argument"
            )
        return value.detach().contiguous()
    return value if isinstance(value, np.ndarray) and value.flags.c_contiguous else np.array(value)


def _checked(spec: TensorSpec, name: str, value: Any, batch: int) -> Array:
    """``value`` as a contiguous array of the dtype and shape of ``spec``; a number fills an array."""
    shape = spec.at(batch)
    if isinstance(value, Real) and not isinstance(value, bool | np.generic):
        if isinstance(value, Integral) or spec.dtype.startswith("float"):
            return np.full(shape, value, spec.dtype)
        raise UsageError(f"{name} must be of type {spec.dtype}, not the number {value!r}")
    array = _contiguous(value)
    dtype = str(array.dtype).removeprefix("torch.")
    if array.ndim == 0 and shape and dtype == spec.dtype:  # one timestep for all batch rows
        array = np.full(shape, array.item(), dtype)
    if dtype != spec.dtype or tuple(array.shape) != shape:
        wanted = f"{spec.dtype} of shape ({', '.join(map(str, spec.shape))})"
        raise UsageError(
            f"{name} must be {wanted}, which is {shape} for a batch of {batch}, not {dtype} of shape "
            f"{tuple(array.shape)}"
        )
    return array


def like_call(output: Array, call: Mapping[str, Array]) -> Array:
    """The output as a torch tensor on the device of the call's torch tensors, or a numpy array if there are none."""
    torch = sys.modules.get("torch")
    if torch is None:
        return output
    tensor = next((value for value in call.values() if isinstance(value, torch.Tensor)), None)
    if tensor is not None:
        return torch.from_dlpack(output).to(tensor.device)
    return output.cpu().numpy() if isinstance(output, torch.Tensor) else output


_TYPES: dict[tuple[str, tuple[str, ...]], Any] = {}


def result(structure: Mapping[str, Any], outputs: Sequence[Array]) -> Any:
    """The outputs in the structure that the manifest describes; see ``Signature``."""
    if "output" in structure:
        return outputs[structure["output"]]
    if "value" in structure:
        return structure["value"]
    items = [result(item, outputs) for item in structure["items"]]
    kind = structure["type"]
    if "names" not in structure:
        return tuple(items) if kind == "tuple" else items
    if kind == "dict":
        return dict(zip(structure["names"], items, strict=True))
    key = kind, tuple(structure["names"])
    if key not in _TYPES:
        _TYPES[key] = namedtuple(*key)
    return _TYPES[key](*items)
