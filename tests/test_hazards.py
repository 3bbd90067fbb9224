"""What callers and models do that must neither corrupt a later step nor crash a compiler."""

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from torch import Tensor, nn

import duca_compile
from duca_compile import FORA, CaptureError, DuCa, Policy, Uncached
from tests import models
from tests.test_optimize import build

STEPS = 6


class Variation(models.DiT):
    """A small DiT with something unusual in its forward."""

    def __init__(self, what: str) -> None:
        super().__init__(depth=2)
        self.what = what
        self.table: Tensor | None = None
        self.register_buffer("offset", torch.zeros(()))

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor, flag: bool = True) -> object:
        if self.what == "lazy table":
            if self.table is None:
                self.table = torch.linspace(0, 1, x.shape[1])[:, None]
            x = x + self.table
        if self.what == "autocast inside":
            with torch.autocast("cpu", enabled=False):
                x = x * 1.5
        if self.what == "in place":
            x = (x * 1.0).add_(0.5).mul_(2)
        if self.what == "random":
            x = x + torch.randn_like(x)
        y = super().forward(x, timestep, text) + self.offset
        if self.what == "returns its conditioning":
            return y, text * 2
        if self.what == "twice":
            return {"a": y * 1.0, "b": y * 1.0, "flag": flag, "nothing": None}
        return y


class NoHead(models.DiT):
    """Returns the end of its stream."""

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        condition = self.embed_t(models.embed(timestep, models.WIDTH))
        h = self.embed_x(x)
        for block in self.blocks:
            h = block(h, condition, text)
        return h


def arguments(step: int) -> dict[str, Tensor]:
    given = models.example()
    given["x"] = torch.randn(given["x"].shape, generator=torch.Generator().manual_seed(step))
    given["timestep"] = torch.full_like(given["timestep"], 900 - 10 * step)
    return given


def run(model: nn.Module, policy: Policy, spoil: bool = False, backend: str = "eager") -> list[Tensor]:
    """The first output of each step; ``spoil`` writes to every output in place once it is copied."""
    optimized = duca_compile.optimize(model.eval(), policy, backend, strict=True)
    text = models.example()["text"]
    found = []
    with torch.no_grad():
        for step in range(STEPS):
            output = optimized(**(arguments(step) | {"text": text}))
            outputs = output if isinstance(output, tuple) else (output,)
            found.append(outputs[0].clone())
            if spoil:
                for each in outputs:
                    each.mul_(0)
    return found


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("policy", [Uncached(), DuCa(4, first="skip"), DuCa(4), FORA(3)], ids=lambda p: p.name)
@pytest.mark.parametrize("returned", ["stream", "conditioning"])
def test_callers_may_write_to_what_they_get(returned: str, policy: Policy) -> None:
    torch.manual_seed(0)
    model = NoHead() if returned == "stream" else Variation("returns its conditioning")
    assert same(run(model, policy, spoil=True), run(model, policy))


@torch.no_grad()
@pytest.mark.parametrize("what", ["lazy table", "autocast inside", "in place", "twice"])
def test_unusual_forwards_give_the_models_own_results(what: str) -> None:
    torch.manual_seed(0)
    model = Variation(what).eval()
    optimized = duca_compile.optimize(model, DuCa(3), "eager")
    for step in (0, 3):
        given = arguments(0)
        got, expected = optimized(**given), model(**given)
        if what == "twice":
            assert list(got) == list(expected)
            assert (got["flag"], got["nothing"]) == (True, None)
            got["a"].zero_()
            got, expected = got["b"], expected["b"]
        assert torch.equal(got, expected), step
        optimized.reset()
    given["x"] = given["x"].transpose(1, 2).contiguous().transpose(1, 2)  # other strides
    assert torch.allclose(optimized(**given)["a"] if what == "twice" else optimized(**given), run_plain(model, given))
    assert not any(type(v) is not Tensor for v in vars(model).values() if isinstance(v, Tensor))


def run_plain(model: nn.Module, given: dict[str, Tensor]) -> Tensor:
    output = model(**given)
    return output["a"] if isinstance(output, dict) else output


@torch.no_grad()
def test_capturing_draws_none_of_the_callers_random_numbers() -> None:
    model = Variation("random").eval()
    optimized = duca_compile.optimize(model, Uncached(), "eager")
    torch.manual_seed(5)
    expected = model(**arguments(0))
    torch.manual_seed(5)
    assert torch.equal(optimized(**arguments(0)), expected)


@torch.no_grad()
def test_a_pass_that_missed_steps_computes_in_full() -> None:
    model = Variation("").eval()
    optimized = duca_compile.optimize(model, FORA(3), "eager")
    other = models.example()["text"] + 1
    for step in range(6):
        optimized(**arguments(step))
        if step in (0, 4):
            given = arguments(step) | {"text": other}
            assert torch.equal(optimized(**given), model(**given))
    assert [(e.step, e.kind.value) for e in optimized.history if e.pass_index == 1] == [(0, "full"), (4, "full")]


@torch.no_grad()
def test_guidance_switched_off_and_on_again_starts_in_full() -> None:
    """Half the batch is another captured shape of the same request; the first one's caches are old when it returns."""
    model = Variation("").eval()
    optimized = duca_compile.optimize(model, FORA(4), "eager")
    for step in range(8):
        given = arguments(step)
        optimized(**({n: t[:1] for n, t in given.items()} if step in (2, 3, 4, 5) else given))
    assert "".join(e.kind.value[0] for e in optimized.history) == "frfrfrfr"
    assert [e.step for e in optimized.history] == list(range(8))


@torch.no_grad()
def test_an_error_in_a_step_starts_over() -> None:
    model = Variation("").eval()
    optimized = duca_compile.optimize(model, FORA(3), "eager")
    optimized(**arguments(0))
    (compiled,) = optimized._compiled.values()
    _, run_full = next(iter(compiled.programs.by_spec.values()))
    working, run_full.run = run_full.run, lambda *_: (_ for _ in ()).throw(RuntimeError("lost the device"))
    optimized.reset()
    with pytest.raises(RuntimeError, match="lost the device"):
        optimized(**arguments(0))
    run_full.run = working
    for step in range(4):
        optimized(**arguments(step))
    assert "".join(e.kind.value[0] for e in optimized.history) == "frrf"


@torch.no_grad()
def test_buffers_replaced_by_to_are_seen() -> None:
    model = Variation("").eval()
    optimized = duca_compile.optimize(model, Uncached(), "eager")
    optimized(**arguments(0))
    optimized.double().float()
    model.offset.add_(1)
    assert torch.equal(optimized(**arguments(1)), model(**arguments(1)))


@torch.no_grad()
def test_a_default_given_or_not_is_the_same_call() -> None:
    optimized = duca_compile.optimize(Variation("").eval(), FORA(3), "eager")
    optimized(**arguments(0))
    optimized(**arguments(1), flag=True)
    assert "".join(e.kind.value[0] for e in optimized.history) == "fr"


@torch.no_grad()
def test_an_optimized_model_can_be_copied() -> None:
    optimized = duca_compile.optimize(Variation("").eval(), FORA(3), "eager")
    expected = optimized(**arguments(0))
    twin = copy.deepcopy(optimized)
    assert torch.equal(twin(**arguments(0)), expected)
    next(twin.parameters()).add_(1)
    assert not torch.equal(twin.source(**arguments(0)), optimized.source(**arguments(0)))


def test_a_model_without_memory_can_be_explained() -> None:
    with torch.device("meta"):
        model = build()
        x, time, labels = torch.empty(4, 3, 8, 8), torch.empty(4), torch.empty(4, dtype=torch.int64)
        assert len(duca_compile.explain(model, x, timestep=time, class_labels=labels).branches) == 6


def test_writing_to_an_argument_is_refused() -> None:
    class Writes(models.DiT):
        def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
            x.add_(1)
            return super().forward(x, timestep, text)

    with pytest.raises(CaptureError, match="writes to its argument 'x' in place; clone it there first"):
        duca_compile.optimize(Writes().eval(), Uncached(), "eager")(**models.example())


@torch.no_grad()
def test_strides_may_differ_from_call_to_call_under_inductor() -> None:
    model = Variation("").eval()
    optimized = duca_compile.optimize(model, Uncached(), "inductor", strict=True)
    for step, stretch in enumerate((False, True, False)):
        given = arguments(step)
        if stretch:
            given["timestep"] = given["timestep"][:1].expand(len(given["timestep"]))
            given["x"] = given["x"].transpose(1, 2).contiguous().transpose(1, 2)
        error = (optimized(**given) - model(**given)).norm() / model(**given).norm()
        assert error < 1e-5


class Optional(models.DiT):
    """Reads an attribute that it need not have."""

    def __init__(self) -> None:
        super().__init__(depth=1)
        self.register_buffer("scratch", torch.zeros(()), persistent=False)

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        return super().forward(x, timestep, text) * getattr(self, "gain", 1.0)


@torch.no_grad()
def test_attributes_are_set_and_deleted_on_the_source() -> None:
    model = Optional().eval()
    expected = model(**arguments(0))
    optimized = duca_compile.optimize(model, Uncached(), "eager")
    optimized(**arguments(0))
    optimized.reset()
    optimized.gain = 3.0
    assert model.gain == 3.0
    assert torch.equal(optimized(**arguments(0)), expected * 3)
    optimized.reset()
    del optimized.gain
    assert not hasattr(model, "gain")
    assert torch.equal(optimized(**arguments(0)), expected)
    with pytest.raises(AttributeError):
        del optimized.gain
    optimized.register_buffer("more", torch.ones(1), persistent=False)
    assert list(optimized.state_dict()) == list(model.state_dict())
    assert "scratch" not in optimized.state_dict()


@torch.no_grad()
def test_what_wraps_the_optimized_model_leaves_the_source_alone() -> None:
    model = Optional().eval()
    before, expected = dict(vars(model)), model(**arguments(0))
    optimized = duca_compile.optimize(model, FORA(2), "eager")
    optimized.compile(backend="eager")
    wrapped = optimized.forward
    optimized.forward = lambda **given: wrapped(**given) + 1
    assert torch.equal(optimized(**arguments(0)), expected + 1)
    del optimized.forward
    optimized.reset()
    assert torch.equal(optimized(**arguments(0)), expected)
    optimized(**arguments(1))
    assert [e.kind.value for e in optimized.history] == ["full", "reuse"]
    assert vars(model) == before
    assert torch.equal(model(**arguments(0)), expected)


class Doubling(ModelHook):  # type: ignore[misc]
    """Doubles what the module returns."""

    def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
        return output * 2


@torch.no_grad()
@pytest.mark.parametrize("when", ["before", "after"])
def test_accelerates_hooks_run_and_go(when: str) -> None:
    model = Optional().eval()
    expected = model(**arguments(0))
    before = dict(vars(model))
    if when == "before":
        add_hook_to_module(model, Doubling())
    optimized = duca_compile.optimize(model, FORA(2), "eager")
    if when == "after":
        add_hook_to_module(optimized, ModelHook())
        add_hook_to_module(optimized, Doubling(), append=True)
        assert vars(model) == before
    assert torch.equal(optimized(**arguments(0)), expected * 2)
    assert torch.equal(duca_compile.restore(optimized)(**arguments(0)), expected * (2 if when == "before" else 1))
    remove_hook_from_module(optimized, recurse=True)
    assert vars(model).keys() - {"forward"} == before.keys()
    optimized.reset()
    assert torch.equal(optimized(**arguments(0)), expected)
    optimized(**arguments(1))
    assert [e.kind.value for e in optimized.history] == ["full", "reuse"]
    assert torch.equal(model(**arguments(0)), expected)


@torch.no_grad()
def test_a_shallow_copy_shares_the_source_and_no_requests() -> None:
    optimized = duca_compile.optimize(Variation("").eval(), FORA(3), "eager")
    expected = optimized(**arguments(0))
    twin = copy.copy(optimized)
    assert twin.source is optimized.source
    assert (twin.policy, twin.history) == (optimized.policy, ())
    assert torch.equal(twin(**arguments(0)), expected)
    assert len(optimized.history) == 1


class Numbers(models.DiT):
    """Takes its timestep as a number or a tensor."""

    def __init__(self) -> None:
        super().__init__(depth=1)

    def forward(self, x: Tensor, t: float, text: Tensor) -> Tensor:
        return super().forward(x, torch.as_tensor(t).reshape(-1).expand(x.shape[0]), text)


@torch.no_grad()
@pytest.mark.parametrize("number", [int, float, np.int64, np.int32, np.float64, np.float32], ids=lambda n: n.__name__)
def test_a_timestep_may_be_a_number_of_any_kind(number: Callable[[int], float]) -> None:
    model = Numbers().eval()
    optimized = duca_compile.optimize(model, FORA(2), "eager")
    for step in range(4):
        given = arguments(step)
        found = optimized(given["x"], number(900 - 10 * step), given["text"])
        if step % 2 == 0:
            assert torch.equal(found, model(given["x"], 900 - 10 * step, given["text"]))
    assert "".join(e.kind.value[0] for e in optimized.history) == "frfr"
    assert len(optimized._compiled) == 1


@torch.no_grad()
def test_integers_and_other_numbers_are_two_kinds_of_timestep() -> None:
    model = Numbers().eval()
    optimized = duca_compile.optimize(model, FORA(2), "eager")
    for step, time in enumerate((1, 0.5, 0)):
        given = arguments(step)
        assert torch.equal(optimized(given["x"], time, given["text"]), model(given["x"], time, given["text"]))
    assert [e.step for e in optimized.history] == [0, 1, 2]
    assert len(optimized._compiled) == 2


class Frames(models.DiT):
    """Has an option ``t``, a number of frames, beside its timestep."""

    def __init__(self) -> None:
        super().__init__(depth=1)

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor, t: int = 2) -> Tensor:
        return super().forward(x.unflatten(1, (t, -1)).flatten(1, 2) * t, timestep, text)


@torch.no_grad()
def test_a_number_beside_a_timestep_is_an_option() -> None:
    model = Frames().eval()
    optimized = duca_compile.optimize(model, Uncached(), "eager")
    for frames in (2, 4):
        given = arguments(0) | {"t": frames}
        assert torch.equal(optimized(**given), model(**given))
        optimized.reset()
    assert {compiled.captured.inputs for compiled in optimized._compiled.values()} == {("x", "timestep", "text")}
