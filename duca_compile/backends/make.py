"""Backends by name."""

from __future__ import annotations

from duca_compile.backends.base import Backend
from duca_compile.backends.eager import EagerBackend
from duca_compile.errors import UsageError

BACKENDS = ("inductor", "openvino", "eager")
MODES = ("default", "reduce-overhead")


def make_backend(name: str, strict: bool, mode: str = "default") -> Backend:
    """Makes a backend.

    Args:
        name: one of ``BACKENDS``.
        strict: whether it raises BackendError if a variant does not compile, instead of falling back to eager.
        mode: one of ``MODES``.

    Raises:
        UsageError: the name or the mode is unknown.
        BackendError: the backend's package is not installed, or is of a version without what the backend needs.
    """
    if mode not in MODES or (mode != "default" and name != "inductor"):
        raise UsageError(f"mode={mode!r} is unknown to backend={name!r}; inductor has {MODES}")
    if name == "eager":
        return EagerBackend()
    if name == "inductor":
        from duca_compile.backends.inductor.backend import InductorBackend

        return InductorBackend(strict, mode)
    if name == "openvino":
        from duca_compile.backends.openvino import OpenVINOBackend

        return OpenVINOBackend(strict)
    raise UsageError(f"backend={name!r} is unknown; choose one of {BACKENDS}")
