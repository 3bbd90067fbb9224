"""A call's kind: a binder that has seen other calls gives what a new one gives."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from duca_compile.frontend.binder import Binder, Call


class Model(nn.Module):
    def forward(
        self, latent: Tensor, timestep: Any, text: Any = None, scale: float = 1.0, flag: bool = True, **rest: Any
    ) -> Tensor:
        raise NotImplementedError


TENSORS = [torch.zeros(2, 3), torch.ones(2, 3), torch.zeros(4, 3), torch.zeros(2, 3, dtype=torch.float64)]
with torch.inference_mode():
    TENSORS += [torch.zeros(2, 3)]
TENSORS += [nn.Parameter(torch.zeros(2, 3)), torch.zeros(3, 2).t(), torch.zeros(2, 3, requires_grad=True)]
TENSOR = st.sampled_from(TENSORS)
VALUE = st.sampled_from([None, 1, 1.0, True, "a", TENSORS[0], {"a": TENSORS[1]}, {"a": 2}, [TENSORS[2], 1]])
ARGUMENTS = st.fixed_dictionaries(
    {"latent": TENSOR, "timestep": st.sampled_from([TENSORS[0], TENSORS[2], 5, 5.0])},
    optional={"text": VALUE, "scale": st.sampled_from([1.0, 2.0]), "flag": st.booleans(), "more": VALUE},
)
CALLS = st.lists(st.tuples(ARGUMENTS, st.integers(0, 2), st.booleans(), st.booleans()), min_size=2, max_size=6)


def bound(binder: Binder, arguments: dict[str, Any], by_place: int, turned: bool, autocast: bool) -> Call:
    args = tuple(arguments[name] for name in ("latent", "timestep")[:by_place])
    rest = [*arguments.items()][by_place:]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        return binder(args, dict(rest[::-1] if turned else rest))


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return one is other or (one.dim() == 0 and torch.equal(one, other))  # a number's tensor is made anew
    return type(one) is type(other) and one == other


@given(CALLS)
def test_earlier_calls_make_no_difference(calls: list[tuple[dict[str, Any], int, bool, bool]]) -> None:
    used, found = Binder(Model()), list[tuple[Call, Call]]()
    for arguments, by_place, turned, autocast in calls:
        given = {name: arguments[name] for name in ("latent", "timestep")} | arguments
        pair = bound(used, given, by_place, turned, autocast), bound(Binder(Model()), given, by_place, turned, autocast)
        found.append(pair)
        one, other = pair
        assert len(one.tensors) == len(other.tensors)
        assert all(map(same, one.tensors, other.tensors))
        assert one.arguments.keys() == other.arguments.keys()
        assert all(same(value, other.arguments[name]) for name, value in one.arguments.items())
    for one, fresh in found:
        for other, other_fresh in found:
            assert (one.key == other.key) == (fresh.key == other_fresh.key)
            assert one.key != other.key or hash(one.key) == hash(other.key)
