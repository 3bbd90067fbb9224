"""Caching policies: which kind of step runs when. Plain numbers only, no graph code."""

from duca_compile.core.steps import Probe, Step, StepKind, Verify
from duca_compile.policies.adaptive import AdaptivePolicy, Decider
from duca_compile.policies.auto import Auto
from duca_compile.policies.base import Forecast, Policy, Selection, TokenQuery
from duca_compile.policies.calibrated import Calibrated
from duca_compile.policies.disca import DisCa
from duca_compile.policies.duca import DuCa
from duca_compile.policies.easycache import EasyCache
from duca_compile.policies.fora import FORA
from duca_compile.policies.freqca import FreqCa
from duca_compile.policies.gate import ResidualGate
from duca_compile.policies.hicache import HiCache
from duca_compile.policies.magcache import MagCache
from duca_compile.policies.published import published
from duca_compile.policies.rfc import RFC, RelationalFeatureCaching
from duca_compile.policies.schedule import Interval, Linear
from duca_compile.policies.seacache import SeaCache
from duca_compile.policies.speca import SpeCa
from duca_compile.policies.spectrum import Spectrum
from duca_compile.policies.taylorseer import TaylorSeer
from duca_compile.policies.toca import ToCa
from duca_compile.policies.uncached import Uncached

__all__ = [
    "FORA",
    "RFC",
    "AdaptivePolicy",
    "Auto",
    "Calibrated",
    "Decider",
    "DisCa",
    "DuCa",
    "EasyCache",
    "Forecast",
    "FreqCa",
    "HiCache",
    "Interval",
    "Linear",
    "MagCache",
    "Policy",
    "Probe",
    "RelationalFeatureCaching",
    "ResidualGate",
    "SeaCache",
    "Selection",
    "SpeCa",
    "Spectrum",
    "Step",
    "StepKind",
    "TaylorSeer",
    "ToCa",
    "TokenQuery",
    "Uncached",
    "Verify",
    "published",
]
