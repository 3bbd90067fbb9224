"""Finds the request that a call belongs to: that of the innermost session, else that of the thread."""

from __future__ import annotations

import copy
import operator
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar, Token
from dataclasses import dataclass
from types import TracebackType
from typing import Any, cast

from duca_compile.errors import UsageError
from duca_compile.policies.auto import Auto
from duca_compile.policies.base import Policy
from duca_compile.runtime.learning import Learner
from duca_compile.runtime.loops import LoopMemory, LoopSchedule
from duca_compile.runtime.request import Executed, Request


class Requests:
    """Makes and finds the requests of one optimized model, or of the several models that one pipeline holds.

    Each session has its own request, and so does each thread for calls outside of any session.
    """

    def __init__(self, policy: Policy, total: int | None, schedule: LoopSchedule | None = None) -> None:
        self._policy, self.total, self._schedule = policy, total, schedule
        self._memory = LoopMemory()
        self.learner = Learner(policy) if isinstance(policy, Auto) else None  # what requests have learnt
        self._local = threading.local()

    def new(self) -> Request:
        """A request that no session and no thread has."""
        return Request(self._policy, self.total, self._schedule, self._memory, self.learner)

    def current(self) -> Request:
        """The request that a call in this context belongs to."""
        for session in reversed(_SESSIONS.get()):
            if session.requests is self:
                return session.request
        request: Request | None = self._local.__dict__.get("request")
        if request is None:
            request = self._local.request = self.new()
        return request

    def __deepcopy__(self, memo: dict[int, Any]) -> Requests:
        """Requests of their own, which know what was learnt so far."""
        policy = self._policy if self.learner is None else self.learner.policy()
        return Requests(policy, self.total, copy.deepcopy(self._schedule, memo))


class HasRequest:
    """What an optimized model, an artifact and a session have in common: their calls belong to a request."""

    def _request(self) -> Request:
        """The request that a call made now would belong to."""
        raise NotImplementedError

    def reset(self) -> None:
        """Drops all cached features; the next call starts a new request."""
        self._request().reset()

    @property
    def cache_bytes(self) -> int:
        """The peak size in bytes of the caches of the current request, or of the last one if none is running."""
        return self._request().cache_bytes

    @property
    def history(self) -> tuple[Executed, ...]:
        """What each call of the current request ran, in order; of the last request if none is running."""
        return tuple(self._request().history)


class HasSessions(HasRequest):
    """What an optimized model and an artifact have in common: a request for each thread, sessions, guidance passes."""

    _requests: Requests

    def _request(self) -> Request:
        return self._requests.current()

    def session(self) -> Session:
        """A request with its own caches, for serving several requests at once.

        Inside ``with model.session() as session:`` all calls of the model belong to it, including those that a pipeline
        makes.
        """
        return Session(cast(Callable[..., Any], self), self._requests)

    def cache_context(self, name: str, **options: Any) -> AbstractContextManager[None]:
        """Calls inside ``with model.cache_context("cond"):`` belong to the guidance pass "cond", with its own caches.

        This is the interface that diffusers' pipelines use.

        Args:
            name: the name of the guidance pass.
            options: passed to the ``cache_context`` of the source model, if it has one, while it is captured. The
                option ``step_index`` says at which step the calls are, counted from 0; None leaves that to the
                timestep. A smaller index than the last one starts a new request.

        Raises:
            UsageError: on entry, if ``step_index`` is neither None nor a whole number of at least 0.
        """
        return named_pass(self, name, options)


class Session(HasRequest):
    """A request with its own caches, one of several that share an optimized model or an artifact.

    It is called like the model. Inside ``with session:`` calls of the model in this thread or asyncio task belong to it
    too, including those that a pipeline makes; leaving the outermost such block drops the caches. A session serves one
    thread at a time; any number of sessions may be in use.
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
    """What the caller has said about the guidance pass of ``model`` that is running."""

    model: object
    name: str
    options: Mapping[str, Any]
    step_index: int | None = None  # the step, if the caller gives it
    outer: NamedPass | None = None  # of the enclosing block, which may be about another model


_PASS: ContextVar[NamedPass | None] = ContextVar("duca_compile_pass", default=None)


@contextmanager
def named_pass(model: object, name: str, options: Mapping[str, Any]) -> Iterator[None]:
    """Inside the block, calls of ``model`` belong to the guidance pass ``name``.

    The option ``step_index`` gives the step of these calls.

    Raises:
        UsageError: ``step_index`` is neither None nor a whole number of at least 0.
    """
    token = _PASS.set(NamedPass(model, name, options, _step_index(options.get("step_index")), _PASS.get()))
    try:
        yield
    finally:
        _PASS.reset(token)


def current_pass(model: object) -> NamedPass | None:
    """The innermost named guidance pass of ``model``."""
    named = _PASS.get()
    while named is not None and named.model is not model:
        named = named.outer
    return named


def _step_index(given: Any) -> int | None:
    """The index as an int. A scheduler's is None before its first step, which leaves the step to the timestep."""
    if given is None:
        return None
    try:
        index = -1 if isinstance(given, bool) else operator.index(given)
    except TypeError:
        index = -1
    if index < 0:
        raise UsageError(f"cache_context(step_index={given!r}) must count the loop's steps from 0, in whole numbers")
    return index
