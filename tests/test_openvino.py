"""Variants under OpenVINO: the eager results over whole loops, the model's live weights, no compilation twice."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import duca_compile
from duca_compile import FORA, BackendError, DuCa, Policy, TaylorSeer, UsageError
from duca_compile.backends import openvino as openvino_backend
from duca_compile.export import trace
from duca_compile.passes.pipeline import build_variant
from tests import artifacts, zoo
from tests.test_inductor import VARYING, close
from tests.test_models import POLICY, sample
from tests.test_models import loop as zoo_loop
from tests.test_optimize import LABELS, build, kinds, loop


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return build(depth=1)


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with each graph that is compiled, by the number of its inputs."""
    found: list[int] = []
    compiled = openvino_backend._compiled

    def counted(graph: Any, arguments: Any, *more: Any) -> Any:
        found.append(len(arguments))
        return compiled(graph, arguments, *more)

    monkeypatch.setattr(openvino_backend, "_compiled", counted)
    return found


@torch.no_grad()
@pytest.mark.parametrize(
    "policy",
    [
        VARYING,
        pytest.param(DuCa(interval=3, fresh_ratio=0.25, selection="attention"), marks=pytest.mark.slow),
        TaylorSeer(interval=3, max_order=2),
    ],
    ids=["duca, counts that vary", "duca, attention", "taylorseer"],
)
def test_compiled_variants_agree_with_eager_ones_and_compile_once(
    model: nn.Module, policy: Policy, compilations: list[int]
) -> None:
    eager = duca_compile.optimize(model, policy, "eager", 12)
    expected = loop(eager, 12)
    optimized = duca_compile.optimize(model, policy, "openvino", 12, strict=True)
    first = loop(optimized, 12)
    assert close(first, expected)
    assert kinds(optimized) == kinds(eager)
    specs = {spec for each in optimized._compiled.values() for spec in each.programs.by_spec}
    assert len(compilations) == len(specs)
    optimized.reset()
    kept = [output.clone() for output in first]
    assert close(loop(optimized, 12), expected)
    assert all(map(torch.equal, first, kept)), "outputs are not written to by later calls"
    assert len(compilations) == len(specs)


@torch.no_grad()
def test_a_partial_step_updates_the_chosen_tokens_of_its_caches(model: nn.Module) -> None:
    """The caches themselves, step by step, against those of the eager backend."""
    policy = DuCa(interval=4, fresh_ratio=0.25, selection="random")
    one, other = (duca_compile.optimize(model, policy, name, 4, strict=True) for name in ("openvino", "eager"))
    for step in range(1, 5):
        found, expected = _caches(one, step), _caches(other, step)
        assert found.keys() == expected.keys()
        assert close(list(found.values()), list(expected.values()))


def _caches(optimized: duca_compile.OptimizedModel, steps: int) -> dict[str, Tensor]:
    optimized.reset()
    loop(optimized, steps)
    (compiled,) = optimized._compiled.values()
    return optimized._requests.current().state(compiled.dispatcher, (None, 0)).caches


@torch.no_grad()
def test_weights_are_the_model_s_own_and_what_is_done_to_them_takes_effect(compilations: list[int]) -> None:
    model = build(depth=1)
    optimized = duca_compile.optimize(model, FORA(2), "openvino", strict=True)
    loop(optimized, 4)
    compiled = len(compilations)
    linears = [weight for module in model.modules() if isinstance(module, nn.Linear) for weight in module.parameters()]
    for weight in linears:
        weight.data.mul_(0.5)  # which no counter of writes sees
    optimized.reset()
    assert close(loop(optimized, 4), loop(duca_compile.optimize(model, FORA(2), "eager"), 4))
    assert len(compilations) == compiled

    model.pos_embed.proj.weight.mul_(0.5)  # a convolution's: a constant of the two graphs
    optimized.reset()
    assert close(loop(optimized, 4), loop(duca_compile.optimize(model, FORA(2), "eager"), 4))
    assert len(compilations) == 2 * compiled

    model.load_state_dict(build(depth=1).state_dict(), assign=True)
    optimized.reset()
    assert close(loop(optimized, 4), loop(duca_compile.optimize(model, FORA(2), "eager"), 4))


@torch.no_grad()
def test_it_takes_and_gives_bfloat16(model: nn.Module) -> None:
    """Its error, to the same model in float32, is of the size of the bfloat16 model's own."""
    half = build(depth=1).to(torch.bfloat16)
    time, labels = torch.full((4,), 500), torch.zeros(4, dtype=torch.int64)
    latent = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    plain = half(latent, timestep=time, class_labels=labels).sample.float()
    found = duca_compile.optimize(half, "none", "openvino", strict=True)(latent, timestep=time, class_labels=labels)
    exact = half.float()(latent.float(), timestep=time, class_labels=labels).sample
    assert found.sample.dtype is torch.bfloat16
    assert (found.sample.float() - exact).norm() < 1.5 * (plain - exact).norm()


class Bessel(nn.Module):
    """Ends in an operator that OpenVINO has no rule for."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = build(depth=1)

    def forward(self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        return torch.special.bessel_j0(self.inner(hidden_states, timestep=timestep, class_labels=class_labels).sample)


@torch.no_grad()
def test_what_it_cannot_convert_is_named_and_runs_under_eager() -> None:
    model = Bessel().eval()
    call = {"hidden_states": torch.randn(4, 3, 8, 8), "timestep": torch.full((4,), 5), "class_labels": LABELS}
    with pytest.raises(
        BackendError, match=r"OpenVINO could not compile the variant of full steps: No conversion rule .*bessel_j0"
    ):
        duca_compile.optimize(model, "none", "openvino", strict=True)(**call)
    optimized = duca_compile.optimize(model, "none", "openvino")
    with pytest.warns(RuntimeWarning, match=r"bessel_j0.*runs under eager instead"):
        found = optimized(**call)
    assert torch.equal(found, model(**call))


@torch.no_grad()
@pytest.mark.parametrize(
    ("cache_dtype", "tolerance"), [(None, 1e-5), pytest.param(torch.bfloat16, 5e-3, marks=pytest.mark.slow)]
)
def test_an_artifact_runs_as_the_optimized_model(
    cache_dtype: torch.dtype | None, tolerance: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With weights that are shared and with copies. The model's own caches are float32, whatever the artifact's are."""

    def built(*arguments: Any, **options: Any) -> Any:
        return build_variant(*arguments, **options | {"cache_dtype": cache_dtype})

    monkeypatch.setattr(trace, "build_variant", built)
    model = artifacts.optimized(DuCa(interval=5))
    found = artifacts.export(model, tmp_path / "artifact", check="openvino")  # ONNX Runtime lacks bfloat16's kernels
    assert {spec.dtype for spec in found.caches} == {"float32" if cache_dtype is None else "bfloat16"}
    for rows in (2, 3):
        expected = artifacts.loop(model, rows)
        for share_weights in (True, False):
            loaded = duca_compile.load(tmp_path / "artifact", "openvino", threads=1, share_weights=share_weights)
            for a, b in zip(artifacts.loop(loaded, rows, arrays=rows == 3), expected, strict=True):
                assert (a - b).norm() <= tolerance * b.norm()
            assert kinds(loaded) == kinds(model)
    with pytest.raises(UsageError, match="providers are ONNX Runtime's"):
        duca_compile.load(tmp_path / "artifact", "openvino", providers=["CPUExecutionProvider"])


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("name", ["PixArt", "SD3", "FLUX", "Wan", "U-ViT", "LTX-Video"])
def test_other_models(name: str, compilations: list[int]) -> None:
    torch.manual_seed(0)
    entry = zoo.ZOO[name]
    source, arguments = entry.build(2)
    eager = duca_compile.optimize(source.eval(), POLICY, "eager")
    optimized = duca_compile.optimize(source, POLICY, "openvino", strict=True)
    for each in zoo_loop(entry, arguments):
        assert close(sample(optimized(**each)), sample(eager(**each)))
    assert len(compilations) == 3
