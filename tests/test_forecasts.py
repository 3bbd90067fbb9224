"""Forecasts of every kind are the sums that the methods' formulas say, over whole loops and in artifacts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import factorial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import duca_compile
from duca_compile import FreqCa, HiCache, OptimizedModel, Policy, PolicyError, Spectrum
from duca_compile.core.ports import STREAM_END, Port, PortKind
from duca_compile.core.variants import FullVariant, ReuseVariant, SkipVariant
from duca_compile.frontend.binder import Binder
from duca_compile.passes.pipeline import build_variant
from duca_compile.policies import StepKind
from duca_compile.policies.factors import Chebyshev, hermite
from tests.artifacts import distance, example, export, optimized, tiny_dit
from tests.support import Shared, values_of_step
from tests.test_models import loop as calls
from tests.test_models import sample
from tests.zoo import ZOO

STEPS = 8
Weights = Callable[
    [Sequence[int], int], Sequence[float]
]  # of the features of these full steps, in a forecast of a step


def letters(made: Any, name: str | None = None) -> str:
    return "".join(each.kind.letter for each in made.history if name in (None, each.pass_name))


def differences(full: Sequence[int], order: int, first: int) -> np.ndarray:
    """D_0, D_1, ... at the last of these full steps, as sums of the features at each of them."""
    unit = np.eye(len(full))
    rows = [unit[0]]
    for i in range(1, len(full)):
        updated = [unit[i]]
        for old in rows[:order] if full[i] >= first else []:
            updated.append((updated[-1] - old) / (full[i] - full[i - 1]))
        rows = updated
    return np.array(rows)


def by_hermite(order: int, scale: float, first: int) -> Weights:
    """The sum of s^i H_i(s k) D_i / i!, with numpy's polynomials."""

    def weights(full: Sequence[int], step: int) -> Sequence[float]:
        rows = differences(full, order, first)
        x = scale * (step - full[-1])
        terms = [np.polynomial.hermite.hermval(x, np.eye(order + 1)[i]) for i in range(len(rows))]
        factors = [scale**i / factorial(i) * term for i, term in enumerate(terms)]
        return list(np.array(factors) @ rows)

    return weights


def by_ridge(policy: Spectrum, total: int) -> Weights:
    """The row of ridge regression, with numpy's polynomials, and the line."""

    def weights(full: Sequence[int], step: int) -> Sequence[float]:
        def rows(steps: Sequence[int]) -> np.ndarray:
            return np.polynomial.chebyshev.chebvander(2 * np.array(steps) / total - 1, policy.degree)

        known = rows(full)
        inverse = np.linalg.inv(known.T @ known + policy.ridge * np.eye(policy.degree + 1))
        line = np.zeros(len(full))
        line[-1] = 1.0
        if len(full) > 1:
            line[-2:] += np.array([-1, 1]) * (step - full[-1]) / (full[-1] - full[-2])
        return list((1 - policy.share) * line + policy.share * (rows([step]) @ inverse @ known.T)[0])

    return weights


POLICIES: dict[str, tuple[Policy, Weights, str]] = {
    "HiCache": (HiCache(interval=3, first_full_steps=2), by_hermite(2, 0.5, 1), "FFTTFTTF"),
    "HiCache lite": (HiCache(3, 4, 0.71, 1, lite=True), by_hermite(4, 0.71, 0), "FTTFTTFT"),
    "Spectrum": (Spectrum(1.0, first_full_steps=2, degree=3), by_ridge(Spectrum(degree=3), STEPS), "FFTFTTFT"),
    "Spectrum and line": (
        Spectrum(1.0, first_full_steps=2, share=0.5),
        by_ridge(Spectrum(share=0.5), STEPS),
        "FFTFTTFT",
    ),
}


@pytest.fixture(scope="module", params=["DiT", "FLUX"])
def shared(request: pytest.FixtureRequest) -> tuple[str, Shared, dict[str, Any]]:
    torch.manual_seed(0)
    model, arguments = ZOO[request.param].build(2)
    return request.param, Shared(model.eval()), arguments


@torch.no_grad()
@pytest.mark.parametrize("name", POLICIES)
def test_each_step_is_the_sum_by_hand(shared: tuple[str, Shared, dict[str, Any]], name: str) -> None:
    """The reference runs the plain reuse or skip variant, with caches that were summed outside of the graph."""
    kind, made, arguments = shared
    policy, weights, expected = POLICIES[name]
    fast = made.optimized(policy, STEPS)
    lite = policy.forecast is not None and policy.forecast.lite
    full = list[int]()
    kept = list[dict[Port, Tensor]]()
    for step, each in enumerate(calls(ZOO[kind], arguments)):
        outputs = sample(fast(**each))
        (compiled,) = fast._compiled.values()
        values = values_of_step(compiled, Binder(made.model)((), each).tensors)
        is_full = expected[step] == "F"
        spec = FullVariant() if is_full else SkipVariant() if lite else ReuseVariant()
        if not is_full:
            terms = [*zip(weights(full, step), kept, strict=True)]
            values |= {port: sum(w * each[port] for w, each in terms) for port in kept[0]}  # type: ignore[misc]
        variant = build_variant(compiled.captured, compiled.facts, spec)
        results = dict(zip(variant.outputs, variant.module(*[values[n] for n in variant.inputs]), strict=True))
        if is_full:
            slots = [STREAM_END] if lite else [b.slot for b in compiled.facts.branches]
            full.append(step)
            kept.append({slot: results[slot] for slot in slots})
        for i, output in enumerate(outputs):
            wanted = results[Port(PortKind.OUTPUT, i)]
            assert torch.equal(output, wanted) if is_full else (output - wanted).norm() <= 2e-5 * wanted.norm()
    assert letters(fast) == expected


def low_by_dct(value: Tensor, grid: tuple[int, ...], cutoff: float) -> Tensor:
    """What is within the radius of the orthonormal DCT-2, (rows, tokens, channels)."""
    bases = []
    for size in grid:
        places = np.arange(size)
        basis = np.sqrt(2 / size) * np.cos(np.pi * np.outer(places, 2 * places + 1) / (2 * size))
        basis[0] /= np.sqrt(2)
        bases.append(torch.from_numpy(basis))
    image = value.double().unflatten(1, grid)
    spectrum = torch.einsum("rhwc,ih,jw->rijc", image, *bases)
    rows, columns = (torch.arange(size) for size in grid)
    low = (rows[:, None] ** 2 + columns**2).sqrt() <= cutoff * np.hypot(grid[0] - 1, grid[1] - 1)
    return torch.einsum("rijc,ih,jw->rhwc", spectrum * low[..., None], *bases).flatten(1, 2)


def low_by_fft(value: Tensor, grid: tuple[int, ...], cutoff: float) -> Tensor:
    frequencies = torch.fft.fftfreq(value.shape[1]).abs()
    low = frequencies <= cutoff * frequencies.max() + 1e-9
    return torch.fft.ifft(torch.fft.fft(value.double(), dim=1) * low[:, None], dim=1).real


@torch.no_grad()
@pytest.mark.parametrize(("transform", "cutoff"), [("dct", 0.1), ("dct", 0.5), ("fft", 0.4)])
def test_low_frequencies_are_reused_and_others_forecast(
    shared: tuple[str, Shared, dict[str, Any]], transform: Any, cutoff: float
) -> None:
    """In FLUX, the latent's tokens lie behind those of the text, and the graph shows no grid."""
    kind, made, arguments = shared
    latent, grid = (16, (4, 4)) if kind == "FLUX" else (None, None)
    policy = FreqCa(3, 0.71, 2, transform, cutoff, grid if transform == "dct" else None)
    fast = made.optimized(policy, STEPS)
    weights = by_hermite(2, 0.71, 1)
    full, kept = list[int](), list[Tensor]()
    for step, each in enumerate(calls(ZOO[kind], arguments)):
        outputs = sample(fast(**each))
        (compiled,) = fast._compiled.values()
        values = values_of_step(compiled, Binder(made.model)((), each).tensors)
        is_full = "FFTTFTTF"[step] == "F"
        if not is_full:
            change = sum(w * h for w, h in zip(weights(full, step), kept, strict=True)) - kept[-1]
            own = change[:, -latent:] if latent else change
            sizes = grid or compiled.facts.grids[own.shape[1]]
            low = (low_by_dct if transform == "dct" else low_by_fft)(own, sizes, cutoff).float()
            change[:, change.shape[1] - own.shape[1] :] -= low
            values[STREAM_END] = kept[-1] + change
        variant = build_variant(compiled.captured, compiled.facts, FullVariant() if is_full else SkipVariant())
        results = dict(zip(variant.outputs, variant.module(*[values[n] for n in variant.inputs]), strict=True))
        if is_full:
            full.append(step)
            kept.append(results[STREAM_END])
        for i, output in enumerate(outputs):
            wanted = results[Port(PortKind.OUTPUT, i)]
            assert torch.equal(output, wanted) if is_full else (output - wanted).norm() <= 2e-5 * wanted.norm()
    assert letters(fast) == "FFTTFTTF"


def test_tokens_without_a_grid_are_refused(shared: tuple[str, Shared, dict[str, Any]]) -> None:
    kind, made, arguments = shared
    with pytest.raises(PolicyError, match=r"FreqCa needs the grid|has 15 places, and there are"):
        made.optimized(FreqCa(grid=None if kind == "FLUX" else (3, 5)), STEPS)(**arguments)


VECTORS = [  # (full steps, forecast step, the weight of each full step) at 50 steps, degree 4 and ridge 0.1
    ([0, 1, 2, 3, 4], 5, [-0.268, -0.028, 0.201, 0.416, 0.617]),
    (
        [0, 1, 2, 3, 4, 6, 8, 11, 15, 20, 25],
        28,
        [-0.126, -0.009, 0.065, 0.103, 0.111, 0.065, -0.030, -0.178, -0.233, 0.124, 1.016],
    ),
    ([0, 1, 2, 3, 4, 6, 11, 19, 30], 43, [-0.455, -0.124, 0.117, 0.281, 0.376, 0.400, -0.127, -0.969, 1.154]),
]


@pytest.mark.parametrize(("full", "step", "weights"), VECTORS)
def test_the_weights_of_spectrum_are_the_published_ones(full: list[int], step: int, weights: list[float]) -> None:
    series = Chebyshev()
    factors = series.factors(step, full, 50)
    found = [float(np.dot(factors, series.values(each, 50))) for each in full]
    assert np.abs(np.array(found) - weights).max() <= 5e-4


def test_the_factors_of_hermite_polynomials() -> None:
    for k in (0.5, 1.0, 3.0, 6.0):
        assert hermite(k, 2, 0.5) == pytest.approx((k / 2, k * k / 8 - 0.25), rel=1e-12)
        s = 0.71
        assert hermite(k, 2, s) == pytest.approx((2 * s**2 * k, 2 * s**4 * k**2 - s**2), rel=1e-12)


@pytest.mark.parametrize(
    ("policy", "total", "full"),
    [
        (Spectrum(), 50, (0, 1, 2, 3, 4, 6, 8, 11, 15, 20, 25, 31, 38, 46)),
        (Spectrum(3), 50, (0, 1, 2, 3, 4, 6, 11, 19, 30, 44)),
        (Spectrum(), 28, (0, 1, 2, 3, 4, 6, 8, 11, 15, 20, 25)),
        (Spectrum(3), 28, (0, 1, 2, 3, 4, 6, 11, 19)),
        (Spectrum(), 4, (0, 1, 2, 3)),
        (Spectrum(), 8, (0, 1, 2, 3, 4, 6)),
        (HiCache(), 28, (0, 1, 2, 9, 16, 23)),
        (HiCache(), 4, (0, 1, 2)),
        (FreqCa(9), 28, (0, 1, 2, 11, 20)),
    ],
)
def test_full_steps_are_the_published_ones(policy: Policy, total: int, full: tuple[int, ...]) -> None:
    assert tuple(i for i, step in enumerate(policy.steps(total)) if step.kind is StepKind.FULL) == full


def test_spectrum_needs_the_number_of_steps() -> None:
    with pytest.raises(PolicyError, match=r"number of steps; pass optimize\(..., num_inference_steps=50\)"):
        duca_compile.optimize(tiny_dit(), Spectrum(), "eager")


@torch.no_grad()
def test_a_pass_that_joins_late_has_as_many_full_steps() -> None:
    """And a request with another number of steps has other weights."""
    model = duca_compile.optimize(tiny_dit(), Spectrum(first_full_steps=3), "eager", 12)
    call = example(2)
    for step in range(12):
        for name in ("cond", "uncond") if step >= 4 else ("cond",):
            with model.cache_context(name, step_index=step):
                model(**call | {"timestep": torch.full((2,), 999 - 80 * step)})
    assert letters(model, "cond") == "FFFTFTFTTFTT"
    assert letters(model, "uncond") == "FFFTTFTT"


@torch.no_grad()
def guided(run: Any, steps: int) -> list[Tensor]:
    """A loop with two guidance passes, which drift apart."""
    outputs = []
    for step in range(steps):
        for name, scale in (("cond", 1.0), ("uncond", 3.0)):
            call = example(2) | {"timestep": torch.full((2,), 990 - 990 // steps * step)}
            call["hidden_states"] = call["hidden_states"] * (1 + scale * step / steps)
            with run.cache_context(name, step_index=step):
                outputs.append(run(**call).sample)
    return outputs


def alone(made: OptimizedModel, steps: int, name: str) -> list[Tensor]:
    """What one of the passes gives without the other."""
    made.reset()
    place = ("cond", "uncond").index(name)
    scale = (1.0, 3.0)[place]
    outputs = []
    with torch.no_grad():
        for step in range(steps):
            call = example(2) | {"timestep": torch.full((2,), 990 - 990 // steps * step)}
            call["hidden_states"] = call["hidden_states"] * (1 + scale * step / steps)
            outputs.append(made(**call).sample)
    return outputs


EXPORTED: dict[str, tuple[Policy, int]] = {
    "Spectrum": (Spectrum(1.0, first_full_steps=2, share=0.5), 10),
    "FreqCa": (FreqCa(3, first_full_steps=2, cutoff=0.3), 10),
    "HiCache": (HiCache(3, 2, first_full_steps=1), 10),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (i > 0)) for i, name in enumerate(EXPORTED)]
)
def test_an_artifact_gives_the_same_in_each_pass(name: str, tmp_path: Path) -> None:
    policy, steps = EXPORTED[name]
    model = optimized(policy, steps=steps)
    export(model, tmp_path / "artifact")
    artifact = duca_compile.load(tmp_path / "artifact", threads=1)
    wanted = guided(model, steps)
    assert distance(wanted, guided(artifact, steps)) < 1e-4
    assert letters(artifact) == letters(model)
    for place, each in enumerate(("cond", "uncond")):
        assert distance(alone(model, steps, each), wanted[place::2]) < 1e-6


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: HiCache(max_order=0), "max_order=0 is invalid"),
        (lambda: HiCache(scale=0), "scale=0 is invalid: it must be above 0"),
        (lambda: HiCache(lite=1), "lite=1 is invalid"),  # type: ignore[arg-type]
        (lambda: FreqCa(transform="dft"), "transform='dft' is unknown"),  # type: ignore[arg-type]
        (lambda: FreqCa(transform="fft", grid=(4, 4)), r"grid=\(4, 4\) is invalid"),
        (lambda: FreqCa(cutoff=1.5), "cutoff=1.5 is invalid"),
        (lambda: FreqCa(scale=0), "scale=0 is invalid"),
        (lambda: Spectrum(degree=9), "degree=9 is invalid: it must be a whole number from 1 to 8"),
        (lambda: Spectrum(ridge=0), "ridge=0, share=1.0 is invalid: both must be above 0"),
        (lambda: Spectrum(share=0), "share=0 is invalid"),
        (lambda: Spectrum(growth=-1), "growth=-1 is invalid"),
    ],
)
def test_what_cannot_be_is_refused(make: Callable[[], Policy], reason: str) -> None:
    with pytest.raises(PolicyError, match=reason):
        make()
