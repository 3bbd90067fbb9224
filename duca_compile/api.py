"""``optimize`` and ``explain``: the stages wired together."""

from __future__ import annotations

import functools
import inspect
import logging
from collections import OrderedDict
from collections.abc import Hashable
from typing import Any

import torch
from torch import nn

from duca_compile.analysis import analyze
from duca_compile.backends import Backend, dynamic_positions, make_backend
from duca_compile.capture import Call, capture
from duca_compile.errors import PolicyError, UsageError
from duca_compile.graph import CapturedGraph, Facts, Variant, VariantFunction, VariantSpec
from duca_compile.passes.hoist import frontier, hoisted_input
from duca_compile.passes.pipeline import build_prologue, build_variant, prepare
from duca_compile.policies import FORA, DuCa, Policy, Uncached
from duca_compile.runtime.dispatcher import Dispatcher, Executed

log = logging.getLogger("duca_compile")

MAX_CAPTURES = 4  # shapes kept compiled at a time; the least recently used one goes first

POLICIES: dict[str, type[Policy]] = {"duca": DuCa, "fora": FORA, "uncached": Uncached}


class Compiled:
    """One captured shape: its graph, its facts, and the dispatcher that runs its variants."""

    def __init__(
        self, captured: CapturedGraph, facts: Facts, policy: Policy, total: int | None, backend: Backend
    ) -> None:
        self.captured, self.facts, self._backend = captured, facts, backend
        hoisted = tuple(hoisted_input(n.name) for n in frontier(captured.graph, facts))
        prologue = build_prologue(captured, facts)
        needed = tuple(n.name for n in prologue.graph.nodes if n.op == "placeholder")
        entry = (needed, hoisted, prologue.forward)
        self.dispatcher = Dispatcher(facts, captured.inputs, policy, total, self._build, entry)

    def _build(self, spec: VariantSpec) -> tuple[Variant, VariantFunction]:
        variant = build_variant(self.captured, self.facts, spec)
        return variant, self._backend.compile(variant.module, dynamic_positions(variant))


class OptimizedModel(nn.Module):
    """A drop-in for the model it was made from; see ``optimize``.

    It shares the source's parameter, buffer and submodule tables, so ``state_dict``, ``load_state_dict``, ``to`` and
    the like act on the source's own weights. Everything else that is asked of it is answered by the source.
    """

    def __init__(
        self, model: nn.Module, policy: Policy, backend: Backend, total: int | None, timestep: str | None
    ) -> None:
        super().__init__()
        self.__dict__.update({name: model.__dict__[name] for name in ("_parameters", "_buffers", "_modules")})
        own = {"source": model, "policy": policy, "_backend": backend, "_total": total, "_timestep": timestep}
        self.__dict__.update(own)
        self.__dict__["_signature"] = inspect.signature(model.forward)
        self.__dict__["_compiled"] = OrderedDict[Hashable, Compiled]()
        self.training = model.training
        forward = functools.partial(self._call)
        functools.update_wrapper(forward, model.forward)
        forward.__signature__ = self._signature  # type: ignore[attr-defined]
        self.__dict__["forward"] = forward

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["source"], name)

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        if self.source.training or self.training:
            raise UsageError(
                f"{type(self.source).__name__} is in training mode; caching changes gradients and dropout differs from "
                "call to call. Call .eval() first."
            )
        call = Call.bind(self._signature, args, kwargs)
        compiled = self._compiled.get(call.key) or self._capture(call)
        with torch.no_grad():
            return compiled.captured.output.rebuild(compiled.dispatcher(call.tensors))

    def _capture(self, call: Call) -> Compiled:
        if self._compiled:
            log.info("new shapes, types or options in the call: capturing %s anew", type(self.source).__name__)
        compiled = compile_call(self.source, call, self.policy, self._backend, self._total, self._timestep)
        while len(self._compiled) >= MAX_CAPTURES:
            self._compiled.popitem(last=False)
            log.info("dropping the oldest of %d captured shapes", MAX_CAPTURES)
        self._compiled[call.key] = compiled
        return compiled

    def reset(self) -> None:
        """Forgets all cached features: the next call starts a new request."""
        for compiled in self._compiled.values():
            compiled.dispatcher.reset()

    @property
    def cache_bytes(self) -> int:
        """Bytes held by the caches of the running request."""
        return sum(c.dispatcher.cache_bytes for c in self._compiled.values())

    @property
    def history(self) -> tuple[Executed, ...]:
        """The calls of the running (or last) request as they ran."""
        return tuple(each for c in self._compiled.values() for each in c.dispatcher.history)


def compile_call(
    model: nn.Module, call: Call, policy: Policy, backend: Backend, total: int | None, timestep: str | None
) -> Compiled:
    """Captures and analyses one call of ``model``; variants are built when a step first needs them."""
    captured = prepare(capture(model, call))
    return Compiled(captured, analyze(captured, timestep), policy, total, backend)


def resolve_policy(policy: str | Policy) -> Policy:
    """Raises PolicyError for an unknown name or something that is no policy."""
    if isinstance(policy, Policy):
        return policy
    if not isinstance(policy, str) or policy.lower() not in POLICIES:
        raise PolicyError(f"policy={policy!r} is unknown; pass a Policy object or one of {sorted(POLICIES)}")
    return POLICIES[policy.lower()]()


def optimize(
    model: nn.Module,
    policy: str | Policy = "duca",
    backend: str = "inductor",
    num_inference_steps: int | None = None,
    *,
    timestep: str | None = None,
    strict: bool = False,
) -> Any:
    """A drop-in for ``model`` that reuses features from step to step of a denoising loop.

    The model is captured at the first call, from its real arguments, and never modified. Steps are told apart by
    the timestep argument; a timestep that jumps back starts a new request, and so does ``reset()``.

    Args:
        model: a Diffusion Transformer in eval mode: any nn.Module that takes a latent and a timestep.
        policy: "duca", "fora", "uncached", or a Policy object such as ``DuCa(interval=5, fresh_ratio=0.1)``.
        backend: "inductor" (torch.compile) or "eager".
        num_inference_steps: steps of a request; needed by schedules that depend on it, and on an accelerator it
            spares reading the timestep's value from the device at every call.
        timestep: name of the timestep argument, where it cannot be told from the graph.
        strict: raise BackendError where the backend cannot compile, instead of falling back to eager with a warning.

    Returns:
        An ``OptimizedModel``: an nn.Module with the same call signature, outputs, config, dtype, device and
        state_dict keys.

    Raises:
        UsageError: ``model`` is not an nn.Module or is in training mode, or the backend is unknown.
        PolicyError: an unknown policy, or one that cannot plan without ``num_inference_steps``.
    """
    if not isinstance(model, nn.Module):
        raise UsageError(f"optimize() takes an nn.Module, not {type(model).__name__}; for a pipeline, its transformer")
    if isinstance(model, OptimizedModel):
        raise UsageError("this model is optimized already; optimize its .source with the other policy")
    if num_inference_steps is not None and num_inference_steps < 1:
        raise PolicyError(f"num_inference_steps={num_inference_steps} is impossible: it must be at least 1")
    chosen = resolve_policy(policy)
    next(chosen.steps(num_inference_steps))  # a policy that cannot plan says so now, not at the first call
    if model.training:
        raise UsageError(f"{type(model).__name__} is in training mode; call .eval() first")
    return OptimizedModel(model, chosen, make_backend(backend, strict), num_inference_steps, timestep)
