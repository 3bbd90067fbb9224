"""``tune``: which policy meets a wish on a user's own model, calls and device."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from duca_compile import __version__
from duca_compile.backends.make import make_backend
from duca_compile.core.files import check_writable
from duca_compile.errors import PolicyError, UsageError
from duca_compile.integrations.diffusers import is_pipeline
from duca_compile.methods.tuning.candidates import MEASURED, Candidates, add_measured, named_series
from duca_compile.methods.tuning.measuring import Bench
from duca_compile.methods.tuning.results import Conditions
from duca_compile.methods.tuning.search import FINALISTS, Phase, Search, Tell, judge
from duca_compile.methods.tuning.trials import Journal, cached
from duca_compile.methods.tuning.tuned import Tuned
from duca_compile.methods.tuning.wishes import Wishes, read_wish
from duca_compile.methods.tuning.workload import SampleCall, Workload
from duca_compile.policies import Policy
from duca_compile.policies.checks import check_number, check_whole
from duca_compile.policies.files import in_package

if TYPE_CHECKING:
    from typing_extensions import Unpack

POLICY_FILE, PAGE = "tuned.json", "report.html"


def tune(
    target: Any,
    calls: Sequence[Any],
    sample: SampleCall | None = None,
    *,
    policies: Sequence[str | Policy] | None = None,
    backend: str = "inductor",
    timestep: str | None = None,
    seed: int = 0,
    minutes: float = 10.0,
    folder: str | os.PathLike[str] | None = None,
    **wishes: Unpack[Wishes],
) -> Tuned:
    """Finds the policy and the settings that meet a wish, by trying them on this device.

    All calls run uncached first. Then settings of all methods that fit the model run on the first half of the calls,
    which choose: where speed is wished for, the closest result that is fast enough; else the fastest that is close
    enough. The other calls judge what was chosen, in turn with uncached runs. So with two calls, one chooses and one
    judges. Shows progress on a terminal. The target is left as it was.

    Args:
        target: a diffusers pipeline, or a model in eval mode.
        calls: two or more calls of one kind (size and number of steps). For a pipeline, prompts, or dictionaries of its
            keyword arguments; without a generator among them, it gets one with a seed. With ``sample``, anything.
        sample: ``sample(target, call)`` runs one denoising loop with what it is given in place of the model, and
            returns the result. A model needs it.
        policies: what to try instead of all: names, "calibrated" and "magcache" among them, or Policy objects.
        backend: "inductor", "openvino" or "eager".
        timestep: the name of the timestep argument, where the graph does not show it.
        seed: of the random numbers that the first call starts with; each further call has the next.
        minutes: how long trials may take, besides the uncached runs before them and the judging after them.
        folder: where results so far are kept, so that the same tuning goes on after an interruption, also with another
            wish; and where ``report.html`` and ``tuned.json`` are written at the end, the latter unless the policy is
            your own or has a predictor. None keeps nothing.
        wishes: one or more of ``speedup``, ``max_seconds``, ``min_psnr``, ``max_cache_bytes``, ``metric`` and
            ``min_metric``; see ``Wishes``.

    Returns:
        The policy, whether it meets the wish on the calls that judge, and all figures.

    Raises:
        UsageError: there is no wish, or an unknown one; fewer than two calls; calls that give other results when they
            run again, or that differ in shape or steps; a folder of another tuning; or a target that cannot be
            optimized.
        PolicyError: an invalid value, or no setting fits the model.
        BackendError: the backend's package is not installed.
    """
    wish, started = read_wish(wishes), time.perf_counter()
    check_number("minutes", minutes, least=0)
    check_whole("seed", seed, least=0)
    named_series(policies, 2)  # raises PolicyError for an unknown name now
    where = _folder(folder)
    workload = Workload(target, calls, sample, seed)
    bench = Bench(workload, make_backend(backend, strict=False), timestep, wish)
    choosing, judging = _split(len(workload))
    try:
        with _progress() as phase:
            tell = phase(len(workload) + 1)
            for done in bench.measure_uncached():
                tell("uncached calls", done)
            tell("calibrating", 0)
            candidates = _candidates(bench, choosing, policies, timestep)
            journal = Journal(where, _identity(bench, workload, backend, seed), bench.signature())
            search = Search(bench, wish, candidates, journal, choosing, minutes * 60, phase(minutes * 60))
            ranked = search.race()
            finalists = [trial.policy for trial in ranked[:FINALISTS]]
            judged = judge(bench, finalists, judging, phase)
    finally:
        workload.restore()
    conditions = Conditions(
        workload.name, is_pipeline(target), bench.steps, backend, bench.device, torch.__version__,
        torch.get_num_threads(), tuple(workload.labels()), tuple(choosing), tuple(judging), bench.seconds, bench.peak,
        time.perf_counter() - started, search.cut_short,
    )  # fmt: skip
    uncached = tuple(bench.uncached[number].result for number in judging)
    met = wish.shortfall(judged[0].outcome) <= 0 and (wish.wants_speed or cached(judged[0].letters))
    tuned = Tuned(
        finalists[0], met, tuple(judged), tuple(search.trials), candidates.left_out, wish, conditions, uncached
    )
    if where is not None:
        tuned.report(where / PAGE)
        if in_package(tuned.policy):
            tuned.save(where / POLICY_FILE)
    return tuned


def _split(count: int) -> tuple[range, range]:
    """The numbers of the calls that choose, and of those that judge; the odd one chooses."""
    choosing = (count + 1) // 2
    return range(choosing), range(choosing, count)


def _folder(given: str | os.PathLike[str] | None) -> Path | None:
    if given is None:
        return None
    folder = Path(given)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file; folder= names a folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot create {folder}: {error.strerror}") from error
    check_writable(folder / POLICY_FILE, "choose another folder")
    return folder


def _candidates(
    bench: Bench, choosing: Sequence[int], policies: Sequence[str | Policy] | None, timestep: str | None
) -> Candidates:
    candidates = Candidates()
    measured = [name for name in MEASURED if policies is None or name in policies]
    add_measured(candidates, measured, bench, choosing, timestep)
    candidates.add(named_series(policies, bench.steps), bench.explanation, bench.steps)
    if not candidates.series:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in candidates.left_out.items())
        raise PolicyError(f"no setting fits {bench.workload.name} with {bench.steps} steps ({reasons})")
    return candidates


def _identity(bench: Bench, workload: Workload, backend: str, seed: int) -> dict[str, Any]:
    """What trials of an earlier process must agree in; the wish may differ."""
    metric = bench.wish.metric_name
    return {
        "target": workload.name, "steps": bench.steps, "calls": workload.labels(), "seed": seed, "backend": backend,
        "device": bench.device, "metric": metric, "torch": torch.__version__, "duca_compile": __version__,
    }  # fmt: skip


@contextmanager
def _progress() -> Iterator[Phase]:
    """Shows what is being done; yields what starts a bar."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("tuning")

        def phase(total: float) -> Tell:
            progress.reset(task, total=total)
            return lambda text, done: progress.update(task, description=text, completed=done)

        yield phase
