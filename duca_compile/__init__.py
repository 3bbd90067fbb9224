"""duca_compile: a compiler for the denoising loop of Diffusion Transformers."""

from duca_compile.api import OptimizedModel, optimize, restore
from duca_compile.errors import (
    BackendError,
    CaptureError,
    DucaError,
    InternalError,
    PolicyError,
    StructureError,
    UsageError,
)
from duca_compile.explain import Explanation, explain
from duca_compile.policies import (
    FORA,
    DuCa,
    Interval,
    Linear,
    Policy,
    ResidualGate,
    Selection,
    SpeCa,
    TaylorSeer,
    ToCa,
    Uncached,
    published,
)
from duca_compile.runtime.session import Session

__all__ = [
    "FORA",
    "BackendError",
    "CaptureError",
    "DuCa",
    "DucaError",
    "Explanation",
    "InternalError",
    "Interval",
    "Linear",
    "OptimizedModel",
    "Policy",
    "PolicyError",
    "ResidualGate",
    "Selection",
    "Session",
    "SpeCa",
    "StructureError",
    "TaylorSeer",
    "ToCa",
    "Uncached",
    "UsageError",
    "explain",
    "optimize",
    "published",
    "restore",
]
