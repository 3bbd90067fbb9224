"""Every mistake gets one clear message that names what was wrong and what to do."""

import io
import logging
import os
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import duca_compile
from duca_compile import CaptureError, DuCa, PolicyError, Selection, StructureError, Uncached, UsageError
from duca_compile.app.cli import app
from duca_compile.policies import published


class TinyDiT(nn.Module):
    """One residual MLP per block; ``bad`` names something that forward does wrong."""

    def __init__(self, bad: str = "", width: int = 8) -> None:
        super().__init__()
        self.bad = bad
        self.mlp = nn.ModuleList(nn.Sequential(nn.Linear(width, 16), nn.GELU(), nn.Linear(16, width)) for _ in range(2))
        self.register_buffer("count", torch.zeros(()))

    def forward(self, latent: Tensor, timestep: Tensor) -> Tensor:
        gate = timestep.float().sin().view(-1, 1, 1)
        if self.bad == "branch" and latent.sum() > 0:
            latent = latent + 1
        if self.bad == "numpy":
            latent = latent * float(latent.numpy().max())
        if self.bad == "side effect":
            self.count += 1
        for mlp in self.mlp:
            latent = mlp(latent) * gate if self.bad == "no residual" else latent + gate * mlp(latent)
        return latent


class NoTimestep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Linear(8, 8)

    def forward(self, latent: Tensor, cond: Tensor) -> Tensor:
        return latent + self.mlp(latent) + cond.view(-1, 1, 1)


def call(model: nn.Module, step: int = 0, tokens: int = 4) -> Tensor:
    return model(torch.ones(2, tokens, 8), torch.full((2,), 900 - step))


def optimize(model: nn.Module, policy: object = None, **options: object) -> nn.Module:
    chosen = policy or DuCa(interval=3, selection="random")
    return duca_compile.optimize(model.eval(), chosen, "eager", **options)  # type: ignore[arg-type]


def test_not_a_module() -> None:
    with pytest.raises(UsageError, match=r"expected an nn\.Module or a diffusers pipeline, not str"):
        duca_compile.optimize("model")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"expected an nn\.Module, not dict"):
        duca_compile.explain({})  # type: ignore[arg-type]


def test_optimized_already() -> None:
    with pytest.raises(UsageError, match=r"optimized already; call duca_compile\.restore on it first"):
        optimize(optimize(TinyDiT()))


class Holder(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList([inner])

    def forward(self, latent: Tensor, timestep: Tensor) -> Tensor:
        return self.parts[0](latent, timestep)


def test_an_optimized_part_is_refused_by_its_path() -> None:
    holder = Holder(optimize(TinyDiT())).eval()
    message = r"Holder\.parts\.0 is an optimized model; put duca_compile\.restore of it there"
    with pytest.raises(UsageError, match=message):
        optimize(holder)
    with pytest.raises(UsageError, match=message):
        duca_compile.explain(holder, torch.ones(2, 4, 8), torch.ones(2))


def test_an_optimized_model_is_not_pickled() -> None:
    optimized = optimize(TinyDiT())
    message = r"cannot be pickled.*save duca_compile\.restore\(model\), or its state_dict\(\)"
    with pytest.raises(UsageError, match=message):
        pickle.dumps(optimized)
    with pytest.raises(UsageError, match=message):
        torch.save({"model": optimized}, io.BytesIO())


def test_training_mode_at_once_and_later() -> None:
    with pytest.raises(UsageError, match=r"TinyDiT is in training mode.*call \.eval\(\) first"):
        duca_compile.optimize(TinyDiT())
    model = TinyDiT()
    optimized = optimize(model)
    call(optimized)
    optimized.train()
    with pytest.raises(UsageError, match="training mode"):
        call(optimized)
    model.eval()
    call(optimized)


@pytest.mark.parametrize(("bad", "line"), [("branch", "latent.sum() > 0"), ("numpy", "latent.numpy()")])
def test_what_cannot_be_captured_is_named_by_source_line(bad: str, line: str) -> None:
    with pytest.raises(CaptureError) as caught:
        call(optimize(TinyDiT(bad)))
    message = str(caught.value)
    number = next(i for i, text in enumerate(Path(__file__).read_text().splitlines(), 1) if line in text)
    assert f"{Path(__file__).name}:{number}" in message
    assert "TinyDiT" in message
    assert "pass it as an argument" in message


def test_side_effects_are_refused() -> None:
    with pytest.raises(CaptureError, match=r"changes 'count'.*Return the new value"):
        call(optimize(TinyDiT("side effect")))


def test_no_residual_stream_is_an_error_never_a_silent_no_op() -> None:
    with pytest.raises(StructureError, match=r"no residual branch found.*run it without duca_compile"):
        call(optimize(TinyDiT("no residual")))
    with pytest.raises(StructureError, match="no residual branch found"):
        duca_compile.explain(TinyDiT("no residual").eval(), torch.ones(2, 4, 8), torch.ones(2))


def test_no_timestep() -> None:
    model = NoTimestep().eval()
    with pytest.raises(StructureError, match=r"no timestep among.*optimize\(model, timestep='argument'\)"):
        call(optimize(model))
    named = optimize(model, timestep="cond")
    assert torch.equal(call(named), call(model))
    with pytest.raises(UsageError, match="timestep='time' is not a tensor argument of this call"):
        call(optimize(model, timestep="time"))


def test_arguments_that_do_not_fit() -> None:
    with pytest.raises(UsageError, match=r"does not fit the model's forward.*missing a required argument: 'timestep'"):
        optimize(TinyDiT())(torch.ones(2, 4, 8))


def test_wrong_shapes_later_on_raise_the_models_own_reason() -> None:
    optimized = optimize(TinyDiT())
    call(optimized)
    assert call(optimized, tokens=6).shape == (2, 6, 8)  # captured anew
    with pytest.raises(
        CaptureError, match=r"TinyDiT itself fails on this call at .*test_errors.py:\d+ .*'latent': \(2, 4, 7\)"
    ):
        optimized(torch.ones(2, 4, 7), torch.full((2,), 900))
    assert call(optimized).shape == (2, 4, 8)


def test_impossible_numbers() -> None:
    for settings, message in [
        ({"interval": 0}, "interval"),
        ({"fresh_ratio": 1.5}, r"fresh_ratio=1.5 is impossible"),
        ({"fresh_ratio": -0.1}, r"fresh_ratio=-0.1 is impossible"),
        ({"selection": "best"}, "selection='best' is unknown"),
        ({"first": "last"}, "first='last' is unknown"),
    ]:
        with pytest.raises(PolicyError, match=message):
            DuCa(**settings)  # type: ignore[arg-type]
    with pytest.raises(PolicyError, match="num_inference_steps=0 is impossible"):
        optimize(TinyDiT(), num_inference_steps=0)
    with pytest.raises(PolicyError, match="policy='fast' is unknown"):
        optimize(TinyDiT(), "fast")
    with pytest.raises(PolicyError, match=r"pass optimize\(\.\.\., num_inference_steps="):
        optimize(TinyDiT(), published("duca", "dit"))
    with pytest.raises(PolicyError, match="nothing is published here for duca/unet; there is"):
        published("duca", "unet")


def test_scores_that_the_graph_cannot_give() -> None:
    with pytest.raises(PolicyError, match=r"selection='v_norm' needs a self-attention.*use selection='random'"):
        call(optimize(TinyDiT(), DuCa(selection="v_norm")))


def test_a_patch_bonus_needs_a_grid() -> None:
    policy = DuCa(interval=3, selection=Selection("random", patch_bonus=0.5, patch=2))
    with pytest.raises(PolicyError, match="patch_bonus needs to know how the 6 tokens lie"):
        call(optimize(TinyDiT(), policy), tokens=6)


def test_more_steps_than_planned_run_in_full_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    optimized = optimize(TinyDiT(), num_inference_steps=4)
    with caplog.at_level(logging.WARNING, "duca_compile"):
        for step in range(7):
            call(optimized, step)
    assert [e.kind.value for e in optimized.history] == ["full", "partial", "skip", "full", "full", "full", "full"]
    messages = [r.getMessage() for r in caplog.records if r.name == "duca_compile"]
    assert len(messages) == 1
    assert "step 5 is more than the 4 planned steps" in messages[0]
    assert "num_inference_steps=N" in messages[0]


def test_unknown_backend() -> None:
    with pytest.raises(
        UsageError, match=r"backend='tvm' is unknown; choose one of \('inductor', 'openvino', 'eager'\)"
    ):
        duca_compile.optimize(TinyDiT().eval(), Uncached(), "tvm")


@pytest.mark.parametrize("strict", [False, True])
def test_no_compiler_falls_back_with_one_warning_or_fails_if_asked_to(strict: bool, tmp_path: Path) -> None:
    script = f"""
        import warnings, torch, duca_compile
        from duca_compile import BackendError, DuCa
        from tests.test_errors import TinyDiT, call
        model = TinyDiT().eval()
        optimized = duca_compile.optimize(model, DuCa(interval=2, selection="random"), strict={strict})
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                with torch.no_grad():
                    assert torch.equal(call(optimized), call(model))
                    call(optimized, 1)
            except BackendError as error:
                print("refused:", error)
        print(sum("apt-get install g++" in str(w.message) for w in caught))
    """
    environment = os.environ | {
        "CXX": "/nonexistent/c++",
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1] == ("0" if strict else "1")
    assert lines[0].startswith("refused: Inductor could not compile a variant") == strict


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "missing/demo.png"], "there is no folder missing; create it first"),
        (["--out", "."], "is a folder; name a file"),
        (["--policy", "[fastest]"], "policy='[fastest]' is unknown"),
        (["--backend", "tvm"], "backend='tvm' is unknown"),
        (["--device", "cuda:99"], "device 'cuda:99' cannot be used here"),
    ],
)
def test_the_command_line_refuses_in_one_line(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["demo", *arguments])
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
    assert "Traceback" not in result.output
