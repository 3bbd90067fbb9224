"""duca_compile: a compiler for the denoising loop of Diffusion Transformers.

Names are imported when they are first used, so that an artifact can be run where torch is not installed. Their types
are in ``__init__.pyi``.
"""

from importlib import import_module
from os import environ
from typing import Any

__version__ = "0.1.0"

_NAMES = {
    "api": ("optimize", "restore"),
    "artifact.loader": ("load",),
    "artifact.model": ("Artifact",),
    "drop_in": ("OptimizedModel",),
    "errors": (
        "ArtifactError",
        "BackendError",
        "CaptureError",
        "DucaError",
        "ExportError",
        "InternalError",
        "PolicyError",
        "StructureError",
        "UsageError",
    ),
    "explanation": ("Explanation", "explain"),
    "export.artifact": ("save",),
    "methods.calibration": ("Calibration", "calibrate"),
    "methods.ratios": ("residual_ratios",),
    "methods.tuning.tuned": ("Tuned",),
    "methods.tuning.tuner": ("tune",),
    "methods.training": ("TrainingSettings", "prediction_error", "train_predictor"),
    "policies": (
        "FORA",
        "RFC",
        "Auto",
        "Calibrated",
        "DisCa",
        "DuCa",
        "EasyCache",
        "FreqCa",
        "HiCache",
        "Interval",
        "Linear",
        "MagCache",
        "Policy",
        "RelationalFeatureCaching",
        "ResidualGate",
        "SeaCache",
        "Selection",
        "SpeCa",
        "Spectrum",
        "TaylorSeer",
        "ToCa",
        "Uncached",
        "published",
    ),
    "policies.predictor": ("Predictor",),
    "runtime.session": ("Session",),
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names}

__all__ = sorted(_MODULES)

if environ.get("DUCA_LOG"):
    import_module(f"{__name__}.logs").configure(environ["DUCA_LOG"])


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
