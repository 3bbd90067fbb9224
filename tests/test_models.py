"""Every model of the zoo: captured, understood as its architecture is, and run, without a word about any of them."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

import duca_compile
from duca_compile import DuCa
from duca_compile.backends.inductor import private
from duca_compile.compiler.compiled import Compiled
from duca_compile.core.ir import Role
from duca_compile.core.variants import FullVariant, ReuseVariant, SkipVariant
from duca_compile.frontend.binder import Binder
from duca_compile.passes.pipeline import build_variant
from duca_compile.policies import Step, StepKind
from duca_compile.runtime.planning import plan_step
from tests.support import BLOCKS, HEAD, PAGE, POLICY, row, sampled, streams, values_of_step
from tests.zoo import ZOO, Entry

STEPS = 8
NEXT_OF_KIN = {  # whose kin is compiled by the slow tests
    "SD3 dual",
    "Flux2",
    "AuraFlow",
    "Latte",
    "CogVideoX longer",
    "HunyuanVideo-1.5",
    "Mochi",
    "QwenImage",
    "Lumina2",
    "plain DiT by hand",
    "audio DiT prepended",
}
COMPILED = [sampled(name, slow=name not in NEXT_OF_KIN) for name in ZOO]


def sample(outputs: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return len(left) == len(right) and all(map(torch.equal, left, right))


def loop(entry: Entry, arguments: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The arguments of each step of a denoising loop: timesteps fall, and the latent changes."""
    for step in range(STEPS):
        torch.manual_seed(step)
        latent = tree_map(lambda tensor: tensor + 0.1 * torch.randn_like(tensor), arguments[entry.latent])
        time = arguments[entry.timestep]
        time = time - step if time.max() > 1 else time * (1 - step / STEPS)
        yield arguments | {entry.latent: latent, entry.timestep: time}


@dataclass(frozen=True)
class Run:
    """A model of the zoo, optimized, after a loop of ``STEPS`` steps."""

    entry: Entry
    model: nn.Module
    arguments: dict[str, Any]
    optimized: duca_compile.OptimizedModel
    outputs: list[list[Tensor]]

    @property
    def compiled(self) -> Compiled:
        (compiled,) = self.optimized._compiled.values()
        return compiled

    @property
    def found(self) -> duca_compile.Explanation:
        return duca_compile.Explanation(self.entry.name, self.compiled.captured, self.compiled.facts, POLICY)


# Long to capture, and much like others here.
SLOW = {"CogVideoX longer", "HiDream", "HunyuanVideo-1.5", "Lumina2", "OmniGen", "Z-Image"}


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in ZOO]
)
def run(request: pytest.FixtureRequest) -> Run:
    torch.manual_seed(0)
    entry = ZOO[request.param]
    model, arguments = entry.build(BLOCKS)
    optimized = duca_compile.optimize(model.eval(), POLICY, "eager")
    with torch.no_grad():
        outputs = [sample(optimized(**each)) for each in loop(entry, arguments)]
    return Run(entry, model, arguments, optimized, outputs)


def test_its_structure_is_that_of_its_architecture(run: Run) -> None:
    found = run.found
    assert streams(found) == run.entry.streams(BLOCKS)
    assert found.facts.latent.partition("_0")[0] == run.entry.latent
    assert found.facts.timestep == run.entry.timestep
    assert row(run.entry, found) in PAGE.read_text(), "run python -m tests.support to write docs/models.md anew"
    planned = {step.kind: step for step in found.schedule(POLICY, 3).steps}
    assert planned[StepKind.SKIP].flops <= 0.1 * found.flops  # at 4 blocks; more blocks, less


@torch.no_grad()
def test_it_runs_full_partial_and_skip_steps(run: Run) -> None:
    assert "".join(e.kind.value[0] for e in run.optimized.history) == "fpsfpsfp"
    for step, (each, outputs) in enumerate(zip(loop(run.entry, run.arguments), run.outputs, strict=True)):
        assert all(output.isfinite().all() for output in outputs)
        assert same(outputs, sample(run.model(**each))) == (step % 3 == 0)


@torch.no_grad()
def test_reuse_right_after_a_full_step_changes_nothing(run: Run) -> None:
    captured, facts = run.compiled.captured, run.compiled.facts
    tensors = Binder(run.model)((), run.arguments).tensors
    values = values_of_step(run.compiled, tensors)
    expected = sample(run.model(**run.arguments))
    full = build_variant(captured, facts, FullVariant())
    results = full.module(*[values[n] for n in full.inputs])
    assert same(sample(results[: len(expected)]), expected)
    values |= zip(full.outputs, results, strict=True)
    for spec in (ReuseVariant(), SkipVariant()):
        reuse = build_variant(captured, facts, spec)
        assert same(sample(reuse.module(*[values[n] for n in reuse.inputs])[: len(expected)]), expected)


@torch.no_grad()
def test_text_tokens_are_recomputed_on_demand() -> None:
    """FLUX: by default the image's MLPs; with ``text_factor`` the text's too, on tokens of their own."""
    torch.manual_seed(0)
    entry = ZOO["FLUX"]
    model, arguments = entry.build(2)
    model.eval()
    step = Step(StepKind.PARTIAL, ratio=0.5)
    chosen: dict[float, Counter[Role]] = {}
    for factor in (0.0, 0.5):
        policy = DuCa(interval=3, fresh_ratio=0.5, text_factor=factor)
        optimized = duca_compile.optimize(model, policy, "eager")
        for each in loop(entry, arguments):
            assert all(output.isfinite().all() for output in sample(optimized(**each)))
        facts = duca_compile.explain(optimized, **arguments).facts
        _, counts = plan_step(facts, policy, step)
        chosen[factor] = Counter(facts.branches[index].role for index in counts)
    assert chosen == {0.0: Counter({Role.MAIN: 2}), 0.5: Counter({Role.MAIN: 2, Role.TEXT: 2})}


@torch.no_grad()
@pytest.mark.parametrize("name", COMPILED)
def test_its_variants_compile_whole_and_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    entry = ZOO[name]
    model, arguments = entry.build(2)
    eager = duca_compile.optimize(model.eval(), POLICY, "eager")
    optimized = duca_compile.optimize(model, POLICY, "inductor", strict=True)
    calls = list(loop(entry, arguments))
    for each in calls[:3]:
        optimized(**each)  # one step of each kind
    optimized.reset()
    with monkeypatch.context() as patch:
        patch.setattr(private, "compile_fx", None)
        for each in calls:
            for a, b in zip(sample(optimized(**each)), sample(eager(**each)), strict=True):
                assert (a - b).norm() <= 1e-4 * b.norm()
    assert "".join(e.kind.value[0] for e in optimized.history) == "fpsfpsfp"


def test_the_page_has_no_other_models() -> None:
    page = PAGE.read_text()
    assert page.startswith(HEAD)
    assert page.count("\n| ") == len(ZOO) + 1
