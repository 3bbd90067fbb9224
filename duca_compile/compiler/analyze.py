"""One call through the stages before any rewriting: capture, analysis and verification."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from duca_compile.analysis import analyze
from duca_compile.compiler.checks import check_caching
from duca_compile.compiler.outside import make_prologue, make_rows
from duca_compile.compiler.verification import verified
from duca_compile.core.ir import CapturedGraph, Facts
from duca_compile.core.lock import COMPILING
from duca_compile.core.ports import Port, argument
from duca_compile.errors import CaptureError, StructureError
from duca_compile.frontend import casts
from duca_compile.frontend.binder import Call
from duca_compile.frontend.capture import capture
from duca_compile.frontend.opaque import READS
from duca_compile.frontend.state import followed
from duca_compile.passes.pipeline import prepare
from duca_compile.runtime.dispatcher import Hoister
from duca_compile.runtime.torch.prologue import Prologue

_NONE: Mapping[str, str] = {}


def analyze_call(
    model: nn.Module, call: Call, timestep: str | None, known: Mapping[str, str] = _NONE, careful: bool = False
) -> tuple[CapturedGraph, Facts, Prologue]:
    """Captures one call of ``model`` and finds its structure; the token analysis is checked on the call's values.

    ``known`` are submodules that run as one operator in other calls, with the reasons: what they keep may change. To be
    ``careful`` takes two more runs: the model's own results must repeat, and any graph must give them.
    """
    check_caching(model)
    devices = [tensor.device for tensor in call.tensors if tensor.device.type == "cuda"]
    # the caller's random numbers are not drawn here, and what forward changes at each call is put back
    with COMPILING, torch.no_grad(), torch.random.fork_rng(devices), followed(model, call, known, careful) as own:
        captured = prepare(capture(model, call, {**known, **own.operators}, own, careful))
        facts = _facts(captured, timestep)
        if readers := changing_reads(model, captured, facts):
            operators = {**known, **own.operators, **{site.path: site.reason for site in captured.opaque}}
            captured = prepare(capture(model, call, operators | readers, own, careful))
            facts = _facts(captured, timestep)
            changing_reads(model, captured, facts)
        own.check(model, captured)
        captured = replace(captured, unread=own.unread, results=tuple(own.results))
        prologue = make_prologue(captured, facts)
        values = dict(zip(captured.inputs, call.tensors, strict=True))
        with casts.none_for(captured):
            return captured, verified(captured, facts, step_values(captured, facts, prologue, values)), prologue


def _facts(captured: CapturedGraph, timestep: str | None) -> Facts:
    """Says of a model without structure what has hidden it."""
    try:
        return analyze(captured, timestep)
    except StructureError as error:
        if not captured.opaque:
            raise
        site = max(captured.opaque, key=lambda each: each.flops)
        hidden = f"What is in {site.path} is not seen: it {site.reason}, so it runs as it is, as one operator."
        raise StructureError(f"{error} {hidden}") from error


def step_values(
    captured: CapturedGraph, facts: Facts, prologue: Hoister, call: Mapping[str, Tensor]
) -> dict[Port, Tensor]:
    """What a variant may read but caches: the tensors of a call, and what is computed of them outside of the step."""
    hoisted, rows = prologue.compute(call), make_rows(captured, facts)
    outside = zip(rows.outputs, rows.compute(call, hoisted), strict=True)
    return {argument(name): tensor for name, tensor in call.items()} | hoisted | dict(outside)


def changing_reads(model: nn.Module, captured: CapturedGraph, facts: Facts) -> dict[str, str]:
    """The submodules whose Python reads values that change from step to step, which no trace can hold; and why.

    Raises:
        CaptureError: the model's own forward does; names the line.
    """
    reads = {name: captured.given[name] for name in facts.changing if name in captured.given}
    for name, read in reads.items():
        if "" in read.paths:
            raise CaptureError(
                f"{type(model).__name__}.forward reads a value that depends on {name!r} at {read.source}. It changes "
                "from step to step, so no graph can hold what follows from it. Compute it before the loop and pass it "
                "as an argument, or move that line to a submodule, which then runs as it is, as one operator."
            )
    return {path: READS for read in reads.values() for path in read.paths}
