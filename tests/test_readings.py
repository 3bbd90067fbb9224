"""Forwards that read values in Python: exact for every value, captured anew only where what is read differs."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor, nn

import duca_compile
from duca_compile import CaptureError, DuCa, Uncached
from tests import models, zoo
from tests.models import BATCH

POLICY = DuCa(interval=3, fresh_ratio=0.5)


class Reader(nn.Module):
    """A DiT whose forward reads its prompt's mask, or its latent, in the way called ``how``."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.dit = models.build(models.CrossBlock)
        self.experts = Experts()

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        if self.how == "branch" and mask.all():
            text = text * 2
        elif self.how == "length":
            text = text[:, : int(mask.sum(1).max())]
        elif self.how == "numpy":
            text = text * float(mask.numpy().mean())
        elif self.how == "selection":
            text = text[:1, mask[0]].expand(BATCH, -1, -1)
        elif self.how == "masked_select":
            text = text + torch.masked_select(text, mask[..., None]).mean()
        elif self.how == "data":
            places = torch.zeros_like(text)
            places.data[:, :3].copy_(text[:, :3])
            text = text + places
        elif self.how == "no difference" and mask.any():
            text = text + 0
        if self.how == "experts":
            x = self.experts(x)
        elif self.how == "latent" and x.mean() > 0:
            x = x * 2
        return self.dit(x, timestep, text)


class Experts(nn.Module):
    """Each token goes to one of two experts, counted on the host: what a graph cannot hold."""

    def __init__(self) -> None:
        super().__init__()
        self.choice = nn.Linear(models.CHANNELS, 2)
        self.experts = nn.ModuleList(nn.Linear(models.CHANNELS, models.CHANNELS) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.choice(x).argmax(-1)
        out = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            if int((chosen == index).sum()):
                out[chosen == index] = expert(x[chosen == index])
        return out


def build(how: str) -> Reader:
    torch.manual_seed(0)
    return Reader(how).eval().requires_grad_(False)


def call(step: int = 0, length: int = 7, seed: int = 0) -> dict[str, Tensor]:
    mask = (torch.arange(7) < length).expand(BATCH, -1).clone()
    return models.example(seed, 7.0 - step) | {"mask": mask}


def captures(optimized: nn.Module) -> int:
    return len(optimized._compiled)


@torch.no_grad()
@pytest.mark.parametrize("how", ["branch", "length", "numpy", "selection", "masked_select", "data"])
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
    assert "experts reads values that change from step to step" in str(found)
    model.experts.experts[0].weight.mul_(2)
    model.experts.experts[1].weight.mul_(2)
    optimized.reset()
    assert torch.allclose(optimized(**call()), model(**call()), atol=1e-5)


def test_a_forward_that_reads_its_latent_is_refused_by_line() -> None:
    optimized = duca_compile.optimize(build("latent"), POLICY, "eager")
    with pytest.raises(CaptureError, match=r"depends on 'x' at .*test_readings.py:\d+.*to a submodule"):
        optimized(**call())


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
