"""Forwards that read values in Python: exact for every value, captured anew only where what is read differs."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import duca_compile
from duca_compile import CaptureError, DuCa, Uncached
from tests import models, zoo
from tests.models import BATCH

MASKS = ("branch", "length", "numpy", "selection", "masked_select", "slice", "arange", "where", "repeat_interleave")
POLICY = DuCa(interval=3, fresh_ratio=0.5)


def _written_through_data(text: Tensor, mask: Tensor) -> Tensor:
    places = torch.zeros_like(text)
    places.data[:, :3].copy_(text[:, :3])
    return text + places


READ_MASK: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # what becomes of the text, by what is read of its mask
    "branch": lambda text, mask: text * 2 if mask.all() else text,
    "length": lambda text, mask: text[:, : int(mask.sum(1).max())],
    "numpy": lambda text, mask: text * float(mask.numpy().mean()),
    "selection": lambda text, mask: text[:1, mask[0]].expand(BATCH, -1, -1),
    "masked_select": lambda text, mask: text + torch.masked_select(text, mask[..., None]).mean(),
    "data": _written_through_data,
    "slice": lambda text, mask: text[:, : mask[0].sum()],
    "arange": lambda text, mask: text + torch.arange(mask[0].sum()).sum(),
    "where": lambda text, mask: text * torch.where(mask[0])[0].shape[0],
    "repeat_interleave": lambda text, mask: text.repeat_interleave(mask[0].long(), 1),
    "no difference": lambda text, mask: text + 0 if mask.any() else text,
}


class Reader(nn.Module):
    """A DiT whose forward reads its prompt's mask, or its latent, in the way called ``how``."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.dit = models.build(models.CrossBlock)
        self.experts = Experts()
        self.register_buffer("flag", torch.ones(()))

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        if self.how in READ_MASK:
            text = READ_MASK[self.how](text, mask)
        elif self.how == "buffer" and self.flag.item() > 0:
            text = text * 2
        elif self.how == "experts":
            x, _ = self.experts(x)
        elif self.how == "latent" and x.mean() > 0:
            x = x * 2
        elif self.how == "timestep":
            x = x + torch.full((1,), timestep[0])
        return self.dit(x, timestep, text)


class Experts(nn.Module):
    """Each token goes to one of two experts, counted on the host: what a graph cannot hold."""

    def __init__(self) -> None:
        super().__init__()
        self.choice = nn.Linear(models.CHANNELS, 2)
        self.calls = 0
        self.experts = nn.ModuleList(nn.Linear(models.CHANNELS, models.CHANNELS) for _ in range(2))

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        chosen = self.choice(x).argmax(-1)
        self.calls += 1
        out = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            if int((chosen == index).sum()):
                out[chosen == index] = expert(x[chosen == index])
        return out, None


def build(how: str) -> Reader:
    torch.manual_seed(0)
    return Reader(how).eval().requires_grad_(False)


def call(step: int = 0, length: int = 7, seed: int = 0) -> dict[str, Tensor]:
    mask = (torch.arange(7) < length).expand(BATCH, -1).clone()
    return models.example(seed, 7.0 - step) | {"mask": mask}


def captures(optimized: nn.Module) -> int:
    return len(optimized._compiled)


@torch.no_grad()
@pytest.mark.parametrize("how", [*MASKS, "data"])
def test_every_value_is_exact_and_those_seen_before_are_not_captured_again(how: str) -> None:
    model = build(how)
    optimized = duca_compile.optimize(model, Uncached(), "eager")
    for step, length in enumerate([7, 4, 7, 4]):
        arguments = call(step, length, seed=step)
        assert torch.equal(optimized(**arguments), model(**arguments))
    assert captures(optimized) == (1 if how == "data" else 2)


@torch.no_grad()
def test_values_that_are_read_to_the_same_end_share_a_capture(caplog: pytest.LogCaptureFixture) -> None:
    """The number of tokens counts, not where they are; a reading without effect counts once."""
    model = build("length")
    optimized = duca_compile.optimize(model, Uncached(), "eager")
    first, second = call(0, 4), call(1, 4)
    second["mask"] = second["mask"].flip(1)
    optimized(**first)
    assert torch.equal(optimized(**second), model(**second))
    assert captures(optimized) == 1
    idle = build("no difference")
    optimized = duca_compile.optimize(idle, Uncached(), "eager")
    with caplog.at_level(logging.INFO, "duca_compile"):
        for step, length in enumerate([7, 0, 7, 0, 7]):
            arguments = call(step, length)
            assert torch.equal(optimized(**arguments), idle(**arguments))
    assert captures(optimized) == 2
    assert sum("values that it reads" in record.getMessage() for record in caplog.records) == 1


@torch.no_grad()
def test_a_mask_written_in_place_is_noticed() -> None:
    model = build("length")
    optimized = duca_compile.optimize(model, Uncached(), "eager")
    arguments = call(0, 7)
    optimized(**arguments)
    arguments["mask"][:, 3:] = False
    assert torch.equal(optimized(**arguments), model(**arguments))


@torch.no_grad()
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_a_submodule_that_reads_the_latent_runs_as_it_is(backend: str) -> None:
    model = build("experts")
    optimized = duca_compile.optimize(model, POLICY, backend, strict=True)
    for step in range(6):
        arguments = call(step, seed=step)
        output = optimized(**arguments)
        assert output.isfinite().all()
        assert torch.allclose(output, model(**arguments), atol=1e-5) == (step % 3 == 0)
    assert "".join(e.kind.value[0] for e in optimized.history) == "fpsfps"
    found = duca_compile.explain(model, **call())
    assert {site.path for site in found.captured.opaque} == {"experts"}
    assert "experts changes experts.calls at each call" in str(found)  # of its two reasons the first that is found
    model.experts.experts[0].weight.mul_(2)
    model.experts.experts[1].weight.mul_(2)
    optimized.reset()
    assert torch.allclose(optimized(**call()), model(**call()), atol=1e-5)


@torch.no_grad()
def test_a_submodule_that_runs_as_it_is_may_change_itself(caplog: pytest.LogCaptureFixture) -> None:
    """It counts its calls; its weights are its own; inference mode is no obstacle."""
    model = build("experts")
    optimized = duca_compile.optimize(model, Uncached(), "eager")
    with caplog.at_level(logging.INFO, "duca_compile"), torch.inference_mode():
        for seed in range(4):
            arguments = call(seed=seed)
            assert torch.equal(optimized(**arguments), model(**arguments))
    assert not any("anew" in record.getMessage() for record in caplog.records)
    assert captures(optimized) == 1


@torch.no_grad()
def test_a_flag_in_a_buffer_is_looked_at_before_each_request() -> None:
    model = build("buffer")
    optimized = duca_compile.optimize(model, Uncached(), "eager")
    for flag in (1, 0, 1):
        model.flag.fill_(flag)
        assert torch.equal(optimized(**call()), model(**call()))
    model.flag = torch.zeros(())
    assert torch.equal(optimized(**call()), model(**call()))
    assert captures(optimized) == 2


@pytest.mark.parametrize(("how", "name"), [("latent", "x"), ("timestep", "timestep")])
def test_a_forward_that_reads_what_changes_is_refused_by_line(how: str, name: str) -> None:
    with pytest.raises(CaptureError, match=rf"depends on '{name}' at .*test_readings.py:\d+.*to a submodule"):
        duca_compile.explain(build(how), **call())


class Region(nn.Module):
    """Sets autocast for a part of itself, and for a part of that."""

    def __init__(self) -> None:
        super().__init__()
        self.dit, self.inner = models.build(models.CrossBlock), nn.Linear(models.CHANNELS, models.CHANNELS)

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                x = x + self.inner(torch.einsum("btc,dc->btd", x, self.inner.weight)).softmax(-1)
            x = self.dit(x.float(), timestep, text)
        with torch.autocast("cuda", dtype=torch.float16):
            return self.inner(x)


@torch.no_grad()
@pytest.mark.parametrize("around", [None, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)])
def test_an_autocast_region_is_exact(around: torch.dtype | None) -> None:
    """Whatever is set around it: the region's own setting holds, and none is lost behind it."""
    torch.manual_seed(0)
    model = (
        Region().eval().requires_grad_(False)
    )  # else autocast keeps the casts of weights, whatever type it is set to
    optimized = duca_compile.optimize(model, POLICY, "eager")
    with torch.autocast("cpu", around or torch.bfloat16, enabled=around is not None):
        for step in range(4):
            arguments = models.example(step, 7.0 - step)
            assert torch.equal(optimized(**arguments), model(**arguments)) == (step % 3 == 0)
    assert "".join(e.kind.value[0] for e in optimized.history) == "fpsf"


@torch.no_grad()
def test_other_images_of_an_image_to_video_model_share_its_capture() -> None:
    torch.manual_seed(0)
    model, arguments = zoo.ZOO["HunyuanVideo-1.5"].build(1)
    model.eval()
    optimized = duca_compile.optimize(model, Uncached(), "eager")
    for _ in range(2):
        arguments = arguments | {"image_embeds": torch.randn_like(arguments["image_embeds"])}
        assert torch.equal(optimized(**arguments)[0], model(**arguments)[0])
    assert captures(optimized) == 1
