"""Whose request a call belongs to: that of the session in use, else that of the thread."""

from __future__ import annotations

import copy
import operator
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar, Token
from dataclasses import dataclass
from types import TracebackType
from typing import Any, cast

from duca_compile.errors import UsageError
from duca_compile.policies.base import Policy
from duca_compile.runtime.loops import LoopMemory, LoopSchedule
from duca_compile.runtime.request import Executed, Request


class Requests:
    """Makes and finds the requests of one optimized model, or of the several that one pipeline holds.

    A session has a request of its own, and so has each thread for the calls outside of any session.
    """

    def __init__(self, policy: Policy, total: int | None, schedule: LoopSchedule | None = None) -> None:
        self._policy, self.total, self._schedule = policy, total, schedule
        self._memory = LoopMemory()
        self._local = threading.local()

    def new(self) -> Request:
        return Request(self._policy, self.total, self._schedule, self._memory)

    def current(self) -> Request:
        for session in reversed(_SESSIONS.get()):
            if session.requests is self:
                return session.request
        request: Request | None = self._local.__dict__.get("request")
        if request is None:
            request = self._local.request = self.new()
        return request

    def __deepcopy__(self, memo: dict[int, Any]) -> Requests:
        return Requests(self._policy, self.total, copy.deepcopy(self._schedule, memo))


class HasRequest:
    """Whose calls belong to a request: an optimized model, an artifact, a session."""

    def _request(self) -> Request:
        """The one that a call belongs to now."""
        raise NotImplementedError

    def reset(self) -> None:
        """Forgets all cached features: the next call starts a new request."""
        self._request().reset()

    @property
    def cache_bytes(self) -> int:
        """The most bytes that the caches of the running, or last, request have held."""
        return self._request().cache_bytes

    @property
    def history(self) -> tuple[Executed, ...]:
        """The calls of the running (or last) request as they ran."""
        return tuple(self._request().history)


class HasSessions(HasRequest):
    """What has a request for each thread, and as many more as are asked for."""

    _requests: Requests

    def _request(self) -> Request:
        return self._requests.current()

    def session(self) -> Session:
        """A request with caches of its own: one for each of several requests that run at once.

        ``with model.session() as session:`` makes all calls of the model inside, a pipeline's included, belong to it.
        """
        return Session(cast(Callable[..., Any], self), self._requests)


class Session(HasRequest):
    """A request with caches of its own, for one of several that share an optimized model.

    It is called like the model. Inside ``with session:`` the model's own calls belong to it too, those of a pipeline
    that holds the model included, in this thread or asyncio task; leaving the outermost such block drops its caches. A
    session serves one thread at a time; any number of sessions may be in use.
    """

    def __init__(self, model: Callable[..., Any], requests: Requests) -> None:
        self._model, self.requests, self.request = model, requests, requests.new()
        self._tokens: list[Token[tuple[Session, ...]]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        token = self._use()
        try:
            return self._model(*args, **kwargs)
        finally:
            _SESSIONS.reset(token)

    def __enter__(self) -> Session:
        self._tokens.append(self._use())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _SESSIONS.reset(self._tokens.pop())
        if not self._tokens:
            self.reset()

    def _use(self) -> Token[tuple[Session, ...]]:
        return _SESSIONS.set((*_SESSIONS.get(), self))

    def _request(self) -> Request:
        return self.request


_SESSIONS: ContextVar[tuple[Session, ...]] = ContextVar("duca_compile_sessions", default=())


@dataclass(frozen=True)
class NamedPass:
    """What the caller said of the passes of ``model`` that run now."""

    model: object
    name: str
    options: Mapping[str, Any]
    step_index: int | None = None  # the step, where the caller says it
    outer: NamedPass | None = None  # what was said before, and holds for other models


_PASS: ContextVar[NamedPass | None] = ContextVar("duca_compile_pass", default=None)


@contextmanager
def named_pass(model: object, name: str, options: Mapping[str, Any]) -> Iterator[None]:
    """Calls of ``model`` inside are of the pass called ``name``, at the step ``step_index``, if this option is there.

    Raises:
        UsageError: ``step_index`` is neither None nor a whole number from 0 on.
    """
    token = _PASS.set(NamedPass(model, name, options, _step_index(options.get("step_index")), _PASS.get()))
    try:
        yield
    finally:
        _PASS.reset(token)


def current_pass(model: object) -> NamedPass | None:
    """The innermost named pass of ``model``."""
    now = _PASS.get()
    while now is not None and now.model is not model:
        now = now.outer
    return now


def _step_index(given: Any) -> int | None:
    """A scheduler's is None before its first step; then the timestep tells."""
    if given is None:
        return None
    try:
        index = -1 if isinstance(given, bool) else operator.index(given)
    except TypeError:
        index = -1
    if index < 0:
        raise UsageError(f"cache_context(step_index={given!r}) must count the loop's steps from 0, in whole numbers")
    return index
