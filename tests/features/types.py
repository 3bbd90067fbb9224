"""Cases of docs/followed.md on types, and on what falls back to something slower; see table.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._inductor.exc import InvalidCxxCompiler

import duca_compile
from duca_compile import DuCa, OptimizedModel, Policy
from duca_compile.backends.inductor import private
from duca_compile.backends.inductor.backend import InductorBackend
from duca_compile.policies import StepKind
from tests import models
from tests.features.table import feature
from tests.test_fallbacks import convolved
from tests.test_methods import STEPS, Case
from tests.test_models import sample
from tests.test_types import ENTROPY, POLICIES, MixedBlock, make

Pair = tuple[Any, Any]
BFLOAT16, FLOAT16 = torch.bfloat16, torch.float16

case_of = cache(make)


def full_steps(case: Case, *names: str) -> Pair:
    """What these policies' full steps give, row by row, and what the model gives; other steps give numbers."""
    found: list[Tensor] = []
    own: list[Tensor] = []
    for name in names:
        optimized = case.shared.optimized(POLICIES.get(name, ENTROPY), STEPS)
        for arguments, expected in zip(case.calls(), case.own, strict=True):
            outputs = sample(optimized(**arguments))
            done = optimized.history[-1]
            for row, kind in enumerate(done.rows or (done.kind,) * len(expected[0])):
                assert all(each[row].isfinite().all() for each in outputs)
                if kind is StepKind.FULL:
                    found += [each[row] for each in outputs]
                    own += [each[row] for each in expected]
    return found, own


def of_both(dtype: torch.dtype, *names: str) -> Pair:
    """On DiT, and on Wan as it is loaded, with norms and tables in float32."""
    pairs = [full_steps(case_of(model, dtype), *names) for model in ("DiT", "Wan")]
    return [a for a, _ in pairs], [b for _, b in pairs]


def scored(dtype: torch.dtype) -> Pair:
    by_self, own = full_steps(case_of("DiT", dtype), "DuCa, v_norm", "DuCa, attention")
    by_cross, own_too = full_steps(case_of("PixArt", dtype), "ToCa, entropy")
    return by_self + by_cross, own + own_too


FULL = "full steps; the others ran, with caches in that type"


@feature("types", "bfloat16: FORA, DuCa, ToCa", note=FULL)
def reuse_in_bfloat16() -> Pair:
    return of_both(BFLOAT16, "FORA", "DuCa", "ToCa")


@feature("types", "float16: FORA, DuCa, ToCa", note=FULL)
def reuse_in_float16() -> Pair:
    return of_both(FLOAT16, "FORA", "DuCa", "ToCa")


@feature("types", "bfloat16: tokens chosen by value norms, attention and entropy", note="scores are float32")
def scores_in_bfloat16() -> Pair:
    return scored(BFLOAT16)


@feature("types", "float16: tokens chosen by value norms, attention and entropy", note="scores are float32")
def scores_in_float16() -> Pair:
    return scored(FLOAT16)


@feature("types", "bfloat16: TaylorSeer in all forms, calibrated forecasts", note=FULL)
def forecasts_in_bfloat16() -> Pair:
    return of_both(BFLOAT16, "TaylorSeer", "TaylorSeer lite", "TaylorSeer relational", "calibrated")


@feature("types", "float16: TaylorSeer in all forms, calibrated forecasts", note=FULL)
def forecasts_in_float16() -> Pair:
    return of_both(FLOAT16, "TaylorSeer", "TaylorSeer lite", "TaylorSeer relational", "calibrated")


@feature("types", "bfloat16: SpeCa by batch, row and pair", note="errors are float32")
def speca_in_bfloat16() -> Pair:
    return of_both(BFLOAT16, "SpeCa", "SpeCa by row", "SpeCa by pair", "SpeCa released")


@feature("types", "float16: SpeCa by batch, row and pair", note="errors are float32")
def speca_in_float16() -> Pair:
    return of_both(FLOAT16, "SpeCa", "SpeCa by row", "SpeCa by pair", "SpeCa released")


@feature("types", "bfloat16: RFC by batch, row and pair", note="lengths and ratios are float32")
def rfc_in_bfloat16() -> Pair:
    return of_both(BFLOAT16, "RFC", "RFC by row", "RFC by pair")


@feature("types", "float16: RFC by batch, row and pair", note="lengths and ratios are float32")
def rfc_in_float16() -> Pair:
    return of_both(FLOAT16, "RFC", "RFC by row", "RFC by pair")


@feature("types", "bfloat16: residual gates by batch, row and pair", note="changes are float32")
def gates_in_bfloat16() -> Pair:
    return of_both(BFLOAT16, "gate", "gate by row", "gate by pair", "gate, first block", "gate, forecast")


@feature("types", "float16: residual gates by batch, row and pair", note="changes are float32")
def gates_in_float16() -> Pair:
    return of_both(FLOAT16, "gate", "gate by row", "gate by pair", "gate, first block", "gate, forecast")


@torch.no_grad()
def loop(optimized: Any, model: Any, calls: Sequence[dict[str, Tensor]]) -> Pair:
    return [optimized(**call) for call in calls], [model(**call) for call in calls]


def steps(count: int) -> list[dict[str, Tensor]]:
    return [models.example(step, 900.0 - 10 * step) for step in range(count)]


@feature("types", "a stream in float32, layers in bfloat16, tables in complex128", note="each value in its own type")
def mixed_types() -> Pair:
    model = models.build(lambda: MixedBlock(BFLOAT16))
    return loop(duca_compile.optimize(model, "none", "eager"), model, steps(3))


@feature("types", "a model converted after `optimize()`", note="another capture")
def converted_later() -> Pair:
    case = case_of("DiT", torch.float32)
    optimized = duca_compile.optimize(case.model, "none", "eager")
    optimized(**case.arguments)
    optimized.to(torch.float64)
    arguments = {k: v.double() if v.is_floating_point() else v for k, v in case.arguments.items()}
    found, own = optimized(**arguments).sample, case.model(**arguments).sample
    optimized.to(torch.float32)
    return found, own


def without(lower: Callable[..., Any], policy: str | Policy = "none") -> Pair:
    """With the Inductor backend, of which ``lower`` takes the place."""
    model, original = models.build(), InductorBackend.lower
    InductorBackend.lower = lower  # type: ignore[method-assign]
    try:
        return loop(duca_compile.optimize(model, policy), model, steps(3))
    finally:
        InductorBackend.lower = original  # type: ignore[method-assign]


@feature(
    "fallbacks",
    "a variant that Inductor cannot compile",
    says="that of full steps is running under eager instead",
    note="that variant alone runs under eager; `strict=True` refuses",
    slow=False,
)
def a_variant_fails() -> Pair:
    def lower(*_: Any) -> Any:
        raise NotImplementedError("no lowering of an operator")

    return without(lower)


@feature(
    "fallbacks",
    "no C++ compiler for Inductor",
    says="all are running under eager instead",
    note="runs under eager, with one warning",
    slow=False,
)
def no_compiler() -> Pair:
    def lower(*_: Any) -> Any:
        raise InvalidCxxCompiler

    compiler = private.get_cpp_compiler
    private.get_cpp_compiler = lambda: "/nonexistent"
    try:
        return without(lower)
    finally:
        private.get_cpp_compiler = compiler


@feature(
    "fallbacks",
    "more kinds of shapes in turn than captures that are kept",
    says="captured and compiled again and again",
    note="each is captured again, with one warning",
)
def too_many_shapes() -> Pair:
    model = models.build()
    optimized = duca_compile.optimize(model, "none", "eager")
    texts = [models.example()["text"][:, :words] for words in (1, 2, 3, 4, 5, 1)]
    return loop(optimized, model, [models.example() | {"text": text} for text in texts])


@feature(
    "fallbacks",
    "DuCa on MLPs that contain a convolution",
    says="partial steps compute 2 of 4 branches in full",
    note="full steps; partial ones compute these MLPs in full, with one warning",
    slow=False,
)
def mixing_tokens() -> Pair:
    model = models.build(convolved)
    optimized: OptimizedModel = duca_compile.optimize(model, DuCa(interval=3), "eager")
    found, own = loop(optimized, model, steps(4))
    kept = [i for i, done in enumerate(optimized.history) if done.kind is StepKind.FULL]
    return [found[i] for i in kept], [own[i] for i in kept]


@feature(
    "fallbacks",
    "more steps than `num_inference_steps`",
    says="step 3 is more than the 2 planned steps",
    note="computed in full, with one warning",
    slow=False,
)
def more_steps_than_planned() -> Pair:
    model = models.build()
    found, own = loop(duca_compile.optimize(model, "fora", "eager", 2), model, steps(4))
    return (found[0], *found[2:]), (own[0], *own[2:])
