"""Which input is what, and how often each value of the loop changes."""

from __future__ import annotations

from itertools import pairwise

import models
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from tracing import analysed, module, names, raw

from duca_compile.analysis.latent import latent_arguments
from duca_compile.analysis.variance import timestep_input, variances
from duca_compile.core.ir import CapturedGraph, Variance
from duca_compile.errors import StructureError, UsageError
from duca_compile.frontend.operators import argument, is_random
from duca_compile.passes.exact.hoist import ALIGNMENT, frontier, row_layout
from duca_compile.passes.pipeline import prepare

X, T = torch.randn(2, 4, 8), torch.full((2,), 3.0)
Y, U = X.clone(), T.clone()


def variance_of(captured: CapturedGraph, latent: str = "x", timestep: str = "timestep") -> dict[str, Variance]:
    return variances(captured.graph, {latent}, timestep)


def test_a_value_is_as_variable_as_its_most_variable_input() -> None:
    def forward(self: nn.Module, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        a = text.exp()
        b = timestep.sin()
        c = a * b[:, None, None]
        d = self.weight.tanh()
        return x.cos() + c.relu() + d.neg()

    captured = raw(module(forward, weight=nn.Parameter(torch.ones(8))), x=X, timestep=T, text=Y)
    found = variance_of(captured)
    expected = {"exp": 0, "tanh": 0, "neg": 0, "sin": 1, "mul": 1, "relu": 1, "cos": 2, "add": 2, "add_1": 2}
    assert {name: int(found[name]) for name in expected} == expected
    assert (found["x"], found["timestep"], found["text"]) == (Variance.LATENT, Variance.TIMESTEP, Variance.INVARIANT)


def test_random_values_are_never_hoisted_and_attention_without_dropout_is_not_random() -> None:
    def forward(self: nn.Module, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        noise = torch.bernoulli(text.sigmoid())
        loose = F.dropout(text, 0.5, training=True)
        refined = F.scaled_dot_product_attention(text, text, text)
        dropped = F.scaled_dot_product_attention(text, text, text, dropout_p=0.5)
        x = x + timestep.sin()[:, None, None] * self.linear(x)
        return x + noise + loose + refined + dropped

    captured, facts = analysed(module(forward, linear=nn.Linear(8, 8)), x=X, timestep=T, text=Y)
    (bernoulli,), (dropout,) = names(captured.graph, "bernoulli"), names(captured.graph, "dropout.default")
    exact, random = names(captured.graph, "scaled_dot_product")
    assert facts.variance[bernoulli] == facts.variance[dropout] == facts.variance[random] == Variance.LATENT
    assert facts.variance[exact] is Variance.INVARIANT
    (before_draw,) = names(captured.graph, "sigmoid")
    assert {n.name for n in frontier(captured.graph, facts)} == {exact, before_draw}


def test_the_frontier_is_what_the_loop_reads_of_the_loop_invariant_values() -> None:
    captured, facts = analysed(models.build(models.CrossBlock), **models.example())
    found = frontier(captured.graph, facts)
    assert {facts.variance[n.name] for n in found} == {Variance.INVARIANT}
    assert len([n for n in found if n.name.startswith("linear")]) == 4, "two blocks project the text to keys and values"
    assert not [n for n in found if n.name.startswith(("reshape", "view", "transpose", "unsqueeze"))], (
        "views are made in the loop, of what they are views of"
    )


def test_timestep_only_values_lie_apart_in_the_row_and_are_those_that_the_loop_reads() -> None:
    captured, facts = analysed(models.build(models.CrossBlock), **models.example())
    (row,) = row_layout(captured.graph, facts).values()
    assert {facts.variance[piece.name] for piece in row} == {Variance.TIMESTEP}
    assert len(row) == 2 + 1, "the modulation of two blocks and of the head"
    for piece, after in pairwise(row):
        assert piece.stop <= after.start
        assert after.start * 4 % ALIGNMENT == 0


def embedded(*arguments: str) -> str:
    """Source of a forward that embeds ``arguments`` by sin and adds everything up."""
    return " + ".join(f"{name}.sin().reshape(-1, 1, 1)" for name in arguments)


def detect(signature: str, expression: str, requested: str | None = None, **values: Tensor) -> str:
    scope: dict[str, object] = {}
    exec(f"def forward(self, {signature}):\n    return {expression}", scope)
    captured = raw(module(scope["forward"]), **values)  # type: ignore[arg-type]
    return timestep_input(captured.graph, captured.inputs, requested)


def test_the_timestep_is_found_by_its_embedding_whatever_its_name() -> None:
    assert detect("x, level, y", f"x + {embedded('level')} + y", x=X, level=T, y=Y) == "level"
    assert detect("x, t", f"x + {embedded('t')}", x=X, t=torch.tensor(3.0)) == "t", "a 0-dimensional timestep"
    assert detect("x, level", f"x + {embedded('level')}", x=X, level=T[:, None]) == "level", "one column"


def test_a_timestep_for_each_token_or_frame_is_found() -> None:
    frames = torch.rand(2, 4)
    for name in ("t", "timesteps", "sigma", "noise_levels"):
        assert detect(f"x, {name}", f"x + {name}.sin()[..., None]", x=X, **{name: frames}) == name
    assert detect("x, level", "x + level.sin()", x=X, level=frames[..., None]) == "level", "with a column"
    merged = "x + rates.sin().unflatten(0, (2, 4))[..., None]"
    assert detect("x, rates", merged, x=X, rates=frames.flatten()) == "rates", "rows and frames in one dimension"
    both = "x + level.sin()[..., None] + timestep.sin()[:, None, None]"
    assert detect("x, level, timestep", both, x=X, level=frames, timestep=T) == "timestep"


def test_positions_are_no_timestep() -> None:
    for name in ("position", "ids"):
        with pytest.raises(StructureError, match="no timestep"):
            detect(f"x, {name}", f"x + {name}.sin()[..., None]", x=X, **{name: torch.rand(2, 4)})


def test_of_two_embedded_inputs_the_one_named_like_time_wins() -> None:
    both = f"x + {embedded('guidance')} + {embedded('timestep')}"
    assert detect("x, guidance, timestep", both, x=X, guidance=T, timestep=U) == "timestep"
    neither = f"x + {embedded('guidance')} + {embedded('level')}"
    assert detect("x, guidance, level", neither, x=X, guidance=T, level=U) == "guidance", "else the first"


def test_without_an_embedding_the_name_decides() -> None:
    plain = "x + sigma.reshape(-1, 1, 1) + y.reshape(-1, 1, 1)"
    assert detect("x, y, sigma", plain, x=X, y=T, sigma=U) == "sigma"


def test_a_request_overrules_the_structure() -> None:
    both = f"x + {embedded('timestep')} + y.reshape(-1, 1, 1)"
    assert detect("x, timestep, y", both, "y", x=X, timestep=T, y=U) == "y"
    with pytest.raises(UsageError, match=r"timestep='z' is not a tensor argument.*'x', 'timestep', 'y'"):
        detect("x, timestep, y", both, "z", x=X, timestep=T, y=U)


def test_no_timestep_is_an_error_that_lists_the_inputs() -> None:
    with pytest.raises(StructureError, match=r"no timestep among the tensor inputs \['x', 'y'\]"):
        detect("x, y", "x.sin() + y.reshape(-1, 1, 1)", x=X, y=T)


@pytest.mark.parametrize(
    ("values", "latent"),
    [
        ({"x": torch.randn(2, 4, 8), "timestep": T, "text": torch.randn(2, 90, 8)}, "x"),
        ({"text": torch.randn(2, 90, 8), "timestep": T, "x": torch.randn(2, 4, 8)}, "x"),
        ({"ids": torch.zeros(2, 4, 8, dtype=torch.long), "timestep": T, "x": torch.randn(2, 4, 8)}, "x"),
    ],
    ids=["first", "last", "not the integers of the same shape"],
)
def test_the_latent_is_shaped_like_the_output(values: dict[str, Tensor], latent: str) -> None:
    others = [f"{name}.float().mean()" for name in values if name != "x"]
    scope: dict[str, object] = {}
    exec(f"def forward(self, {', '.join(values)}):\n    return x + {' + '.join(others)}", scope)
    captured = raw(module(scope["forward"]), **values)  # type: ignore[arg-type]
    assert latent_arguments(captured, "timestep") == (latent,)


def test_where_no_shape_is_like_the_output_the_largest_input_is_the_latent() -> None:
    def forward(self: nn.Module, text: Tensor, x: Tensor, timestep: Tensor) -> Tensor:
        return (x.mean() + text.mean() + timestep).sum()

    captured = raw(module(forward), text=torch.randn(2, 3, 8), x=torch.randn(2, 4, 5, 5), timestep=T)
    assert latent_arguments(captured, "timestep") == ("x",)


def test_no_latent_is_an_error() -> None:
    captured = raw(module(lambda self, timestep, ids: timestep.sin() + ids), timestep=T, ids=torch.arange(2))
    with pytest.raises(StructureError, match=r"no latent among the tensor inputs \['timestep', 'ids'\]"):
        latent_arguments(captured, "timestep")


def test_arguments_are_read_by_name_wherever_they_stand() -> None:
    def forward(self: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
        return torch.linalg.vector_norm(x, 3, 1), x.var(2, unbiased=False, keepdim=True), F.gelu(x)

    captured = prepare(raw(module(forward), x=X))
    norm, var, gelu = (n for n in captured.graph.nodes if n.op == "call_function")
    assert (argument(norm, "ord"), argument(norm, "dim"), argument(norm, "keepdim")) == (3, [1], False)
    assert (argument(var, "dim"), argument(var, "keepdim")) == ([2], True)
    assert argument(gelu, "approximate") == "none"
    assert argument(gelu, "no_such_argument") is None
    assert argument(captured.graph.output_node(), "x") is None
    assert not any(map(is_random, captured.graph.nodes))
