"""The table of supported models, made from the zoo: ``python -m tests.support`` writes docs/models.md."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.progress import track
from torch import Tensor, nn

import duca_compile
from duca_compile import DuCa, Explanation, OptimizedModel, Policy
from duca_compile.backends.make import make_backend
from duca_compile.compiler.analyze import analyze_call, step_values
from duca_compile.compiler.captures import CaptureCache
from duca_compile.compiler.compiled import Compiled
from duca_compile.core.ir import CapturedGraph, Facts
from duca_compile.core.ports import Port
from duca_compile.core.variants import Action
from duca_compile.frontend.binder import Call
from duca_compile.frontend.capture import live_tensors
from duca_compile.policies import Step, StepKind
from duca_compile.runtime.planning import plan_step
from duca_compile.runtime.torch.prologue import Prologue
from tests.zoo import ZOO, Entry

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
BLOCKS = 4
POLICY = DuCa(interval=3, fresh_ratio=0.5)
HEAD = f"""# Models in the test suite

No model is registered, and nothing depends on a class's name. The test suite has 27 models, tiny and with random
weights: 22 from diffusers 0.42 (20 classes), from DiT to FLUX, video models and a mixture of experts, and 5 written for
it. All are captured, have the branches that their source has, and give the model's own bits in full steps. 24 of them
recompute tokens in partial steps; of the others, AuraFlow reuses everything then, and Sana and HiDream compute their
MLPs in full. This says nothing about images: no pretrained weights were used.

The table is what `duca_compile.explain` finds in versions with {BLOCKS} blocks of each kind. `python -m tests.support`
writes it, and the tests compare it with what they see. They also compare the branches, stream by stream, with numbers
counted by hand in each model's source (`tests/zoo.py`).

- **branches**: residual additions `x + gate * f(x)`. *main* carries the latent to the output; *text* runs beside it and
  meets it in attention; *refiner* comes before the two join; *encoder* does not depend on the latent.
- **traced with real values**: forward reads values of these arguments in Python (`.item()`, the length of a mask), so
  the graph holds for these values, and other values are captured again. **One operator**: submodules whose Python
  depends on values that change from step to step run as they are.
- **partial step**: what recomputes chosen tokens, and what is computed in full because its tokens mix in a way that is
  not attention. The rest comes from the cache.
- **FLOPs**: of a partial step with half of the tokens, and of a skip step, each as a share of a full step. Tiny models
  have heavy embeddings; deeper models have smaller shares.

| model | branches | traced with real values | partial step | FLOPs, partial | FLOPs, skip |
|---|---|---|---|---|---|
"""


def sampled(*values: object, slow: bool) -> Any:
    """A case of the slow tests, or where these take others of its kind as samples, of the exhaustive ones."""
    return pytest.param(*values, marks=pytest.mark.slow if slow else pytest.mark.exhaustive)


def values_of_step(compiled: Compiled, tensors: tuple[Tensor, ...]) -> dict[Port, Tensor]:
    """What a variant may read of one call but caches."""
    return step_values(compiled.captured, compiled.facts, compiled.dispatcher._prologue, compiled.named(tensors))


class Shared:
    """Optimizes one model again and again, and captures each kind of call once for all."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._found: dict[Any, Any] = {}

    def captured(self, call: Call) -> tuple[CapturedGraph, Facts, Prologue]:
        kind = tuple((tensor.shape, tensor.dtype) for tensor in call.tensors)
        if kind not in self._found:
            self._found[kind] = analyze_call(self.model, call, None)
        found: tuple[CapturedGraph, Facts, Prologue] = self._found[kind]
        return found

    def optimized(self, policy: Policy, steps: int | None, backend: str = "eager") -> OptimizedModel:
        """As ``optimize`` gives it."""
        made: OptimizedModel = duca_compile.optimize(self.model, policy, backend, steps, strict=True)
        engine, live = make_backend(backend, strict=True), live_tensors(self.model)

        def capture(call: Call, known: Mapping[str, str]) -> Compiled:
            return Compiled(*self.captured(call), policy, engine, live, None)

        made.__dict__["_compiled"] = CaptureCache(self.model, capture)
        return made


def explained(entry: Entry) -> Explanation:
    """What the compiler finds in a model of ``BLOCKS`` blocks."""
    torch.manual_seed(0)
    model, arguments = entry.build(BLOCKS)
    return duca_compile.explain(model.eval(), **arguments)


def streams(found: Explanation) -> dict[str, int]:
    """Branches by the role of their stream."""
    counts: Counter[str] = Counter()
    for stream in found.facts.streams:
        counts[stream.role.value] += stream.branches
    return dict(counts)


def row(entry: Entry, found: Explanation) -> str:
    """The model's line of the table."""
    planned = {step.kind: step.flops / found.flops for step in found.schedule(POLICY, 3).steps}
    branches = ", ".join(f"{count} {role}" for role, count in sorted(streams(found).items(), key=lambda item: -item[1]))
    given = ", ".join(f"`{name}`" for name in found.captured.guarded_inputs)
    if found.captured.opaque:
        given = f"one operator: {len(found.captured.opaque)} submodules"
    spec, recomputed = plan_step(found.facts, POLICY, Step(StepKind.PARTIAL, ratio=POLICY.fresh_ratio))
    computed = [spec.action(branch.index) for branch in found.branches]
    counts = {"tokens of {} MLPs": len(recomputed), "{} branches in full": computed.count(Action.COMPUTE)}
    partial = [text.format(count) for text, count in counts.items() if count]
    cells = [entry.name, branches, given, "; ".join(partial) or "all reused"]
    return "| " + " | ".join([*cells, f"{planned[StepKind.PARTIAL]:.1%}", f"{planned[StepKind.SKIP]:.1%}"]) + " |\n"


if __name__ == "__main__":
    PAGE.write_text(HEAD + "".join(row(entry, explained(entry)) for entry in track(ZOO.values())))
