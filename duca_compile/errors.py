"""What can go wrong, told apart by whose mistake it is."""


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


class InternalError(DucaError):
    """A broken invariant: a bug in duca_compile, not in the model or the call."""


def first_line(error: BaseException) -> str:
    """The first line of another library's message that says anything, else the error's type."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
