"""Shared by the benchmarks: clocks, spreads, memory, FLOPs, and the description of machine and software."""

from __future__ import annotations

import copy
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, cycle
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

import duca_compile
from duca_compile import DuCa, OptimizedModel
from duca_compile.policies import Step, StepKind
from duca_compile.runtime.dispatcher import Program

KINDS = (StepKind.FULL, StepKind.PARTIAL, StepKind.REUSE, StepKind.SKIP)
PACKAGES = ("torch", "diffusers", "cache-dit", "numpy")
MESSAGE = 300  # the most characters kept of an error

Model = Callable[..., Any]
Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class Spread:
    """Repeated measurements, of seconds or ratios."""

    median: float
    q1: float
    q3: float
    fastest: float
    runs: int

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        q1, _, q3 = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
        return Spread(statistics.median(values), q1, q3, min(values), len(values))

    def milliseconds(self) -> str:
        return f"{1e3 * self.median:.2f} ({1e3 * self.q1:.2f} to {1e3 * self.q3:.2f})"

    def whole_seconds(self) -> str:
        return f"{self.median:.2f} ({self.q1:.2f} to {self.q3:.2f})"


@dataclass(frozen=True)
class Timing:
    """Wall-clock and CPU seconds of one run; CPU time excludes waiting for a core."""

    wall: float
    cpu: float


def cpu_seconds() -> float:
    """CPU seconds of this process and its finished children, such as the C++ compiler."""
    return sum(os.times()[:4])


def timed(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Timing:
    wall, cpu = time.perf_counter(), time.process_time()
    call(*args, **kwargs)
    return Timing(time.perf_counter() - wall, time.process_time() - cpu)


def of_pairs(bases: Sequence[float], owns: Sequence[float]) -> Spread:
    """Base over own in each round, so that load on the machine cancels."""
    return Spread.of([base / own for base, own in zip(bases, owns, strict=True)])


@dataclass(frozen=True)
class EachKind(DuCa):
    """A full step, then the other kinds in turn, so that all four kinds are timed under the same load."""

    turns: tuple[StepKind, ...] = (*KINDS[1:], *KINDS[:1])

    def steps(self, total: int | None) -> Iterator[Step]:
        for kind in chain([StepKind.FULL], cycle(self.turns)):
            yield Step(kind, interval=len(KINDS), ratio=self.fresh_ratio)


def programs_of(model: OptimizedModel) -> list[Program]:
    """The programs of all its variants so far."""
    return [program for compiled in model._compiled.values() for _, program in compiled.programs.by_spec.values()]


class InnerTime:
    """Wraps every compiled variant of an optimized model, and sums the time spent inside them.

    Once ``kept`` is set to a dictionary, each computes once more, and then returns the same result at each call.
    """

    def __init__(self, model: OptimizedModel) -> None:
        self.seconds = 0.0
        self.kept: dict[Model, Any] | None = None
        for program in programs_of(model):
            self._wrap(program)

    def _wrap(self, program: Program) -> None:
        """Wraps Inductor's own callable, without our code around it."""
        if hasattr(program.run, "_compiled"):
            program.run._compiled = self._timed(program.run._compiled)
        else:
            program.run = self._timed(program.run)

    def _timed(self, run: Model) -> Model:
        def timed(*tensors: Tensor) -> Any:
            started = time.perf_counter()
            if self.kept is None:
                results = run(*tensors)
            else:
                results = self.kept.get(run) or self.kept.setdefault(run, run(*tensors))
            self.seconds += time.perf_counter() - started
            return results

        return timed


def sharing_weights(model: Module) -> Module:
    """A copy of the modules with the same parameters and buffers, so that hooks on it do not affect the model."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def _cpu_attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


# torch's counter has no formula for fused attention on the CPU
_FORMULAS: dict[Any, Callable[..., int]] = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _cpu_attention}


@contextmanager
def counted_flops(found: list[float]) -> Iterator[None]:
    """Appends the FLOPs that are executed eagerly inside."""
    with FlopCounterMode(display=False, custom_mapping=_FORMULAS) as counter:
        yield
    found.append(float(counter.get_total_flops()))


def memory(name: str) -> int:
    """A line of ``/proc/self/status``, in bytes: ``VmHWM`` is the peak resident set, ``RssFile`` its mapped files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def peak_anonymous() -> int:
    """The peak resident set since the last ``forget_peak``, without mapped files, which are mostly libraries."""
    return memory("VmHWM") - memory("RssFile")


def forget_peak() -> None:
    """Resets the kernel's peak to what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def message(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:MESSAGE]


def surroundings(threads: int) -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    flags = next((line.split(":", 1)[1].split() for line in lines if line.startswith("flags")), [])
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": threads,
        "vector_extensions": [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_tile") if f in flags],
        "system": platform.platform(),
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
        "commit": _commit(),
        "started": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
    }


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str:
    """The commit of the measured package, with "+changes" if its files differ."""
    package = Path(duca_compile.__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", package, *arguments], capture_output=True, text=True, check=True).stdout

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".").strip()
        return git("rev-parse", "--short=12", "HEAD").strip() + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def write(found: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=2) + "\n")
