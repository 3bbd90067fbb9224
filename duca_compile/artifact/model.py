"""Runs an artifact: a folder that ``duca_compile.save`` wrote. Needs neither torch nor the compiler."""

from __future__ import annotations

import sys
import threading
from typing import Any

from duca_compile.artifact.binder import Binder, like_call, result
from duca_compile.artifact.engines.base import Engine
from duca_compile.artifact.manifest import Manifest
from duca_compile.artifact.planner import Planner, Prologue, Recorded
from duca_compile.policies.base import Policy
from duca_compile.runtime.dispatcher import Dispatcher
from duca_compile.runtime.planning import check_pairs
from duca_compile.runtime.session import HasSessions, Requests, current_pass


class Config(dict[str, Any]):
    """A config whose entries are attributes too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class Artifact(HasSessions):
    """An exported model: called like the model, with numpy arrays or torch tensors, and returns the same kind.

    Steps, guidance passes and requests are told apart as by an optimized model. Each thread and each session has its
    own request. The result has the model's structure: fields by name and by index.

    Attributes:
        manifest: what the folder holds.
        policy: the recorded steps; where the policy decides while it runs, the policy itself.
    """

    def __init__(self, manifest: Manifest, engine: Engine) -> None:
        self.manifest, self._engine = manifest, engine
        rule = manifest.policy.rule
        self.policy: Policy = Recorded(manifest.policy, manifest.schedule) if rule is None else rule.rebuilt()
        self._functions = {name: engine.function(name, graph) for name, graph in manifest.graphs.items()}
        self._prologue = Prologue(manifest, self._functions[manifest.prologue])
        self._requests = Requests(self.policy, manifest.schedule.num_inference_steps)
        self._bind = Binder(manifest)
        self._dispatchers: dict[int, Dispatcher] = {}  # by batch size
        self._lock = threading.Lock()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """One call of the model.

        Raises:
            UsageError: the arguments are not of the kinds that were exported; names the argument.
            PolicyError: pairs of rows are to decide together, and the number of rows is odd.
        """
        call, batch = self._bind(args, kwargs)
        dispatcher, request, named = self._dispatcher(batch), self._requests.current(), current_pass(self)
        name, step = (None, None) if named is None else (named.name, named.step_index)
        try:
            position = request.locate(self.manifest.signature, call, name, step)
            outputs = dispatcher(request, position, call, name)
        except BaseException:
            request.reset()
            raise
        return result(self.manifest.signature.result, [like_call(output, call) for output in outputs])

    def _dispatcher(self, batch: int) -> Dispatcher:
        dispatcher = self._dispatchers.get(batch)
        if dispatcher is None:
            check_pairs(self.policy, batch)
            with self._lock:
                planner = Planner(self.manifest, batch, self._engine, self._functions)
                new = Dispatcher(planner, self.policy, self._prologue, precomputes_timesteps=False)
                dispatcher = self._dispatchers.setdefault(batch, new)
        return dispatcher

    @property
    def config(self) -> Config:
        """The source model's config, as pipelines read it."""
        return Config(self.manifest.source.config)

    @property
    def dtype(self) -> Any:
        """The type of most of the weights' bytes: torch's own where torch is loaded, else its name."""
        return getattr(sys.modules.get("torch"), self.manifest.precision, self.manifest.precision)
