"""Turns a variant into a callable: as it is, or through torch.compile with Inductor.

Everything of torch that is not public API and that compiling needs is in this module.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch._dynamo
from torch import Tensor, fx
from torch.fx.experimental import _config as shapes_config

from duca_compile.errors import BackendError, UsageError, first_line
from duca_compile.graph import Variant, VariantFunction
from duca_compile.lock import COMPILING

log = logging.getLogger("duca_compile")

BACKENDS = ("inductor", "eager")


class Backend(Protocol):
    name: str
    exact: bool  # whether results are to be the model's own, bit for bit

    def compile(self, module: fx.GraphModule, dynamic: tuple[int, ...] = ()) -> VariantFunction:
        """A callable of ``module``'s flat tensors; ``dynamic`` are inputs whose dimension 1 changes between calls."""


class EagerBackend:
    """Runs the graph operator by operator: the reference that other backends are held to."""

    name = "eager"
    exact = True

    def compile(self, module: fx.GraphModule, dynamic: tuple[int, ...] = ()) -> VariantFunction:
        del dynamic
        return module.forward


class InductorBackend:
    """torch.compile, one graph per variant, no recompilation for other token counts.

    Where Inductor has no C++ compiler or fails on a variant, that variant runs under eager with one warning;
    ``strict`` raises BackendError instead.
    """

    name = "inductor"
    exact = False

    def __init__(self, strict: bool = False) -> None:
        self._strict = strict
        self._failed = False

    def compile(self, module: fx.GraphModule, dynamic: tuple[int, ...] = ()) -> VariantFunction:
        if self._failed:
            return module.forward
        # The dispatcher calls a variant with the shapes it was captured for and with the model's own weights, so only
        # the guards on dynamic shapes can ever fail; checking hundreds of weights costs more than a skipped step.
        # Not the module itself: nn.Module.__call__ is patched in all threads while one of them traces.
        compiled = torch.compile(module.forward, fullgraph=True, options={"guard_filter_fn": _shape_guards})
        return _FirstCall(self, module, compiled, dynamic)

    def failed(self, error: Exception) -> None:
        reason = first_line(error)
        if self._strict:
            raise BackendError(f"Inductor could not compile a variant: {reason}") from error
        self._failed = True
        warnings.warn(
            f"Inductor could not compile a variant ({reason}); running under eager instead. Install a C++ compiler "
            "(Debian: apt-get install g++) or set CXX, or ask for backend='eager'.",
            RuntimeWarning,
            stacklevel=2,
        )


class _FirstCall:
    """Compiles at the first call, marking what is dynamic; afterwards it calls the compiled code."""

    def __init__(
        self, backend: InductorBackend, module: fx.GraphModule, compiled: Callable[..., Any], dynamic: tuple[int, ...]
    ) -> None:
        self._backend, self._module, self._compiled, self._dynamic = backend, module, compiled, dynamic
        self._ready = False

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        # Inductor builds strides into its code, and a caller's latent or expanded timestep may come with any.
        tensors = tuple(map(Tensor.contiguous, tensors))
        if self._ready:
            return tuple(self._compiled(*tensors))
        with COMPILING:
            return tuple(self._compiled(*tensors)) if self._ready else self._compile(tensors)

    def _compile(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        for position in self._dynamic:
            torch._dynamo.decorators.mark_unbacked(tensors[position], 1)
        try:
            # Equal token counts of two branches are a coincidence of this step, not a fact to build into the code.
            with shapes_config.patch(use_duck_shape=False):  # type: ignore[attr-defined]
                results = self._compiled(*tensors)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            self._backend.failed(error)
            self._compiled = self._module.forward
            results = self._compiled(*tensors)
        self._ready = True
        return tuple(results)


def _shape_guards(guards: list[Any]) -> list[bool]:
    return [guard.guard_type == "SHAPE_ENV" for guard in guards]


def make_backend(name: str, strict: bool) -> Backend:
    """Raises UsageError for an unknown name."""
    if name == "eager":
        return EagerBackend()
    if name == "inductor":
        return InductorBackend(strict)
    raise UsageError(f"backend={name!r} is unknown; choose one of {BACKENDS}")


def dynamic_positions(variant: Variant) -> tuple[int, ...]:
    return tuple(i for i, name in enumerate(variant.inputs) if name in variant.dynamic_inputs)
