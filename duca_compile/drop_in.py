"""``OptimizedModel``: a module that takes the place of the model it was made from."""

from __future__ import annotations

import copy
import functools
import inspect
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from itertools import islice
from operator import is_
from typing import Any, NamedTuple, NoReturn, cast

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch._dynamo import OptimizedModule as CompiledModule
from torch.utils._pytree import tree_leaves

from duca_compile.backends.base import Backend
from duca_compile.compiler.analyze import analyze_call
from duca_compile.compiler.budget import CacheOptions, fitted
from duca_compile.compiler.captures import Captures
from duca_compile.compiler.checks import (
    DIFFUSERS_HOOKS,
    check_caching,
    check_model,
    check_no_gradients,
    check_no_transform,
)
from duca_compile.compiler.compiled import Compiled
from duca_compile.core.ir import CapturedGraph
from duca_compile.core.steps import StepKind
from duca_compile.errors import UsageError
from duca_compile.frontend import away, casts
from duca_compile.frontend.binder import Binder, Call
from duca_compile.frontend.capture import live_tensors
from duca_compile.frontend.reproduce import COMPILED, ROUNDING, apart, relative
from duca_compile.frontend.state import Held
from duca_compile.policies import Policy
from duca_compile.runtime.dispatcher import Plan
from duca_compile.runtime.planning import not_recomputed
from duca_compile.runtime.request import Request
from duca_compile.runtime.session import HasSessions, Requests, current_pass, named_pass

log = logging.getLogger("duca_compile")

LOOKED_AHEAD = 1000  # steps that a warm-up looks at for variants that they need
_SHARED = (  # tables that an optimized model has in common with its source
    "_parameters",
    "_buffers",
    "_modules",
    "_non_persistent_buffers_set",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
_READ_ONLY = {bool, int, float, str, bytes, type(None), torch.dtype, torch.device, torch.Size, Tensor, nn.Parameter}
_ACCELERATE = frozenset({"forward", "_old_forward", "_hf_hook"})  # what its hooks set, and put back


class _Guise(type):
    """Makes the type of an optimized model equal to its source's: diffusers' ``from_pipe`` compares types."""

    source_type: type | None = None

    def __eq__(cls, other: object) -> bool:
        return other is cls or (cls.source_type is not None and other is cls.source_type)

    __hash__ = type.__hash__


class _First(NamedTuple):
    """The tensors of the call that a capture was made of, and the leaves of what the model itself gave for it."""

    tensors: tuple[Tensor, ...]
    results: tuple[Any, ...]

    def is_given_by(self, call: Call, output: Any, exact: bool) -> bool:
        """Whether a full step of that very call has given it, but for rounding; of other calls nothing is known."""
        if len(call.tensors) != len(self.tensors) or not all(map(is_, call.tensors, self.tensors)):
            return True
        leaves = tree_leaves(output)
        return apart(self.results, leaves) <= ROUNDING or (not exact and relative(self.results, leaves) <= COMPILED)


class OptimizedModel(nn.Module, HasSessions, metaclass=_Guise):
    """A drop-in for the model it was made from; see ``optimize``.

    It shares the source's parameter, buffer and submodule tables, so ``state_dict``, ``load_state_dict``, ``to`` and
    the like act on the source's own weights. Everything that it does not have itself is read, set and deleted on the
    source, and ``isinstance`` takes it for one of the source's class. What wraps its ``forward`` is its own.
    """

    source: nn.Module
    policy: Policy
    timestep_name: str | None
    cache_options: CacheOptions
    _backend: Backend
    _requests: Requests
    _bind: Binder
    _compiled: Captures
    _told: bool  # whether it was said what partial steps cannot do
    _careful: bool  # whether a step was once not what the model gives, so that captures are made with all checks
    _first: _First | None  # of the last capture, until a step was compared with it

    def __new__(cls, model: nn.Module, *_: Any) -> OptimizedModel:
        source = type(model)
        names = {"source_type": source, "__module__": source.__module__}
        return super().__new__(cast(type[OptimizedModel], _Guise(cls.__name__, (cls,), names)))

    def __init__(
        self,
        model: nn.Module,
        policy: Policy,
        backend: Backend,
        requests: Requests,
        timestep: str | None,
        cache_options: CacheOptions,
    ) -> None:
        super().__init__()
        self.__dict__.update({name: model.__dict__[name] for name in _SHARED})
        own = {"source": model, "policy": policy, "_backend": backend, "_requests": requests, "timestep_name": timestep}
        self.__dict__.update(own, cache_options=cache_options)
        self.__dict__["_bind"] = Binder(model, timestep)
        self.__dict__["_compiled"] = Captures(model, self._capture)
        self.__dict__.update(_told=False, _careful=False, _first=None)
        self.training = model.training
        self._set_forward()

    def _set_forward(self) -> None:
        call = functools.partial(self._call)
        call.__name__ = "forward"  # type: ignore[attr-defined]  # asked for at every call
        forward = torch.compiler.disable(call)  # type: ignore[no-untyped-call]
        functools.update_wrapper(forward, self.source.forward)
        forward.__signature__ = self._bind.signature
        self.__dict__["forward"] = forward

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self.source)

    def __getattr__(self, name: str) -> Any:
        source = self.__dict__.get("source")
        if source is None:
            raise AttributeError(name)
        value = getattr(source, name)
        if type(value) not in _READ_ONLY and name != "config":  # through anything else the model can be changed
            self._touch()
        return value

    def _touch(self) -> None:
        compiled = self.__dict__.get("_compiled")
        if compiled is not None:
            compiled.touched = True

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        self._touch()
        yield from super().named_modules(*args, **kwargs)

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        self._touch()
        yield from super().named_children()

    def _is_own(self, name: str) -> bool:
        """Whether ``name`` is set here: where it would be found here. All else is set where forward reads it."""
        mine, source = self.__dict__, self.__dict__.get("source")
        if source is None:  # this is nn.Module's own start
            return True
        if name in _ACCELERATE:  # whose hook it is, the source's or that of this model, is told by the saved forward
            return "_old_forward" in mine or "_old_forward" not in vars(source)
        if name == DIFFUSERS_HOOKS:
            return name in mine or name not in vars(source)
        return name in mine or (hasattr(OptimizedModel, name) and name != "__class__")

    def __setattr__(self, name: str, value: Any) -> None:
        if self._is_own(name):
            super().__setattr__(name, value)
        else:
            setattr(self.source, name, value)
            self._touch()

    def __delattr__(self, name: str) -> None:
        if name not in self.__dict__:
            delattr(self.source, name)
            self._touch()
            return
        super().__delattr__(name)
        if name == "forward":
            self._set_forward()

    def train(self, mode: bool = True) -> OptimizedModel:
        self.source.train(mode)
        self.training = mode
        return self

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        source = self.source
        check_model(source)
        if away.has_hooks(source):
            args, kwargs = away.entered(source, args, kwargs)
            return away.left(source, self._run(self._bind(args, kwargs)))
        return self._run(self._bind(args, kwargs))

    def _run(self, call: Call) -> Any:
        if records := torch.is_grad_enabled():
            check_no_gradients(call.tensors)
        check_no_transform()
        compiled = self._compiled.find(call)
        request, called = self._requests.current(), current_pass(self)
        name, step = (None, None) if called is None else (called.name, called.step_index)
        try:
            named = compiled.named(call.tensors)
            tick = request.tick(compiled.facts, named, name, step)
            if tick.new_request:
                compiled = self._compiled.find_anew(call)
                named = compiled.named(call.tensors)
                request.captured(compiled.facts)
            if (captured := compiled.captured).casts or torch.is_inference_mode_enabled():
                with _outside_of_modes(captured):
                    output = compiled.run(request, tick, named, name)
            elif records:
                with torch.no_grad():
                    output = compiled.run(request, tick, named, name)
            else:
                output = compiled.run(request, tick, named, name)
        except BaseException:
            request.reset()
            raise
        first = self._first
        if first is None:
            return output
        self.__dict__["_first"] = None
        if request.history[-1].kind is not StepKind.FULL or first.is_given_by(call, output, self._backend.exact):
            return output
        return self._again_with_care(compiled, request, call)

    def _again_with_care(self, compiled: Compiled, request: Request, call: Call) -> Any:
        """The call, whose first step was not what the model itself gives: captured anew, now with all checks."""
        log.info("%s: a step does not give its results; capturing it with all checks", type(self.source).__name__)
        self.__dict__["_careful"] = True
        request.reset()
        self._compiled.forget(compiled)
        return self._run(call)

    def warm_up(self, *args: Any, **kwargs: Any) -> None:
        """Captures this kind of call and compiles every variant that the policy needs, so that no request waits for it.

        Takes the arguments of one call of the model. Shows its progress on a terminal. No request is touched.

        Raises:
            DucaError: what the call itself would raise.
        """
        check_model(self.source)
        call = self._bind(args, kwargs)
        compiled, requests = self._compiled.find_anew(call), self._requests
        steps = self.policy.planned(requests.total)
        console = Console(stderr=True)

        def watch(plans: Sequence[Plan]) -> Iterable[Plan]:
            return track(plans, f"compiling {type(self.source).__name__}", console=console, transient=True)

        with torch.no_grad(), casts.none_for(compiled.captured):
            call_by_name = compiled.named(call.tensors)
            held = Held(self.source) if compiled.captured.opaque else None
            compiled.dispatcher.warm_up(requests.new(), call_by_name, islice(steps, LOOKED_AHEAD), watch)
            if held is not None:
                held.put_back()

    def _capture(self, call: Call, known: Mapping[str, str]) -> Compiled:
        with self._source_context():
            captured, facts, prologue = analyze_call(self.source, call, self.timestep_name, known, self._careful)
        self.__dict__["_first"] = None if self._careful else _First(call.tensors, captured.results)
        captured = replace(captured, results=())
        limit = not_recomputed(facts, self.policy)
        if limit is not None and not self._told:
            self.__dict__["_told"] = True
            log.warning("%s: %s", type(self.source).__name__, limit)
        policy, dtype = fitted(captured, facts, self.policy, self.cache_options, self._requests.total)
        return Compiled(captured, facts, prologue, policy, self._backend, live_tensors(self.source), dtype)

    def _source_context(self) -> AbstractContextManager[None]:
        """The source's own ``cache_context``: capturing is the only time that the source itself runs."""
        named, own = current_pass(self), getattr(self.source, "cache_context", None)
        if named is None or own is None:
            return nullcontext()
        options = dict(named.options)
        if not _takes(own, "step_index"):
            options.pop("step_index", None)
        return cast(AbstractContextManager[None], own(named.name, **options))

    def cache_context(self, name: str, **options: Any) -> AbstractContextManager[None]:
        """Calls inside, ``with model.cache_context("cond"):``, are of the pass called ``name``, with caches of its own.

        As in diffusers, whose pipelines use it; ``options`` go to the source's own ``cache_context``. One of them says
        at which step the calls are: ``step_index``, counted from 0 at the loop's start, or None where the timestep is
        to tell. One that is smaller than the last starts a request.

        Raises:
            UsageError: when it is entered, if ``step_index`` is neither None nor a whole number from 0 on.
        """
        return named_pass(self, name, options)

    def __deepcopy__(self, memo: dict[int, Any]) -> OptimizedModel:
        """An optimized copy of the source, which captures anew."""
        source, requests = copy.deepcopy(self.source, memo), copy.deepcopy(self._requests, memo)
        return OptimizedModel(source, self.policy, self._backend, requests, self.timestep_name, self.cache_options)

    def __copy__(self) -> OptimizedModel:
        """Another optimized model of the same source, with requests of its own, which captures anew."""
        requests = copy.deepcopy(self._requests)
        return OptimizedModel(self.source, self.policy, self._backend, requests, self.timestep_name, self.cache_options)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise UsageError(
            "an optimized model cannot be pickled or saved whole, since it holds compiled code; "
            "save duca_compile.restore(model), or its state_dict(), and optimize what is loaded"
        )


@contextmanager
def _outside_of_modes(captured: CapturedGraph) -> Iterator[None]:
    """Recording neither gradients nor inference tensors, which nobody could write to outside of inference mode."""
    with torch.inference_mode(False), torch.no_grad(), casts.none_for(captured):
        yield


def _takes(function: Callable[..., Any], name: str) -> bool:
    """Whether it takes an argument of that name."""
    parameters = inspect.signature(function).parameters.values()
    return any(each.name == name or each.kind is each.VAR_KEYWORD for each in parameters)


def check_plain(model: Any) -> None:
    check_model(model, "an nn.Module or a diffusers pipeline")
    if isinstance(model, OptimizedModel):
        raise UsageError("this model is optimized already; duca_compile.restore it first")
    check_parts(model)
    check_caching(model)


def check_parts(model: nn.Module) -> None:
    """Raises UsageError where it is compiled, or a submodule is an optimized model, whose state no trace can hold."""
    if isinstance(model, CompiledModule):
        raise UsageError(
            f"this is what torch.compile made of a {type(model._orig_mod).__name__}; pass the model itself, which is "
            "its attribute _orig_mod: duca_compile compiles what it makes of it"
        )
    inner = next((path for path, part in model.named_modules() if isinstance(part, OptimizedModel)), None)
    if inner is not None:
        raise UsageError(
            f"{type(model).__name__}.{inner} is an optimized model; "
            "put duca_compile.restore of it there to optimize the whole, or leave the whole as it is"
        )
