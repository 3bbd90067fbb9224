"""Runs the calls of a pipeline, or of a model with a loop, with drop-ins in place of the models."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Generator, nn
from torch.utils._pytree import tree_leaves

from duca_compile.drop_in import check_plain
from duca_compile.errors import UsageError, not_none
from duca_compile.integrations.diffusers import PipelineSchedule, is_pipeline, set_component, transformers
from duca_compile.policies import Policy
from duca_compile.runtime.session import Requests

SampleCall = Callable[[Any, Any], Any]  # sample(target, call) runs one denoising loop and returns its result


class Workload:
    """The calls of a target. Each run of a call starts from the same random numbers.

    Args:
        target: a pipeline, or a model.
        calls: prompts or keyword arguments of the pipeline; or whatever ``sample`` takes.
        sample: ``sample(target, call)`` runs a call. A model needs it; a pipeline is called without it.
        seed: of the random numbers of the first call; each further call has the next.

    Attributes:
        models: what is to be replaced, by name.
        name: of the target's class.

    Raises:
        UsageError: the target, the calls or ``sample`` cannot be used.
    """

    def __init__(self, target: Any, calls: Sequence[Any], sample: SampleCall | None, seed: int) -> None:
        self._pipe = target if is_pipeline(target) else None
        self.models: dict[str, nn.Module] = transformers(target) if self._pipe is not None else {"": target}
        for model in self.models.values():
            check_plain(model)
        self.name = type(target).__name__
        if isinstance(calls, str | Mapping) or not isinstance(calls, Sequence):
            raise UsageError("calls must be a list of calls, such as two prompts or more")
        if len(calls) < 2:
            raise UsageError(
                f"calls holds {len(calls)}, and two are needed: one to choose a setting, and one to judge it"
            )
        if sample is None and self._pipe is None:
            raise UsageError(
                "a model needs sample=: sample(model, call) runs its loop for a call, and returns the result"
            )
        if sample is not None and not callable(sample):
            raise UsageError(f"sample={sample!r} must be a function: sample(target, call) runs a call")
        self._sample, self._seed = sample, seed
        self._calls = list(calls) if sample is not None else [_arguments(n, call) for n, call in enumerate(calls)]
        self._states = [[(each, each.get_state()) for each in _generators(call)] for call in self._calls]
        self._seeded = self._pipe is not None and "generator" in inspect.signature(self._pipe.__call__).parameters

    def __len__(self) -> int:
        return len(self._calls)

    def labels(self) -> list[str]:
        """What to call each call in reports."""
        return [f"{n}: {_label(call)}" if _label(call) else f"{n}" for n, call in enumerate(self._calls)]

    def requests(self, policy: Policy, steps: int | None) -> Requests:
        """Requests of a policy, whose steps are known or are the pipeline's."""
        return Requests(policy, steps if self._pipe is None else None, self.schedule())

    def schedule(self) -> PipelineSchedule | None:
        """What knows the steps of a pipeline; None for a model."""
        return None if self._pipe is None else PipelineSchedule(self._pipe)

    def run(self, drop_ins: Mapping[str, nn.Module], number: int) -> Any:
        """What a call returns with these in place of the models; the target stays as it was."""
        call = self._calls[number]
        with self._installed(drop_ins), _seed(self._seed + number):
            for generator, state in self._states[number]:
                generator.set_state(state)
            if self._sample is not None:
                return self._sample(self._pipe if self._pipe is not None else drop_ins[""], call)
            if self._seeded and "generator" not in call:
                call = {**call, "generator": Generator().manual_seed(self._seed + number)}
            return not_none(self._pipe, "the pipeline")(**call)

    def restore(self) -> None:
        """Sets the generators among the calls back to where they were."""
        for states in self._states:
            for generator, state in states:
                generator.set_state(state)

    @contextmanager
    def _installed(self, drop_ins: Mapping[str, nn.Module]) -> Iterator[None]:
        if self._pipe is None:
            yield
            return
        try:
            for name, model in drop_ins.items():
                set_component(self._pipe, name, model)
            yield
        finally:
            for name, model in self.models.items():
                set_component(self._pipe, name, model)


def _arguments(number: int, call: Any) -> dict[str, Any]:
    if isinstance(call, str):
        return {"prompt": call}
    if isinstance(call, Mapping):
        return dict(call)
    raise UsageError(
        f"calls[{number}] is a {type(call).__name__}: a call of a pipeline is a prompt, or a dictionary of keyword "
        "arguments; for anything else pass sample=, which runs it"
    )


def _generators(call: Any) -> list[Generator]:
    return [leaf for leaf in tree_leaves(call) if isinstance(leaf, Generator)]


def _label(call: Any) -> str:
    prompt = call.get("prompt") if isinstance(call, Mapping) else call
    return prompt if isinstance(prompt, str) else ""


@contextmanager
def _seed(seed: int) -> Iterator[None]:
    """Global random numbers from ``seed``; the caller's are as before afterwards."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield
