from duca_compile.api import OptimizedModel, optimize, restore
from duca_compile.errors import (
    ArtifactError,
    BackendError,
    CaptureError,
    DucaError,
    ExportError,
    InternalError,
    PolicyError,
    StructureError,
    UsageError,
)
from duca_compile.explanation import Explanation, explain
from duca_compile.export.artifact import save
from duca_compile.policies import FORA, DuCa, Interval, Linear, Policy, Selection, TaylorSeer, Uncached, published
from duca_compile.runtime.artifact import Artifact, load
from duca_compile.runtime.session import Session

__version__: str

__all__ = [
    "FORA",
    "Artifact",
    "ArtifactError",
    "BackendError",
    "CaptureError",
    "DuCa",
    "DucaError",
    "Explanation",
    "ExportError",
    "InternalError",
    "Interval",
    "Linear",
    "OptimizedModel",
    "Policy",
    "PolicyError",
    "Selection",
    "Session",
    "StructureError",
    "TaylorSeer",
    "Uncached",
    "UsageError",
    "explain",
    "load",
    "optimize",
    "published",
    "restore",
    "save",
]
