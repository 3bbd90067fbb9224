"""What reaches a model, and how: latents beside conditions, containers that forward fills, objects; compiled parts."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import duca_compile
from duca_compile import CaptureError, ExportError, StructureError, UsageError
from tests.test_forms import STEPS, WIDTH, letters, waves

X, T = torch.randn(2, 8, 4), torch.ones(2)


class Block(nn.Module):
    """Attention and MLP; with a context, the attention reads that alone."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        h = functional.layer_norm(x, x.shape[-1:])
        k, v = self.kv(h if context is None else context).chunk(2, dim=-1)
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in (self.q(h), k, v))
        x = x + self.out(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(functional.layer_norm(x, x.shape[-1:]))


class Base(nn.Module):
    """``enter`` takes ``width`` channels."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enter, self.hint, self.leave = nn.Linear(width, WIDTH), nn.Linear(4, WIDTH), nn.Linear(WIDTH, 4)
        self.time, self.blocks = nn.Linear(WIDTH, WIDTH), nn.ModuleList(Block() for _ in range(2))

    def run(self, x: Tensor, t: Tensor, *contexts: Tensor) -> Tensor:
        x = x + self.time(waves(t))[:, None]
        for number, block in enumerate(self.blocks):
            x = block(x, contexts[number] if contexts else None)
        return x


class Robot(Base):
    """Its latent has one token more than its result; text and image are only read."""

    def forward(self, x: Tensor, t: Tensor, text: Tensor, image: Tensor) -> Tensor:
        return self.leave(self.run(self.enter(x), t, text, image))[:, 1:]


class Control(Base):
    """Lists of images without a batch; the control enters behind the first block."""

    def forward(self, x: list[Tensor], t: Tensor, control: list[Tensor]) -> list[Tensor]:
        latent, hint = (torch.stack([each.flatten(1).T for each in images]) for images in (x, control))
        h = self.blocks[0](self.enter(latent) + self.time(waves(t))[:, None])
        h = self.blocks[1](h + self.hint(hint))
        return [each.T.reshape(x[0].shape) for each in self.leave(h)]


class Residuals(Base):
    """A ControlNet's results, of the latent's own shape, are added behind each block."""

    def forward(self, x: Tensor, t: Tensor, residuals: list[Tensor]) -> Tensor:
        h = self.enter(x) + self.time(waves(t))[:, None]
        for block, residual in zip(self.blocks, residuals, strict=True):
            h = block(h) + self.hint(residual)
        return self.leave(h)


class Reference(Base):
    """A reference image of the latent's shape runs beside it, and its tokens are dropped at the end."""

    def forward(self, reference: Tensor, x: Tensor, t: Tensor, cut: str) -> Tensor:
        tokens = x.shape[1]
        h = self.run(self.enter(torch.cat([reference, x], dim=1)), t)
        if cut == "slice":
            return self.leave(functional.layer_norm(h, h.shape[-1:]) * (1 + self.time(waves(t))[:, None]))[:, -tokens:]
        if cut == "split":
            return self.leave(h.split([reference.shape[1], tokens], dim=1)[1])
        return self.leave(h.narrow(1, reference.shape[1], tokens))


class Inpainting(Base):
    """All of them are joined channel by channel: what is denoised cannot be seen."""

    def __init__(self) -> None:
        super().__init__(9)

    def forward(self, x: Tensor, t: Tensor, mask: Tensor, masked: Tensor) -> Tensor:
        return self.leave(self.run(self.enter(torch.cat([x, mask, masked], dim=-1)), t))


class Nested(Base):
    def forward(self, t: Tensor, added: dict[str, Tensor]) -> Tensor:
        return self.leave(self.run(self.enter(added["y"]) + self.hint(added["x"]), t))


class Pair(Base):
    """Two latents, each with a result of its own."""

    def forward(self, x: Tensor, y: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        h = self.run(torch.cat([self.enter(x), self.hint(y)], dim=1), t)
        return self.leave(h[:, : x.shape[1]]), self.leave(h[:, x.shape[1] :])


def context(tokens: int) -> Tensor:
    return torch.randn(2, tokens, WIDTH)


LATENTS: dict[str, tuple[nn.Module, dict[str, Any], set[str]]] = {
    "conditions are only read": (Robot(), {"x": X, "t": T, "text": context(7), "image": context(30)}, {"x"}),
    "a control in the middle": (
        Control(),
        {"x": [torch.randn(4, 2, 4)], "t": T[:1], "control": [torch.randn(4, 2, 4)]},
        {"x_0"},
    ),
    "residuals": (Residuals(), {"x": X, "t": T, "residuals": [X, X + 1]}, {"x"}),
    "tokens are sliced": (Reference(), {"reference": X, "x": X + 1, "t": T, "cut": "slice"}, {"x"}),
    "tokens are split": (Reference(), {"reference": X, "x": X + 1, "t": T, "cut": "split"}, {"x"}),
    "tokens are narrowed": (Reference(), {"reference": X, "x": X + 1, "t": T, "cut": "narrow"}, {"x"}),
    "two latents": (Pair(), {"x": X, "y": torch.randn(2, 5, 4), "t": T}, {"x", "y"}),
}


@pytest.mark.parametrize("name", LATENTS)
def test_the_latent_is_told_from_conditions(name: str) -> None:
    model, call, expected = LATENTS[name]
    found = duca_compile.explain(model.eval(), **call).facts
    assert found.latent == min(expected)
    assert found.changing == expected | {"t"}
    assert len(found.branches) == 4


@pytest.mark.parametrize(
    ("model", "call", "named"),
    [
        (Inpainting(), {"x": X, "t": T, "mask": X[..., :1], "masked": X + 1}, "x and masked"),
        (Nested(), {"t": T, "added": {"x": X, "y": X + 1}}, "added.x and added.y"),
    ],
    ids=["arguments", "entries of a dictionary"],
)
def test_a_latent_that_cannot_be_told_is_asked_for(model: nn.Module, call: dict[str, Any], named: str) -> None:
    with pytest.raises(StructureError, match=f"{named} may each be the latent.*latent='{named.split(' ')[0]}'"):
        duca_compile.explain(model.eval(), **call)
    for name in named.split(" and "):
        optimized = duca_compile.optimize(model, "fora", "eager", STEPS, latent=name)
        with torch.no_grad():
            assert torch.equal(optimized(**call), model(**call))
        assert name.replace(".", "_").removeprefix("added_") in duca_compile.explain(optimized, **call).facts.latent
    with pytest.raises(UsageError, match=r"latent='z' is not a floating-point tensor argument.*" + named.split()[0]):
        duca_compile.optimize(model, "fora", "eager", STEPS, latent="z")(**call)


# PyTorch's own attention modules


class Encoder(Base):
    """``nn.TransformerEncoder`` as its blocks, and one for the text."""

    def __init__(self, norm_first: bool, activation: str, nested: bool = False) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            WIDTH, 2, 2 * WIDTH, activation=activation, batch_first=True, norm_first=norm_first
        )
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.text = nn.TransformerEncoder(layer, 1, enable_nested_tensor=nested)

    def forward(self, x: Tensor, t: Tensor, text: Tensor, padded: Tensor) -> Tensor:
        pooled = self.text(text, src_key_padding_mask=padded).mean(1, keepdim=True)
        return self.leave(self.layers(self.enter(x) + self.time(waves(t))[:, None] + pooled))


class Multihead(Base):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.ModuleList(nn.MultiheadAttention(WIDTH, 2, batch_first=True) for _ in range(2))

    def forward(self, x: Tensor, t: Tensor, text: Tensor, padded: Tensor) -> Tensor:
        x = self.enter(x) + self.time(waves(t))[:, None]
        for block, attention in zip(self.blocks, self.attention, strict=True):
            h = functional.layer_norm(x, x.shape[-1:])
            x = x + attention(h, h, h, need_weights=False)[0]
            x = x + block.mlp(functional.layer_norm(x, x.shape[-1:]))
        return self.leave(x)


FUSED: dict[str, Callable[[], nn.Module]] = {
    "norm first, gelu": lambda: Encoder(True, "gelu"),
    "norm last, relu": lambda: Encoder(False, "relu"),
    "nested tensors": lambda: Encoder(False, "gelu", nested=True),
    "nn.MultiheadAttention": Multihead,
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("name", FUSED)
def test_full_steps_take_the_path_of_eager_mode(name: str) -> None:
    model = FUSED[name]().eval()
    rest = context(5), torch.arange(5).expand(2, 5) > torch.tensor([[4], [2]])
    optimized = duca_compile.optimize(model, "fora", "eager", STEPS)
    with torch.no_grad():
        times = [torch.full((2,), 9.0 - step) for step in range(STEPS)]
        equal = [torch.equal(optimized(X, t, *rest), model(X, t, *rest)) for t in times]
        assert letters(optimized) == "FRRFRR"
        assert equal[0]
        assert equal[3]
        assert optimized.history[1].flops < 0.2 * optimized.history[0].flops
        try:
            torch.backends.mha.set_fastpath_enabled(False)
            plain = duca_compile.optimize(model, "none", "eager")
            assert torch.equal(plain(X, T, *rest), model(X, T, *rest))
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
        report = duca_compile.explain(model, X, T, *rest)  # for compilers: the same attention, as plain operators
    assert {branch.kind for branch in report.branches} == {"self_attention", "mlp"}
    assert any("scaled_dot_product_attention" in str(node.target) for node in report.captured.graph.nodes)


# functions that torch.compile compiles


@torch.compile(backend="eager")
def modulated(x: Tensor, scale: Tensor) -> Tensor:
    return functional.gelu(x) * (1 + scale)


class Decorated(Base):
    def __init__(self, reads: bool) -> None:
        super().__init__()
        self.reads = reads

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        if self.reads:
            x = x[:, : torch.tensor([x.shape[1]]).tolist()[0]]
        return self.leave(self.run(modulated(self.enter(x), self.time(waves(t))[:, None]), t))


def in_place(model: nn.Module) -> None:
    model.compile(backend="eager")


def regional(model: nn.Module) -> None:
    for block in model.blocks:  # type: ignore[union-attr]
        block.compile(fullgraph=True, backend="eager")


def wrapped(model: nn.Module) -> None:
    for number, block in enumerate(model.blocks):  # type: ignore[arg-type]
        model.blocks[number] = torch.compile(block, backend="eager")  # type: ignore[index,operator]


class Plain(Base):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.leave(self.run(self.enter(x), t))


COMPILED: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], None]]] = {
    "a function": (lambda: Decorated(False), lambda _: None),
    "a function, and values are read": (lambda: Decorated(True), lambda _: None),
    "the model, in place": (Plain, in_place),
    "blocks, in place": (Plain, regional),
    "blocks, wrapped": (Plain, wrapped),
}


@pytest.mark.parametrize("name", COMPILED)
def test_what_torch_compile_compiles_is_captured(name: str, caplog: pytest.LogCaptureFixture) -> None:
    build, compile_parts = COMPILED[name]
    model, expected = build().eval(), build().eval()
    compile_parts(model)
    optimized = duca_compile.optimize(model, "fora", "eager", STEPS)
    with torch.no_grad():
        found = [optimized(X, torch.full((2,), 9.0 - step)) for step in range(STEPS)]
        with torch.compiler.set_stance("force_eager"):
            assert torch.equal(found[0], expected(X, torch.full((2,), 9.0)))
    assert letters(optimized) == "FRRFRR"
    (said,) = [each.getMessage() for each in caplog.records if each.levelno == logging.WARNING]
    assert "is compiled by torch.compile" in said
    assert "rounding" in said
    assert len({branch.block for branch in duca_compile.explain(optimized, X, T).branches}) == 2


# containers that forward fills


class Keys:
    """A cache of a class of its own, as pipelines pass."""

    def __init__(self) -> None:
        self.text: Tensor | None = None
        self.layers = [Layer(), Layer()]
        self.count = 0


class Layer:
    def __init__(self) -> None:
        self.key: Tensor | None = None


class Fills(Base):
    def forward(self, x: Tensor, t: Tensor, text: Tensor, store: Any) -> Tensor:
        return self.leave(self.run(self.enter(x) + self.fill(text, store), t))

    def fill(self, text: Tensor, store: Any) -> Tensor:
        if "text" not in store:
            store["text"] = self.hint(text)
        return store["text"]  # type: ignore[no-any-return]


class Appends(Fills):
    def fill(self, text: Tensor, store: Any) -> Tensor:
        if not store:
            store.append(self.hint(text))
        return store[0]  # type: ignore[no-any-return]


class Sets(Fills):
    def fill(self, text: Tensor, store: Any) -> Tensor:
        if store.text is None:
            store.text, store.count = self.hint(text), len(text)
            for layer in store.layers:
                layer.key = store.text * 2
        return store.text + store.layers[1].key  # type: ignore[no-any-return]


class Rewrites(Fills):
    """Reads in each step what the one before wrote."""

    def forward(self, x: Tensor, t: Tensor, text: Tensor, store: Any) -> Tensor:
        y = self.leave(self.run(self.enter(x + 0.1 * store["last"]) + self.hint(text), t))
        store["last"] = y
        return y


def tensors_in(store: Any) -> list[Tensor]:
    if isinstance(store, Tensor):
        return [store]
    held = store.values() if isinstance(store, dict) else store if isinstance(store, list) else vars(store).values()
    return [tensor for each in held if isinstance(each, Tensor | dict | list | Layer) for tensor in tensors_in(each)]


FILLED: dict[str, tuple[type[Fills], Callable[[], Any], str]] = {
    "a dictionary": (Fills, dict, "FFRRFR"),
    "a list": (Appends, list, "FFRRFR"),
    "an object": (Sets, Keys, "FFRRFR"),
    "a dictionary, at each step": (Rewrites, lambda: {"last": torch.zeros(2, 8, 4)}, "FRRFRR"),
}


@pytest.mark.parametrize("name", FILLED)
def test_what_forward_fills_is_filled_in_each_step(name: str) -> None:
    cls, make, kinds = FILLED[name]
    model, text = cls().eval(), torch.randn(2, 1, 4)
    for policy in ("none", "fora"):
        optimized = duca_compile.optimize(model, policy, "eager", STEPS)
        found, expected = make(), make()
        with torch.no_grad():
            for step in range(STEPS):
                t = torch.full((2,), 9.0 - step)
                results = optimized(X, t, text, found), model(X, t, text, expected)
                if policy == "none":
                    assert torch.equal(*results)
                    assert len(tensors_in(found)) == len(tensors_in(expected)) > 0
                    assert all(map(torch.equal, tensors_in(found), tensors_in(expected)))
        if policy == "fora":
            assert [letter == "F" for letter in letters(optimized)].count(True) < STEPS
            assert letters(optimized)[:2] == kinds[:2]


def test_a_list_that_grows_at_each_step_is_refused_and_an_artifact_fills_nothing(tmp_path: Any) -> None:
    class Logs(Fills):
        def fill(self, text: Tensor, store: Any) -> Tensor:
            store.append(self.hint(text))
            return store[-1]  # type: ignore[no-any-return]

    text = torch.randn(2, 1, 4)
    optimized = duca_compile.optimize(Logs().eval(), "none", "eager")
    with pytest.raises(CaptureError, match=r"writes to its argument, store\[1\] at .*store\.append"):
        optimized(X, T, text, [text])
    fills = duca_compile.optimize(Fills().eval(), "none", "eager")
    with pytest.raises(ExportError, match=r"writes to its argument, store\['text'\]"):
        duca_compile.save(fills, tmp_path / "artifact", {"x": X, "t": T, "text": text, "store": {}})
