"""Policies by name."""

from __future__ import annotations

import os

from duca_compile.errors import PolicyError
from duca_compile.policies import (
    FORA,
    RFC,
    Auto,
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
from duca_compile.policies.files import load_policy

POLICIES: dict[str, type[Policy]] = {
    "auto": Auto,
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


def resolve_policy(policy: str | os.PathLike[str] | Policy) -> Policy:
    """The policy with this name, with its default parameters, or the one in this file; an object is returned unchanged.

    Raises:
        PolicyError: the name is unknown, or the object is not a policy.
        UsageError: a path, which ends in ``.json``, that holds no policy.
    """
    if isinstance(policy, Policy):
        return policy
    if isinstance(policy, os.PathLike) or (isinstance(policy, str) and policy.endswith(".json")):
        return load_policy(policy)
    if not isinstance(policy, str) or policy.lower() not in POLICIES:
        raise PolicyError(
            f"policy={policy!r} is unknown; pass a Policy object, the path of a .json file, or one of "
            f"{sorted(POLICIES)}"
        )
    return POLICIES[policy.lower()]()
