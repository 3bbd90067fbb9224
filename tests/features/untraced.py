"""Cases of docs/followed.md: offloading, storage types, quantizers, custom kernels, autocast; see table.py."""

from __future__ import annotations

import ctypes
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

import duca_compile
from tests import models, pipelines, zoo
from tests.features.table import Outcome, feature

CPU = torch.device("cpu")
STEPS = 4
Change = Callable[[Any], object]  # what a user does to a model
Results = tuple[list[Tensor], list[Tensor]]


def folder() -> str:
    return tempfile.mkdtemp(prefix="duca_offload_")


def cast(storage: torch.dtype, compute: torch.dtype = torch.float32) -> Change:
    return lambda model: model.enable_layerwise_casting(storage_dtype=storage, compute_dtype=compute)


def group(kind: str, **options: Any) -> Change:
    from diffusers.hooks import apply_group_offloading

    return lambda model: apply_group_offloading(model, CPU, CPU, offload_type=kind, **options)


def group_to_disk(model: Any) -> None:
    group("leaf_level", offload_to_disk_path=folder())(model)


def cpu_offload(model: Any) -> None:
    import accelerate

    accelerate.cpu_offload(model, CPU)


def disk_offload(model: Any) -> None:
    import accelerate

    accelerate.disk_offload(model, folder(), CPU)


def offload_with_hook(model: Any) -> None:
    import accelerate

    accelerate.cpu_offload_with_hook(model, CPU)


def dispatch(model: Any) -> None:
    """One block on the disk, the rest in memory."""
    import accelerate

    devices = {name: "cpu" for name, _ in model.named_children() if name != "transformer_blocks"}
    devices |= {f"transformer_blocks.{i}": "disk" if i else "cpu" for i in range(len(model.transformer_blocks))}
    accelerate.dispatch_model(model, devices, main_device="cpu", offload_dir=folder(), force_hooks=True)


def both(*changes: Change) -> Change:
    def change(model: Any) -> None:
        for each in changes:
            each(model)

    return change


def results(model: nn.Module, arguments: dict[str, Any], time: str) -> list[Tensor]:
    found = []
    for step in range(STEPS):
        given = arguments | {time: arguments[time] * (0.9 - 0.2 * step) if step else arguments[time]}
        given[time] = given[time].to(arguments[time].dtype)
        output = model(**given)
        found.append(output if isinstance(output, Tensor) else output[0])
    return found


@torch.no_grad()
def run(name: str, before: Change | None = None, after: Change | None = None, **options: Any) -> Results:
    """A request of each, of a model of the zoo that was changed before it was optimized, or behind the first step."""
    entry = next(each for each in zoo.ZOO.values() if each.name == name)
    torch.manual_seed(0)
    model, arguments = entry.build(2)
    arguments = {"return_dict": False, **arguments} if hasattr(model, "config") else arguments
    model.eval().requires_grad_(False)
    if before is not None:
        before(model)
    optimized = duca_compile.optimize(model, "none", "eager", **options)
    if after is not None:
        optimized(**arguments)
        after(model)
        optimized.reset()
    found = results(optimized, arguments, entry.timestep)
    return found, results(model, arguments, entry.timestep)


WAYS: dict[tuple[str, str], Change] = {
    ("diffusers", "layerwise casting to float8_e4m3fn"): cast(torch.float8_e4m3fn),
    ("diffusers", "layerwise casting to float8_e5m2"): cast(torch.float8_e5m2),
    ("diffusers", "layerwise casting to bfloat16"): cast(torch.bfloat16),
    ("diffusers", "group offloading, leaf_level"): group("leaf_level"),
    ("diffusers", "group offloading, block_level"): group("block_level", num_blocks_per_group=1),
    ("diffusers", "group offloading, block_level, two blocks at a time"): group("block_level", num_blocks_per_group=2),
    ("diffusers", "group offloading, low_cpu_mem_usage"): group("leaf_level", low_cpu_mem_usage=True),
    ("diffusers", "group offloading to disk"): group_to_disk,
    ("diffusers", "layerwise casting and group offloading"): both(cast(torch.float8_e4m3fn), group("leaf_level")),
    ("accelerate", "cpu_offload (sequential)"): cpu_offload,
    ("accelerate", "disk_offload"): disk_offload,
    ("accelerate", "cpu_offload_with_hook (a whole model)"): offload_with_hook,
    ("accelerate", "dispatch_model, partly to disk"): dispatch,
    ("accelerate", "layerwise casting and cpu_offload"): both(cast(torch.float8_e4m3fn), cpu_offload),
}
for (_library, _title), _change in WAYS.items():
    for _when in ("before", "after"):

        def _run(when: str = _when, change: Change = _change) -> Results:
            return run("SD3", **{when: change})

        _run.__name__ = f"{_title}, {_when}".replace(" ", "_")
        feature(_library, f"{_title}, {_when} `optimize`")(_run)
for _model in ("DiT", "PixArt", "FLUX", "Wan", "LTX-Video"):
    for _title, _change in (("casting", cast(torch.float8_e4m3fn)), ("offloading", cpu_offload)):

        def _run(model: str = _model, change: Change = _change) -> Results:
            return run(model, change)

        _run.__name__ = f"{_model} {_title}".replace(" ", "_")
        feature(_model, {"casting": "layerwise casting", "offloading": "sequential offloading"}[_title])(_run)


def cached(policy: str) -> Results:
    """Kinds of steps stand for results: the same as without casting."""

    def kinds(change: Change | None) -> list[Tensor]:
        torch.manual_seed(0)
        model, arguments = zoo.stable_diffusion_3(2)
        model.eval()
        if change is not None:
            change(model)
        optimized = duca_compile.optimize(model, policy, "eager")
        with torch.no_grad():
            results(optimized, arguments, "timestep")
        return [torch.tensor([ord(executed.kind.letter) for executed in optimized.history])]

    return kinds(cast(torch.float8_e4m3fn)), kinds(None)


@feature("diffusers", "layerwise casting, `duca`: the steps of each kind")
def cached_duca() -> Results:
    return cached("duca")


@feature("diffusers", "layerwise casting, `fora`: the steps of each kind")
def cached_fora() -> Results:
    return cached("fora")


def quantized(kind: str) -> Results:
    import bitsandbytes as bnb

    def change(model: nn.Module) -> None:
        for path, part in list(model.named_modules()):
            if type(part) is nn.Linear:
                bias, sizes = part.bias is not None, (part.in_features, part.out_features)
                if kind == "nf4":
                    other = bnb.nn.Linear4bit(*sizes, bias=bias, compute_dtype=torch.float32, quant_type="nf4")
                else:
                    other = bnb.nn.Linear8bitLt(*sizes, bias=bias, has_fp16_weights=False)
                other.load_state_dict(part.state_dict())
                parent, _, name = path.rpartition(".")
                setattr(model.get_submodule(parent), name, other.requires_grad_(False))
        model.to("cpu")

    return run("DiT", change)


@feature("bitsandbytes", "NF4 weights (Linear4bit)", note="each such layer runs as one opaque operator")
def nf4() -> Results:
    return quantized("nf4")


@feature("bitsandbytes", "8 bit weights (Linear8bitLt)")
def int8() -> Results:
    return quantized("int8")


@feature("torchao", "int8 weights")
def torchao_int8() -> Results:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    return run("DiT", lambda model: quantize_(model, Int8WeightOnlyConfig()))


@feature("torchao", "int8 weights and group offloading")
def torchao_offloaded() -> Results:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    return run("DiT", both(lambda model: quantize_(model, Int8WeightOnlyConfig()), group("leaf_level")))


@feature("bitsandbytes", "NF4 weights and group offloading")
def nf4_offloaded() -> Results:
    import bitsandbytes as bnb

    def change(model: Any) -> None:
        for block in model.transformer_blocks:
            old = block.ff.net[2]
            new = bnb.nn.Linear4bit(old.in_features, old.out_features, compute_dtype=torch.float32, quant_type="nf4")
            new.load_state_dict(old.state_dict())
            block.ff.net[2] = new.requires_grad_(False).to("cpu")
        group("leaf_level")(model)

    return run("DiT", change)


class Kernel(nn.Module):
    """An MLP with something in the middle that is not PyTorch's."""

    def __init__(self, kernel: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.up, self.down, self.kernel = nn.Linear(models.WIDTH, 32), nn.Linear(32, models.WIDTH), kernel

    def forward(self, x: Tensor) -> Tensor:
        return self.down(functional.gelu(self.kernel(self.up(x))))


@torch.no_grad()
def with_kernel(kernel: Callable[[Tensor], Tensor]) -> Results:
    def block() -> nn.Module:
        made = models.Block()
        made.mlp = Kernel(kernel)
        return made

    model = models.build(block)
    optimized = duca_compile.optimize(model, "none", "eager")
    calls = [models.example(step, 7.0 - step) for step in range(STEPS)]
    return [optimized(**each) for each in calls], [model(**each) for each in calls]


torch.library.define("duca_features::doubled", "(Tensor x) -> Tensor")
torch.library.impl("duca_features::doubled", "CPU", lambda x: x * 2)


@feature(
    "custom kernels",
    "an operator of `torch.library` without a fake implementation",
    note="its module runs as one operator",
)
def library() -> Results:
    return with_kernel(torch.ops.duca_features.doubled)


@feature("custom kernels", "numpy working on a tensor's memory", note="its module runs as one operator")
def numpy() -> Results:
    return with_kernel(lambda x: torch.from_numpy(np.tanh(x.numpy())))


@feature("custom kernels", "a C function that receives addresses", note="its module runs as one operator")
def address() -> Results:
    def kernel(x: Tensor) -> Tensor:
        x, result = x.contiguous(), torch.empty(x.shape)
        ctypes.memmove(result.data_ptr(), x.data_ptr(), x.numel() * x.element_size())
        return result

    return with_kernel(kernel)


@feature("custom kernels", "`torch.autograd.Function`")
def function() -> Results:
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x * 2

    return with_kernel(Doubled.apply)


@feature("custom kernels", "Python that looks at each token", note="its module runs as one operator")
def looks() -> Results:
    return with_kernel(
        lambda x: torch.stack([row * 2 if row.sum() > 0 else row for row in x.flatten(0, -2)]).view_as(x)
    )


@feature("custom kernels", "a kernel in the model's own forward", Outcome.REFUSED, says="Move that")
@torch.no_grad()
def own_kernel() -> Results:
    class Own(models.DiT):
        def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
            return super().forward(torch.ops.duca_features.doubled(x), timestep, text)

    model = Own().eval()
    call = models.example()
    return [duca_compile.optimize(model, "none", "eager")(**call)], [model(**call)]


class Flexible(nn.Module):
    """flex_attention with a bias that is learnt, in a submodule of the block or in the block itself."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(models.WIDTH, 3 * models.WIDTH), nn.Linear(models.WIDTH, models.WIDTH)
            self.bias = nn.Parameter(torch.randn(models.HEADS))

        def forward(self, x: Tensor) -> Tensor:
            from torch.nn.attention.flex_attention import flex_attention

            def score(value: Tensor, _: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
                return value + self.bias[head] * (row - column)

            parts = self.qkv(x).unflatten(-1, (3, models.HEADS, -1)).permute(2, 0, 3, 1, 4)
            mixed: Any = flex_attention(*parts, score_mod=score)
            found: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
            return found

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.mlp = self.Attention(), models.mlp()

    def forward(self, x: Tensor, condition: Tensor, text: Tensor) -> Tensor:
        x = x + self.attention(x)
        found: Tensor = x + self.mlp(x)
        return found


class FlexibleInside(Flexible):
    def forward(self, x: Tensor, condition: Tensor, text: Tensor) -> Tensor:
        x = x + Flexible.Attention.forward(self.attention, x)
        found: Tensor = x + self.mlp(x)
        return found


class Conditional(Flexible):
    def forward(self, x: Tensor, condition: Tensor, text: Tensor) -> Tensor:
        x = x + torch.cond(x.sum() > 0, lambda x: x * 2, lambda x: x * 3, (x,))
        found: Tensor = x + self.mlp(x)
        return found


@torch.no_grad()
def with_blocks(block: type[nn.Module]) -> Results:
    torch.manual_seed(0)
    model, call = models.build(block), models.example()
    optimized = duca_compile.optimize(model, "none", "eager")
    return results(optimized, call, "timestep"), results(model, call, "timestep")


@feature("torch", "flex_attention in a submodule", note="it runs as an opaque operator")
def flex_attention_in_a_submodule() -> Results:
    return with_blocks(Flexible)


@feature(
    "torch", "flex_attention in a block's own forward", Outcome.REFUSED, says="it calls flex_attention, which runs"
)
def flex_attention_in_a_block() -> Results:
    return with_blocks(FlexibleInside)


@feature("torch", "torch.cond in a block's own forward", Outcome.REFUSED, says="it calls cond, which runs a function")
def cond() -> Results:
    return with_blocks(Conditional)


@feature("diffusers", "WanAnimate2, which fills a cache of its own class and attends by flex_attention")
@torch.no_grad()
def wan_animate_2() -> Results:
    from diffusers.models.transformers import transformer_wan_animate_2 as wan

    torch.manual_seed(0)
    sizes = {"in_dim": 12, "dim": 48, "ffn_dim": 96, "freq_dim": 32, "text_dim": 16, "out_dim": 4}
    model = wan.WanAnimate2Transformer3DModel(text_len=8, num_heads=2, num_layers=2, use_img_emb=False, **sizes).eval()
    latent, condition, text = torch.randn(4, 2, 4, 4), torch.randn(8, 2, 4, 4), torch.randn(5, 16)
    grid = torch.tensor([[2, 2, 2]])

    def run(run_model: Any) -> list[Tensor]:
        cache = wan.WanAnimate2KVCache(2)
        common = {"encoder_hidden_states": [text], "condition_latents": [condition], "kv_cache": cache, "seq_len": 8}
        run_model([latent], torch.tensor([1.0]), kv_cache_mode="extract", offset_grid_sizes=grid, **common)
        rest = {"reference_grid_sizes": grid, "origin_len": 5, "origin_area": [64, 64], "return_dict": False}
        return [
            run_model([latent], torch.tensor([900.0 - 100 * step]), kv_cache_mode="cached", **common, **rest)[0][0]
            for step in range(STEPS)
        ]

    return run(duca_compile.optimize(model, "none", "eager")), run(model)


@feature("diffusers", "perturbed attention (a processor that writes to a view)", note="runs as one operator")
@torch.no_grad()
def perturbed() -> Results:
    from diffusers.models.attention_processor import PAGJointAttnProcessor2_0

    model, arguments = zoo.stable_diffusion_3(2)
    model.eval().transformer_blocks[1].attn.processor = PAGJointAttnProcessor2_0()
    optimized = duca_compile.optimize(model, "none", "eager")
    return results(optimized, arguments, "timestep"), results(model, arguments, "timestep")


def under(name: str, dtype: torch.dtype) -> Results:
    with torch.autocast("cpu", dtype):
        return run(name)


@feature("autocast", "Mochi, which sets autocast for parts of itself")
def mochi() -> Results:
    return under("Mochi", torch.bfloat16)


@feature("autocast", "around DiT, bfloat16")
def around() -> Results:
    return under("DiT", torch.bfloat16)


@feature("torch", "a model that torch.compile has wrapped", Outcome.REFUSED, says="_orig_mod", slow=False)
def compiled() -> Results:
    model = models.build()
    duca_compile.optimize(torch.compile(model, backend="eager"), "none", "eager")
    return [], []


@feature("diffusers", "a timestep for each token (Wan 2.2, image and text to video)")
def per_token() -> Results:
    torch.manual_seed(0)
    model, arguments = zoo.wan(2)
    arguments |= {"timestep": torch.full((2, 32), 900.0), "return_dict": False}
    model.eval().requires_grad_(False)
    with torch.no_grad():
        optimized = duca_compile.optimize(model, "none", "eager")
        return results(optimized, arguments, "timestep"), results(model, arguments, "timestep")


@feature("diffusers", "a ModularPipeline")
def modular() -> Results:
    import diffusers
    from diffusers.modular_pipelines.modular_pipeline import SequentialPipelineBlocks
    from diffusers.modular_pipelines.stable_diffusion_3 import before_denoise, denoise

    class Blocks(SequentialPipelineBlocks):
        model_name = "stable-diffusion-3"
        block_classes = [before_denoise.StableDiffusion3SetTimestepsStep, denoise.StableDiffusion3DenoiseStep]  # noqa: RUF012
        block_names = ["set_timesteps", "denoise"]  # noqa: RUF012

    torch.manual_seed(0)
    pipe = Blocks().init_pipeline()
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe.update_components(transformer=zoo.stable_diffusion_3(2)[0].eval(), scheduler=scheduler)
    given = pipelines.guided(32, pooled=16) | {"latents": pipelines.noise(4, 16, 16), "height": 128, "width": 128}
    own = pipe(**given, num_inference_steps=STEPS, output="latents")
    duca_compile.optimize(pipe, "none", "eager")
    return [pipe(**given, num_inference_steps=STEPS, output="latents")], [own]


def offloaded_pipeline(offload: Change, before: bool) -> Results:
    """Two requests of a pipeline."""
    pipe = pipelines.make("SD3")
    own = pipelines.run(pipe, "SD3", STEPS)
    for change in (offload, lambda each: duca_compile.optimize(each, "none", "eager"))[:: 1 if before else -1]:
        change(pipe)
    return [pipelines.run(pipe, "SD3", STEPS) for _ in range(2)], [own, own]


def model_offload(pipe: Any) -> None:
    pipe.enable_model_cpu_offload(device="cpu")


def group_offload(pipe: Any) -> None:
    pipe.enable_group_offload(onload_device=CPU, offload_device=CPU, offload_type="leaf_level")


@feature("diffusers", "`pipe.enable_model_cpu_offload()` before `optimize`")
def model_offload_before() -> Results:
    return offloaded_pipeline(model_offload, before=True)


@feature("diffusers", "`pipe.enable_model_cpu_offload()` after `optimize`")
def model_offload_after() -> Results:
    return offloaded_pipeline(model_offload, before=False)


@feature("diffusers", "`pipe.enable_group_offload()` before `optimize`")
def group_offload_before() -> Results:
    return offloaded_pipeline(group_offload, before=True)


@feature("diffusers", "`pipe.enable_group_offload()` after `optimize`")
def group_offload_after() -> Results:
    return offloaded_pipeline(group_offload, before=False)


def hooked(change: Change) -> Callable[[Any], None]:
    def all_linear(model: nn.Module) -> None:
        for path, part in model.named_modules():
            if type(part) is nn.Linear and path.startswith("transformer_blocks"):
                part.to(torch.float8_e4m3fn)
                change(part)

    return all_linear


@feature("torch", "your own hooks that move weights", note="each such module runs as one opaque operator")
def own_hooks() -> Results:
    def change(part: nn.Module) -> None:
        part.register_forward_pre_hook(lambda module, _: module.to(torch.float32) and None)
        part.register_forward_hook(lambda module, _, output: module.to(torch.float8_e4m3fn) and None)

    return run("SD3", hooked(change))
