"""What cannot be traced runs as an opaque operator, and weights that hooks move stay where these put them."""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import accelerate
import diffusers
import numpy as np
import pytest
import torch
from diffusers.hooks import apply_group_offloading
from torch import Tensor, nn
from torch.nn import functional

import duca_compile
from duca_compile import CaptureError, DuCa, StructureError, Uncached
from duca_compile.analysis.memory import _AllocationCounter
from tests import models
from tests.models import WIDTH

CPU = torch.device("cpu")
POLICY = DuCa(interval=3, fresh_ratio=0.5)

torch.library.define("duca_tests::doubled", "(Tensor x) -> Tensor")
torch.library.impl("duca_tests::doubled", "CPU", lambda x: x * 2)


@torch.library.custom_op("duca_tests::halved", mutates_args=())
def _halved(x: Tensor) -> Tensor:
    return x / 2


@_halved.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Tripled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x * 3

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return gradient * 3


def by_address(x: Tensor) -> Tensor:
    """A kernel that gets addresses, as Triton's do."""
    x = x.contiguous()
    result = torch.empty_like(x)
    given, made = ((ctypes.c_float * x.numel()).from_address(each.data_ptr()) for each in (x, result))
    np.negative(np.ctypeslib.as_array(given), out=np.ctypeslib.as_array(made))
    return result


def by_rows(x: Tensor) -> Tensor:
    """Looks at each token in Python, one by one."""

    def found():
        for row in x.flatten(0, -2):
            yield row * 2 if row.sum() > 0 else row

    return torch.stack(list(found())).view(x.shape)


def by_diagonal(x: Tensor) -> Tensor:
    """In place, on a view of a view."""
    mask = torch.zeros(x.shape[0], x.shape[1], x.shape[1], dtype=x.dtype)
    mask[:1].view(x.shape[1], x.shape[1]).fill_diagonal_(1)
    return x + mask @ x


KERNELS: dict[str, Callable[[Tensor], Tensor]] = {
    "operator without fake": torch.ops.duca_tests.doubled,
    "operator with fake": torch.ops.duca_tests.halved,
    "autograd function": Tripled.apply,
    "address": by_address,
    "numpy": lambda x: torch.from_numpy(np.tanh(x.numpy())),
    "dlpack": lambda x: torch.from_numpy(np.from_dlpack(x).copy()),
    "storage": lambda x: torch.tensor(list(x.contiguous().untyped_storage())[:1], dtype=torch.float32).sum() * 0 + x,
    "rows": by_rows,
    "diagonal": by_diagonal,
}


class KernelMLP(nn.Module):
    """An MLP with something in the middle that is not PyTorch's."""

    def __init__(self, kernel: str) -> None:
        super().__init__()
        self.up, self.down, self.kernel = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), kernel

    def forward(self, x: Tensor) -> Tensor:
        return self.down(functional.gelu(KERNELS[self.kernel](self.up(x))))


class KernelBlock(models.Block):
    def __init__(self, kernel: str) -> None:
        super().__init__()
        self.mlp = KernelMLP(kernel)


def quick_if(quick: bool, value: object) -> Any:
    return pytest.param(value, marks=() if quick else pytest.mark.slow)


def build(kernel: str) -> nn.Module:
    return models.build(lambda: KernelBlock(kernel))


def kinds(optimized: nn.Module) -> str:
    return "".join(executed.kind.value[0] for executed in optimized.history)


@torch.no_grad()
@pytest.mark.parametrize("kernel", [quick_if(name == "address", name) for name in KERNELS])
def test_a_kernel_is_followed_or_runs_as_it_is(kernel: str) -> None:
    model = build(kernel)
    optimized = duca_compile.optimize(model, POLICY, "eager")
    for step in range(6):
        arguments = models.example(step, 7.0 - step)
        assert torch.equal(optimized(**arguments), model(**arguments)) == (step % 3 == 0)
    assert kinds(optimized) == "fpsfps"


class OwnForward(models.DiT):
    """A kernel in the model's own forward: there is no submodule to run as it is."""

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        return super().forward(torch.ops.duca_tests.doubled(x), timestep, text)


@pytest.mark.slow
def test_a_kernel_in_the_own_forward_is_refused_with_line_and_reason() -> None:
    with pytest.raises(
        CaptureError, match=r"test_untraced.py.*duca_tests.doubled.*Move that line to a submodule"
    ) as caught:
        duca_compile.optimize(OwnForward().eval(), Uncached(), "eager")(**models.example())
    assert "branch on tensor values" not in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


class Object:
    """What torch cannot look into."""

    __slots__ = ("value",)


class Returns(models.DiT):
    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> tuple[Tensor, Object]:
        return super().forward(x, timestep, text), Object()


def test_a_result_that_torch_cannot_look_into_is_named() -> None:
    with pytest.raises(CaptureError, match="forward returns a Object, which torch cannot flatten"):
        duca_compile.optimize(Returns().eval(), Uncached(), "eager")(**models.example())


@torch.no_grad()
def test_what_runs_as_one_operator_is_named_and_its_tokens_are_recomputed() -> None:
    found = duca_compile.explain(build("address"), **models.example())
    assert {site.path for site in found.captured.opaque} == {"blocks.0.mlp", "blocks.1.mlp"}
    assert "blocks.0.mlp does what its trace does not show: it runs as one opaque operator" in str(found)
    assert [branch.kind for branch in found.branches] == ["self_attention", "mlp"] * 2
    fixed, partial = (found.schedule(DuCa(interval=3, fresh_ratio=ratio), 3).steps[1].flops for ratio in (0.25, 0.5))
    assert partial > fixed


class Shifted(KernelMLP):
    """Its tokens look at their neighbours, behind torch's back."""

    def forward(self, x: Tensor) -> Tensor:
        return by_address(self.down(self.up(x.roll(1, dims=1))))


@pytest.mark.slow
@torch.no_grad()
def test_an_operator_whose_tokens_mix_is_found_out_by_values() -> None:
    def block() -> nn.Module:
        made = models.Block()
        made.mlp = Shifted("address")
        return made

    found = duca_compile.explain(models.build(block), **models.example())
    assert [branch.kind for branch in found.branches] == ["self_attention", "mixing"] * 2
    assert "recomputing some tokens gave different values" in str(found)


class Packed(nn.Parameter):
    """A weight of a kind of its own, which no tracer knows: two of its values in each byte."""

    @staticmethod
    def of(weight: Tensor) -> Packed:
        scale = weight.abs().max() / 7
        levels = (weight / scale).round().to(torch.int8) + 8
        packed = Packed(levels[:, ::2] * 16 + levels[:, 1::2] - 128, requires_grad=False)
        packed.scale = scale
        return packed

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.__name__ in ("clone", "detach", "linear", "to"):
            raise TypeError(f"{func.__name__} is not known to packed weights")
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    def widened(self) -> Tensor:
        with torch._C.DisableTorchFunctionSubclass():
            levels = self.data.to(torch.int16) + 128
            return torch.stack([levels // 16, levels % 16], -1).flatten(1).sub(8).float() * self.scale


class PackedLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight.widened(), self.bias)


def packed(model: nn.Module) -> nn.Module:
    for path, part in list(model.named_modules()):
        if type(part) is nn.Linear and path.startswith("blocks"):
            part.__class__ = PackedLinear
            part.weight = Packed.of(part.weight)
    return model


@torch.no_grad()
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_weights_of_a_kind_of_their_own(backend: str) -> None:
    """Each linear layer is an operator, attention and MLPs are found all the same, and tokens are recomputed."""
    model = packed(models.build(models.Block))
    optimized = duca_compile.optimize(model, POLICY, backend, strict=True)
    for step in range(6):
        arguments = models.example(step, 7.0 - step)
        own = model(**arguments)
        assert torch.allclose(optimized(**arguments), own, rtol=0, atol=1e-5) == (step % 3 == 0)
        assert backend != "eager" or step % 3 or torch.equal(optimized.source(**arguments), own)
    assert kinds(optimized) == "fpsfps"
    found = duca_compile.explain(model, **models.example())
    assert [branch.kind for branch in found.branches] == ["self_attention", "mlp"] * 2
    assert len(found.captured.opaque) == 14


def sized(heads: int = 4, layers: int = 6) -> nn.Module:
    torch.manual_seed(0)
    return (
        diffusers.DiTTransformer2DModel(
            num_attention_heads=heads,
            attention_head_dim=32,
            in_channels=4,
            out_channels=8,
            num_layers=layers,
            sample_size=8,
            num_embeds_ada_norm=1000,
        )
        .requires_grad_(False)
        .eval()
    )


def sized_call(step: int) -> dict[str, Any]:
    """Of one row, so that weights are most of what a step holds."""
    latent = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(step))
    timestep, labels = torch.tensor([900 - 100 * step]), torch.tensor([1])
    return {"hidden_states": latent, "timestep": timestep, "class_labels": labels, "return_dict": False}


def tensors_of(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


@torch.no_grad()
@pytest.mark.parametrize("way", [quick_if(name == "casting", name) for name in ("casting", "group", "sequential")])
def test_a_step_holds_one_layer_of_weights_that_hooks_bring(way: str) -> None:
    """And nothing of them is left behind it, whatever the kind of the step."""
    model = sized()
    largest = max(weight.numel() * 4 for weight in model.parameters())
    total = sum(weight.numel() * 4 for weight in model.parameters())
    WAYS[way](model)
    optimized = duca_compile.optimize(model, POLICY, "eager")
    for step in range(4):
        optimized(**sized_call(step))
    optimized.reset()
    for step in range(4):
        held = [tensor.dtype for tensor in tensors_of(model)], [tensor.device for tensor in tensors_of(model)]
        watch = _AllocationCounter()
        watch.ignore([tensor for tensor in tensors_of(model) if not tensor.is_meta])
        with watch:
            optimized(**sized_call(step))
        assert watch.peak < 2 * largest < total / 8
        assert watch.live - optimized.cache_bytes < 2**18, "loop-invariant and timestep-only values"
        assert held == ([tensor.dtype for tensor in tensors_of(model)], [tensor.device for tensor in tensors_of(model)])
    assert kinds(optimized) == "fpsf"


RESIDENT = """
import threading, time, torch, duca_compile
from tests.test_untraced import WAYS, sized, sized_call

def resident():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("RssAnon"))

def watch():
    while not done:
        seen.append(resident())
        time.sleep(0.003)

with torch.no_grad():
    model = sized(heads=24, layers=8)
    WAYS["disk"](model)
    model(**sized_call(0))
    optimized = duca_compile.optimize(model, "duca", "eager")
    seen, done = [resident()], False
    thread = threading.Thread(target=watch)
    thread.start()
    for step in range(6):
        optimized(**sized_call(step))
    done = True
    thread.join()
    print("grown", max(seen) - seen[0], sum(4 * weight.numel() for weight in model.parameters()))
"""


@pytest.mark.slow
def test_a_model_on_disk_stays_there() -> None:
    """What the process holds in memory of its own, from the capture on."""
    given = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000"}  # what is freed is given back at once
    run = subprocess.run([sys.executable, "-c", RESIDENT], env=given, capture_output=True, text=True, check=True)
    grown, weights = map(int, run.stdout.split("grown")[1].split())
    assert weights > 350 * 2**20
    assert grown < weights / 4


STORED = torch.float8_e4m3fn


def widened(module: nn.Module, *_: Any) -> None:
    module.to(torch.float32)


def stored(module: nn.Module, *_: Any) -> None:
    module.to(STORED)


def with_hooks(module: nn.Module) -> None:
    module.register_forward_pre_hook(widened)
    module.register_forward_hook(stored)


def with_another_forward(module: nn.Module) -> None:
    own = module.forward

    def forward(*args: Any) -> Any:
        widened(module)
        try:
            return own(*args)
        finally:
            stored(module)

    module.forward = forward


class Widening(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        widened(self)
        result = super().forward(x)
        stored(self)
        return result


def with_another_class(module: nn.Module) -> None:
    module.__class__ = Widening


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("way", [with_hooks, with_another_forward, with_another_class])
def test_weights_that_code_of_ones_own_brings(way: Callable[[nn.Module], None]) -> None:
    """As hand-written offloading does: no copy of them is in the graph, and what is done to them takes effect."""
    model = models.build()
    for path, part in model.named_modules():
        if type(part) is nn.Linear and path.startswith("blocks"):
            way(part)
            stored(part)
    optimized = duca_compile.optimize(model, POLICY, "eager")
    for step in range(4):
        arguments = models.example(step, 7.0 - step)
        assert torch.equal(optimized(**arguments), model(**arguments)) == (step % 3 == 0)
    assert kinds(optimized) == "fpsf"
    (compiled,) = optimized._compiled.values()
    own = set(map(id, tensors_of(model)))
    assert all(id(tensor) in own for tensor in compiled.captured.attributes.values())
    assert len(compiled.captured.opaque) == 14
    for weight in model.parameters():
        weight.data.copy_((weight.float() * 2).to(weight.dtype))
    optimized.reset()
    assert torch.equal(optimized(**arguments), model(**arguments))


@pytest.mark.slow
def test_blocks_that_are_hidden_are_named() -> None:
    model = models.build()
    for block in model.blocks:
        with_hooks(block)
        stored(block)
    with pytest.raises(
        StructureError, match=r"The inside of blocks.0 is hidden: it cannot be traced .* one opaque operator"
    ):
        duca_compile.optimize(model, POLICY, "eager")(**models.example())


def casting(model: Any) -> None:
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def group(model: Any) -> None:
    apply_group_offloading(model, CPU, CPU, offload_type="leaf_level")


WAYS: dict[str, Callable[[Any], object]] = {
    "casting": casting,
    "group": group,
    "sequential": lambda model: accelerate.cpu_offload(model, CPU),
    "disk": lambda model: accelerate.disk_offload(model, tempfile.mkdtemp(), CPU),
}


class Draws(nn.Module):
    """Draws random numbers in a way that a trace alone does not show."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        match self.way:
            case "seeded":
                with torch.random.fork_rng():
                    torch.manual_seed(3)
                    return x + torch.randn(x.shape)
            case "generator":
                return x + torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
            case "branch":
                return x if torch.rand(1) > 0.5 else 2 * x
            case "unused":
                torch.rand(3)
                return x + torch.randn(x.shape)
        return torch.func.vmap(lambda row: row * row.sum())(x)


class Tells(nn.Module):
    """Goes by whether it is traced."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (2 if torch.compiler.is_compiling() else 3)


class Sliced(nn.Module):
    """Returns a view with gaps, by whose strides sums go."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, ::2] if np.isfinite(x.numpy()).all() else x


class Summed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.sliced = Sliced()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.sliced(x).sum()


WHOLES: dict[str, Callable[[], nn.Module]] = {
    **{way: functools.partial(Draws, way) for way in ("seeded", "generator", "branch", "unused", "vmap")},
    "tells": Tells,
    "sliced": Summed,
    "script": lambda: torch.jit.script(nn.Linear(models.WIDTH, models.WIDTH)),  # type: ignore[no-untyped-call]
    "lazy": lambda: nn.LazyLinear(models.WIDTH),
}


@pytest.mark.parametrize("name", WHOLES)
@torch.no_grad()
def test_what_a_trace_does_not_show_is_the_models_own(name: str) -> None:
    def run(optimize: Callable[[nn.Module], nn.Module]) -> list[Tensor]:
        torch.manual_seed(0)
        model = models.build()
        for block in model.blocks:
            block.mlp.append(WHOLES[name]())  # type: ignore[union-attr,operator]
        called = optimize(model)
        torch.manual_seed(5)
        return [called(**models.example(step, 9.0 - step)) for step in range(5)]

    expected = run(lambda model: model)
    assert all(map(torch.equal, run(lambda model: duca_compile.optimize(model, "none", "eager", 5)), expected))
