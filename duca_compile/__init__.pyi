from duca_compile.api import optimize, restore
from duca_compile.artifact.loader import load
from duca_compile.artifact.model import Artifact
from duca_compile.drop_in import OptimizedModel
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
from duca_compile.methods.calibration import Calibration, calibrate
from duca_compile.methods.training import TrainingSettings, prediction_error, train_predictor
from duca_compile.methods.tuning.tuned import Tuned
from duca_compile.methods.tuning.tuner import tune
from duca_compile.policies import (
    FORA,
    RFC,
    Calibrated,
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
from duca_compile.policies.predictor import Predictor
from duca_compile.runtime.session import Session

__version__: str

__all__ = [
    "FORA",
    "RFC",
    "Artifact",
    "ArtifactError",
    "BackendError",
    "Calibrated",
    "Calibration",
    "CaptureError",
    "DisCa",
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
    "Tuned",
    "Uncached",
    "UsageError",
    "calibrate",
    "explain",
    "load",
    "optimize",
    "prediction_error",
    "published",
    "restore",
    "save",
    "train_predictor",
    "tune",
]
