"""The life of a model after it was optimized: whatever is done to it takes effect, and is captured no oftener than it
must be.
"""

from __future__ import annotations

import copy
import functools
import gc
import logging
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import duca_compile
from duca_compile import DuCa, OptimizedModel, Uncached
from duca_compile.compiler import captures
from duca_compile.frontend.snapshot import take
from duca_compile.integrations.diffusers import set_component
from tests import models, pipelines, zoo
from tests.test_optimize import LABELS, latent
from tests.test_optimize import build as dit

ROWS = 2


class Model(models.DiT):
    """A small DiT that reads plain attributes, and makes a table at first use."""

    def __init__(self) -> None:
        super().__init__(depth=1)
        self.gain = 1.0
        self.settings = {"shift": [0.0, 1.0]}
        self.act: Callable[[Tensor], Tensor] = torch.tanh
        self.table: Tensor | None = None
        self.register_buffer("offset", torch.zeros(models.CHANNELS))

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor, bias: Tensor | None = None) -> Tensor:
        if self.table is None or self.table.shape[0] != x.shape[0]:
            self.table = torch.linspace(0, 1, x.shape[0], dtype=x.dtype)[:, None, None]
        x = x + self.table * self.settings["shift"][0]
        y = self.act(super().forward(x, timestep.to(x.dtype), text) * self.gain) + self.offset
        return y if bias is None else y + bias


class Counting(Model):
    """Counts its calls."""

    calls = 0

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        self.calls += 1
        return super().forward(*args, **kwargs)


class Reading(Model):
    """Reads a value, so that it is traced with that."""

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor, bias: Tensor | None = None) -> Tensor:
        return super().forward(x * float(text.mean().item()), timestep, text, bias)


def tiny(kind: type[Model] = Model) -> Model:
    torch.manual_seed(0)
    return kind().eval().requires_grad_(False)


def given(step: int, rows: int = ROWS, words: int = 7, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {
        "x": torch.randn(rows, models.TOKENS, models.CHANNELS, generator=generator).to(dtype),
        "timestep": torch.full((rows,), 900.0 - 10 * step),
        "text": torch.ones(rows, words, models.TEXT, dtype=dtype),
    }


def request(model: nn.Module, steps: int = 2, **options: Any) -> list[Tensor]:
    return [model(**given(step, **options)) for step in range(steps)]


def agree(optimized: OptimizedModel, **options: Any) -> bool:
    """Whether a request, which is computed in full, gives the model's own results bit for bit."""
    found, expected = request(optimized, **options), request(optimized.source, **options)
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


class Log:
    """Counts what was logged since it was last asked."""

    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        self._caplog = caplog

    def __call__(self, part: str) -> int:
        messages = [record.getMessage() for record in self._caplog.records if record.name == "duca_compile"]
        return sum(part in message for message in messages)

    def captures(self) -> int:
        """Captures after the first, less those that compile nothing."""
        found = self("anew") - self("nothing is compiled")
        self._caplog.clear()
        return found


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Log:
    caplog.set_level(logging.INFO, "duca_compile")
    return Log(caplog)


def replace_parameter(model: Model) -> None:
    model.head.weight = nn.Parameter(model.head.weight * 2)


def replace_module(model: Model) -> None:
    model.blocks[0].mlp = nn.Sequential(nn.Linear(models.WIDTH, models.WIDTH), nn.SiLU()).requires_grad_(False)


def untie(model: Model) -> None:
    model.blocks[0].attention.q.weight = model.blocks[0].attention.k.weight


def other_kind(model: Model) -> None:
    model.head.weight = nn.Parameter(model.head.weight.t().contiguous().t(), requires_grad=False)
    model.head.weight.mul_(2)


def hook(model: Model) -> None:
    model.blocks[0].register_forward_hook(lambda module, args, output: output * 1.5)


def nested(model: Model) -> None:
    model.settings["shift"][0] = 0.5


CHANGES: dict[str, Callable[[Model], object]] = {
    "in place": lambda m: m.head.weight.mul_(2),
    "data": lambda m: setattr(m.head.weight, "data", m.head.weight * 2),
    "load_state_dict": lambda m: m.load_state_dict({n: t + 0.01 for n, t in m.state_dict().items()}),
    "load_state_dict(assign)": lambda m: m.load_state_dict(
        {n: t + 0.01 for n, t in m.state_dict().items()}, assign=True
    ),
    "a parameter": replace_parameter,
    "a parameter in other strides": other_kind,
    "a tied parameter": untie,
    "a buffer": lambda m: setattr(m, "offset", torch.ones(models.CHANNELS)),
    "a module": replace_module,
    "a module added": lambda m: m.blocks.append(copy.deepcopy(m.blocks[0])),
    "a number": lambda m: setattr(m, "gain", 2.0),
    "a nested number": nested,
    "a function": lambda m: setattr(m, "act", torch.sin),
    "a bound function": lambda m: setattr(m, "act", functools.partial(torch.add, other=1)),
    "a tensor": lambda m: (
        setattr(m, "table", torch.full((ROWS, 1, 1), 3.0)) or setattr(m, "settings", {"shift": [1.0]})
    ),
    "a hook": hook,
}


@torch.no_grad()
@pytest.mark.parametrize("what", CHANGES)
def test_a_change_takes_effect_at_the_next_request(what: str) -> None:
    model = tiny()
    optimized = duca_compile.optimize(model, Uncached(), "eager")
    before = request(optimized)
    CHANGES[what](model)
    assert agree(optimized)
    assert not torch.equal(request(optimized)[0], before[0])


@torch.no_grad()
@pytest.mark.parametrize("what", ["load_state_dict", "load_state_dict(assign)", "a parameter", "a buffer", "a number"])
def test_what_is_done_to_the_optimized_model_is_done_to_its_source(what: str) -> None:
    optimized = duca_compile.optimize(tiny(), Uncached(), "eager")
    before = request(optimized)
    CHANGES[what](optimized)
    assert agree(optimized)
    assert not torch.equal(request(optimized)[0], before[0])


@torch.no_grad()
@pytest.mark.parametrize("what", ["in place", "data", "load_state_dict(assign)"])
def test_changed_weights_take_effect_in_mid_request(what: str) -> None:
    model = tiny()
    optimized = duca_compile.optimize(model, Uncached(), "eager")
    optimized(**given(0))
    CHANGES[what](model)
    after = optimized(**given(1))
    assert torch.allclose(after, model(**given(1)), atol=0.02)  # but for the text's projection, which is hoisted
    assert [executed.step for executed in optimized.history] == [0, 1]


@torch.no_grad()
def test_another_type_in_mid_request_goes_on_with_a_full_step() -> None:
    model = dit()
    optimized = duca_compile.optimize(model, DuCa(3), "eager")
    for step in range(3):
        if step == 1:
            optimized.double()
        arguments = {"timestep": torch.full((4,), 900 - step), "class_labels": LABELS}
        x = latent(step).to(model.dtype)
        found = optimized(x, **arguments).sample
        assert found.dtype == model.dtype
        assert torch.equal(found, model(x, **arguments).sample) == (step < 2)
    assert "".join(executed.kind.value[0] for executed in optimized.history) == "ffs"


def test_a_move_to_another_device_is_seen_at_once() -> None:
    model = tiny()
    weights = take(model).weights
    assert weights.seem_unchanged()
    model.to("meta")
    assert not weights.seem_unchanged()


def test_weights_that_a_trace_has_put_away_are_kept() -> None:
    model = tiny()
    weights, seen = take(model).weights, []

    def look(*_: object) -> None:
        seen.append((weights.seem_unchanged(), take(model).weights.traced()))

    model.head.register_forward_hook(look)
    torch.export.export(model, (), given(0), strict=False)
    assert seen[-1] == (True, True)
    assert weights.seem_unchanged()
    assert not take(model).weights.traced()


@torch.no_grad()
def test_weights_of_the_same_kind_are_not_captured_anew(log: Log) -> None:
    """Not even the buffers that ``to`` makes anew each time: offloading moves a model at every request."""
    model = tiny()
    optimized = duca_compile.optimize(model, Uncached(), "eager")
    request(optimized)
    for change in ("load_state_dict(assign)", "a parameter", "a buffer", "data"):
        CHANGES[change](model)
        assert agree(optimized), change
    for _ in range(3):
        optimized.double().float()
        assert agree(optimized)
    assert log.captures() == 0


@torch.no_grad()
def test_weights_under_names_of_the_trace_are_replaced_too(log: Log) -> None:
    model = tiny(Reading)
    optimized = duca_compile.optimize(model, Uncached(), "eager")
    before = request(optimized)
    replace_parameter(model)
    assert agree(optimized)
    assert not torch.equal(request(optimized)[0], before[0])
    assert log.captures() == 0


@pytest.mark.slow
@torch.no_grad()
def test_compiled_code_sees_new_weights_too(log: Log) -> None:
    model = tiny()
    optimized = duca_compile.optimize(model, Uncached(), "inductor", strict=True)
    request(optimized)
    for change in (replace_parameter, CHANGES["a buffer"], replace_module):
        change(model)
        for found, expected in zip(request(optimized), request(model), strict=True):
            torch.testing.assert_close(found, expected)
    assert log.captures() == 1


@torch.no_grad()
def test_a_return_to_an_earlier_state_finds_its_capture(log: Log) -> None:
    model = tiny()
    optimized = duca_compile.optimize(model, Uncached(), "eager")
    for gain in (1.0, 2.0, 1.0, 2.0, 1.0):
        model.gain = gain
        assert agree(optimized)
    assert log("(gain): capturing Model anew") == 1
    assert log.captures() == 1
    model.head.weight = nn.Parameter(model.head.weight * 2)  # gain 2 was captured with the other one
    model.gain = 2.0
    assert agree(optimized)


@torch.no_grad()
def test_weights_that_the_model_let_go_are_let_go(log: Log) -> None:
    model = tiny()
    optimized = duca_compile.optimize(model, Uncached(), "eager")
    request(optimized)
    old = weakref.ref(model.blocks[0].mlp[0].weight)
    replace_module(model)
    assert agree(optimized)
    gc.collect()
    assert old() is None
    assert log("no longer holds its weights") == 1


@torch.no_grad()
def test_what_forward_itself_changes_is_no_change(log: Log) -> None:
    """A counter, and a table for each batch size; the model also runs on its own, as in a comparison."""
    model = tiny(Counting)
    optimized = duca_compile.optimize(model, Uncached(), "eager")
    for rows in (2, 3, 2, 3, 2):
        request(optimized, rows=rows)
    assert model.calls == 0
    assert log("Counting: forward changes calls at each call, at") == 1
    assert (log("new shapes"), log.captures()) == (1, 1)
    for _ in range(4):
        assert agree(optimized)
    assert log("changed weights, modules or attributes (table)") == log("nothing is compiled") == 1
    CHANGES["a tensor"](model)
    assert agree(optimized)
    assert log.captures() == 1


@torch.no_grad()
def test_a_model_that_changes_at_every_request_is_captured_each_time_with_one_warning(
    log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(captures, "MAX_IN_ALL", 4)
    model = tiny()
    optimized = duca_compile.optimize(model, Uncached(), "eager")
    for number in range(7):
        model.gain = 1.0 + number
        assert agree(optimized)
        assert len(optimized._compiled.values()) <= 4
    assert log("Model has changed before each of the last 3 captures (now gain)") == 1
    assert log("dropping the least recently used") == 3
    assert log.captures() == 6


@torch.no_grad()
def test_an_attribute_that_nothing_reads_compiles_nothing(log: Log) -> None:
    model = tiny()
    optimized = duca_compile.optimize(model, Uncached(), "eager")
    request(optimized)
    (compiled,) = optimized._compiled.values()
    model.progress = 0.5  # type: ignore[assignment]
    assert agree(optimized)
    assert [*optimized._compiled.values()] == [compiled]
    assert log.captures() == 0


@torch.no_grad()
def test_each_kind_of_call_is_captured_once(log: Log) -> None:
    model = tiny()
    optimized = duca_compile.optimize(model, Uncached(), "eager")
    calls = ({}, {"words": 9}, {"rows": 3}, {"bias": torch.ones(models.CHANNELS)})
    for _ in range(3):
        for options in calls:
            extra = {name: options[name] for name in options if name == "bias"}
            shapes = {name: options[name] for name in options if name != "bias"}
            arguments = given(0, **shapes) | extra
            assert torch.equal(optimized(**arguments), model(**arguments))
    assert log("new shapes, types, options or values that it reads in the call") == len(calls) - 1
    assert log("dropping") == 0


def without_timestep(case: zoo.Case) -> zoo.Case:
    model, arguments = case
    return model, {name: value for name, value in arguments.items() if name != "timestep"}


def flux() -> zoo.Case:
    return without_timestep(zoo.flux(1))


def wan() -> zoo.Case:
    return without_timestep(zoo.wan(1))


def sampled(model: nn.Module, arguments: dict[str, Any]) -> list[Tensor]:
    """The results of two steps of a request."""
    return [model(timestep=torch.full((ROWS,), time), **arguments)[0] for time in (0.9, 0.8)]


class Watch:
    """Compares an optimized model with its source, and with what it gave the last time."""

    def __init__(self, build: Callable[[], tuple[nn.Module, dict[str, Any]]]) -> None:
        torch.manual_seed(0)
        self.model, self.arguments = build()
        self.model.eval()
        self.optimized = duca_compile.optimize(self.model, Uncached(), "eager")
        self.last = self.run()

    def run(self, **more: Any) -> list[Tensor]:
        found, expected = (sampled(model, self.arguments | more) for model in (self.optimized, self.model))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        return found

    def changed(self, **more: Any) -> bool:
        """Whether a request, which must give what the source gives, gives something new."""
        before, self.last = self.last, self.run(**more)
        return not torch.equal(self.last[0], before[0])


@torch.no_grad()
def test_adapters_take_effect(log: Log) -> None:
    peft = pytest.importorskip("peft")
    watch = Watch(flux)
    model, plain = watch.optimized, watch.last
    config = peft.LoraConfig(r=2, lora_alpha=3, init_lora_weights=False, target_modules=["to_q", "to_v"])
    model.add_adapter(config, "one")
    assert watch.changed()
    assert watch.changed(joint_attention_kwargs={"scale": 0.5})
    model.set_adapters("one", 0.3)
    assert watch.changed()
    model.add_adapter(config, "two")
    assert watch.changed()
    log.captures()
    model.disable_lora()
    assert watch.changed()
    assert torch.equal(watch.last[0], plain[0])
    model.enable_lora()
    assert watch.changed()
    assert log.captures() == 1  # both adapters again: as captured before
    model.delete_adapters("two")
    assert watch.changed()
    model.fuse_lora()
    assert watch.changed()  # by rounding
    model.unfuse_lora()
    assert watch.changed()
    model.unload_lora()
    assert watch.changed()
    assert torch.allclose(watch.last[0], plain[0], atol=1e-5)


@torch.no_grad()
def test_an_adapter_loaded_from_weights_takes_effect() -> None:
    pytest.importorskip("peft")
    watch = Watch(wan)
    places = [f"blocks.0.{attention}.to_{each}" for attention in ("attn1", "attn2") for each in "qkv"]
    width = watch.model.blocks[0].attn1.to_q.weight.shape[0]
    weights = {f"{place}.lora_{side}.weight": torch.randn(2, width) for place in places for side in "AB"}
    weights = {name: tensor.t() if "lora_B" in name else tensor for name, tensor in weights.items()}
    watch.optimized.load_lora_adapter(weights, prefix=None)
    assert watch.changed()
    assert watch.changed(attention_kwargs={"scale": 0.5})
    watch.optimized.unload_lora()
    assert watch.changed()


@torch.no_grad()
def test_a_pipelines_adapters_take_effect() -> None:
    pytest.importorskip("peft")
    pipe = pipelines.make("FLUX")
    duca_compile.optimize(pipe, Uncached(), "eager")
    optimized = pipe.transformer

    def image(**more: Any) -> Tensor:
        found = pipelines.run(pipe, "FLUX", steps=2, true_cfg_scale=1.0, **more)
        set_component(pipe, "transformer", optimized.source)
        assert torch.equal(pipelines.run(pipe, "FLUX", steps=2, true_cfg_scale=1.0, **more), found)
        set_component(pipe, "transformer", optimized)
        return found

    plain = image()
    place = "transformer.transformer_blocks.0.attn.to_q"
    pipe.load_lora_weights({f"{place}.lora_A.weight": torch.randn(2, 32), f"{place}.lora_B.weight": torch.randn(32, 2)})
    loaded = image()
    assert not torch.equal(loaded, plain)
    assert not torch.equal(image(joint_attention_kwargs={"scale": 0.5}), loaded)
    pipe.unload_lora_weights()
    assert torch.equal(image(), plain)


@torch.no_grad()
def test_an_attention_processor_takes_effect() -> None:
    watch = Watch(wan)

    class Louder:
        def __init__(self, inner: Any, gain: float) -> None:
            self.inner, self.gain = inner, gain

        def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
            return self.inner(*args, **kwargs) * self.gain

    original = watch.model.attn_processors
    watch.optimized.set_attn_processor({name: Louder(inner, 2.0) for name, inner in original.items()})
    assert watch.changed()
    watch.model.blocks[0].attn1.processor.gain = 3.0
    assert watch.changed()
    watch.optimized.set_attn_processor(original)
    assert watch.changed()


@torch.no_grad()
def test_a_quantized_model_is_computed_bit_for_bit_and_understood_like_the_plain_one() -> None:
    torchao = pytest.importorskip("torchao.quantization")
    torch.manual_seed(0)
    model, arguments = flux()
    model.eval().requires_grad_(False)
    arguments["timestep"] = torch.full((ROWS,), 0.9)
    plain = duca_compile.explain(model, **arguments)
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    optimized = duca_compile.optimize(model, DuCa(3, fresh_ratio=0.5), "eager")
    for step in range(3):
        arguments["timestep"] = torch.full((ROWS,), 0.9 - 0.1 * step)
        found, expected = optimized(**arguments)[0], model(**arguments)[0]
        assert torch.isfinite(found).all()
        assert torch.equal(found, expected) == (step == 0)
    assert "".join(executed.kind.value[0] for executed in optimized.history) == "fps"
    quantized = duca_compile.explain(optimized, **arguments)
    for one, other in zip(quantized.branches, plain.branches, strict=True):
        assert (one.kind, one.pointwise, one.flops) == (other.kind, other.pointwise, other.flops)
    assert quantized.flops == plain.flops
    assert len(quantized.hoisted) == len(plain.hoisted), "widened weights are not kept"


@torch.no_grad()
def test_quantizing_an_optimized_model_takes_effect() -> None:
    torchao = pytest.importorskip("torchao.quantization")
    model = tiny()
    optimized = duca_compile.optimize(model, Uncached(), "eager")
    before = request(optimized)
    torchao.quantize_(optimized, torchao.Int8WeightOnlyConfig())
    assert agree(optimized)
    quantized = request(optimized)
    assert not torch.equal(quantized[0], before[0])
    model.head.weight.qdata.zero_()
    assert agree(optimized)
    assert not torch.equal(request(optimized)[0], quantized[0])


@pytest.mark.slow
@torch.no_grad()
def test_a_quantized_model_runs_compiled() -> None:
    torchao = pytest.importorskip("torchao.quantization")
    model = tiny()
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    expected, found = (
        request(duca_compile.optimize(model, DuCa(3, fresh_ratio=0.5), backend, strict=True), 3)
        for backend in ("eager", "inductor")
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
