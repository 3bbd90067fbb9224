"""Parts of a model that torch.compile compiles: a capture follows the Python that they are compiled from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch._dynamo import OptimizedModule as CompiledModule
from torch._dynamo import config, eval_frame

_FILE = eval_frame.__file__


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """While open, compiled functions and submodules run their Python, which a trace can follow."""
    parts = [part for part in model.modules() if isinstance(part, CompiledModule)]
    with torch.compiler.set_stance("force_eager"), config.patch(error_on_nested_fx_trace=False), ExitStack() as undo:
        for part in parts:
            undo.callback(vars(part).update, forward=vars(part)["forward"])
            vars(part)["forward"] = _calling(part._orig_mod)
        yield


def _calling(module: nn.Module) -> Callable[..., Any]:
    return lambda *args, **kwargs: module(*args, **kwargs)


def compiled_function(frame: FrameType | None) -> Callable[..., Any] | None:
    """What torch.compile compiles of what is running in ``frame`` and its callers: the innermost function, if any."""
    while frame is not None:
        code = frame.f_code
        if code.co_filename == _FILE and "callback" in code.co_freevars:  # the wrapper of a compiled function
            function: Callable[..., Any] | None = frame.f_locals.get("fn")
            return function
        frame = frame.f_back
    return None


def wrapped_forward(model: nn.Module) -> Callable[..., Any] | None:
    """The forward of the first submodule that torch.compile has wrapped, if any."""
    return next((part._orig_mod.forward for part in model.modules() if isinstance(part, CompiledModule)), None)


def described(function: Callable[..., Any]) -> str:
    """What a compiled function is called, and where it is."""
    owner = getattr(function, "__self__", None)
    if isinstance(owner, nn.Module):
        function = type(owner).forward
    code = getattr(function, "__code__", None)
    name = (
        type(owner).__qualname__ if isinstance(owner, nn.Module) else getattr(function, "__qualname__", repr(function))
    )
    return f"{name} ({code.co_filename}:{code.co_firstlineno})" if code is not None else name
