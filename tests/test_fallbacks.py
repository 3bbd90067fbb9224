"""What falls back to something slower says so once, at level WARNING, with what to do."""

from __future__ import annotations

import io
import logging
import sys
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._inductor import lowering
from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

import duca_compile
from duca_compile import FORA, BackendError, Calibrated, CaptureError, DuCa, OptimizedModel, Policy, Uncached
from duca_compile.backends.base import Lifted
from duca_compile.backends.eager import EagerBackend
from duca_compile.backends.inductor import private
from duca_compile.backends.inductor.backend import InductorBackend
from duca_compile.compiler import verification as verify
from duca_compile.policies.base import FittedFactors
from duca_compile.runtime.torch import rows
from duca_compile.runtime.torch.programs import Programs
from tests import models
from tests.unit.tracing import module


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[str], int]:
    """How often something was said at level WARNING."""
    caplog.set_level(logging.WARNING, "duca_compile")
    return lambda text: sum(text in each.getMessage() for each in caplog.records if each.name == "duca_compile")


@torch.no_grad()
def loop(optimized: Any, steps: int = 6, start: float = 900.0) -> list[Tensor]:
    return [optimized(**models.example(step, start - 10 * step)) for step in range(steps)]


def letters(optimized: OptimizedModel) -> str:
    return "".join(done.kind.letter for done in optimized.history)


def warned(run: Callable[[], object]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [str(each.message) for each in caught if each.category is RuntimeWarning]


# ---- a variant that a backend cannot compile

PARTIAL = "index_put_"  # an operator that partial steps alone have


def failing(monkeypatch: pytest.MonkeyPatch, error: Exception, operator: str = "") -> list[bool]:
    """Inductor fails on graphs with this operator, and runs others as they are; returns whether each one failed."""
    tried: list[bool] = []

    def lower(self: InductorBackend, lifted: Lifted, weights: list[Tensor], tensors: tuple[Tensor, ...]) -> Any:
        tried.append(any(operator in str(node.target) for node in lifted.graph.nodes))
        if tried[-1]:
            raise error
        return fx.GraphModule({}, lifted.graph)

    monkeypatch.setattr(InductorBackend, "lower", lower)
    return tried


def test_a_variant_that_cannot_be_compiled_falls_back_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = failing(monkeypatch, RuntimeError("no lowering of index_put_"), PARTIAL)
    model, policy = models.build(), DuCa(interval=3)
    optimized = duca_compile.optimize(model, policy)
    (message,) = warned(lambda: loop(optimized))
    assert "no lowering of index_put_" in message
    assert "that of partial steps runs under eager instead" in message
    assert letters(optimized) == "FPSFPS"
    assert sorted(tried) == [False, False, True]
    with pytest.raises(
        BackendError, match=r"could not compile the variant of partial steps: .*no lowering of index_put_"
    ):
        loop(duca_compile.optimize(model, policy, strict=True))


def test_one_reason_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = failing(monkeypatch, RuntimeError("no lowering"))
    optimized = duca_compile.optimize(models.build(), DuCa(interval=3))
    assert len(warned(lambda: loop(optimized))) == 1
    assert tried == [True] * 3


@pytest.mark.parametrize("error", [InvalidCxxCompiler(), CppCompileError(["g++"], "")])
@pytest.mark.parametrize("works", [True, False])
def test_without_a_compiler_one_variant_is_tried(
    monkeypatch: pytest.MonkeyPatch, error: Exception, works: bool
) -> None:
    """One that works for others has failed on this variant's code alone."""
    monkeypatch.setattr(private, "get_cpp_compiler", lambda: "true" if works else "false")
    tried = failing(monkeypatch, error)
    optimized = duca_compile.optimize(models.build(), DuCa(interval=3))
    (message,) = warned(lambda: loop(optimized))
    assert ("all variants run under eager" in message) == ("apt-get install g++" in message) == (not works)
    assert tried == [True] * (3 if works else 1)


class BesselMLP(nn.Module):
    """A block whose branch has an operator of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.weigh = models.Block(), nn.Linear(models.WIDTH, models.WIDTH)

    def forward(self, x: Tensor, condition: Tensor, text: Tensor) -> Tensor:
        x = self.block(x, condition, text)
        return x + torch.special.bessel_j0(self.weigh(x))


@pytest.mark.slow
def test_what_inductor_has_no_lowering_for_costs_its_own_variant(monkeypatch: pytest.MonkeyPatch) -> None:
    """Full steps run the operator, those that reuse it do not."""

    def refused(*operands: Any) -> Any:
        raise NotImplementedError("bessel_j0 is not for this machine")

    monkeypatch.setitem(lowering.lowerings, torch.ops.aten.special_bessel_j0.default, refused)
    model = models.build(BesselMLP)
    optimized, eager = (duca_compile.optimize(model, FORA(3), backend) for backend in ("inductor", "eager"))
    found: list[Tensor] = []
    (message,) = warned(lambda: found.extend(loop(optimized)))
    assert "bessel_j0" in message
    assert "that of full steps runs under eager instead" in message
    for a, b in zip(found, loop(eager), strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()
    compiled = optimized._compiled.values()
    functions = {spec.kind: program.run for each in compiled for spec, (_, program) in each.programs.by_spec.items()}
    assert {kind: "<lambda>" in repr(run._compiled) for kind, run in functions.items()} == {
        "full steps": True,
        "reuse steps": False,
    }


# ---- what a capture prints


def test_others_print_while_a_model_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.export prints the graph so far where it fails, and that alone is not to be seen."""
    go, done = threading.Event(), threading.Event()

    def forward(self: nn.Module, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        go.set()
        done.wait(10)
        print("of the model", file=sys.stderr)
        return self.inner(x, timestep, text) if x.sum() < 1e9 else x  # type: ignore[operator]

    def printing() -> None:
        go.wait(10)
        print("of another thread", file=sys.stderr)
        done.set()

    model = module(forward, inner=models.build())
    monkeypatch.setattr(sys, "stderr", stream := io.StringIO())
    thread = threading.Thread(target=printing)
    thread.start()
    with pytest.raises(CaptureError):
        duca_compile.explain(model, **models.example())
    thread.join()
    assert sys.stderr is stream
    lines = stream.getvalue().splitlines()
    assert lines.count("of another thread") == 1
    assert set(lines) == {"of another thread", "of the model"}


# ---- what is computed or captured oftener than need be


@pytest.mark.slow
def test_kinds_of_call_that_push_each_other_out_are_warned_about_once(said: Callable[[str], int]) -> None:
    optimized = duca_compile.optimize(models.build(), Uncached(), "eager")
    texts = [models.example()["text"][:, :words] for words in (1, 2, 3, 4, 5)]
    for round_, warned_by_now in enumerate((0, 1, 1)):
        for text in texts:
            optimized(**models.example() | {"text": text})
        assert said("captured and compiled again and again") == warned_by_now, round_
    assert said("copy.copy(optimized)") == 1


@pytest.mark.parametrize(
    ("most", "reason"),
    [(0, "for 6 steps they would take"), (2**28, "torch.func.vmap does not support them (no rule for it)")],
)
def test_timesteps_that_cannot_be_computed_at_once_are_warned_about_once(
    said: Callable[[str], int], monkeypatch: pytest.MonkeyPatch, most: int, reason: str
) -> None:
    def vmap(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no rule for it")

    monkeypatch.setattr(rows, "MAX_BYTES", most)
    monkeypatch.setattr(torch.func, "vmap", vmap)
    monkeypatch.setattr(EagerBackend, "exact", False)
    optimized = duca_compile.optimize(models.build(), Uncached(), "eager")
    for _ in range(3):  # the loops behind the first one are expected to go as that went
        loop(optimized)
    assert said(reason) == said("computed step by step, not all at once") == 1


def test_timestep_values_that_cannot_be_built_are_an_error_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def timestep_rows(self: Programs, needed: object) -> Any:
        raise RuntimeError("a bug in building")

    monkeypatch.setattr(Programs, "timestep_rows", timestep_rows)
    monkeypatch.setattr(EagerBackend, "exact", False)
    with pytest.raises(RuntimeError, match="a bug in building"):
        loop(duca_compile.optimize(models.build(), Uncached(), "eager"))


def convolved() -> nn.Module:
    return models.Block(conv=True)


class WholeBlock(models.FusedBlock):
    """Its only branch holds attention, and is reused as a whole."""


@pytest.mark.parametrize(
    ("block", "policy", "text"),
    [
        (convolved, DuCa(interval=3), "partial steps compute 2 of 4 branches in full"),
        (WholeBlock, DuCa(interval=3), "they reuse every branch"),
        (convolved, FORA(3), ""),
        (models.Block, DuCa(interval=3), ""),
    ],
)
def test_partial_steps_that_recompute_no_tokens_say_so_once(
    said: Callable[[str], int], block: Callable[[], nn.Module], policy: Policy, text: str
) -> None:
    optimized = duca_compile.optimize(models.build(block), policy, "eager")
    for rows_ in (1, 2, 1):
        for step in range(3):
            call = models.example(step, 900.0 - step)
            optimized(**{name: value[:rows_] for name, value in call.items()})
    assert said("partial steps") == bool(text)
    assert said(text) == bool(text) or not text


def test_branches_that_the_check_of_values_finds_wrong_are_named(
    said: Callable[[str], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "_close", lambda found, expected: False)
    loop(duca_compile.optimize(models.build(), DuCa(interval=3), "eager"))
    assert said("recomputing some tokens gave different values than computing all of them") == 1


def test_steps_beyond_a_calibrated_policy_are_said(said: Callable[[str], int]) -> None:
    policy = Calibrated((None, None, FittedFactors(1, (0.5,))), max_order=1)
    optimized = duca_compile.optimize(models.build(), policy, "eager")
    loop(optimized, 5)
    assert letters(optimized) == "FFTFF"
    assert said("step 4 is more than the 3 planned steps") == 1
