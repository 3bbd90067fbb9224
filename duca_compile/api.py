"""``optimize`` and ``explain``: the stages wired together."""

from __future__ import annotations

import copy
import functools
import logging
from collections import OrderedDict
from collections.abc import Hashable
from typing import Any

import torch
from torch import nn

from duca_compile.analysis import analyze
from duca_compile.backends import Backend, dynamic_positions, make_backend
from duca_compile.capture import Call, capture, signature_of
from duca_compile.errors import CaptureError, PolicyError, UsageError
from duca_compile.graph import CapturedGraph, Facts, Variant, VariantFunction, VariantSpec
from duca_compile.passes.hoist import frontier, hoisted_input
from duca_compile.passes.pipeline import build_prologue, build_variant, prepare
from duca_compile.policies import FORA, DuCa, Policy, Uncached
from duca_compile.policies.checks import check_whole
from duca_compile.runtime.dispatcher import Dispatcher, Prologue
from duca_compile.runtime.request import Executed, Request
from duca_compile.verify import verified

log = logging.getLogger("duca_compile")

MAX_CAPTURES = 4  # shapes kept compiled at a time; the least recently used one goes first

POLICIES: dict[str, type[Policy]] = {"duca": DuCa, "fora": FORA, "uncached": Uncached}


class Compiled:
    """One captured call: its graph, its facts, and the dispatcher that runs its variants."""

    def __init__(
        self, captured: CapturedGraph, facts: Facts, prologue: Prologue, policy: Policy, backend: Backend
    ) -> None:
        self.captured, self.facts, self._backend = captured, facts, backend
        self.dispatcher = Dispatcher(facts, captured.inputs, policy, self._build, prologue)

    def _build(self, spec: VariantSpec) -> tuple[Variant, VariantFunction]:
        variant = build_variant(self.captured, self.facts, spec)
        return variant, self._backend.compile(variant.module, dynamic_positions(variant))


def _prologue(captured: CapturedGraph, facts: Facts) -> Prologue:
    module = build_prologue(captured, facts)
    inputs = tuple(n.name for n in module.graph.nodes if n.op == "placeholder")
    outputs = tuple(hoisted_input(n.name) for n in frontier(captured.graph, facts))
    return Prologue(inputs, outputs, module.forward)


def analyze_call(model: nn.Module, call: Call, timestep: str | None) -> tuple[CapturedGraph, Facts, Prologue]:
    """Captures one call of ``model`` and finds its structure; the token analysis is checked on the call's values."""
    devices = [tensor.device for tensor in call.tensors if tensor.device.type == "cuda"]
    with torch.no_grad(), torch.random.fork_rng(devices):  # the caller's random numbers are not drawn here
        captured = prepare(capture(model, call))
        facts = analyze(captured, timestep)
        if readers := changing_reads(model, captured, facts):
            captured = prepare(capture(model, call, readers))
            facts = analyze(captured, timestep)
            changing_reads(model, captured, facts)
        prologue = _prologue(captured, facts)
        values = dict(zip(captured.inputs, call.tensors, strict=True))
        return captured, verified(captured, facts, values | prologue.compute(values)), prologue


def changing_reads(model: nn.Module, captured: CapturedGraph, facts: Facts) -> frozenset[str]:
    """Paths of the submodules whose Python reads values that change from step to step, which no trace can hold.

    Raises:
        CaptureError: the model's own forward does; names the line.
    """
    reads = {name: captured.given[name] for name in facts.changing if name in captured.given}
    for name, read in reads.items():
        if "" in read.paths:
            raise CaptureError(
                f"{type(model).__name__}.forward reads a value that depends on {name!r} at {read.source}. It changes "
                "from step to step, so no graph can hold what follows from it. Compute it before the loop and pass it "
                "as an argument, or move that line to a submodule, which then runs as it is, as one operator."
            )
    return frozenset[str]().union(*(read.paths for read in reads.values()))


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
        own = {"source": model, "policy": policy, "_backend": backend, "_total": total, "timestep_name": timestep}
        self.__dict__.update(own)
        self.__dict__["_signature"] = signature_of(model)
        self.__dict__["_compiled"] = OrderedDict[Hashable, Compiled]()
        self.__dict__["_request"] = Request(policy, total)
        self.training = model.training
        forward = functools.partial(self._call)
        functools.update_wrapper(forward, model.forward)
        forward.__signature__ = self._signature  # type: ignore[attr-defined]
        self.__dict__["forward"] = forward

    def __getattr__(self, name: str) -> Any:
        source = self.__dict__.get("source")
        if source is None:
            raise AttributeError(name)
        return getattr(source, name)

    def train(self, mode: bool = True) -> OptimizedModel:
        self.source.train(mode)
        self.training = mode
        return self

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        check_model(self.source)
        call = Call.bind(self._signature, args, kwargs, self.timestep_name)
        key = (call.key, self._weights_key())
        compiled = self._compiled.get(key) or self._capture(call, key)
        self._compiled.move_to_end(key)
        with torch.no_grad():
            number = self._request.number
            outputs = compiled.dispatcher(self._request, call.tensors)
            if self._request.number != number:  # the other shapes' caches are of the request before
                self._forget(keep=compiled)
            return compiled.captured.output.rebuild(outputs)

    def _forget(self, keep: Compiled | None = None) -> None:
        for compiled in self._compiled.values():
            if compiled is not keep:
                compiled.dispatcher.forget()

    def _weights_key(self) -> Hashable:
        """Changes with ``to()``, which keeps parameters as objects but makes new buffers."""
        first = next(self.source.parameters(), None)
        kind = None if first is None else (first.dtype, first.device)
        return kind, id(next(self.source.buffers(), None))

    def _capture(self, call: Call, key: Hashable) -> Compiled:
        if self._compiled:
            log.info("new shapes, types or options in the call: capturing %s anew", type(self.source).__name__)
        compiled = Compiled(*analyze_call(self.source, call, self.timestep_name), self.policy, self._backend)
        while len(self._compiled) >= MAX_CAPTURES:
            self._compiled.popitem(last=False)
            log.info("dropping the least recently used of %d captured shapes", MAX_CAPTURES)
        self._compiled[key] = compiled
        return compiled

    def reset(self) -> None:
        """Forgets all cached features: the next call starts a new request."""
        self._request.reset()
        self._forget()

    @property
    def cache_bytes(self) -> int:
        """Bytes held by the caches of the running request."""
        return sum(c.dispatcher.cache_bytes for c in self._compiled.values())

    @property
    def history(self) -> tuple[Executed, ...]:
        """The calls of the running (or last) request as they ran."""
        return tuple(self._request.history)

    def __deepcopy__(self, memo: dict[int, Any]) -> OptimizedModel:
        """An optimized copy of the source, which captures anew."""
        source = copy.deepcopy(self.source, memo)
        return OptimizedModel(source, self.policy, self._backend, self._total, self.timestep_name)


def check_model(model: nn.Module) -> None:
    """Raises UsageError for anything but an nn.Module in eval mode."""
    if not isinstance(model, nn.Module):
        raise UsageError(f"expected an nn.Module, not {type(model).__name__}; of a pipeline, pass its transformer")
    if model.training:
        raise UsageError(f"{type(model).__name__} is in training mode, where dropout is on; call .eval() first")


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
        num_inference_steps: steps of a request; needed by schedules that depend on it.
        timestep: name of the timestep argument, where it cannot be told from the graph.
        strict: raise BackendError where the backend cannot compile, instead of falling back to eager with a warning.

    Returns:
        An ``OptimizedModel``: an nn.Module with the same call signature, outputs, config, dtype, device and
        state_dict keys.

    Raises:
        UsageError: ``model`` is not an nn.Module or is in training mode, or the backend is unknown.
        PolicyError: an unknown policy, or one that cannot plan without ``num_inference_steps``.
    """
    check_model(model)
    if isinstance(model, OptimizedModel):
        raise UsageError("this model is optimized already; optimize its .source with the other policy")
    if num_inference_steps is not None:
        check_whole("num_inference_steps", num_inference_steps, least=1)
    chosen = resolve_policy(policy)
    next(chosen.steps(num_inference_steps))  # a policy that cannot plan says so now, not at the first call
    return OptimizedModel(model, chosen, make_backend(backend, strict), num_inference_steps, timestep)
