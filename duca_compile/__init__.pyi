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
from duca_compile.methods.ratios import residual_ratios
from duca_compile.methods.training import TrainingSettings, prediction_error, train_predictor
from duca_compile.methods.tuning.tuned import Tuned
from duca_compile.methods.tuning.tuner import tune
from duca_compile.policies import (
    FORA,
    RFC,
    Auto,
    Calibrated,
    DisCa,
    DuCa,
    EasyCache,
    FreqCa,
    HiCache,
    Interval,
    Linear,
    MagCache,
    Policy,
    RelationalFeatureCaching,
    ResidualGate,
    SeaCache,
    Selection,
    SpeCa,
    Spectrum,
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
    "Auto",
    "BackendError",
    "Calibrated",
    "Calibration",
    "CaptureError",
    "DisCa",
    "DuCa",
    "DucaError",
    "EasyCache",
    "Explanation",
    "ExportError",
    "FreqCa",
    "HiCache",
    "InternalError",
    "Interval",
    "Linear",
    "MagCache",
    "OptimizedModel",
    "Policy",
    "PolicyError",
    "Predictor",
    "RelationalFeatureCaching",
    "ResidualGate",
    "SeaCache",
    "Selection",
    "Session",
    "SpeCa",
    "Spectrum",
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
    "residual_ratios",
    "restore",
    "save",
    "train_predictor",
    "tune",
]
