"""Runs a model's own denoising loops, and keeps what they computed: for what is learned from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from duca_compile.backends.eager import EagerBackend
from duca_compile.compiler.budget import CacheOptions
from duca_compile.compiler.compiled import Compiled
from duca_compile.core.ports import STREAM_END, Port, PortKind
from duca_compile.core.variants import Variant, VariantFunction
from duca_compile.drop_in import OptimizedModel, check_plain
from duca_compile.errors import UsageError
from duca_compile.policies import TaylorSeer
from duca_compile.runtime.session import Requests

Sample = Callable[[Any, int], Any]  # runs the denoising loop of this number, with this in the place of the model


@dataclass(frozen=True)
class Call:
    """One call of the model: what its graph read, what it returned, and its last hidden state."""

    inputs: Mapping[Port, Tensor]
    outputs: tuple[Tensor, ...]
    hidden: Tensor


@dataclass(frozen=True)
class Pass:
    """The calls of one pass of a loop, in order, the steps that they were made at, and the capture that they ran on."""

    compiled: Compiled
    steps: Sequence[int]
    calls: Sequence[Call]


class Recorder(EagerBackend):
    """Runs loops of the model in full, and keeps the hidden states, and if ``whole`` what goes in and comes out."""

    def __init__(self, model: nn.Module, sample: Sample, timestep: str | None = None, whole: bool = True) -> None:
        check_plain(model)
        self._whole, self.steps = whole, 0  # steps of the last loop
        self.model_name = type(model).__name__
        self._sample, self._calls = sample, list[tuple[Variant, Call]]()
        policy = TaylorSeer(1, max_order=0, first_full_steps=1, lite=True)  # full steps that keep the end of the stream
        self._model = OptimizedModel(model, policy, self, Requests(policy, None), timestep, CacheOptions())

    def compile(self, variant: Variant, cuts: frozenset[str] = frozenset()) -> VariantFunction:
        run = super().compile(variant, cuts)

        def recorded(*tensors: Tensor) -> tuple[Tensor, ...]:
            results = run(*tensors)
            found = dict(zip(variant.outputs, results, strict=True))
            call = Call({}, (), found[STREAM_END])
            if self._whole:
                outputs = tuple(value.clone() for port, value in found.items() if port.kind is PortKind.OUTPUT)
                inputs = {port: tensor.clone() for port, tensor in zip(variant.inputs, tensors, strict=True)}
                call = replace(call, inputs=inputs, outputs=outputs)
            self._calls.append((variant, call))
            return results

        return recorded

    def passes(self, number: int) -> list[Pass]:
        """The passes of the loop of this number.

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
                f"sample(model, {number}) must run one denoising loop of two steps or more with the model that it is "
                f"given; it made {len(self._calls)} calls, and the last loop has {len(history)} of them"
            )
        owners = {id(v): c for c in self._model._compiled.values() for v, _ in c.programs.by_spec.values()}
        found: dict[tuple[int, str | None, int], list[tuple[int, Call]]] = {}
        for (variant, call), executed in zip(self._calls, history, strict=True):
            key = id(variant), executed.pass_name, executed.pass_index
            found.setdefault(key, []).append((executed.step, call))
        self._calls.clear()
        return [Pass(owners[key[0]], *zip(*made, strict=True)) for key, made in found.items() if len(made) > 1]
