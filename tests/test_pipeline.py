"""Real diffusers pipelines: optimized, run and restored as a whole."""

import copy
import gc
from pathlib import Path

import diffusers
import pytest
import torch

import duca_compile
from duca_compile import FORA, DuCa, Interval, OptimizedModel, Uncached, UsageError
from tests.pipelines import CASES, make, patterns, run


@pytest.mark.parametrize("name", CASES)
def test_a_pipeline_is_optimized_run_and_restored(name: str) -> None:
    pipe = make(name)
    original, config = pipe.transformer, dict(pipe.config)
    expected = run(pipe, name)

    assert duca_compile.optimize(pipe, Uncached(), "eager") is pipe
    assert isinstance(pipe.transformer, OptimizedModel)
    assert torch.equal(run(pipe, name), expected)
    assert duca_compile.restore(pipe) is pipe
    assert pipe.transformer is original

    duca_compile.optimize(pipe, DuCa(interval=4), "eager")
    first = run(pipe, name)
    assert patterns(pipe.transformer) == dict.fromkeys(CASES[name].passes, "fpspfpsp")
    assert not torch.equal(first, expected)
    assert torch.equal(run(pipe, name), first)
    assert dict(pipe.config) == config
    duca_compile.restore(pipe)
    assert pipe.transformer is original
    assert torch.equal(run(pipe, name), expected)


def test_a_pipeline_with_an_optimized_model_passes_for_the_original(tmp_path: Path) -> None:
    pipe = make("SD3")
    original = pipe.transformer
    duca_compile.optimize(pipe, DuCa(interval=4), "eager")
    optimized = pipe.transformer
    assert isinstance(optimized, diffusers.SD3Transformer2DModel)
    assert isinstance(optimized, OptimizedModel)
    assert not isinstance(optimized, diffusers.FluxTransformer2DModel)
    assert pipe.components["transformer"] is optimized
    expected = run(pipe, "SD3")
    for other in (
        diffusers.StableDiffusion3Pipeline(**pipe.components),
        diffusers.StableDiffusion3Pipeline.from_pipe(pipe),
        diffusers.AutoPipelineForText2Image.from_pipe(pipe),
    ):
        assert other.transformer is optimized
        assert other.config["transformer"] == ("diffusers", "SD3Transformer2DModel")
        assert torch.equal(run(other.to(torch.float32), "SD3"), expected)
    pipe.save_pretrained(tmp_path)
    loaded = diffusers.SD3Transformer2DModel.from_pretrained(tmp_path / "transformer")
    assert loaded.config["num_layers"] == original.config["num_layers"]
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), original.parameters(), strict=True))
    pipe.to(torch.float64)
    assert next(original.parameters()).dtype == torch.float64
    pipe.to(torch.float32)
    assert torch.equal(run(pipe, "SD3"), expected)


def test_a_copied_pipeline_follows_its_own_scheduler() -> None:
    pipe = make("SD3")
    duca_compile.optimize(pipe, FORA(Interval(3, descending=True)), "eager")
    expected = run(pipe, "SD3")
    twin = copy.deepcopy(pipe)
    assert torch.equal(run(twin, "SD3"), expected)
    assert twin.transformer is not pipe.transformer
    assert twin.transformer.proj_out.weight is not pipe.transformer.proj_out.weight
    run(pipe, "SD3", steps=5)
    assert {len(kinds) for kinds in patterns(twin.transformer).values()} == {8}


def test_two_pipelines_share_a_model_and_one_is_restored() -> None:
    pipe = make("SD3")
    plain = run(pipe, "SD3")
    duca_compile.optimize(pipe, DuCa(interval=4), "eager")
    other = diffusers.StableDiffusion3Pipeline(**pipe.components)
    cached = run(other, "SD3")
    original = duca_compile.restore(pipe).transformer
    assert torch.equal(run(pipe, "SD3"), plain)
    assert torch.equal(run(other, "SD3"), cached)
    assert other.transformer.source is original
    del pipe  # the other goes on with the scheduler that both had
    gc.collect()
    assert torch.equal(run(other, "SD3"), cached)
    assert patterns(other.transformer) == {(None, 0): "fpspfpsp"}


def test_a_model_alone_in_a_pipeline_still_works() -> None:
    pipe = make("DiT")
    expected = run(pipe, "DiT")
    pipe.transformer = duca_compile.optimize(pipe.transformer, Uncached(), "eager")
    assert torch.equal(run(pipe, "DiT"), expected)
    pipe.transformer = duca_compile.restore(pipe.transformer)
    assert torch.equal(run(pipe, "DiT"), expected)


def test_what_cannot_be_optimized_or_restored() -> None:
    pipe = make("DiT")
    with pytest.raises(UsageError, match=r"this DiTPipeline is not optimized, so there is nothing to restore"):
        duca_compile.restore(pipe)
    with pytest.raises(UsageError, match=r"this DiTTransformer2DModel is not optimized"):
        duca_compile.restore(pipe.transformer)
    with pytest.raises(UsageError, match="scheduler says how many steps a request has; leave num_inference_steps out"):
        duca_compile.optimize(pipe, num_inference_steps=8)
    duca_compile.optimize(pipe, backend="eager")
    with pytest.raises(UsageError, match=r"optimized already; call duca_compile\.restore on it first"):
        duca_compile.optimize(pipe)
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    unet = diffusers.UNet2DModel(sample_size=8, block_out_channels=(32,), **blocks)
    without = diffusers.DDPMPipeline(unet=unet, scheduler=diffusers.DDPMScheduler())
    with pytest.raises(
        UsageError, match=r"DDPMPipeline has no transformer.*components are .*scheduler \(DDPMScheduler\)"
    ):
        duca_compile.optimize(without)
    pipe = duca_compile.restore(pipe)
    pipe.transformer.train()
    with pytest.raises(UsageError, match=r"DiTTransformer2DModel is in training mode"):
        duca_compile.optimize(pipe)
