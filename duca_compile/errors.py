"""What can go wrong, told apart by whose mistake it is."""

from collections.abc import Iterator
from contextlib import contextmanager


class DucaError(Exception):
    """Base of every error that duca_compile raises on purpose."""


class UsageError(DucaError, ValueError):
    """A bad argument or a call in the wrong state; the message says what to change."""


class PolicyError(UsageError):
    """A policy with impossible numbers, or one that this model or this call cannot serve."""


class CaptureError(DucaError):
    """The model cannot be captured as a graph; the message names the source line."""


class StructureError(DucaError):
    """The graph was captured, but has no residual stream to cache."""


class BackendError(DucaError):
    """A backend is missing or failed to compile a variant."""


class ExportError(DucaError):
    """A model or a policy that cannot be exported; the message says which graph and why."""


class ArtifactError(DucaError):
    """A folder that is no artifact of ours, is damaged, is of a later version, or cannot be run here."""


class InternalError(DucaError):
    """A broken invariant: a bug in duca_compile, not in the model or the call."""


def first_line(error: BaseException) -> str:
    """The first line of another library's message that says anything, else the error's type."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


@contextmanager
def missing_package(extra: str) -> Iterator[None]:
    """An import inside that fails says which extra to install.

    Raises:
        BackendError: a package is missing.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise BackendError(f"{error.name} is not installed; install duca-compile[{extra}]") from error
