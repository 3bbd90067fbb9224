"""DisCa: the predictor against the same network written by hand, its training, its file, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor, fx, nn
from torch._inductor.compile_fx import compile_fx
from torch.nn import functional
from typer.testing import CliRunner

import duca_compile
from duca_compile import (
    DisCa,
    OptimizedModel,
    Policy,
    PolicyError,
    Predictor,
    TrainingSettings,
    UsageError,
    prediction_error,
    train_predictor,
)
from duca_compile.app.cli import app
from duca_compile.app.demo import DemoModel
from duca_compile.app.paper_flops import Blocks, paper_flops
from duca_compile.backends.inductor import private
from duca_compile.core.fx_utils import copy_graph
from duca_compile.core.ports import Port, PortKind
from duca_compile.core.variants import FullVariant, PredictVariant, VariantSpec
from duca_compile.methods.training import checkpoint_path
from duca_compile.passes.base import VariantDraft
from duca_compile.passes.caching.predict import PredictStream
from duca_compile.policies import Step, StepKind
from duca_compile.policies.predictor import FUSE
from tests.test_models import sample as outputs_of
from tests.test_optimize import LABELS, build, latent
from tests.zoo import ZOO

STEPS, DEPTH = 8, 4


@torch.no_grad()
def loop(model: nn.Module, number: int) -> list[Tensor]:
    """A denoising loop of Euler steps; returns what the model gave at each."""
    x, found = latent(number), []
    for step in range(STEPS):
        found.append(model(x, timestep=torch.full((4,), 990 - 100 * step), class_labels=LABELS).sample)
        x = x - 0.2 * found[-1]
    return found


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return build(DEPTH).requires_grad_(False)


@pytest.fixture(scope="module")
def trained(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("disca") / "predictor.safetensors"
    train_predictor(model, loop, path, TrainingSettings(loops=6, updates=30))
    return path


def letters(optimized: OptimizedModel) -> str:
    return "".join(executed.kind.letter for executed in optimized.history)


def close(left: list[Tensor], right: list[Tensor], tolerance: float = 1e-5) -> bool:
    return all((a - b).norm() <= tolerance * b.norm() for a, b in zip(left, right, strict=True))


class Skipping(Policy):
    """The cached end of the stream under the current head, with no training: what a predictor must beat."""

    name = "skipping"

    def __init__(self, interval: int) -> None:
        self.interval = interval

    def steps(self, total: int | None) -> Iterator[Step]:
        for index in range(total or 1000):
            yield Step(StepKind.FULL if index % self.interval == 0 else StepKind.SKIP)


class Passing(nn.Module):
    """In the place of a block that is left out; the head still asks the first one for its embedding."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.norm1 = block.norm1

    def forward(self, hidden: Tensor, **_: Any) -> Tensor:
        return hidden


class Fused(nn.Module):
    def __init__(self, embed: nn.Module, weights: Any, cached: Tensor) -> None:
        super().__init__()
        self.embed, self.weights, self.cached = embed, weights, cached

    def forward(self, x: Tensor) -> Tensor:
        joined = torch.cat([self.embed(x), self.cached], dim=-1)
        first, first_bias, second, second_bias = (self.weights[name] for name in FUSE)
        return functional.linear(functional.silu(functional.linear(joined, first, first_bias)), second, second_bias)


@torch.no_grad()
def test_a_predict_step_is_the_network_by_hand(model: nn.Module, trained: Path) -> None:
    predictor = Predictor.load(trained)
    optimized = duca_compile.optimize(model, DisCa(predictor, 3), "eager")
    hidden: list[Tensor] = []
    source = copy.deepcopy(model)
    source.transformer_blocks[-1].register_forward_hook(lambda *found: hidden.append(found[2]))
    x = latent(3)
    for step, output in enumerate(loop(optimized, 3)):
        call = {"timestep": torch.full((4,), 990 - 100 * step), "class_labels": LABELS}
        if step % 3 == 0:
            hidden.clear()
            expected, cached = source(x, **call).sample, hidden[-1]
            assert torch.equal(output, expected)
        else:
            by_hand = copy.deepcopy(model)
            by_hand.load_state_dict({n: w for n, w in predictor.weights.items() if n not in FUSE}, strict=False)
            for index in range(DEPTH - 2):
                by_hand.transformer_blocks[index] = Passing(by_hand.transformer_blocks[index])
            by_hand.pos_embed = Fused(by_hand.pos_embed, predictor.weights, cached)
            expected = by_hand(x, **call).sample
            assert (output - expected).norm() <= 1e-5 * expected.norm()
        x = x - 0.2 * output
    assert letters(optimized) == "FLLFLLFL"


@torch.no_grad()
def test_training_starts_from_reuse_and_improves_on_it(model: nn.Module, trained: Path, tmp_path: Path) -> None:
    untrained = train_predictor(model, loop, tmp_path / "p.safetensors", TrainingSettings(1, 1, learning_rate=0.0))
    skipped = loop(duca_compile.optimize(model, Skipping(3), "eager"), 100)
    assert close(loop(duca_compile.optimize(model, DisCa(untrained, 3), "eager"), 100), skipped, 0.02)
    losses = Predictor.load(trained).config.losses
    assert losses[-1] < losses[0] / 2
    for distance in (1, 2):
        before, after = (prediction_error(model, loop, p, distance, 100) for p in (untrained, Predictor.load(trained)))
        assert after < 0.8 * before, distance


def test_training_leaves_the_model_alone(model: nn.Module, tmp_path: Path) -> None:
    plain = build(DEPTH)  # its weights ask for gradients
    before = copy.deepcopy(plain.state_dict())
    train_predictor(plain, loop, tmp_path / "p.safetensors", TrainingSettings(1, 3))
    assert all(torch.equal(before[name], weight) for name, weight in plain.state_dict().items())
    assert all(weight.grad is None for weight in plain.parameters())


def test_a_resumed_training_equals_an_uninterrupted_one(model: nn.Module, tmp_path: Path) -> None:
    settings = TrainingSettings(loops=4, updates=5)
    whole = train_predictor(model, loop, tmp_path / "whole.safetensors", settings)

    def stopped(drop_in: nn.Module, number: int) -> None:
        if number == 2:
            raise KeyboardInterrupt
        loop(drop_in, number)

    path = tmp_path / "parts.safetensors"
    with pytest.raises(KeyboardInterrupt):
        train_predictor(model, stopped, path, settings)
    assert Predictor.load(path).config.updates == 10
    resumed = train_predictor(model, loop, path, settings, resume=True)
    assert resumed.config == whole.config
    assert resumed.weights.keys() == whole.weights.keys()
    assert all(torch.equal(resumed.weights[name], weight) for name, weight in whole.weights.items())
    again = train_predictor(model, loop, path, settings, resume=True)
    assert all(torch.equal(again.weights[name], weight) for name, weight in whole.weights.items())
    with pytest.raises(
        UsageError, match="belongs to a training with updates=5, and now it is 6; continue with the same"
    ):
        train_predictor(model, loop, path, TrainingSettings(loops=4, updates=6), resume=True)


def test_a_file_holds_what_was_saved(trained: Path, tmp_path: Path) -> None:
    predictor = Predictor.load(trained)
    predictor.save(tmp_path / "again.safetensors")
    again = Predictor.load(tmp_path / "again.safetensors")
    assert again.config == predictor.config
    assert again.config.updates == 180
    assert again.weights.keys() == predictor.weights.keys()
    assert all(torch.equal(again.weights[name], weight) for name, weight in predictor.weights.items())
    assert [p.name for p in tmp_path.iterdir()] == ["again.safetensors"]
    assert DisCa(trained).predictor.config == predictor.config


@torch.no_grad()
@pytest.mark.parametrize("other", [lambda: build(DEPTH + 1), lambda: wide()], ids=["deeper", "wider"])
def test_another_models_predictor_is_refused(trained: Path, other: Callable[[], nn.Module]) -> None:
    with pytest.raises(
        PolicyError, match="trained for DiTTransformer2DModel with 4 blocks and width 32, and this model"
    ):
        loop(duca_compile.optimize(other(), DisCa(trained), "eager"), 0)


def wide() -> nn.Module:
    config = dict(build(DEPTH).config) | {"num_attention_heads": 3}
    return type(build(1)).from_config(config).eval()


def test_what_is_no_predictor_is_refused(tmp_path: Path, trained: Path, model: nn.Module) -> None:
    with pytest.raises(UsageError, match="cannot read"):
        DisCa(tmp_path / "none.safetensors")
    (tmp_path / "text.safetensors").write_text("no weights")
    with pytest.raises(UsageError, match="cannot read"):
        DisCa(tmp_path / "text.safetensors")
    with pytest.raises(UsageError, match="does not hold a predictor"):
        DisCa(checkpoint_path(trained))
    with pytest.raises(UsageError, match=r"must end in \.safetensors"):
        train_predictor(model, loop, tmp_path / "predictor.pt")
    with pytest.raises(UsageError, match="there is no folder"):
        train_predictor(model, loop, tmp_path / "none" / "predictor.safetensors")
    with pytest.raises(UsageError, match="must run one denoising loop of at least two steps"):
        train_predictor(model, lambda drop_in, number: None, tmp_path / "predictor.safetensors")


def test_models_that_a_predictor_cannot_stand_for_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        PolicyError, match="a predictor replaces all blocks but the last 2, and this model has no others"
    ):
        train_predictor(build(2), loop, tmp_path / "p.safetensors")
    model, run = of_zoo("SD3", 3)
    with pytest.raises(PolicyError, match="the last 2 blocks need more from the earlier ones than the stream"):
        train_predictor(model, run, tmp_path / "p.safetensors", TrainingSettings(1, 1))


def of_zoo(name: str, depth: int) -> tuple[nn.Module, Callable[[nn.Module, int], list[Tensor]]]:
    torch.manual_seed(0)
    model, arguments = ZOO[name].build(depth)

    @torch.no_grad()
    def run(drop_in: nn.Module, number: int) -> list[Tensor]:
        time = arguments["timestep"]
        each = [time - 20 * step if time.max() > 1 else time * (1 - step / 8) for step in range(5)]
        return [outputs_of(drop_in(**arguments | {"timestep": t}))[0] for t in each]

    return model.eval(), run


@pytest.mark.parametrize(("name", "depth"), [("FLUX", 2), ("PixArt", 3), ("Wan", 3)])
def test_other_structures(name: str, depth: int, tmp_path: Path) -> None:
    model, run = of_zoo(name, depth)
    predictor = train_predictor(model, run, tmp_path / "p.safetensors", TrainingSettings(1, 2))
    optimized = duca_compile.optimize(model, DisCa(predictor, 4), "eager")
    for step, (output, plain) in enumerate(zip(run(optimized, 0), run(model, 0), strict=True)):
        assert output.isfinite().all()
        assert torch.equal(output, plain) == (step in (0, 4))


def test_models_of_half_precision(tmp_path: Path) -> None:
    half = build(DEPTH).to(torch.bfloat16)

    @torch.no_grad()
    def run(drop_in: nn.Module, number: int) -> list[Tensor]:
        times = [torch.full((4,), 900 - 100 * step) for step in range(4)]
        return [drop_in(latent(number).bfloat16(), timestep=t, class_labels=LABELS).sample for t in times]

    predictor = train_predictor(half, run, tmp_path / "p.safetensors", TrainingSettings(1, 2))
    assert {weight.dtype for weight in predictor.weights.values()} == {torch.float32}
    found = run(duca_compile.optimize(half, DisCa(predictor), "eager"), 0)
    assert all(output.dtype is torch.bfloat16 and output.isfinite().all() for output in found)


@pytest.mark.slow
@torch.no_grad()
def test_compiled_variants_agree_and_are_one_graph_each(
    model: nn.Module, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = []

    def counted(module: fx.GraphModule, inputs: list[Tensor]) -> Any:
        compiled.append(module)
        return compile_fx(module, inputs)

    monkeypatch.setattr(private, "compile_fx", counted)
    policy = DisCa(trained, full_steps=(0, 1, 4))
    expected = loop(duca_compile.optimize(model, policy, "eager"), 5)
    optimized = duca_compile.optimize(model, policy, "inductor", strict=True)
    assert close(loop(optimized, 5), expected)
    assert letters(optimized) == "FFLLFLLL"
    assert len(compiled) == 2


@torch.no_grad()
def test_caches_and_flops_are_as_announced(model: nn.Module, trained: Path) -> None:
    optimized = duca_compile.optimize(model, DisCa(trained, 3), "eager")
    loop(optimized, 0)
    stream = 4 * 16 * 32 * 4
    found = duca_compile.explain(optimized, latent(0), timestep=torch.full((4,), 5), class_labels=LABELS)
    plan = found.schedule(num_inference_steps=STEPS)
    assert optimized.cache_bytes == plan.cache_bytes == found.cache_bytes == stream
    weights = Predictor.load(trained).weights.values()
    assert plan.weight_bytes == sum(weight.numel() * 4 for weight in weights)
    assert f"the predictor's weights hold {plan.weight_bytes / 2**20:.2f} MiB" in str(plan)
    assert [(s.kind, s.flops) for s in plan.steps] == [(e.kind, e.flops) for e in optimized.history]
    rows, tokens, width = 4, 16, 32
    block = rows * (24 * tokens * width**2 + 4 * tokens**2 * width)
    full = found.schedule("none", 1).steps[0].flops
    skip = found.schedule(Skipping(2), 2).steps[1].flops
    embedding = 2 * rows * tokens * (3 * 2 * 2) * width
    gates = 2 * rows * width * 6 * width  # of one block; each embeds the timestep too, and the head with the first
    embedder = (full - DEPTH * (block + gates) - embedding - skip) / (DEPTH - 1)
    fuse = 2 * rows * tokens * 3 * width**2
    assert plan.steps[1].flops == skip + embedding + fuse + 2 * (block + gates + embedder)
    with pytest.raises(PolicyError, match="has predict steps, which the papers do not count"):
        paper_flops(Blocks.of(found.captured, found.facts), DisCa(trained, 3), STEPS)


@torch.no_grad()
def test_a_budget_holds_the_one_cache_or_says_what_it_takes(model: nn.Module, trained: Path) -> None:
    stream = 4 * 16 * 32 * 4
    narrow = duca_compile.optimize(model, DisCa(trained, 3), "eager", cache_budget_bytes=stream // 2)
    loop(narrow, 0)
    assert narrow.cache_bytes == stream // 2
    with pytest.raises(PolicyError, match=f"the least is {stream // 2} bytes, for DisCa"):
        loop(duca_compile.optimize(model, DisCa(trained, 3), "eager", cache_budget_bytes=stream // 4), 0)


def test_the_pass_changes_a_graph_once_and_no_other(model: nn.Module, trained: Path) -> None:
    found = duca_compile.explain(model, latent(0), timestep=torch.full((4,), 5), class_labels=LABELS)
    predict = PredictVariant(frozenset(Predictor.load(trained).weights))
    cases: list[tuple[VariantSpec, list[bool]]] = [(predict, [True, False]), (FullVariant(), [False])]
    for spec, changes in cases:
        draft = VariantDraft(copy_graph(found.captured.graph), found.facts, spec, [Port(PortKind.OUTPUT, 0)])
        assert [PredictStream().apply(draft) for _ in changes] == changes
        draft.graph.lint()


def test_full_steps_are_listed_or_in_intervals(trained: Path) -> None:
    def kinds(policy: DisCa) -> str:
        return "".join(step.kind.letter for step in policy.steps(10))

    assert kinds(DisCa(trained)) == "FLLLFLLLFL"
    assert kinds(DisCa(trained, full_steps=(0, 1, 2, 5, 9))) == "FFFLLFLLLF"
    assert DisCa(trained, full_steps=(0, 3)).name == "DisCa (2 full)"
    with pytest.raises(PolicyError, match=r"full_steps=\(1, 2\) lacks step 0"):
        DisCa(trained, full_steps=(1, 2))
    with pytest.raises(PolicyError, match="interval=0 is invalid"):
        DisCa(trained, 0)


def tiny() -> tuple[nn.Module, Callable[[nn.Module, int], list[Tensor]]]:
    return build(DEPTH), loop


def test_the_command_trains_and_resumes(tmp_path: Path) -> None:
    path = tmp_path / "predictor.safetensors"
    arguments = ["train-predictor", "tests.test_disca:tiny", "--loops", "2", "--updates", "3", "--out", str(path)]
    for extra_arguments in ([], ["--resume"]):
        done = CliRunner().invoke(app, arguments + extra_arguments, env={"COLUMNS": "120"})
        assert done.exit_code == 0, done.output
        assert "relative error of the model's output" in done.output
    assert Predictor.load(path).config.updates == 6
    other = CliRunner().invoke(app, [*arguments, "--resume", "--seed", "1"], env={"COLUMNS": "120"})
    assert other.exit_code == 2
    assert "belongs to a training with seed=0" in " ".join(other.output.split())


@pytest.mark.slow
@torch.no_grad()
def test_a_predictor_of_the_embedded_model_beats_reuse_on_loops_that_it_has_not_seen(tmp_path: Path) -> None:
    """Trained on 10 loops of 20 steps for 3 images; the loops measured start from other noise."""
    demo = DemoModel.load()

    def sample(model: nn.Module, number: int) -> Tensor:
        scheduler = DDIMScheduler(**demo.scheduler)
        scheduler.set_timesteps(20)
        generator = torch.Generator().manual_seed(number)
        labels = torch.randint(0, demo.null_class, (3,), generator=generator)
        labels = torch.cat([labels, torch.full_like(labels, demo.null_class)])
        x = torch.randn(3, 1, 28, 28, generator=generator)
        for t in scheduler.timesteps:
            both = model(torch.cat([x, x]), timestep=t.expand(6), class_labels=labels).sample
            conditional, unconditional = both.chunk(2)
            guided = unconditional + demo.guidance_scale * (conditional - unconditional)
            x = scheduler.step(guided, t, x).prev_sample
        return x

    settings = TrainingSettings(loops=10, updates=30)
    predictor = train_predictor(demo.transformer, sample, tmp_path / "p.safetensors", settings)
    untrained = TrainingSettings(loops=1, updates=1, learning_rate=0.0)
    reuse = train_predictor(demo.transformer, sample, tmp_path / "r.safetensors", untrained)
    for distance in (2, 3, 4):
        before, after = (prediction_error(demo.transformer, sample, p, distance, 1000) for p in (reuse, predictor))
        assert after < 0.85 * before, f"{distance} steps: {after:.3f} against {before:.3f}"
