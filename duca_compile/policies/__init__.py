"""Which variant runs at which step. No graph code here."""

from duca_compile.policies.base import Policy, Selection, Step, StepKind, TokenQuery
from duca_compile.policies.duca import DuCa
from duca_compile.policies.fora import FORA
from duca_compile.policies.published import published
from duca_compile.policies.schedule import Interval, Linear
from duca_compile.policies.uncached import Uncached

__all__ = [
    "FORA",
    "DuCa",
    "Interval",
    "Linear",
    "Policy",
    "Selection",
    "Step",
    "StepKind",
    "TokenQuery",
    "Uncached",
    "published",
]
