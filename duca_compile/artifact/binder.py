"""The tensors of a call of an artifact, and the model's own structure of what is returned."""

from __future__ import annotations

import sys
from collections import namedtuple
from collections.abc import Iterator, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np

from duca_compile.artifact.manifest import Manifest, Size, TensorSpec
from duca_compile.core.tensors import Array
from duca_compile.errors import UsageError


class Binder:
    """Finds the tensors of a call by the names of the graphs' inputs, and checks their kinds."""

    def __init__(self, found: Manifest) -> None:
        self._signature = found.signature
        self._specs = {spec.name: spec for spec in found.inputs}
        self._arguments = [each for each in found.signature.arguments if each.input in self._specs]
        self._latent = self._specs[found.signature.latent]
        self._tensors = {each.path for each in found.signature.arguments}

    def __call__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[dict[str, Array], int]:
        """The tensors of one call, and its batch size. Raises UsageError where they are of other kinds."""
        parameters = self._signature.parameters
        if len(args) > len(parameters):
            raise UsageError(f"{len(args)} arguments are too many; the model takes {', '.join(parameters)}")
        given = {**dict(zip(parameters, args, strict=False)), **kwargs}
        if len(given) < len(args) + len(kwargs):
            raise UsageError("an argument is given twice, by place and by name")
        self._check_options(given)
        values = {each.input: _follow(given, each.path) for each in self._arguments}
        values[self._latent.name] = _contiguous(values[self._latent.name])
        batch = self._batch(values[self._latent.name])
        return {name: _checked(self._specs[name], value, batch) for name, value in values.items()}, batch

    def _batch(self, latent: Array) -> int:
        first = self._latent.shape[0]
        if not isinstance(first, Size):
            return first
        if not latent.ndim:
            raise UsageError(f"{self._latent.name} has no rows")
        return int(latent.shape[0])

    def _check_options(self, given: Mapping[str, Any]) -> None:
        for path, value in _leaves(given):
            if path in self._tensors:
                continue
            name = ".".join(map(str, path))
            if name not in self._signature.options:
                raise UsageError(f"unknown argument {name!r}; the model takes {', '.join(self._signature.parameters)}")
            built_in = self._signature.options[name]
            if value != built_in:
                raise UsageError(f"{name}={value!r}: the artifact was exported with {built_in!r}, which is built in")


def _leaves(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """What is in dictionaries, lists and tuples, with the way to it."""
    if isinstance(value, Mapping | list | tuple):
        for key, each in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _leaves(each, (*path, key))
    else:
        yield path, value


def _follow(given: Mapping[str, Any], path: tuple[str | int, ...]) -> Any:
    found: Any = given
    for key in path:
        try:
            found = found[key]
        except (KeyError, IndexError, TypeError):
            raise UsageError(f"the argument {'.'.join(map(str, path))} is missing") from None
    return found


def _contiguous(value: Any) -> Array:
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        if value.requires_grad and torch.is_grad_enabled():
            raise UsageError(
                "an argument requires a gradient, and an artifact is for inference only: call the model itself for the "
                "gradient pass, or else call it under torch.no_grad() or detach() the argument"
            )
        return value.detach().contiguous()
    return value if isinstance(value, np.ndarray) and value.flags.c_contiguous else np.array(value)


def _checked(spec: TensorSpec, value: Any, batch: int) -> Array:
    """``value`` as a contiguous array of the kind of ``spec``; a number stands for an array of it."""
    shape = spec.at(batch)
    if isinstance(value, Real) and not isinstance(value, bool | np.generic):
        if isinstance(value, Integral) or spec.dtype.startswith("float"):
            return np.full(shape, value, spec.dtype)
        raise UsageError(f"{spec.name} must be of type {spec.dtype}, not the number {value!r}")
    array = _contiguous(value)
    dtype = str(array.dtype).removeprefix("torch.")
    if array.ndim == 0 and shape and dtype == spec.dtype:  # one timestep for all rows
        array = np.full(shape, array.item(), dtype)
    if dtype != spec.dtype or tuple(array.shape) != shape:
        wanted = f"{spec.dtype} of shape ({', '.join(map(str, spec.shape))})"
        raise UsageError(
            f"{spec.name} must be {wanted}, which is {shape} for a batch of {batch}, not {dtype} of shape "
            f"{tuple(array.shape)}"
        )
    return array


def like_call(output: Array, call: Mapping[str, Array]) -> Array:
    """The output as a torch tensor where the call's values are such, on their device; else as a numpy array."""
    torch = sys.modules.get("torch")
    if torch is None:
        return output
    given = next((value for value in call.values() if isinstance(value, torch.Tensor)), None)
    if given is not None:
        return torch.from_dlpack(output).to(given.device)
    return output.cpu().numpy() if isinstance(output, torch.Tensor) else output


_TYPES: dict[tuple[str, tuple[str, ...]], Any] = {}


def result(structure: Mapping[str, Any], outputs: Sequence[Array]) -> Any:
    """Outputs in the structure that the manifest describes."""
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
