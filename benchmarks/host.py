"""What a step costs where there is next to nothing to compute: the host's work for it.

The model is a tiny FLUX of 57 blocks (19 double, 38 single, as the real one has), so that its graphs take next to no
time and the work per block shows. All ways of running it alternate, so they share the machine's load.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import diffusers
import torch
from measure import KINDS, EachKind, InnerTime, Model, Spread, message, programs_of
from peers import CacheDit, FirstBlockCache, Peer, Setting, TaylorSeerHooks, periodic
from runners import ORDER, Mode
from torch import Tensor, nn

import duca_compile
from duca_compile import OptimizedModel, Policy
from duca_compile.compiler.captures import CaptureCache
from duca_compile.core.outputs import OutputLayout
from duca_compile.frontend.binder import Binder
from duca_compile.runtime.dispatcher import Dispatcher
from duca_compile.runtime.request import CacheState, Request

DOUBLE, SINGLE, TEXT, SIDE = 19, 38, 8, 4
LOOP = 20  # steps of a request of ours; it has the timesteps of the one before, as those of a schedule have
WARM = ORDER + 2  # rounds that are not counted: they compile, and a forecast gains an order with each full step

IN_A_ROW = ", in a row"
IDLE = ", nothing computed"  # the same calls, where graphs return what they returned before

# What a call does besides running a graph, by the functions that do it: they do not overlap.
STAGES = {
    "binding the arguments": (Binder, "__call__"),
    "finding the capture": (CaptureCache, "find"),
    "telling step, pass and request": (Request, "tick"),
    "what the pass carries": (Request, "state"),
    "loop-invariant values": (Dispatcher, "_hoist"),
    "the step's plan, and the caches that it reads": (Dispatcher, "_plan"),
    "what the timestep and the forecast give": (Dispatcher, "_given"),
    "choosing tokens": (Dispatcher, "_tokens"),
    "the inputs in their order": (CacheState, "inputs"),
    "what the graph returned": (Dispatcher, "_written"),
    "keeping it": (CacheState, "store"),
    "freeing what is read no more": (CacheState, "drop"),
    "the model's output object": (OutputLayout, "rebuild"),
}
ARGUMENTS, MODULE, REST = "weights and inputs to the graph", "nn.Module's own call", "the rest"

PEERS = {
    "cache-dit, static mask": CacheDit,
    "diffusers, FirstBlockCache": FirstBlockCache,
    "diffusers, TaylorSeer": lambda model: TaylorSeerHooks(model, ORDER, lite=False),
    "diffusers, TaylorSeer lite": lambda model: TaylorSeerHooks(model, ORDER),
}


def build(seed: int, double: int = DOUBLE, single: int = SINGLE) -> tuple[nn.Module, dict[str, Tensor]]:
    """The model and the arguments of one call but the latent and the timestep."""
    torch.manual_seed(seed)
    model = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=double,
        num_single_layers=single,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )
    places = torch.arange(SIDE * SIDE)
    return model.eval().requires_grad_(False), {
        "encoder_hidden_states": torch.randn(1, TEXT, 32),
        "pooled_projections": torch.randn(1, 32),
        "guidance": torch.full((1,), 3.5),
        "img_ids": torch.stack([torch.zeros(SIDE * SIDE), places // SIDE, places % SIDE], dim=1),
        "txt_ids": torch.zeros(TEXT, 3),
    }


def _policies() -> list[Policy]:
    seers = (duca_compile.TaylorSeer(2, ORDER, 1, lite=lite) for lite in (False, True))
    return [EachKind(fresh_ratio=0.25), *seers]


@dataclass
class Own:
    """One of our models, with the time inside of its graphs once they are all there."""

    model: OptimizedModel
    prefix: str
    period: int
    counts: Callable[[int], bool] = lambda step: True  # whether a step of a loop is measured
    suffix: str = ""
    graph: InnerTime | None = None

    @property
    def row(self) -> str:
        """Of the last call."""
        return f"duca_compile, {self.prefix}{self.model.history[-1].kind.value}{self.suffix}"


class StageTime:
    """While it is entered, adds up the seconds that are spent in one method of a class, or in one of an object."""

    def __init__(self, owner: object, name: str) -> None:
        self.seconds, self._owner, self._name, self._method = 0.0, owner, name, getattr(owner, name)

    def __enter__(self) -> StageTime:
        method = self._method

        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            result = method(*args, **kwargs)
            self.seconds += time.perf_counter() - started
            return result

        setattr(self._owner, self._name, timed)
        return self

    def __exit__(self, *_: object) -> None:
        setattr(self._owner, self._name, self._method)


def _is_in_a_row(step: int) -> bool:
    """Whether enough steps of a loop of one kind were like this one."""
    return step > LOOP // 2


class Host:
    """Takes turns: a period of each of our policies, then a computed and a skipped step of each peer."""

    def __init__(self, mode: Mode, rounds: int, seed: int, double: int = DOUBLE, single: int = SINGLE) -> None:
        self.model, self.arguments = build(seed, double, single)
        self.mode, self.rounds = mode, rounds
        self.errors: dict[str, str] = {}
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.outside: dict[str, list[float]] = defaultdict(list)
        self.stages: dict[str, dict[str, float]] = {}
        self.backend = "inductor" if mode == "compile" else "eager"
        self.own = [
            Own(
                duca_compile.optimize(self.model, policy, self.backend, strict=True),
                "lite " if getattr(policy, "lite", False) else "",
                len(KINDS) if isinstance(policy, EachKind) else 2,
            )
            for policy in _policies()
        ]
        self.peers = dict(self._peers())

    def _peers(self) -> Iterator[tuple[str, Model]]:
        for name, make in PEERS.items():
            try:
                peer: Peer = make(self.model)
                peer.start(Setting(mask=periodic(2 * (self.rounds + WARM), 2), interval=2))
            except ModuleNotFoundError:
                self.errors[name] = "not installed"
            except Exception as error:
                self.errors[name] = message(error)
            else:
                yield name, torch.compile(peer.model) if self.mode == "compile" else peer.model

    def _call(self, model: Model, step: int) -> float:
        latent, timestep = torch.randn(1, SIDE * SIDE, 4), torch.full((1,), 1 - step / 1e5)
        started = time.perf_counter()
        model(hidden_states=latent, timestep=timestep, **self.arguments, return_dict=False)
        return time.perf_counter() - started

    def _call_own(self, own: Own, step: int) -> tuple[float, float]:
        """The seconds of a call, and those outside of its graph; all, where graphs are not timed yet."""
        if own.graph is None:
            seconds = self._call(own.model, step)
            return seconds, seconds
        before = own.graph.seconds
        seconds = self._call(own.model, step)
        assert own.graph.seconds > before, "the timed programs did not run"
        return seconds, seconds - (own.graph.seconds - before)

    def _own_round(self, own: Own, index: int) -> None:
        for place in range(own.period):
            step = (index * own.period + place) % LOOP
            seconds, outside = self._call_own(own, step)
            if own.graph and own.counts(step):
                self.outside[own.row].append(outside)
                self.seconds[own.row].append(seconds)
        if index + 1 == WARM:
            own.graph = InnerTime(own.model)

    def _peer_round(self, name: str, model: Model, index: int) -> None:
        self._call(model, 2 * index)
        seconds = self._call(model, 2 * index + 1)
        if index >= WARM:
            self.seconds[name].append(seconds)

    def _in_a_row(self) -> None:
        """Loops of one kind of step each: the host's work with the processor's caches full of it. They take turns."""
        policies: list[tuple[Policy, str]] = [(EachKind(fresh_ratio=0.25, turns=(kind,)), "") for kind in KINDS[1:]]
        policies.append((duca_compile.TaylorSeer(LOOP, ORDER, 1, lite=True), "lite "))
        owns = [
            Own(
                duca_compile.optimize(self.model, policy, self.backend, strict=True),
                prefix,
                LOOP,
                _is_in_a_row,
                IN_A_ROW,
            )
            for policy, prefix in policies
        ]
        for index in range(WARM + self.rounds):
            for own in owns:
                self._own_round(own, index)
        for own in owns:
            self._profile(own)
            assert own.graph is not None
            own.graph.kept, own.suffix = {}, own.suffix + IDLE
            for index in range(WARM, WARM + self.rounds):
                self._own_round(own, index)
            self._profile(own)

    def _profile(self, own: Own) -> None:
        """Seconds of each stage, in calls of their own, since asking takes time: medians over the steps that count."""
        assert own.graph is not None
        found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        with ExitStack() as patches:
            stages = {stage: patches.enter_context(StageTime(*place)) for stage, place in STAGES.items()}
            forward = patches.enter_context(StageTime(own.model, "forward"))
            runs = [patches.enter_context(StageTime(program, "run")) for program in programs_of(own.model)]
            for index in range(self.rounds * LOOP):
                for each in (*stages.values(), forward, *runs):
                    each.seconds = 0.0
                seconds, outside = self._call_own(own, index % LOOP)
                if own.counts(index % LOOP):
                    taken = {stage: each.seconds for stage, each in stages.items()}
                    taken[ARGUMENTS] = sum(run.seconds for run in runs) - (seconds - outside)
                    taken[MODULE] = seconds - forward.seconds
                    for stage, each in (taken | {REST: outside - sum(taken.values())}).items():
                        found[own.row][stage].append(each)
        for name, times in found.items():
            self.stages[name] = {stage: statistics.median(each) for stage, each in times.items()}

    @torch.no_grad()
    def measure(self) -> dict[str, Any]:
        self._in_a_row()
        for index in range(self.rounds + WARM):
            for own in self.own:
                self._own_round(own, index)
            for name, model in [*self.peers.items()]:
                try:
                    self._peer_round(name, model, index)
                except Exception as error:
                    self.errors[name] = message(error)
                    del self.peers[name]
        for own in self.own:
            self._profile(own)
        found: dict[str, Any] = {name: {"seconds": asdict(Spread.of(each))} for name, each in self.seconds.items()}
        for name, each in self.outside.items():
            found[name]["host_seconds_outside_the_graph"] = asdict(Spread.of(each))
        for name, stages in self.stages.items():
            found[name]["stage_seconds"] = stages
        return found | {name: {"status": text} for name, text in self.errors.items()}
