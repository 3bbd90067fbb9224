"""``OptimizedModel``: a module that takes the place of the model it was made from."""

from __future__ import annotations

import copy
import functools
import inspect
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from itertools import islice
from operator import is_
from types import MethodType
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
from duca_compile.compiler.captures import CaptureCache
from duca_compile.compiler.checks import (
    DIFFUSERS_HOOKS,
    check_caching,
    check_model,
    check_no_gradients,
    check_no_transform,
)
from duca_compile.compiler.compiled import Compiled
from duca_compile.core.ir import CapturedGraph
from duca_compile.core.once import Once
from duca_compile.core.steps import StepKind
from duca_compile.errors import CaptureError, StructureError, UsageError
from duca_compile.frontend import casts, offloading
from duca_compile.frontend.binder import Binder, Call
from duca_compile.frontend.capture import live_tensors
from duca_compile.frontend.methods import FORWARD, calls_forward, runs_blocks, with_step
from duca_compile.frontend.side_effects import ModelState
from duca_compile.frontend.trace_check import COMPILED_TOLERANCE, MAX_ULPS, relative_distance, ulp_distance
from duca_compile.frontend.wrappers import WrapperError, networks, standing_in
from duca_compile.policies import Auto, Policy
from duca_compile.runtime.dispatcher import StepPlan
from duca_compile.runtime.planning import not_recomputed
from duca_compile.runtime.request import Request
from duca_compile.runtime.session import HasSessions, Requests, current_pass, named_pass

log = logging.getLogger("duca_compile")

WARM_UP_HORIZON = 1000  # a warm-up compiles the variants that this many steps need
_SHARED = (  # tables that an optimized model shares with its source
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
_ACCELERATE = frozenset({"forward", "_old_forward", "_hf_hook"})  # attributes that its hooks set and restore


class _EqualToSource(type):
    """Makes the type of an optimized model equal to its source's: diffusers' ``from_pipe`` compares types."""

    source_type: type | None = None

    def __eq__(cls, other: object) -> bool:
        return other is cls or (cls.source_type is not None and other is cls.source_type)

    __hash__ = type.__hash__


class _EagerRun(NamedTuple):
    """The tensors of the call that was captured, and the leaves of the results that the model itself gave for it."""

    tensors: tuple[Tensor, ...]
    results: tuple[Any, ...]

    def is_consistent_with(self, call: Call, output: Any, exact: bool) -> bool:
        """Whether a full step gave the model's results, up to rounding; True for another call."""
        if len(call.tensors) != len(self.tensors) or not all(map(is_, call.tensors, self.tensors)):
            return True
        leaves = tree_leaves(output)
        if ulp_distance(self.results, leaves) <= MAX_ULPS:
            return True
        return not exact and relative_distance(self.results, leaves) <= COMPILED_TOLERANCE


class _Around(NamedTuple):
    """A wrapper's networks, optimized, by their names; and why the wrapper's own forward is no graph."""

    parts: dict[str, OptimizedModel]
    reason: WrapperError

    def fit(self, callee: nn.Module) -> bool:
        """Whether these are still the wrapper's networks."""
        return all(callee._modules.get(name) is part.source for name, part in self.parts.items())


class OptimizedModel(nn.Module, HasSessions, metaclass=_EqualToSource):
    """A drop-in for the model it was made from; see ``optimize``.

    It shares the source's tables of parameters, buffers and submodules, so ``state_dict``, ``load_state_dict``, ``to``
    and the like act on the source's own weights. Attributes that it does not have itself are read, set and deleted on
    the source, and ``isinstance`` takes it for an instance of the source's class. A wrapper around its ``forward``
    belongs to it alone. Methods of the source that call forward run on it, so that their steps are cached too.
    """

    source: nn.Module
    callee: nn.Module  # whose forward is the step: the source, or what has another of its methods as forward
    method: str  # of the source, that is the step
    policy: Policy
    timestep_name: str | None
    latent_name: str | None
    cache_options: CacheOptions
    _backend: Backend
    _requests: Requests
    _bind: Binder
    _compiled: CaptureCache
    _warned: Once
    _careful: bool  # whether a step's results once differed from the model's, so that captures run all checks
    _unverified: _EagerRun | None  # that of the last capture, until a step was compared with it
    _captures_of: OptimizedModel | None  # another drop-in of the source, whose captures this one uses
    _around: _Around | None  # where the source is a wrapper that no graph holds: what is cached instead

    def __new__(cls, model: nn.Module, *_: Any, **__: Any) -> OptimizedModel:
        source = type(model)
        names = {"source_type": source, "__module__": source.__module__}
        return super().__new__(cast(type[OptimizedModel], _EqualToSource(cls.__name__, (cls,), names)))

    def __init__(
        self,
        model: nn.Module,
        policy: Policy,
        backend: Backend,
        requests: Requests,
        timestep: str | None,
        cache_options: CacheOptions,
        method: str = FORWARD,
        latent: str | None = None,
    ) -> None:
        callee = with_step(model, method)
        super().__init__()
        self.__dict__.update({name: model.__dict__[name] for name in _SHARED})
        self.__dict__.update(source=model, policy=policy, timestep_name=timestep, cache_options=cache_options)
        self.__dict__.update(callee=callee, method=method, latent_name=latent)
        self.__dict__.update(_backend=backend, _requests=requests, _bind=Binder(callee, timestep))
        self.__dict__.update(_compiled=CaptureCache(callee, self._capture))
        self.__dict__.update(_warned=Once(), _careful=False, _unverified=None, _captures_of=None, _around=None)
        self.training = model.training
        self._set_forward()

    def _set_forward(self) -> None:
        call = functools.partial(self._call)
        call.__name__ = "forward"  # type: ignore[attr-defined]  # asked for at every call
        forward = torch.compiler.disable(call)  # type: ignore[no-untyped-call]
        functools.update_wrapper(forward, self.callee.forward)
        forward.__signature__ = self._bind.signature
        self.__dict__[self.method] = forward
        if self.method != FORWARD:  # which may call the step, and is else the source's own
            self.__dict__[FORWARD] = MethodType(type(self.source).forward, self)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self.source)

    def __getattr__(self, name: str) -> Any:
        source = self.__dict__.get("source")
        if source is None:
            raise AttributeError(name)
        value = getattr(source, name)
        method = value if type(value) is MethodType and value.__self__ is source else None
        if method is not None and calls_forward(method):  # it changes things through this model
            return MethodType(method.__func__, self)
        if type(value) not in _READ_ONLY and name != "config":  # the caller may change the model through any other
            self._touch()
        return value if method is None or not runs_blocks(method) else self._with_warning(method)

    def _with_warning(self, method: MethodType) -> Callable[..., Any]:
        """A method of the source that runs blocks itself, which are not cached."""

        @functools.wraps(method)
        def with_warning(*args: Any, **kwargs: Any) -> Any:
            if any(isinstance(leaf, Tensor) for leaf in tree_leaves((args, kwargs))):
                self._warn_uncached(method.__name__)
            return method(*args, **kwargs)

        return with_warning

    def _warn_uncached(self, method: str) -> None:
        if self._warned.first(method):
            log.warning(
                "%s.%s runs without caches: %s is what is optimized. If a sampler calls it at each step, say "
                "optimize(model, ..., method=%r)",
                type(self.source).__name__,
                method,
                self.method,
                method,
            )

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
        """Whether setting ``name`` sets it here, since it is found here. Others are set on the source, as forward's."""
        attributes, source = self.__dict__, self.__dict__.get("source")
        if source is None:  # within nn.Module.__init__
            return True
        if name in _ACCELERATE:  # the saved forward tells whether the hook is the source's or this model's
            return "_old_forward" in attributes or "_old_forward" not in vars(source)
        if name == DIFFUSERS_HOOKS:
            return name in attributes or name not in vars(source)
        return name in attributes or (hasattr(OptimizedModel, name) and name != "__class__")

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
        if offloading.has_hooks(source):
            args, kwargs = offloading.before_call(source, args, kwargs)
            return offloading.after_call(source, self._step(self._bind(args, kwargs)))
        return self._step(self._bind(args, kwargs))

    def _step(self, call: Call) -> Any:
        if self._around is None:
            try:
                return self._run(call)
            except WrapperError as error:
                self._go_around(error)
        return self._run_around(call)

    def _go_around(self, reason: WrapperError) -> None:
        """Optimizes the networks of a wrapper, whose own forward will run as it is."""
        names = networks(self.callee)
        if not names:
            raise reason
        self.__dict__["_around"] = _Around({name: self._part(self.callee._modules[name]) for name in names}, reason)

    def _part(self, network: nn.Module | None) -> OptimizedModel:
        assert network is not None
        timestep = self.timestep_name if _takes(network.forward, self.timestep_name) else None
        latent = self.latent_name if _takes(network.forward, self.latent_name) else None
        options = timestep, self.cache_options, FORWARD, latent
        return OptimizedModel(network, self.policy, self._backend, self._requests, *options)

    def _run_around(self, call: Call) -> Any:
        """Runs a wrapper's forward with its networks optimized."""
        around = self._around
        if around is None or not around.fit(self.callee):
            self.__dict__["_around"] = None
            return self._step(call)
        if torch.is_grad_enabled():
            check_no_gradients(call.tensors)
        check_no_transform()
        called = current_pass(self)
        with torch.no_grad(), standing_in(self.callee, around.parts) as wrapper, ExitStack() as passes:
            if called is not None:
                for part in around.parts.values():
                    passes.enter_context(named_pass(part, called.name, called.options))
            try:
                output = wrapper(**call.arguments)
            except (CaptureError, StructureError) as error:
                if any(part._compiled.values() for part in around.parts.values()):
                    raise
                self.__dict__["_around"] = None
                raise around.reason from error
        if self._warned.first("wrapper"):
            names = " and ".join(around.parts)
            log.info("%s runs as it is, and %s is cached: %s", type(self.source).__name__, names, around.reason)
        return output

    def _run(self, call: Call) -> Any:
        if records := torch.is_grad_enabled():
            check_no_gradients(call.tensors)
        check_no_transform()
        compiled = self._compiled.find(call)
        request, called = self._requests.current(), current_pass(self)
        name, step = (None, None) if called is None else (called.name, called.step_index)
        try:
            named = compiled.named(call.tensors)
            position = request.locate(compiled.facts, named, name, step)
            if position.new_request:
                compiled = self._compiled.find_revalidated(call)
                named = compiled.named(call.tensors)
                request.captured(compiled.facts)
            if (captured := compiled.captured).explicit_casts or torch.is_inference_mode_enabled():
                with _outside_of_modes(captured):
                    output = compiled.run(request, position, named, name)
            elif records:
                with torch.no_grad():
                    output = compiled.run(request, position, named, name)
            else:
                output = compiled.run(request, position, named, name)
        except BaseException:
            request.reset()
            raise
        run = self._unverified
        if run is not None:
            self.__dict__["_unverified"] = None
            is_full = request.history[-1].kind is StepKind.FULL
            if is_full and not run.is_consistent_with(call, output, self._backend.exact):
                return self._recapture_with_checks(compiled, request, call)
        return output if not captured.writes else _with_writes_made(captured, call, output)

    def _recapture_with_checks(self, compiled: Compiled, request: Request, call: Call) -> Any:
        """Runs the call again, captured anew with all checks, since its step did not give the model's results."""
        log.info(
            "%s: a step does not give the model's results; capturing it again with all checks",
            type(self.source).__name__,
        )
        self.__dict__["_careful"] = True
        request.reset()
        self._compiled.forget(compiled)
        return self._run(call)

    def warm_up(self, *args: Any, **kwargs: Any) -> None:
        """Captures this kind of call and compiles every variant that the policy needs, so that no request waits for it.

        Takes the arguments of one call of the model, and shows progress on a terminal. Requests and their caches stay
        as they are.

        Raises:
            DucaError: what the call itself would raise.
        """
        check_model(self.source)
        call = self._bind(args, kwargs)
        compiled, requests = self._compiled.find_revalidated(call), self._requests
        steps = self.policy.to_compile(requests.total)
        console = Console(stderr=True)

        def watch(plans: Sequence[StepPlan]) -> Iterable[StepPlan]:
            return track(plans, f"compiling {type(self.source).__name__}", console=console, transient=True)

        with torch.no_grad(), casts.without_autocast(compiled.captured):
            call_by_name = compiled.named(call.tensors)
            state = ModelState(self.source) if compiled.captured.opaque else None
            compiled.dispatcher.warm_up(requests.new(), call_by_name, islice(steps, WARM_UP_HORIZON), watch)
            if state is not None:
                state.put_back()

    def learnt(self) -> Auto:
        """The policy "auto" with what its requests have learnt so far, of all models of the pipeline.

        It can be saved, and passed to ``optimize`` in place of "auto", also in another process; ``known`` lists it by
        the kind of request.

        Raises:
            UsageError: the model has another policy.
        """
        learner = self._requests.learner
        if learner is None:
            raise UsageError(f'{self.policy.name} learns nothing: optimize the model with policy="auto"')
        return learner.policy()

    def _capture(self, call: Call, known: Mapping[str, str]) -> Compiled:
        if self._captures_of is not None:
            return self._captures_of._compiled.find_revalidated(call).with_policy(self.policy)
        with self._source_context():
            captured, facts, prologue = analyze_call(
                self.callee,
                call,
                self.timestep_name,
                self.latent_name,
                known=known,
                careful=self._careful,
                exact=self._backend.exact,
            )
        self.__dict__["_unverified"] = None if self._careful else _EagerRun(call.tensors, captured.eager_results)
        captured = replace(captured, eager_results=())
        limit = not_recomputed(facts, self.policy)
        if limit is not None and self._warned.first("partial steps"):
            log.warning("%s: %s", type(self.source).__name__, limit)
        policy, dtype = fitted(captured, facts, self.policy, self.cache_options, self._requests.total)
        live, budget = live_tensors(self.source), self.cache_options.budget
        return Compiled(captured, facts, prologue, policy, self._backend, live, dtype, self._warned, budget)

    def _source_context(self) -> AbstractContextManager[None]:
        """The source's own ``cache_context``, entered for capturing, which is the only time that the source runs."""
        guidance_pass, enter = current_pass(self), getattr(self.source, "cache_context", None)
        if guidance_pass is None or enter is None:
            return nullcontext()
        options = dict(guidance_pass.options)
        if not _takes(enter, "step_index"):
            options.pop("step_index", None)
        return cast(AbstractContextManager[None], enter(guidance_pass.name, **options))

    def __deepcopy__(self, memo: dict[int, Any]) -> OptimizedModel:
        """An optimized copy of the source, without captures."""
        source, requests = copy.deepcopy(self.source, memo), copy.deepcopy(self._requests, memo)
        return self._another(source, requests)

    def __copy__(self) -> OptimizedModel:
        """Another optimized model of the same source, with requests of its own and without captures."""
        requests = copy.deepcopy(self._requests)
        return self._another(self.source, requests)

    def _another(self, source: nn.Module, requests: Requests) -> OptimizedModel:
        options = self.timestep_name, self.cache_options, self.method, self.latent_name
        return OptimizedModel(source, self.policy, self._backend, requests, *options)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise UsageError(
            "an optimized model cannot be pickled or saved as a whole, since it holds compiled code; "
            "save duca_compile.restore(model), or its state_dict(), and optimize the model that is loaded"
        )


def _with_writes_made(captured: CapturedGraph, call: Call, output: Any) -> Any:
    """The model's result, after what forward writes to its arguments was written to those of the call."""
    result, values = output
    for write, value in zip(captured.writes, values, strict=True):
        write.put(call.given, value)
    return result


def sharing_captures(model: OptimizedModel, policy: Policy, requests: Requests) -> OptimizedModel:
    """A drop-in of the same source for another policy. It uses the captures of ``model``, and what they compiled.

    Args:
        model: whose captures are used.
        policy: the other policy, without a trained predictor.
        requests: made for that policy.
    """
    options = model.timestep_name, model.cache_options, model.method, model.latent_name
    other = OptimizedModel(model.source, policy, model._backend, requests, *options)
    other.__dict__["_captures_of"] = model
    return other


@contextmanager
def _outside_of_modes(captured: CapturedGraph) -> Iterator[None]:
    """Turns off gradients, and inference mode, whose tensors could not be written to at a later step outside of it."""
    with torch.inference_mode(False), torch.no_grad(), casts.without_autocast(captured):
        yield


def _takes(function: Callable[..., Any], name: str | None) -> bool:
    """Whether the function accepts an argument of that name; None is no name."""
    parameters = inspect.signature(function).parameters.values()
    return any(each.name == name or each.kind is each.VAR_KEYWORD for each in parameters)


def check_plain(model: Any) -> None:
    """Raises UsageError where ``model`` cannot be optimized in its present state."""
    check_model(model, "an nn.Module or a diffusers pipeline")
    if isinstance(model, OptimizedModel):
        raise UsageError("this model is optimized already; call duca_compile.restore on it first")
    check_parts(model)
    check_caching(model)


def check_parts(model: nn.Module) -> None:
    """Raises UsageError where ``model`` is compiled, or a submodule is an optimized model: no trace holds its state."""
    if isinstance(model, CompiledModule):
        raise UsageError(
            f"this is a {type(model._orig_mod).__name__} compiled by torch.compile; pass the original model, its "
            "attribute _orig_mod: duca_compile compiles the graphs that it derives"
        )
    inner = next((path for path, part in model.named_modules() if isinstance(part, OptimizedModel)), None)
    if inner is not None:
        raise UsageError(
            f"{type(model).__name__}.{inner} is an optimized model; "
            "put duca_compile.restore of it there to optimize the whole model, or do not optimize the whole"
        )
