"""One call through the stages before any rewriting: capture, analysis and verification."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from duca_compile.analysis import analyze
from duca_compile.compiler.behaviour import observe
from duca_compile.compiler.checks import check_caching
from duca_compile.compiler.precompute import make_prologue, make_rows
from duca_compile.compiler.verification import verified
from duca_compile.core.ir import CapturedGraph, Facts
from duca_compile.core.lock import COMPILING
from duca_compile.core.ports import Port, argument
from duca_compile.errors import StructureError
from duca_compile.frontend import casts, fast_paths
from duca_compile.frontend.arguments import Write, with_writes
from duca_compile.frontend.binder import Call
from duca_compile.frontend.capture import capture
from duca_compile.frontend.compiled_parts import uncompiled
from duca_compile.frontend.opaque import READS_CHANGING_VALUES
from duca_compile.frontend.side_effects import WritesToArguments, track_side_effects
from duca_compile.frontend.wrappers import HiddenStructureError, ReadsStepError, holds_most, networks
from duca_compile.passes.base import Draft, Pass
from duca_compile.passes.pipeline import prepare
from duca_compile.runtime.dispatcher import Hoister
from duca_compile.runtime.torch.prologue import Prologue

_NONE: Mapping[str, str] = {}


def analyze_call(
    model: nn.Module,
    call: Call,
    timestep: str | None,
    latent: str | None = None,
    *,
    known: Mapping[str, str] = _NONE,
    careful: bool = False,
    exact: bool = True,
    passes: Sequence[Pass[Draft]] = (),
) -> tuple[CapturedGraph, Facts, Prologue]:
    """Captures one call of ``model`` and analyses it; the token analysis is checked on the call's values.

    Args:
        timestep: the name of the timestep argument, where the graph does not show it.
        latent: the path of the latent's argument, where the graph does not show it.
        known: the submodules that run as one operator in other captures of the model, with the reasons.
        careful: whether to run the model and its graph once more each, to check that the model's results repeat and
            that the graph gives them.
        exact: whether PyTorch's own modules take the path in the graph that they take in eager mode; else they take
            that of plain operators, which compilers and other engines know.
        passes: rewrites of the captured graph, after those that prepare every graph.

    Raises:
        CaptureError: the model cannot be captured.
        StructureError: its graph has nothing to cache.
        WrapperError: one of these, of a model that may be a wrapper.
        UsageError: hooks of the model reuse features already, or ``timestep`` or ``latent`` is no argument of the call.
    """
    check_caching(model)
    options = _Options(timestep, latent, known, careful, exact, passes)
    try:
        return _analyzed(model, call, options)
    except WritesToArguments as error:
        filling = with_writes(model) if error.only_fills else None
        if filling is None:
            raise error.refusal() from None
        return _analyzed(filling, call, options, error.writes)


class _Options(NamedTuple):
    timestep: str | None
    latent: str | None
    known: Mapping[str, str]
    careful: bool
    exact: bool
    passes: Sequence[Pass[Draft]]


def _analyzed(
    model: nn.Module, call: Call, options: _Options, writes: tuple[Write, ...] = ()
) -> tuple[CapturedGraph, Facts, Prologue]:
    known, careful, exact = options.known, options.careful, options.exact
    devices = [tensor.device for tensor in call.tensors if tensor.device.type == "cuda"]
    # the caller's random numbers are not drawn here, and what forward changes at each call is put back
    with (
        COMPILING,
        torch.no_grad(),
        torch.random.fork_rng(devices),
        uncompiled(model),
        track_side_effects(model, call, known, careful) as effects,
        nullcontext() if exact else fast_paths.disabled(model),
    ):
        run = effects if exact or not fast_paths.has_fast_paths(model) else effects.repeated(model, call)

        def captured_with(operators: Mapping[str, str]) -> tuple[CapturedGraph, Facts]:
            graph = capture(model, call, {**known, **effects.operators, **operators}, run, careful)
            graph = replace(prepare(graph, options.passes), writes=writes)
            return graph, _facts(model, graph, options, call)

        captured, facts = captured_with({})
        if readers := changing_reads(model, captured, facts):
            captured, facts = captured_with({**{site.path: site.reason for site in captured.opaque}, **readers})
            changing_reads(model, captured, facts)
        effects.check(model, captured)
        captured = replace(captured, write_only=effects.write_only, eager_results=tuple(effects.results))
        prologue = make_prologue(captured, facts)
        values = dict(zip(captured.inputs, call.tensors, strict=True))
        with casts.without_autocast(captured):
            return captured, verified(captured, facts, step_values(captured, facts, prologue, values)), prologue


def _facts(model: nn.Module, captured: CapturedGraph, options: _Options, call: Call) -> Facts:
    """Runs the analyses. Where an opaque submodule hides the model's structure, the error says so."""
    with casts.without_autocast(captured):
        observe(captured, dict(zip(captured.inputs, call.tensors, strict=True)))
    try:
        return analyze(captured, options.timestep, options.latent)
    except StructureError as error:
        if not captured.opaque:
            raise
        site = max(captured.opaque, key=lambda each: each.flops)
        hidden = f"The inside of {site.path} is hidden: it {site.reason}, so it runs as one opaque operator."
        kind = HiddenStructureError if holds_most(model, site.path) else StructureError
        raise kind(f"{error} {hidden}") from error


def step_values(
    captured: CapturedGraph, facts: Facts, prologue: Hoister, call: Mapping[str, Tensor]
) -> dict[Port, Tensor]:
    """Everything that a variant may read besides caches: a call's tensors, and what is precomputed from them."""
    hoisted, rows = prologue.compute(call), make_rows(captured, facts)
    precomputed = zip(rows.outputs, rows.compute(call, hoisted), strict=True)
    return {argument(name): tensor for name, tensor in call.items()} | hoisted | dict(precomputed)


def changing_reads(model: nn.Module, captured: CapturedGraph, facts: Facts) -> dict[str, str]:
    """The submodules that read values in Python that change from step to step, with the reasons to make them opaque.

    Raises:
        ReadsStepError: the model's own forward reads such a value, or that of a submodule with most of the weights;
            names the line.
    """
    reads = {name: captured.guarded_inputs[name] for name in facts.changing if name in captured.guarded_inputs}
    for name, read in reads.items():
        hiding = [path for path in sorted(read.paths) if not path or holds_most(model, path)]
        if hiding:
            reader = type(model.get_submodule(hiding[0])).__name__
            parts = " and ".join(f"{each!r}" for each in networks(model))
            around = f" optimize() runs it as it is, and caches {parts}: explain or save that instead." if parts else ""
            raise ReadsStepError(
                f"{reader}.forward reads a value that depends on {name!r} at {read.source}. It changes "
                "from step to step, so no graph can be specialized to it. Compute it before the loop and pass it "
                f"as an argument, or move that line to a submodule, which then runs as one opaque operator.{around}"
            )
    return {path: READS_CHANGING_VALUES for read in reads.values() for path in read.paths}
