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
    DisCa,
    DuCa,
    Interval,
    Linear,
    Policy,
    RelationalFeatureCaching,
    ResidualGate,
    Selection,
    SpeCa,
    TaylorSeer,
    ToCa,
    Uncached,
    published,
)
from duca_compile.predictor import Predictor
from duca_compile.runtime.session import Session
from duca_compile.training import TrainingSettings, prediction_error, train_predictor

__all__ = [
    "FORA",
    "RFC",
    "BackendError",
    "CaptureError",
    "DisCa",
    "DuCa",
    "DucaError",
    "Explanation",
    "InternalError",
    "Interval",
    "Linear",
    "OptimizedModel",
    "Policy",
    "PolicyError",
    "Predictor",
    "RelationalFeatureCaching",
    "ResidualGate",
    "Selection",
    "Session",
    "SpeCa",
    "StructureError",
    "TaylorSeer",
    "ToCa",
    "TrainingSettings",
    "Uncached",
    "UsageError",
    "explain",
    "optimize",
    "prediction_error",
    "published",
    "restore",
    "train_predictor",
]
