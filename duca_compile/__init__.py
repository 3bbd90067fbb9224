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
    RFC,
    DuCa,
    Interval,
    Linear,
    Policy,
    RelationalFeatureCaching,
    Selection,
    TaylorSeer,
    Uncached,
    published,
)
from duca_compile.runtime.session import Session

__all__ = [
    "FORA",
    "RFC",
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
    "RelationalFeatureCaching",
    "Selection",
    "Session",
    "StructureError",
    "TaylorSeer",
    "Uncached",
    "UsageError",
    "explain",
    "optimize",
    "published",
    "restore",
]
