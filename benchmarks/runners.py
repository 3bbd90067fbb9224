"""All ways of running a model that are compared: plain, duca_compile's policies, and other libraries' caches.

All that cache compute the first step and each fifth after it. TaylorSeer, here and in diffusers, computes one more near
the start, so that there is a difference to forecast by.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from measure import Model, counted_flops
from peers import CacheDit, FirstBlockCache, Peer, Setting, TaylorSeerHooks, blocks, counted_blocks, periodic
from torch import nn
from workloads import Workload

import duca_compile
from duca_compile import DuCa, OptimizedModel, Policy, Uncached

Mode = Literal["eager", "compile"]
MODES: tuple[Mode, ...] = ("eager", "compile")
INTERVAL, ORDER = 5, 2
PLAIN, NONE = "plain", "none"

# Graph breaks and hooks recompile often; after the default of 8 recompilations, torch would run eagerly.
RECOMPILE_LIMIT = 64


class MissingError(Exception):
    """A way of running that is not installed."""


@dataclass
class Runner:
    """What to call at each step, and what to do before each request."""

    call: Model
    start: Callable[[], None]
    eager: Model  # the same, operator by operator
    model: nn.Module | None = None  # the model whose blocks are counted, if they are called as modules
    optimized: OptimizedModel | None = None


@dataclass(frozen=True)
class Method:
    """One way of caching; ``build`` takes the model, the number of steps and the mode."""

    library: str
    name: str
    build: Callable[[nn.Module, int, Mode], Runner]
    available: Callable[[], bool] = lambda: True
    caches: bool = True

    @property
    def label(self) -> str:
        return f"{self.library}, {self.name}"


def configure() -> None:
    torch.set_num_threads(1)
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    torch._dynamo.config.accumulated_recompile_limit = 16 * RECOMPILE_LIMIT


def _plain(model: nn.Module, steps: int, mode: Mode) -> Runner:
    call = torch.compile(model, fullgraph=True) if mode == "compile" else model
    return Runner(call, lambda: None, model, model)


def _own(policy: Policy) -> Callable[[nn.Module, int, Mode], Runner]:
    def build(model: nn.Module, steps: int, mode: Mode) -> Runner:
        backend = "inductor" if mode == "compile" else "eager"
        optimized = duca_compile.optimize(model, policy, backend, steps, strict=True)
        return Runner(optimized, optimized.reset, optimized, optimized=optimized)

    return build


def _peer(make: Callable[[nn.Module], Peer]) -> Callable[[nn.Module, int, Mode], Runner]:
    def build(model: nn.Module, steps: int, mode: Mode) -> Runner:
        peer = make(model)
        setting = Setting(mask=periodic(steps, INTERVAL), interval=INTERVAL)
        call = torch.compile(peer.model) if mode == "compile" else peer.model  # no fullgraph: the hooks break graphs
        return Runner(call, lambda: peer.start(setting), peer.model, peer.model)

    return build


def _forecasting() -> list[Method]:
    if not hasattr(duca_compile, "TaylorSeer"):
        return []
    kinds = {"taylorseer": False, "taylorseer lite": True}
    policy = duca_compile.TaylorSeer
    return [
        Method("duca_compile", name, _own(policy(interval=INTERVAL, max_order=ORDER, lite=lite)))
        for name, lite in kinds.items()
    ]


METHODS = (
    Method("PyTorch", PLAIN, _plain, caches=False),
    Method("duca_compile", NONE, _own(Uncached()), caches=False),
    Method("duca_compile", "duca", _own(DuCa(interval=INTERVAL))),
    *_forecasting(),
    Method("cache-dit", "static mask", _peer(CacheDit), CacheDit.installed),
    Method("diffusers", "FirstBlockCache", _peer(FirstBlockCache), FirstBlockCache.installed),
    Method(
        "diffusers", "TaylorSeer", _peer(lambda m: TaylorSeerHooks(m, ORDER, lite=False)), TaylorSeerHooks.installed
    ),
    Method("diffusers", "TaylorSeer lite", _peer(lambda m: TaylorSeerHooks(m, ORDER)), TaylorSeerHooks.installed),
)


@torch.no_grad()
def work(runner: Runner, workload: Workload, arguments: dict[str, Any], noise: torch.Tensor) -> dict[str, Any]:
    """The FLOPs and the blocks that one request executes, counted under eager.

    In a duca_compile model, blocks are no longer modules, so steps are counted by kind instead, after everything has
    been captured and built.
    """
    flops: list[float] = []
    if runner.optimized is not None:
        runner.start()
        workload.denoise(runner.eager, arguments, noise, calls=3 * INTERVAL)
    runner.start()
    watched = counted_blocks(runner.model) if runner.model is not None else nullcontext(lambda: 0)
    with counted_flops(flops), watched as ran:
        result = workload.denoise(runner.eager, arguments, noise)
        count = ran()
    found: dict[str, Any] = {"flops": flops[0], "finite": bool(result.isfinite().all())}
    if runner.optimized is not None:
        kinds = [each.kind.value for each in runner.optimized.history]
        found["steps"] = {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}
        found["cache_bytes"] = runner.optimized.cache_bytes
    if runner.model is not None:
        found |= {"blocks_run": count, "blocks_uncached": workload.steps * blocks(runner.model)}
    runner.start()
    return found
