"""Cases of docs/followed.md: Python state, hooks, processors, guiders, adapters, and containers as arguments."""

from __future__ import annotations

import functools
import types
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import diffusers
import numpy as np
import torch
from diffusers.models.attention_processor import JointAttnProcessor2_0
from torch import Tensor, nn

import duca_compile
from tests import models, zoo
from tests.features.table import Outcome, feature

STEPS = 5
SKIP = diffusers.LayerSkipConfig(indices=[1, 2], fqn="transformer_blocks")  # one alone swaps text and image of SD3
During = Callable[[nn.Module, int], object]  # what is done to a model before one of its steps
Results = tuple[list[Tensor], list[Tensor]]


def sd3(depth: int = 2) -> nn.Module:
    torch.manual_seed(0)
    return zoo.stable_diffusion_3(depth)[0].eval().requires_grad_(False)


def small() -> nn.Module:
    return models.build(depth=2)


def call(model: nn.Module, step: int) -> Tensor:
    """One step's call."""
    x = torch.Generator().manual_seed(step)
    if isinstance(model, models.DiT):
        return model(**models.example(step, 9.0 - step))  # type: ignore[no-any-return]
    if isinstance(model, diffusers.FluxTransformer2DModel):
        arguments = zoo.flux(1)[1] | {"timestep": torch.full((zoo.ROWS,), 0.9 - 0.1 * step)}
        torch.manual_seed(step)
        with model.cache_context("only"):  # type: ignore[operator]
            return model(**arguments)[0]  # type: ignore[no-any-return]
    words = torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(99))
    found: tuple[Tensor] = model(
        hidden_states=torch.randn(1, 4, 16, 16, generator=x),
        timestep=torch.tensor([900.0 - 100 * step]),
        encoder_hidden_states=words,
        pooled_projections=words[:, 0, :16],
        return_dict=False,
    )
    return found[0]


@torch.no_grad()
def loop(
    model: nn.Module, during: During | None = None, run: Callable[[nn.Module, int], Tensor] = call
) -> list[Tensor]:
    results = []
    for step in range(STEPS):
        if during is not None:
            during(model, step)
        results.append(run(model, step))
    return results


def both(
    build: Callable[[], nn.Module], during: During | None = None, policy: str = "none", own: During | None = None
) -> Results:
    """A loop of the optimized model, and one of another model that is made alike."""
    found = loop(duca_compile.optimize(build(), policy, "eager", STEPS), during)
    return found, loop(build(), own or during)


def prepared(change: Callable[[nn.Module], object], build: Callable[[], nn.Module] = sd3) -> Results:
    """The same, of models to which something was done before."""

    def make() -> nn.Module:
        model = build()
        change(model)
        return model

    return both(make)


# diffusers' caches


def caching(config: Any) -> Callable[[nn.Module], object]:
    return lambda model: model.enable_cache(config)  # type: ignore[operator]


ALWAYS = {"spatial_attention_timestep_skip_range": (-1, 1001), "current_timestep_callback": lambda: 500}
CACHES = {
    "PyramidAttentionBroadcast": lambda: diffusers.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, **ALWAYS
    ),
    "TaylorSeerCache": lambda: diffusers.TaylorSeerCacheConfig(cache_interval=4, max_order=1),
    "FirstBlockCache": lambda: diffusers.FirstBlockCacheConfig(threshold=0.05),
    "FasterCache": lambda: diffusers.FasterCacheConfig(
        spatial_attention_block_skip_range=2, tensor_format="BFCHW", is_guidance_distilled=True, **ALWAYS
    ),
    "MagCache": lambda: diffusers.MagCacheConfig(num_inference_steps=STEPS, mag_ratios=[1.0] * STEPS),
    "SeaCache": lambda: diffusers.SeaCacheConfig(),
    "TextKVCache": lambda: diffusers.TextKVCacheConfig(),
}


def flux() -> nn.Module:
    torch.manual_seed(0)
    return zoo.flux(2)[0].eval().requires_grad_(False)


def add_cache(name: str, make: Callable[[], Any]) -> None:
    def cache() -> Results:
        return prepared(caching(make()), flux)

    cache.__name__ = name
    feature("diffusers", f"enable_cache({name}Config)", Outcome.REFUSED, says="call disable_cache() first")(cache)


@feature("diffusers", "enable_cache after optimize", Outcome.REFUSED, says="call disable_cache() first")
def cache_later() -> Results:
    def during(model: nn.Module, step: int) -> None:
        if step == 2:
            caching(diffusers.FirstBlockCacheConfig(threshold=0.05))(model)

    return both(flux, during)


@feature("diffusers", "apply_first_block_cache, without enable_cache", Outcome.REFUSED, says="remove_hook")
def cache_applied() -> Results:
    config = diffusers.FirstBlockCacheConfig(threshold=0.05)
    return prepared(lambda model: diffusers.hooks.apply_first_block_cache(model, config))


@feature("diffusers", "enable_cache and disable_cache")
def cache_disabled() -> Results:
    def change(model: nn.Module) -> None:
        caching(diffusers.FirstBlockCacheConfig(threshold=0.05))(model)
        model.disable_cache()  # type: ignore[operator]

    return prepared(change, flux)


# guiders


Run = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]


def run_sd3(model: nn.Module, x: Tensor, t: Tensor, words: Tensor) -> Tensor:
    given = {"encoder_hidden_states": words, "pooled_projections": words[:, 0, :16]}
    return model(hidden_states=x, timestep=t, **given, return_dict=False)[0]  # type: ignore[no-any-return]


def run_dit(model: nn.Module, x: Tensor, t: Tensor, words: Tensor) -> Tensor:
    labels = (1000 * words[:, 0, 0]).long() % 1000
    return model(hidden_states=x, timestep=t.long(), class_labels=labels, return_dict=False)[0][:, :4]  # type: ignore[no-any-return]


@torch.no_grad()
def guided(model: nn.Module, guider: Any, run: Run = run_sd3) -> list[Tensor]:
    draw = torch.Generator().manual_seed(1)
    size = 16 if run is run_sd3 else 8
    latent = torch.randn(1, 4, size, size, generator=draw)
    prompts = tuple(torch.randn(1, 7, 32, generator=draw) for _ in range(2))
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(STEPS)
    latents = []
    for i, t in enumerate(scheduler.timesteps):
        guider.set_state(step=i, num_inference_steps=STEPS, timestep=t)
        batches = guider.prepare_inputs({"x": (latent, latent), "prompt": prompts})
        for batch in batches:
            guider.prepare_models(model)
            batch.noise_pred = run(model, batch.x, t.expand(1), batch.prompt)
            guider.cleanup_models(model)
        latent = scheduler.step(guider(batches).pred, t, latent, return_dict=False)[0]
        latents.append(latent)
    return latents


def dit() -> nn.Module:
    torch.manual_seed(0)
    return zoo.dit(2)[0].eval().requires_grad_(False)


SCORES = diffusers.LayerSkipConfig(
    indices=[1], fqn="transformer_blocks", skip_attention=False, skip_ff=False, skip_attention_scores=True
)
GUIDERS: dict[str, Callable[[], Any]] = {
    "ClassifierFreeGuidance": lambda: diffusers.ClassifierFreeGuidance(4.0),
    "SkipLayerGuidance": lambda: diffusers.SkipLayerGuidance(
        4.0, skip_layer_guidance_scale=3.0, skip_layer_guidance_stop=0.8, skip_layer_config=[SKIP]
    ),
    "SkipLayerGuidance, for some steps": lambda: diffusers.SkipLayerGuidance(
        4.0, skip_layer_guidance_start=0.3, skip_layer_guidance_stop=0.7, skip_layer_config=[SKIP]
    ),
    "SkipLayerGuidance, unconditional pass off": lambda: diffusers.SkipLayerGuidance(
        1.0, skip_layer_guidance_scale=3.0, skip_layer_guidance_stop=0.8, skip_layer_config=[SKIP]
    ),
    "AutoGuidance": lambda: diffusers.AutoGuidance(guidance_scale=4.0, auto_guidance_config=SKIP),
    "PerturbedAttentionGuidance": lambda: diffusers.PerturbedAttentionGuidance(
        4.0, perturbed_guidance_scale=3.0, perturbed_guidance_stop=0.8, perturbed_guidance_config=[SCORES]
    ),
    "AdaptiveProjectedGuidance": lambda: diffusers.AdaptiveProjectedGuidance(4.0),
}


def add_guider(name: str, make: Callable[[], Any]) -> None:
    def guide() -> Results:
        build, run = (dit, run_dit) if name.startswith("Perturbed") else (functools.partial(sd3, 4), run_sd3)
        return guided(duca_compile.optimize(build(), "none", "eager"), make(), run), guided(build(), make(), run)

    guide.__name__ = name
    feature("diffusers", name)(guide)


for each, config in CACHES.items():
    add_cache(each, config)
for each, config in GUIDERS.items():
    add_guider(each, config)


# adapters in the loop


def with_adapters(model: nn.Module) -> nn.Module:
    import peft

    torch.manual_seed(1)
    config = peft.LoraConfig(r=2, lora_alpha=3, init_lora_weights=False, target_modules=["to_q", "to_v"])
    for name in ("one", "two"):
        model.add_adapter(config, name)  # type: ignore[operator]
    model.set_adapters(["one", "two"], [1.0, 0.5])  # type: ignore[operator]
    return model


def at(step: int, *acts: Callable[[Any], object]) -> During:
    """Does one thing before step ``step``, the next before the one behind it, and so on."""

    def during(model: nn.Module, now: int) -> None:
        if 0 <= now - step < len(acts):
            acts[now - step](model)

    return during


@feature("peft", "set_adapters during a loop")
def adapters_weighted() -> Results:
    change = at(1, lambda m: m.set_adapters("one", 0.3), lambda m: m.set_adapters("two"))
    return both(lambda: with_adapters(sd3()), change)


@feature("peft", "disable_lora and enable_lora during a loop")
def adapters_switched() -> Results:
    change = at(1, lambda m: m.disable_lora(), lambda m: None, lambda m: m.enable_lora())
    return both(lambda: with_adapters(sd3()), change)


@feature("peft", "an adapter deleted during a loop")
def adapters_deleted() -> Results:
    return both(lambda: with_adapters(sd3()), at(2, lambda m: m.delete_adapters("two")))


@feature("peft", "fuse_lora during a loop")
def adapters_fused() -> Results:
    return both(lambda: with_adapters(sd3()), at(2, lambda m: m.fuse_lora()))


# processors, hooks and attributes in the loop


class Louder(JointAttnProcessor2_0):
    def __init__(self, gain: float = 1.5) -> None:
        super().__init__()
        self.gain = gain

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return tuple(self.gain * out for out in super().__call__(*args, **kwargs))


def processed(processor: Callable[[], Any]) -> Callable[[], nn.Module]:
    """A model whose attentions have one processor each, or share one."""

    def build() -> nn.Module:
        model = sd3()
        model.set_attn_processor({name: processor() for name in model.attn_processors})  # type: ignore[operator, union-attr]
        return model

    return build


QUICK_CHECK = (
    "found by the next quick check, which takes 2 % of the time; a warning tells of calls that may come before it"
)


def held(
    part: Callable[[Any], Any], build: Callable[[], nn.Module], step: int, *acts: Callable[[Any], object]
) -> Results:
    """Changes a part of the model that the caller has held since before the loop. The quick check is always due."""

    def run(optimize: bool) -> list[Tensor]:
        model = build()
        reference = part(model)
        change = at(step, *[lambda _, act=act: act(reference) for act in acts])  # type: ignore[misc]
        return loop(duca_compile.optimize(model, "none", "eager") if optimize else model, change)

    with mock.patch("duca_compile.frontend.snapshot.WATCH_BACKOFF", 0):
        return run(True), run(False)


def block(model: Any) -> Any:
    return (model.blocks if isinstance(model, models.DiT) else model.transformer_blocks)[1]


@feature("diffusers", "set_attn_processor during a loop")
def processor_set() -> Results:
    def louder(model: Any) -> None:
        model.set_attn_processor({name: Louder() for name in model.attn_processors})

    return both(sd3, at(2, louder))


@feature(
    "diffusers",
    "a number that a processor holds, set during a loop",
    note=QUICK_CHECK,
)
def processor_number() -> Results:
    gains = [lambda p, gain=gain: setattr(p, "gain", gain) for gain in (0.5, 1.0, 2.0)]
    return held(lambda m: m.transformer_blocks[1].attn.processor, processed(Louder), 1, *gains)


@feature("hooks", "a forward hook that changes outputs, set and removed during a loop", slow=False)
def hook_in_loop() -> Results:
    handles: list[Any] = []

    def add(part: nn.Module) -> None:
        handles.append(part.register_forward_hook(lambda module, args, output: output * 1.5))

    return held(block, small, 1, add, lambda part: None, lambda part: handles.pop().remove())


@feature("hooks", "a forward pre-hook that changes arguments, set during a loop")
def pre_hook_in_loop() -> Results:
    def add(part: nn.Module) -> None:
        part.register_forward_pre_hook(lambda module, args: (args[0] * 1.5, *args[1:]))

    return held(block, small, 2, add)


@feature("hooks", "a number in the closure of a hook, changed during a loop")
def hook_closure() -> Results:
    gain = [1.0]

    def build() -> nn.Module:
        model = small()
        gain[0] = 1.0
        block(model).register_forward_hook(lambda module, args, output: output * gain[0])
        return model

    return both(build, at(1, lambda m: gain.__setitem__(0, 2.0), lambda m: gain.__setitem__(0, 3.0)))


@feature(
    "hooks",
    "the forward of a block, replaced during a loop",
    note=QUICK_CHECK,
)
def forward_replaced() -> Results:
    def patch(part: Any) -> None:
        part.forward = types.MethodType(lambda self, x, *rest: type(self).forward(self, x, *rest) * 0.5, part)

    return held(block, small, 2, patch)


@feature(
    "modules",
    "a block replaced by one like nn.Identity during a loop",
    note=QUICK_CHECK,
)
def block_replaced() -> Results:
    class Through(nn.Module):
        def forward(self, x: Tensor, *rest: Any) -> Tensor:
            return x + 0.1

    return held(lambda m: m.blocks, small, 2, lambda blocks: blocks.__setitem__(1, Through()))


@feature(
    "modules",
    "an attribute in a nested dictionary, changed during a loop",
    note=QUICK_CHECK,
)
def attribute_in_loop() -> Results:
    class Scaled(models.Block):
        def __init__(self) -> None:
            super().__init__()
            self.options = {"scale": [1.0]}

        def forward(self, x: Tensor, *rest: Any) -> Tensor:
            return super().forward(x, *rest) * self.options["scale"][0]

    return held(lambda m: block(m).options["scale"], lambda: models.build(Scaled), 2, lambda s: s.__setitem__(0, 0.5))


# what forward changes by itself


class Counting(JointAttnProcessor2_0):
    """Louder in its first three calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return tuple((1.5 if self.calls <= 3 else 1.0) * out for out in super().__call__(*args, **kwargs))


@feature(
    "diffusers",
    "an attention processor that counts its calls and depends on the count",
    note="it runs as an opaque operator",
)
def counting() -> Results:
    return both(processed(Counting))


@feature("diffusers", "one counting processor for all attentions", note="it runs as an opaque operator")
def counting_shared() -> Results:
    def build() -> nn.Module:
        one = Counting()
        return processed(lambda: one)()

    return both(build)


@feature(
    "diffusers", "a processor with a controller that counts layers and steps", note="it runs as an opaque operator"
)
def controller() -> Results:
    class Controller:
        def __init__(self) -> None:
            self.layer, self.step = 0, 0

        def __call__(self, x: Tensor) -> Tensor:
            x = x * (1 + 0.1 * self.layer) if self.step < 2 else x
            self.layer += 1
            if self.layer == 2:
                self.layer, self.step = 0, self.step + 1
            return x

    class Controlled(JointAttnProcessor2_0):
        def __init__(self, one: Controller) -> None:
            super().__init__()
            self.controller = one

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            first, *rest = super().__call__(*args, **kwargs)
            return (self.controller(first), *rest)

    def build() -> nn.Module:
        one = Controller()
        return processed(lambda: Controlled(one))()

    return both(build)


def collected(build: Callable[[], nn.Module], seen: Callable[[nn.Module], Any]) -> Results:
    """What the model's own loop collects, too."""
    pairs = []
    for optimize in (True, False):
        model = build()
        results = loop(duca_compile.optimize(model, "none", "eager") if optimize else model)
        pairs.append(results + list(seen(model)))
    return pairs[0], pairs[1]


class Collecting(JointAttnProcessor2_0):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        out = super().__call__(*args, **kwargs)
        self.seen.append(out[0])
        return out


@feature("diffusers", "a processor that collects features", note="it runs as an opaque operator")
def collecting() -> Results:
    return collected(processed(Collecting), lambda m: m.transformer_blocks[1].attn.processor.seen)  # type: ignore[union-attr, index]


@feature("diffusers", "a processor that keeps its last result", note="it runs as an opaque operator")
def keeping() -> Results:
    class Keeping(JointAttnProcessor2_0):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            self.last = super().__call__(*args, **kwargs)
            return self.last

    return collected(processed(Keeping), lambda m: m.transformer_blocks[1].attn.processor.last)  # type: ignore[union-attr, index]


@feature(
    "diffusers", "a processor that injects what it kept from the step before", note="it runs as an opaque operator"
)
def injecting() -> Results:
    class Injecting(JointAttnProcessor2_0):
        def __init__(self) -> None:
            super().__init__()
            self.last: Tensor | None = None

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            first, *rest = super().__call__(*args, **kwargs)
            self.last, before = first, self.last
            return (first if before is None else 0.5 * (first + before), *rest)

    return both(processed(Injecting))


@feature(
    "modules", "an attention that keeps its last arguments and depends on them", note="it runs as an opaque operator"
)
def arguments_kept() -> Results:
    class Differing(models.Attention):
        last: Tensor | None = None

        def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
            y = super().forward(x, context)
            y, self.last = y if self.last is None else y + x - self.last, x
            return y

    return both(attending(Differing))


def hooked(add: Callable[[nn.Module, list[Any]], object]) -> Results:
    """A small model with a hook that collects."""
    seen: list[Any] = []

    def build() -> nn.Module:
        model = small()
        seen.clear()
        add(model, seen)
        return model

    return collected(build, lambda model: list(seen))


@feature("hooks", "a forward hook on a block that collects", note="the block runs as an opaque operator", slow=False)
def hook_collects() -> Results:
    def add(model: nn.Module, seen: list[Any]) -> None:
        block(model).register_forward_hook(lambda module, args, output: seen.append(output))

    return hooked(add)


@feature("hooks", "a forward hook that collects, replaced during a loop by one that changes outputs")
def hook_replaced() -> Results:
    handles: list[Any] = []

    def collect(part: nn.Module) -> None:
        seen: list[Any] = []
        handles.append(part.register_forward_hook(lambda module, args, output: seen.append(output)))

    def scale(part: nn.Module) -> None:
        handles.pop().remove()
        handles.append(part.register_forward_hook(lambda module, args, output: output * 1.5))

    def remove(part: nn.Module) -> None:
        handles.pop().remove()

    return held(block, small, 0, collect, lambda part: None, scale, remove)


@feature("hooks", "a pre-hook that collects", note="the block runs as an opaque operator")
def pre_hook_collects() -> Results:
    def add(model: nn.Module, seen: list[Any]) -> None:
        block(model).register_forward_pre_hook(lambda module, args: seen.append(args[0]))

    return hooked(add)


@feature("hooks", "a hook with keyword arguments, as a bound method, that collects into an object")
def hook_method() -> Results:
    @dataclass
    class Store:
        found: dict[str, list[Tensor]] = field(default_factory=dict)
        last: deque[Tensor] = field(default_factory=lambda: deque(maxlen=2))

        def hook(self, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
            self.found.setdefault("all", []).append(output)
            self.last.append(output)

    store = Store()

    def build() -> nn.Module:
        model = small()
        store.found.clear()
        store.last.clear()
        block(model).attention.register_forward_hook(store.hook, with_kwargs=True)
        return model

    return collected(build, lambda model: [*store.found["all"], *store.last])


@feature(
    "hooks",
    "a hook that counts in a variable of its closure and depends on it",
    note="the block runs as an opaque operator",
)
def hook_counts() -> Results:
    def build() -> nn.Module:
        calls = 0

        def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            return output * 1.5 if calls == 2 else output

        model = small()
        block(model).register_forward_hook(hook)
        return model

    return both(build)


FOUND: list[Tensor] = []
NUMBER = 0


@feature("hooks", "a hook that collects into a global list", note="the block runs as an opaque operator")
def hook_global() -> Results:
    def build() -> nn.Module:
        model = small()
        FOUND.clear()
        block(model).register_forward_hook(lambda module, args, output: FOUND.append(output))
        return model

    return collected(build, lambda model: list(FOUND))


def attending(kind: type[models.Attention]) -> Callable[[], nn.Module]:
    """The small model with attentions of this kind."""

    def build() -> nn.Module:
        model = small()
        for each in model.blocks:  # type: ignore[union-attr]
            each.attention.__class__ = kind  # type: ignore[union-attr]
        return model

    return build


@feature(
    "modules",
    "blocks that count in a global variable and depend on it",
    Outcome.REFUSED,
    says="changes blocks.0.NUMBER at each call",
    note="nothing is left to cache",
)
def global_number() -> Results:
    class Counted(models.Block):
        def forward(self, x: Tensor, *rest: Any) -> Tensor:
            global NUMBER
            NUMBER += 1
            return super().forward(x, *rest) * (1 + NUMBER / 10)

    def build() -> nn.Module:
        global NUMBER
        NUMBER = 0
        return models.build(Counted)

    return both(build)


@feature(
    "modules",
    "blocks that collect into a list of their class",
    Outcome.REFUSED,
    says="changes blocks.0.found at each call",
    note="nothing is left to cache",
)
def class_list() -> Results:
    class Shared(models.Block):
        found: list[Tensor] = []  # noqa: RUF012 - the point

        def forward(self, x: Tensor, *rest: Any) -> Tensor:
            y = super().forward(x, *rest)
            self.found.append(y)
            return y

    def build() -> nn.Module:
        Shared.found.clear()
        return models.build(Shared)

    return collected(build, lambda model: list(Shared.found))


@feature(
    "modules", "an attention that writes in one call what it reads in another", note="it runs as an opaque operator"
)
def write_and_read() -> Results:
    class Remembering(models.Attention):
        kept: Tensor | None = None

        def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
            y = super().forward(x, context)
            if self.mode == "write":
                self.kept = y
            return y if self.mode == "write" or self.kept is None else 0.5 * (y + self.kept)

    Remembering.mode = "write"  # type: ignore[attr-defined]

    def mode(name: str) -> Callable[[Any], object]:
        return lambda m: [setattr(each.attention, "mode", name) for each in m.blocks]

    return both(attending(Remembering), at(0, *map(mode, ("write", "read", "read", "write", "read"))))


class Root(models.DiT):
    """Changes what it holds in its own forward."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.last, self.seen = 0, torch.zeros(()), list[Tensor]()


def root(forward: Callable[..., Tensor]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        torch.manual_seed(0)
        model = Root().eval().requires_grad_(False)
        model.forward = types.MethodType(forward, model)  # type: ignore[method-assign]
        return model

    return build


@feature(
    "modules", "a model that counts its own calls", Outcome.WARNED, says="changes calls at each call", note="stays 0"
)
def root_counts() -> Results:
    def forward(self: Any, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        self.calls += 1
        return Root.forward(self, x, timestep, text)

    return collected(root(forward), lambda model: [torch.tensor(model.calls)])


@feature("modules", "a model that keeps its last result", Outcome.WARNED, says="changes last at each call")
def root_keeps() -> Results:
    def forward(self: Any, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        self.last = Root.forward(self, x, timestep, text)
        return Root.forward(self, x, timestep, text)

    return collected(root(forward), lambda model: [model.last])  # type: ignore[list-item]


@feature(
    "modules", "a model that depends on a count of its own calls", Outcome.REFUSED, says="changes calls at each call"
)
def root_goes_by_count() -> Results:
    def forward(self: Any, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        self.calls += 1
        if self.calls <= 2:
            x = x * 1.5
        return Root.forward(self, x, timestep, text)

    return both(root(forward))


@feature("modules", "TeaCache in a forward of its own", Outcome.REFUSED, says="and reads it")
def teacache() -> Results:
    def forward(self: Any, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        self.calls += 1
        if self.calls % 2:
            before, x = x, Root.forward(self, x, timestep, text)
            self.last = x - before
            return x
        return x + self.last

    return both(root(forward))


@feature("hooks", "a hook on the model itself that collects", Outcome.WARNED, says="Steps do not change it")
def root_hook() -> Results:
    def add(model: nn.Module, seen: list[Any]) -> None:
        model.register_forward_hook(lambda module, args, output: seen.append(output))

    seen: list[Any] = []

    def build() -> nn.Module:
        model = small()
        seen.clear()
        add(model, seen)
        return model

    return collected(build, lambda model: [torch.tensor(len(seen))])


@feature("modules", "tables made at first use, for each shape", slow=False)
def tables() -> Results:
    class Table(models.Block):
        def __init__(self) -> None:
            super().__init__()
            self.tables: dict[int, Tensor] = {}

        def forward(self, x: Tensor, *rest: Any) -> Tensor:
            if x.shape[1] not in self.tables:
                self.tables[x.shape[1]] = torch.linspace(0, 1, x.shape[1])[:, None]
            return super().forward(x + self.tables[x.shape[1]], *rest)

    return both(lambda: models.build(Table), policy="none")


@feature(
    "modules", "a table made from the arguments' values and kept by their identity", note="runs as an opaque operator"
)
def table_by_identity() -> Results:
    class ByIdentity(models.Attention):
        known: Any = None

        def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
            if self.known is None or self.known[0] is not x:
                self.known = x, x.mean()
            return super().forward(x, context) * self.known[1]

    return both(attending(ByIdentity))


# attributes


@feature("modules", "Python modules, loggers, locks, tokenizers, arrays and the model itself as attributes", slow=False)
def foreign() -> Results:
    import logging
    import threading

    def change(model: nn.Module) -> None:
        model.ops = torch.nn.functional  # type: ignore[assignment]
        model.log, model.lock = logging.getLogger("x"), threading.Lock()  # type: ignore[assignment]
        model.words = {str(number): number for number in range(50_000)}  # type: ignore[assignment]
        model.array = np.zeros(3)  # type: ignore[assignment]
        model.up = [model]  # type: ignore[assignment]
        model.act = functools.partial(torch.nn.functional.gelu, approximate="tanh")  # type: ignore[assignment]

    return prepared(change, small)


# containers as arguments


class Takes(models.DiT):
    """Does something with a container of the caller."""

    def __init__(self, act: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.act = act

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor, info: Any = None) -> Tensor:
        y = super().forward(x, timestep, text)
        more = self.act(info, y)
        return y if more is None else y + more


def given(act: Callable[[Any, Tensor], Any], make: Callable[[], Any]) -> Results:
    def run(optimize: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model: nn.Module = Takes(act).eval().requires_grad_(False)
        model = duca_compile.optimize(model, "none", "eager") if optimize else model
        return loop(model, run=lambda m, step: m(**models.example(step, 9.0 - step), info=make()))

    return run(True), run(False)


@feature("arguments", "a list that forward pops from", slow=False)
def pops() -> Results:
    return given(lambda info, y: info.pop(0) + info.pop(), lambda: [torch.ones(()), torch.ones(())])


@feature("arguments", "a nested dictionary that forward pops from")
def pops_nested() -> Results:
    return given(lambda info, y: info["a"][0].pop("b"), lambda: {"a": ({"b": torch.ones(())},)})


@feature("arguments", "a dictionary that forward writes to", slow=False)
def writes() -> Results:
    return given(lambda info, y: info.__setitem__("feature", y), dict)


@feature("arguments", "a list that forward appends to")
def appends() -> Results:
    return given(lambda info, y: info.append(y), list)


@feature("arguments", "a list whose entry forward replaces")
def replaces() -> Results:
    return given(lambda info, y: info["a"].__setitem__(1, y), lambda: {"a": [torch.ones(()), torch.ones(())]})


class Gain:
    def __init__(self, gain: Tensor) -> None:
        self.gain = gain


class Slotted(Gain):
    __slots__ = ("offset",)

    def __init__(self, gain: Tensor, offset: Tensor) -> None:
        super().__init__(gain)
        self.offset = offset


@feature("arguments", "an object of a class of its own")
def object_argument() -> Results:
    return given(lambda info, y: info.gain * y, lambda: Gain(torch.ones(())))


@feature("arguments", "a namespace")
def namespace_argument() -> Results:
    return given(lambda info, y: info.gain * y, lambda: types.SimpleNamespace(gain=torch.ones(())))


@feature("arguments", "an object with slots", Outcome.REFUSED, says="the argument info of Takes.forward is a Slotted")
def slots_argument() -> Results:
    return given(lambda info, y: info.gain * y, lambda: Slotted(torch.ones(()), torch.ones(())))


@feature("arguments", "a set", Outcome.REFUSED, says="the argument info of Takes.forward is a set")
def set_argument() -> Results:
    return given(lambda info, y: None, lambda: {1})


@feature("diffusers", "HunyuanDiT with ControlNet, whose forward pops the ControlNet's results")
def hunyuan_controlnet() -> Results:
    def run(model: nn.Module, step: int) -> Tensor:
        arguments = zoo.hunyuan_dit(4)[1] | {"timestep": zoo.times(900.0 - step), "return_dict": False}
        tokens = arguments["hidden_states"].shape[-1] ** 2 // 4
        width = model.inner_dim
        samples = [0.1 * torch.ones(zoo.ROWS, tokens, width) for _ in range(1)]
        found: tuple[Tensor] = model(**arguments, controlnet_block_samples=samples)
        return found[0]

    def build() -> nn.Module:
        torch.manual_seed(0)
        return zoo.hunyuan_dit(4)[0].eval()

    torch.manual_seed(0)
    return loop(duca_compile.optimize(build(), "none", "eager"), run=run), loop(build(), run=run)


@feature("diffusers", "FLUX.2 klein, which fills a cache of keys and values at its first step and then reads it")
def klein() -> Results:
    from diffusers.models.transformers.transformer_flux2 import Flux2KVAttnProcessor, Flux2KVParallelSelfAttnProcessor

    torch.manual_seed(0)
    model, arguments = zoo.flux2(2)
    kinds = (Flux2KVAttnProcessor, Flux2KVParallelSelfAttnProcessor)
    model.eval().set_attn_processor({name: kinds["single" in name]() for name in model.attn_processors})
    later = arguments | {name: arguments[name][:, 4:] for name in ("hidden_states", "img_ids")}

    @torch.no_grad()
    def run(klein: nn.Module) -> list[Tensor]:
        first, cache = klein(
            **arguments, kv_cache_mode="extract", num_ref_tokens=4, ref_fixed_timestep=0.0, return_dict=False
        )
        times = [torch.full((zoo.ROWS,), 0.8 - 0.1 * step) for step in range(2)]
        reading = {"kv_cache_mode": "cached", "kv_cache": cache, "return_dict": False}
        return [first, *(klein(**later | {"timestep": time}, **reading)[0] for time in times)]

    return run(duca_compile.optimize(model, "none", "eager")), run(model)
