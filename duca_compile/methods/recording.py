"""Runs a model's own denoising loops, and records what they compute."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

from torch import Tensor, nn

from duca_compile.backends.eager import EagerBackend
from duca_compile.compiler.budget import CacheOptions
from duca_compile.compiler.compiled import Compiled
from duca_compile.core.ports import CACHES, STREAM_END, Port, PortKind
from duca_compile.core.steps import Restores
from duca_compile.core.variants import Variant, VariantFunction
from duca_compile.drop_in import OptimizedModel, check_plain
from duca_compile.errors import UsageError
from duca_compile.policies import Policy, TaylorSeer, Uncached
from duca_compile.runtime.loops import LoopSchedule
from duca_compile.runtime.session import Requests

T = TypeVar("T")
SampleLoop = Callable[[Any, int], Any]  # sample(drop_in, number) runs one denoising loop


@dataclass(frozen=True)
class RecordedCall:
    """One call of the model.

    Attributes:
        inputs: the inputs of its graph, by port.
        outputs: what it returned.
        kept: what the full step keeps, by port: the end of the residual stream, or the changes of all streams.
    """

    inputs: Mapping[Port, Tensor]
    outputs: tuple[Tensor, ...]
    kept: Mapping[Port, Tensor]

    @property
    def hidden(self) -> Tensor:
        """The end of the residual stream, (batch, tokens, channels)."""
        return self.kept[STREAM_END]


@dataclass(frozen=True)
class RecordedPass:
    """One guidance pass of a loop.

    Attributes:
        compiled: the capture that its calls ran on.
        steps: the step of each call.
        calls: the calls, in order.
    """

    compiled: Compiled
    steps: Sequence[int]
    calls: Sequence[RecordedCall]


class _KeepsChanges(Uncached):
    """Only full steps, which return what the blocks add to each stream."""

    @property
    def caches(self) -> bool:
        return True

    @property
    def restores(self) -> Restores:
        return "change"


_ONLY_FULL: Mapping[str, Policy] = {
    "end": TaylorSeer(1, max_order=0, first_full_steps=1, lite=True),
    "changes": _KeepsChanges(),
}


class Recorder(EagerBackend):
    """Runs loops of the model in full, and records what their steps keep.

    Args:
        model: the model. It is not changed.
        sample: runs one denoising loop.
        timestep: name of the timestep argument; needed only if the graph does not show it.
        whole: whether inputs and outputs are recorded, too.
        latent: name of the argument that is denoised; needed only if the graph does not show it.
        keeps: "end", the end of the residual stream; or "changes", what the blocks add to each stream.
        schedule: knows the steps, if the model belongs to a pipeline.

    Attributes:
        steps: the number of steps of the last loop.
        model_name: class name of the model.
    """

    def __init__(
        self,
        model: nn.Module,
        sample: SampleLoop,
        timestep: str | None = None,
        whole: bool = True,
        latent: str | None = None,
        keeps: Literal["end", "changes"] = "end",
        schedule: LoopSchedule | None = None,
    ) -> None:
        check_plain(model)
        self._whole, self.steps = whole, 0
        self.model_name = type(model).__name__
        self._sample, self._calls = sample, list[tuple[Variant, RecordedCall]]()
        policy = _ONLY_FULL[keeps]
        requests = Requests(policy, None, schedule)
        self._model = OptimizedModel(model, policy, self, requests, timestep, CacheOptions(), latent=latent)

    def compile(self, variant: Variant, cuts: frozenset[str] = frozenset()) -> VariantFunction:
        run = super().compile(variant, cuts)

        def recorded(*tensors: Tensor) -> tuple[Tensor, ...]:
            results = run(*tensors)
            by_port = dict(zip(variant.outputs, results, strict=True))
            call = RecordedCall({}, (), {port: value for port, value in by_port.items() if port.kind in CACHES})
            if self._whole:
                outputs = tuple(value.clone() for port, value in by_port.items() if port.kind is PortKind.OUTPUT)
                inputs = {port: tensor.clone() for port, tensor in zip(variant.inputs, tensors, strict=True)}
                call = replace(call, inputs=inputs, outputs=outputs)
            self._calls.append((variant, call))
            return results

        return recorded

    def measured(self, loops: int, measure: Callable[[RecordedPass], T], what: str) -> list[T]:
        """What ``measure`` gives for each guidance pass that runs at every step of one of the first ``loops`` loops.

        Raises:
            UsageError: what ``passes`` raises; loops differ in length; or there is no such pass, so ``what`` cannot be
                measured.
        """
        found, lengths = list[T](), set[int]()
        for number in range(loops):
            for each in self.passes(number):
                if len(each.steps) == self.steps:
                    found.append(measure(each))
                    lengths.add(self.steps)
        if not found:
            raise UsageError(f"no guidance pass runs at every step of the loop, so {what} cannot be measured")
        if len(lengths) > 1:
            raise UsageError(f"sample() must run loops of the same length; these have {sorted(lengths)} steps")
        return found

    def passes(self, number: int) -> list[RecordedPass]:
        """Runs the loop of this number.

        Returns:
            Its guidance passes.

        Raises:
            UsageError: it is not one loop of at least two steps.
        """
        self._model.reset()
        self._calls.clear()
        self._sample(self._model, number)
        history = self._model.history
        self.steps = history[-1].step + 1 if history else 0
        if len(history) != len(self._calls) or len(history) < 2 or history[-1].step == 0:
            raise UsageError(
                f"sample(model, {number}) must run one denoising loop of at least two steps with the model that it is "
                f"given; it made {len(self._calls)} calls, and {len(history)} of them belong to the last loop"
            )
        owners = {
            id(variant): compiled
            for compiled in self._model._compiled.values()
            for variant, _ in compiled.programs.by_spec.values()
        }
        by_pass: dict[tuple[int, str | None, int], list[tuple[int, RecordedCall]]] = {}
        for (variant, call), executed in zip(self._calls, history, strict=True):
            key = id(variant), executed.pass_name, executed.pass_index
            by_pass.setdefault(key, []).append((executed.step, call))
        self._calls.clear()
        return [
            RecordedPass(owners[key[0]], *zip(*made, strict=True)) for key, made in by_pass.items() if len(made) > 1
        ]
