"""Runs an artifact: a folder that ``duca_compile.save`` wrote. Needs neither torch nor the compiler."""

from __future__ import annotations

import sys
import threading
from contextlib import AbstractContextManager
from typing import Any

from duca_compile.artifact.binder import Binder, like_call, result
from duca_compile.artifact.engines.base import Engine
from duca_compile.artifact.manifest import Manifest
from duca_compile.artifact.planner import Planner, Prologue, Recorded
from duca_compile.policies.base import Policy
from duca_compile.runtime.dispatcher import Dispatcher
from duca_compile.runtime.planning import check_pairs
from duca_compile.runtime.session import HasSessions, Requests, current_pass, named_pass


class Config(dict[str, Any]):
    """A config whose entries are attributes too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class Artifact(HasSessions):
    """A model that was exported: called like it, with numpy arrays or torch tensors, and returns what it is given.

    Steps, passes and requests are told apart as by an optimized model. Threads have requests of their own, and so have
    sessions. The result has the model's structure: fields by name and by place.

    Attributes:
        manifest: what the folder holds.
        policy: the steps, as they were recorded, or the policy itself, where it decides while it runs.
    """

    def __init__(self, found: Manifest, engine: Engine) -> None:
        self.manifest, self._engine = found, engine
        rule = found.policy.rule
        self.policy: Policy = Recorded(found.policy, found.schedule) if rule is None else rule.rebuilt()
        self._functions = {name: engine.function(name, graph) for name, graph in found.graphs.items()}
        self._prologue = Prologue(found, self._functions[found.prologue])
        self._requests = Requests(self.policy, found.schedule.num_inference_steps)
        self._bind = Binder(found)
        self._dispatchers: dict[int, Dispatcher] = {}  # by batch size
        self._lock = threading.Lock()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """One call of the model.

        Raises:
            UsageError: the arguments are not of the kinds that were exported; names the argument.
            PolicyError: pairs of rows are to decide together, and their number is odd.
        """
        call, batch = self._bind(args, kwargs)
        dispatcher, request, called = self._dispatcher(batch), self._requests.current(), current_pass(self)
        name, step = (None, None) if called is None else (called.name, called.step_index)
        try:
            tick = request.tick(self.manifest.signature, call, name, step)
            outputs = dispatcher(request, tick, call, name)
        except BaseException:
            request.reset()
            raise
        return result(self.manifest.signature.result, [like_call(output, call) for output in outputs])

    def _dispatcher(self, batch: int) -> Dispatcher:
        found = self._dispatchers.get(batch)
        if found is None:
            check_pairs(self.policy, batch)
            with self._lock:
                planner = Planner(self.manifest, batch, self._engine, self._functions)
                made = Dispatcher(planner, self.policy, self._prologue, foresees=False)
                found = self._dispatchers.setdefault(batch, made)
        return found

    @property
    def config(self) -> Config:
        """The source model's config, as pipelines read it."""
        return Config(self.manifest.source.config)

    @property
    def dtype(self) -> Any:
        """The type of most weights: torch's, where torch is loaded, else its name."""
        return getattr(sys.modules.get("torch"), self.manifest.precision, self.manifest.precision)

    def cache_context(self, name: str, **options: Any) -> AbstractContextManager[None]:
        """Calls inside are of the pass called ``name``, with caches of its own, at the step ``step_index``, if given.

        Raises:
            UsageError: when it is entered, if ``step_index`` is neither None nor a whole number from 0 on.
        """
        return named_pass(self, name, options)
