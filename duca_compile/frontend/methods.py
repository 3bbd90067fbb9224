"""Methods of a model beside forward: those that call it, those that run blocks on their own, and one as the step."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from functools import cache
from textwrap import dedent
from types import FunctionType, MethodType
from typing import Any

from torch import nn

from duca_compile.errors import UsageError

FORWARD = "forward"


def with_step(model: nn.Module, method: str) -> nn.Module:
    """A module whose forward is the method called ``method`` of ``model``; it shares all of the model's state.

    Raises:
        UsageError: there is no such method, or the model's forward is wrapped, as hooks of accelerate do.
    """
    if method == FORWARD:
        return model
    cls = type(model)
    if not isinstance(inspect.getattr_static(cls, method, None), FunctionType):
        raise UsageError(f"method={method!r}: {cls.__name__} has no method of that name")
    if FORWARD in vars(model):
        raise UsageError(
            f"method={method!r}: the forward of this {cls.__name__} is wrapped, by hooks it seems, which "
            f"{method} would not run; remove them first, or optimize before they are set"
        )
    stand_in = type(cls.__name__, (cls,), {FORWARD: getattr(cls, method), "__module__": cls.__module__})
    view: nn.Module = object.__new__(stand_in)
    object.__setattr__(view, "__dict__", model.__dict__)
    return view


def calls_forward(method: MethodType) -> bool:
    """Whether a method calls the forward of its object, itself or by another of its methods."""
    return any(FORWARD in names for names in _reached(method))


def runs_blocks(method: MethodType) -> bool:
    """Whether a method reads a list of submodules of its object, as what runs a model's blocks does."""
    children = vars(method.__self__)["_modules"]
    lists = {name for name, child in children.items() if isinstance(child, nn.ModuleList)}
    return any(lists & names for names in _reached(method))


def _reached(method: MethodType) -> Iterator[frozenset[str]]:
    """What is read of the object by the method, and by each method of the object that it reads."""
    classes = [cls for cls in type(method.__self__).__mro__ if cls not in nn.Module.__mro__]
    waiting, seen = [method.__name__], {FORWARD}
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        for function in [vars(cls)[name] for cls in classes if name in vars(cls)]:  # one may call the next by super()
            if isinstance(function, FunctionType):
                names = _read(function)
                yield names
                waiting += names


@cache
def _read(function: FunctionType) -> frozenset[str]:
    """The attributes of its object that a method names; to call the object is to read its forward."""
    inner: Any = inspect.unwrap(function)
    try:
        tree = ast.parse(dedent(inspect.getsource(inner)))
    except (OSError, TypeError, SyntaxError):
        return frozenset(inner.__code__.co_names)
    own = next(iter(inspect.signature(inner).parameters), None)
    nodes = [*ast.walk(tree)]
    found = {node.attr for node in nodes if isinstance(node, ast.Attribute) and _is_object(node.value, own)}
    if "__call__" in found or any(isinstance(node, ast.Call) and _is_name(node.func, own) for node in nodes):
        found.add(FORWARD)
    return frozenset(found)


def _is_object(node: ast.expr, name: str | None) -> bool:
    """Whether it is the object itself, or ``super()``."""
    return _is_name(node, name) or (isinstance(node, ast.Call) and _is_name(node.func, "super"))


def _is_name(node: ast.expr, name: str | None) -> bool:
    return isinstance(node, ast.Name) and node.id == name
