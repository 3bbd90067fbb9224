"""Python state of a model: what forward changes by itself, what others change within a request, and what is refused."""

from __future__ import annotations

import logging
import types
from collections import defaultdict
from collections.abc import Callable
from contextvars import ContextVar
from threading import local
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

import duca_compile
from duca_compile import CaptureError, StructureError, UsageError
from duca_compile.frontend.side_effects import ModelState
from duca_compile.frontend.snapshot import Watch
from tests import models
from tests.features import state as cases
from tests.features.state import attending, block, call, guided, loop, sd3, small


class Counting(models.Attention):
    """Louder in its first two calls."""

    calls = 0

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        self.calls += 1
        return super().forward(x, context) * (1.5 if self.calls <= 2 else 1.0)


@torch.no_grad()
def test_capturing_and_warming_up_count_nothing() -> None:
    model = attending(Counting)()
    optimized = duca_compile.optimize(model, "none", "eager", cases.STEPS)
    optimized.warm_up(**models.example())
    assert [each.attention.calls for each in model.blocks] == [0, 0]
    assert "calls" not in vars(model.blocks[0].attention)
    loop(optimized)
    assert [each.attention.calls for each in model.blocks] == [cases.STEPS] * 2


@torch.no_grad()
def test_steps_from_caches_do_not_run_what_counts_and_a_warning_says_so(caplog: pytest.LogCaptureFixture) -> None:
    model = attending(Counting)()
    optimized = duca_compile.optimize(model, "fora", "eager", cases.STEPS)
    loop(optimized)
    assert "".join(each.kind.value[0] for each in optimized.history) == "frrfr"
    assert [each.attention.calls for each in model.blocks] == [2, 2]
    (said,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert "blocks.0.attention changes blocks.0.attention.calls at each call, at" in said
    assert '("self.calls += 1")' in said
    assert "steps that take its results from caches do not run it" in said


class Reads(models.DiT):
    """Goes by a count of its own calls, and keeps things."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.kept = 0, list[Tensor]()

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        self.calls += 1
        self.table = torch.ones(1)
        y = super().forward(x, timestep, text)
        self.kept.append(y)
        return y * self.table if self.calls < 3 else y


@torch.no_grad()
@pytest.mark.parametrize("fails", ["in the first run", "in the trace"])
def test_a_capture_that_fails_leaves_the_model_as_it_was(fails: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = (Reads() if fails == "in the first run" else attending(Counting)()).eval()
    seen: list[Any] = []
    block(model).register_forward_hook(lambda module, args, output: seen.append(output))
    if fails == "in the trace":
        monkeypatch.setattr(
            "duca_compile.compiler.analyze.analyze", lambda *_: (_ for _ in ()).throw(StructureError("none"))
        )
    held = ModelState(model)
    with pytest.raises((CaptureError, StructureError)):
        duca_compile.optimize(model, "none", "eager")(**models.example())
    assert not held.changes()
    assert seen == []


@torch.no_grad()
def test_no_fake_tensor_stays_in_a_model() -> None:
    class Making(models.Attention):
        def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
            self.table = torch.ones(x.shape[1], 1)
            return super().forward(x, context) * self.table

    model = attending(Making)()
    optimized = duca_compile.optimize(model, "none", "eager")
    assert all(torch.equal(a, b) for a, b in zip(loop(optimized), loop(attending(Making)()), strict=True))
    tables = [each.attention.table for each in model.blocks]
    assert not any(isinstance(table, FakeTensor) for table in tables)
    assert not optimized._compiled._kept[next(iter(optimized._compiled._kept))].captured.opaque


@torch.no_grad()
def test_a_change_in_mid_request_is_followed_within_it_and_finds_its_capture_again() -> None:
    model = small()
    part = block(model)
    optimized = duca_compile.optimize(model, "fora", "eager", 12)
    handles: list[Any] = []

    def during(_: nn.Module, step: int) -> None:
        if step in (4, 8):
            handles.append(part.register_forward_hook(lambda module, args, output: output * 1.5))
        if step in (6, 10):
            handles.pop().remove()

    for step in range(12):
        during(optimized, step)
        call(optimized, step)
    assert [each.step for each in optimized.history] == [*range(12)]
    assert "".join(each.kind.value[0] for each in optimized.history)[:6] == "frrffr"  # a pass that joins late is full
    assert len(optimized._compiled) == 2


@torch.no_grad()
def test_what_is_found_late_is_said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    model = small()
    optimized = duca_compile.optimize(model, "none", "eager")
    call(optimized, 0)
    with monkeypatch.context() as patch:
        patch.setattr(Watch, "is_due", lambda watch: False)
        block(model).gain = 2.0
        call(optimized, 1)
        block(model).attention.forward = types.MethodType(lambda self, x: x, block(model).attention)
        call(optimized, 2)
        assert not [record for record in caplog.records if record.name == "duca_compile"]
        own = call(model, 3)
        optimized.blocks[1]
        assert torch.equal(call(optimized, 3), own)
    assert "perhaps up to 2 calls ago" in caplog.text


@torch.no_grad()
def test_reading_what_pipelines_read_asks_for_no_look(monkeypatch: pytest.MonkeyPatch) -> None:
    optimized = duca_compile.optimize(sd3(), "none", "eager")
    call(optimized, 0)
    for name in ("dtype", "device", "config", "training"):
        getattr(optimized, name)
    assert not optimized._compiled.touched
    for act in (
        lambda: optimized.transformer_blocks,
        lambda: [*optimized.modules()],
        lambda: optimized.attn_processors,
    ):
        optimized._compiled.touched = False
        act()
        assert optimized._compiled.touched


class Modes(models.Attention):
    """Writes what it reads in another kind of call."""

    kept: Tensor | None = None
    mode = "write"

    def forward(self, x: Tensor, context: Tensor | None = None, mode: str = "") -> Tensor:
        y = super().forward(x, context)
        if (mode or self.mode) == "write":
            self.kept = y
            return y
        return y if self.kept is None else 0.5 * (y + self.kept)


class ByText(models.Block):
    """Writes where there are few words."""

    def forward(self, x: Tensor, condition: Tensor, text: Tensor) -> Tensor:
        mode = "write" if text.shape[1] < 7 else "read"
        return x + self.attention(self.norm(x) + condition[:, None], mode=mode)


class Setting(models.Block):
    """Says so by an attribute."""

    def forward(self, x: Tensor, condition: Tensor, text: Tensor) -> Tensor:
        self.attention.mode = "write" if text.shape[1] < 7 else "read"
        return x + self.attention(self.norm(x) + condition[:, None])


def in_modes(kind: type[models.Block], optimize: bool) -> list[Tensor]:
    model = models.build(kind)
    for each in model.blocks:
        each.attention.__class__ = Modes
    run: Any = duca_compile.optimize(model, "none", "eager") if optimize else model
    calls = [models.example(step, 9.0 - step) for step in range(6)]
    words = (7, 5, 7, 5, 7, 7)
    return [run(**each | {"text": each["text"][:, :number]}) for each, number in zip(calls, words, strict=True)]


@torch.no_grad()
def test_what_one_kind_of_call_writes_and_another_reads_is_followed_in_both() -> None:
    pairs = zip(in_modes(ByText, True), in_modes(ByText, False), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    with pytest.raises(CaptureError, match=r"forward sets blocks.0.attention.mode, at .*self.attention.mode = "):
        in_modes(Setting, True)


def test_explain_refuses_caches_of_diffusers_too() -> None:
    model = cases.flux()
    cases.caching(cases.CACHES["FirstBlockCache"]())(model)
    with pytest.raises(UsageError, match="call disable_cache"):
        duca_compile.explain(model, **cases.zoo.flux(1)[1])


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("name", ["SkipLayerGuidance", "PerturbedAttentionGuidance"])
def test_passes_of_guiders_keep_caches_of_their_own(name: str) -> None:
    build, run = (cases.dit, cases.run_dit) if name.startswith("Perturbed") else (lambda: sd3(4), cases.run_sd3)
    optimized = duca_compile.optimize(build(), "fora", "eager")
    for _ in range(2):
        guided(optimized, cases.GUIDERS[name](), run)
        passes: dict[int, str] = {}
        for each in optimized.history:
            passes[each.pass_index] = passes.get(each.pass_index, "") + each.kind.value[0]
        assert passes[0] == passes[1] == "frrfr"
        assert passes[2][0] == "f"
        assert "r" in passes[2]
    assert len(optimized._compiled) == 2


COUNTER, CALLS, DEFAULTS, LOCAL = types.SimpleNamespace(calls=0), np.zeros(1), defaultdict[str, int](int), local()
SCALE = ContextVar("scale", default=1.0)
OUTSIDE = types.ModuleType("outside")
SOURCE = torch.Generator()


class Shared:
    calls = 0


def count(kind: str) -> float:
    """Counts where only code can see it, not the module."""
    match kind:
        case "object":
            COUNTER.calls += 1
            return COUNTER.calls
        case "array":
            CALLS[0] += 1
            return float(CALLS[0])
        case "defaultdict":
            DEFAULTS["calls"] += 1
            return DEFAULTS["calls"]
        case "class":
            Shared.calls += 1
            return Shared.calls
        case "module":
            OUTSIDE.calls += 1
            return float(OUTSIDE.calls)
        case "thread":
            LOCAL.calls += 1
            return float(LOCAL.calls)
        case "generator":
            return float(torch.rand(1, generator=SOURCE))
    raise ValueError(kind)


class Louder(models.Attention):
    kind = ""

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return super().forward(x, context) * (1 + 0.01 * count(self.kind))


def louder(kind: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        COUNTER.calls, CALLS[0], Shared.calls, LOCAL.calls = 0, 0, 0, 0
        DEFAULTS.clear()
        vars(OUTSIDE)["calls"] = 0
        SOURCE.manual_seed(0)
        model = attending(Louder)()
        for each in model.blocks:
            each.attention.kind = kind
        return model

    return build


@pytest.mark.parametrize("kind", ["object", "array", "defaultdict", "class", "module", "thread", "generator"])
def test_what_counts_in_globals_runs_as_it_is(kind: str) -> None:
    expected = loop(louder(kind)())
    optimized = duca_compile.optimize(louder(kind)(), "none", "eager", cases.STEPS)
    assert all(map(torch.equal, loop(optimized), expected))


def scale(kind: str, value: float) -> None:
    if kind == "context":
        SCALE.set(value)
    elif kind == "thread":
        LOCAL.scale = value
    elif kind == "module":
        vars(OUTSIDE)["scale"] = value
    else:
        COUNTER.scale = value


class Scaled(models.Attention):
    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return super().forward(x, context) * SCALE.get() * LOCAL.scale * OUTSIDE.scale * COUNTER.scale


@pytest.mark.parametrize("kind", ["context", "thread", "module", "object"])
def test_globals_that_are_set_within_a_request_are_followed(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("duca_compile.frontend.snapshot.WATCH_BACKOFF", 0)

    def during(_: nn.Module, step: int) -> None:
        for each in ("context", "thread", "module", "object"):
            scale(each, 1.0)
        scale(kind, 1.0 if step < 3 else 0.5)

    found, expected = cases.both(attending(Scaled), during)
    assert all(map(torch.equal, found, expected))


def test_the_forward_of_a_class_may_be_replaced_within_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("duca_compile.frontend.snapshot.WATCH_BACKOFF", 0)
    own = models.Attention.forward

    def during(_: nn.Module, step: int) -> None:
        monkeypatch.setattr(models.Attention, "forward", own if step < 3 else lambda *args: own(*args) * 0.5)

    found, expected = cases.both(small, during)
    assert all(map(torch.equal, found, expected))


def test_functions_of_torch_may_be_replaced_within_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """As attention libraries have users do it."""
    monkeypatch.setattr("duca_compile.frontend.snapshot.WATCH_BACKOFF", 0)
    attention = functional.scaled_dot_product_attention

    def during(_: nn.Module, step: int) -> None:
        halved = step == 2
        replacement = (lambda *args, **kwargs: attention(*args, **kwargs) * 0.5) if halved else attention
        monkeypatch.setattr(functional, "scaled_dot_product_attention", replacement)

    found, expected = cases.both(small, during)
    assert all(map(torch.equal, found, expected))


@torch.no_grad()
def test_counting_flops_captures_nothing_anew(caplog: pytest.LogCaptureFixture) -> None:
    """Torch's own tools set hooks on all modules, of which each use has new ones."""
    model = small()
    with FlopCounterMode(display=False) as plain:
        loop(model)
    optimized = duca_compile.optimize(model, "none", "eager", cases.STEPS)
    loop(optimized)
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            with FlopCounterMode(display=False) as counted:
                loop(optimized)
            assert 0 < counted.get_total_flops() <= plain.get_total_flops()
    assert not [record for record in caplog.records if record.name.startswith("duca_compile")]


HIDDEN = bytearray(1)


class Hides(models.Attention):
    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        HIDDEN[0] += 1
        return super().forward(x, context) * HIDDEN[0]


def test_calls_that_cannot_be_repeated_are_refused() -> None:
    with pytest.raises(CaptureError, match=r"^blocks.0.attention gives other results when DiT is called again"):
        loop(duca_compile.optimize(attending(Hides)(), "none", "eager", cases.STEPS))


def test_a_hook_on_the_model_that_counts_and_goes_by_it_is_refused() -> None:
    model, calls = small(), [0]

    def louder_each_time(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        calls[0] += 1
        return output * calls[0]

    model.register_forward_hook(louder_each_time)
    with pytest.raises(CaptureError, match="and reads it"):
        loop(duca_compile.optimize(model, "none", "eager", cases.STEPS))


class Once(models.Attention):
    first = True

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        again, self.first = not self.first, False
        return super().forward(x, context) * (1.0 if again else 2.0)


def test_another_first_call_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    loop(duca_compile.optimize(attending(Once)(), "none", "eager", cases.STEPS))
    assert "other results at its first call, which sets blocks.0.attention.first" in caplog.text
