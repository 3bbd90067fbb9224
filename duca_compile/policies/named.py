"""Policies by name."""

from __future__ import annotations

from duca_compile.errors import PolicyError
from duca_compile.policies import (
    FORA,
    RFC,
    DuCa,
    EasyCache,
    FreqCa,
    HiCache,
    Policy,
    ResidualGate,
    SeaCache,
    SpeCa,
    Spectrum,
    TaylorSeer,
    ToCa,
    Uncached,
)

POLICIES: dict[str, type[Policy]] = {
    "duca": DuCa,
    "easycache": EasyCache,
    "fora": FORA,
    "freqca": FreqCa,
    "gate": ResidualGate,
    "hicache": HiCache,
    "none": Uncached,
    "rfc": RFC,
    "seacache": SeaCache,
    "speca": SpeCa,
    "spectrum": Spectrum,
    "taylorseer": TaylorSeer,
    "toca": ToCa,
    "uncached": Uncached,
}


def resolve_policy(policy: str | Policy) -> Policy:
    """The policy with this name, with its default parameters; a policy object is returned unchanged.

    Raises:
        PolicyError: the name is unknown, or the object is not a policy.
    """
    if isinstance(policy, Policy):
        return policy
    if not isinstance(policy, str) or policy.lower() not in POLICIES:
        raise PolicyError(f"policy={policy!r} is unknown; pass a Policy object or one of {sorted(POLICIES)}")
    return POLICIES[policy.lower()]()
