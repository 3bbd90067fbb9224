"""Exceptions, one class for each kind of mistake: of the caller, of the model or of this package."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


class DucaError(Exception):
    """Base of every error that duca_compile raises on purpose."""


class UsageError(DucaError, ValueError):
    """A bad argument, or a call at the wrong time; the message says what to change."""


class PolicyError(UsageError):
    """A policy has invalid parameters, or does not work with this model or call."""


class CaptureError(DucaError):
    """The model cannot be captured as a graph; the message names the source line."""


class StructureError(DucaError):
    """The graph was captured, but has no residual stream to cache."""


class BackendError(DucaError):
    """A backend, or a part of torch that it needs, is not installed, or it failed to compile a variant."""


class ExportError(DucaError):
    """A model or a policy cannot be exported; the message names the graph and the reason."""


class ArtifactError(DucaError):
    """A folder is not an artifact, is damaged, has a newer format, or cannot run on this machine."""


class InternalError(DucaError):
    """A broken invariant: a bug in duca_compile, not in the model or the call."""


def first_line(error: BaseException) -> str:
    """The first line of an error message that is not blank, else the name of the error's type."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def not_none(value: T | None, name: str) -> T:
    """``value``, which is called ``name`` in the message.

    Raises:
        InternalError: it is None.
    """
    if value is None:
        raise InternalError(f"{name} is not set here, which is a bug in duca_compile")
    return value


@contextmanager
def missing_package(extra: str) -> Iterator[None]:
    """Turns a failed import inside into an error that says which extra to install.

    Raises:
        BackendError: a package is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise BackendError(f"{error.name} is not installed; install duca-compile[{extra}]") from error
