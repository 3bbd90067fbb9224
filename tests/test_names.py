"""Arguments, results, weights and submodules of a model may have the names of what variants and artifacts add."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import duca_compile
from duca_compile import DuCa, OptimizedModel, Policy, ResidualGate, TaylorSeer, UsageError
from duca_compile.artifact.manifest import read_manifest
from duca_compile.policies import StepKind
from tests import models

PREFIXES = (
    "cache",
    "hoisted",
    "output",
    "score",
    "branch",
    "input",
    "tokens",
    "timestep",
    "forecast",
    "given",
    "weight",
)
NAMES = (
    *(f"{prefix}_x" for prefix in PREFIXES),
    *("output_0", "score_0", "branch_1", "stream_end", "branch_1_d1", "probe_seen", "probe_change", "verify_error"),
    *("cache_branch_1", "cache_stream_end", "cache_probe_seen", "hoisted_exp", "tokens_1", "timestep_float32"),
    *("forecast_gap", "forecast_factor_1", "full_rows", "given_output_0", "given_cache_x", "batch", "operand_0"),
)
OTHERS = tuple(f"argument{place}" for place in range(len(NAMES)))
POLICIES: dict[str, Policy] = {
    "duca": DuCa(interval=3, fresh_ratio=0.5, selection="v_norm"),
    "taylorseer": TaylorSeer(interval=3, max_order=1, first_full_steps=1),
    "gate": ResidualGate(threshold=0.3, cached="forecast", decide_per="row"),
}


def build(names: tuple[str, ...]) -> nn.Module:
    """A model whose arguments, results, buffers and submodules have these names; the numbers do not depend on them."""
    scaled = " * ".join(f"{name} * self.{name}" for name in names[::2])
    scaled += " * " + " * ".join(f"{name}.exp() * self.part.{name}" for name in names[1::2])
    lines = [
        f"def forward(self, x, timestep, text, {', '.join(names)}):",
        f"    y = self.{names[0]}_inner(x * ({scaled}), timestep, text)",
        f"    return {{{names[0]!r}: y, {names[-1]!r}: y.sum(-1)}}",
    ]
    functions: dict[str, Any] = {}
    exec("\n".join(lines), functions)
    model = type("Named", (nn.Module,), {"forward": functions["forward"]})()
    model.add_module(f"{names[0]}_inner", models.build())
    model.add_module("part", nn.Module())
    for place, name in enumerate(names):
        owner = model.part if place % 2 else model
        value = torch.full((1, 1, 1), 1 + place / 100)
        if place % 4 < 2:
            owner.register_buffer(name, value)
        else:
            owner.register_parameter(name, nn.Parameter(value))
    return model.eval().requires_grad_(False)


def calls(names: tuple[str, ...], steps: int = 7) -> list[dict[str, Tensor]]:
    """The arguments of each step; the others than the latent and the timestep stay the same objects."""
    given = models.example()
    others = {name: torch.full((2, 1, 1), 0.05 if place % 2 else 1.02) for place, name in enumerate(names)}
    drift = torch.randn_like(given["x"]) / 10
    return [
        {"x": given["x"] + step * drift, "timestep": given["timestep"] - step / 10, "text": given["text"], **others}
        for step in range(steps)
    ]


@torch.no_grad()
def loop(model: Any, names: tuple[str, ...]) -> list[list[Tensor]]:
    torch.manual_seed(1)
    return [[torch.as_tensor(result) for result in model(**call).values()] for call in calls(names)]


def kinds(model: Any) -> list[Any]:
    return [(executed.kind, executed.rows, executed.flops) for executed in model.history]


def same(one: list[list[Tensor]], other: list[list[Tensor]]) -> bool:
    pairs = zip(one, other, strict=True)
    return all(torch.equal(a, b) for results, known in pairs for a, b in zip(results, known, strict=True))


def close(one: list[list[Tensor]], other: list[list[Tensor]]) -> bool:
    pairs = zip(one, other, strict=True)
    return all(
        (a - b).norm() <= 1e-4 * b.norm() for results, known in pairs for a, b in zip(results, known, strict=True)
    )


@pytest.fixture(scope="module", params=POLICIES)
def plain(request: pytest.FixtureRequest) -> tuple[Policy, list[list[Tensor]], list[Any]]:
    """What a policy gives for the model whose names mean nothing."""
    policy = POLICIES[request.param]
    optimized = duca_compile.optimize(build(OTHERS), policy, "eager", 7)
    return policy, loop(optimized, OTHERS), kinds(optimized)


def test_names_change_nothing_under_eager(plain: tuple[Policy, list[list[Tensor]], list[Any]]) -> None:
    policy, expected, steps = plain
    optimized = duca_compile.optimize(build(NAMES), policy, "eager", 7)
    found = loop(optimized, NAMES)
    assert same(found, expected)
    assert kinds(optimized) == steps
    assert len({kind for kind, *_ in steps}) > 1, "caches are read"
    full = [place for place, (kind, rows, _) in enumerate(steps) if {kind, *rows} == {StepKind.FULL}]
    own = loop(build(NAMES), NAMES)
    assert same([found[place] for place in full], [own[place] for place in full])


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_single_name_changes_nothing(name: str) -> None:
    """Of several, one could be renamed for the sake of another."""
    found = []
    for names in (("other", "spare"), (name, "spare")):
        optimized = duca_compile.optimize(build(names), "duca", "eager", 7)
        found.append((loop(optimized, names), kinds(optimized)))
    assert same(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


@pytest.mark.slow
def test_names_change_nothing_under_inductor(plain: tuple[Policy, list[list[Tensor]], list[Any]]) -> None:
    policy, expected, steps = plain
    optimized = duca_compile.optimize(build(NAMES), policy, "inductor", 7, strict=True)
    assert close(loop(optimized, NAMES), expected)
    assert kinds(optimized) == steps


@pytest.mark.slow
def test_names_change_nothing_in_an_artifact(
    plain: tuple[Policy, list[list[Tensor]], list[Any]], tmp_path: Path
) -> None:
    policy, expected, steps = plain
    model: OptimizedModel = duca_compile.optimize(build(NAMES), policy, "eager", 7)
    duca_compile.save(model, tmp_path / "artifact", calls(NAMES)[0])
    artifact = duca_compile.load(tmp_path / "artifact", threads=1)
    assert close(loop(artifact, NAMES), expected)
    assert [kind for kind, *_ in kinds(artifact)] == [kind for kind, *_ in steps]
    with pytest.raises(UsageError, match=r"^output_0 must be"):
        artifact(**calls(NAMES)[0] | {"output_0": torch.zeros(3)})
    found = read_manifest(tmp_path / "artifact")
    assert {each.path[0] for each in found.signature.arguments} == {"x", "timestep", "text", *NAMES}
    for graph in found.graphs.values():
        names = [spec.name for spec in (*graph.inputs, *graph.outputs)]
        assert len(names) == len(set(names))
