"""Wrappers: models whose forward reads the timestep in Python, and leaves the work to a network that it calls.

Guidance inside of a model is often made so. No graph holds such a forward: it runs as it is, with an optimized model in
place of each network.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

from torch import nn

from duca_compile.errors import CaptureError, DucaError, StructureError

T = TypeVar("T")


class WrapperError(DucaError):
    """What is refused about a model is its own forward, or that of a submodule with most of its weights."""


class ReadsStepError(WrapperError, CaptureError):
    """It reads in Python what changes from step to step."""


class HiddenStructureError(WrapperError, StructureError):
    """It runs as one opaque operator, which hides the network inside."""


def networks(model: nn.Module) -> tuple[str, ...]:
    """The submodules that do a wrapper's work: that with the most weights, and all with half as many or more.

    None where the most weights are in a list of blocks, which the model's own forward runs, or where forward is
    patched, so that it would run on the model itself.
    """
    sizes = {name: _size(child) for name, child in model.named_children()}
    most = max(sizes.values(), default=0)
    found = tuple(name for name, size in sizes.items() if size and 2 * size >= most)
    lists = [name for name in found if isinstance(getattr(model, name), nn.ModuleList | nn.ModuleDict)]
    return () if lists or "forward" in vars(model) else found


def holds_most(model: nn.Module, path: str) -> bool:
    """Whether the submodule at ``path`` has at least half of a model's weights."""
    return 2 * _size(model.get_submodule(path)) >= _size(model)


def _size(module: nn.Module) -> int:
    return sum(each.numel() for each in module.parameters()) + sum(each.numel() for each in module.buffers())


@contextmanager
def standing_in(model: nn.Module, parts: Mapping[str, nn.Module]) -> Iterator[nn.Module]:
    """``model`` with other modules in place of some submodules. What runs sets on it is set on ``model`` in the end."""
    modules = {**model._modules, **parts}
    attributes, children = {**vars(model), "_modules": modules}, dict(modules)
    view: nn.Module = object.__new__(type(model))
    vars(view).update(attributes)
    try:
        yield view
    finally:
        _write_back(children, modules, model._modules)
        _write_back(attributes, vars(view), vars(model))


def _write_back(before: Mapping[str, T], after: Mapping[str, T], into: dict[str, T]) -> None:
    for name, value in after.items():
        if name not in before or before[name] is not value:
            into[name] = value
    for name in before.keys() - after.keys():
        into.pop(name, None)
