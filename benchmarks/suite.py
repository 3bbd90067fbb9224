"""Time, start-up and memory of the denoising loop: plain, with duca_compile, and with other libraries' caches.

    python benchmarks/suite.py --out benchmarks/results/suite.json

The weights are random, so images are not compared here; pareto.py does that. Results of other models and parts in --out
are kept. Each part runs in processes of its own, on one thread. A package that is not installed, or a failure, becomes
a row that says so.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import json
import os
import pstats
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from compare import OK
from host import DOUBLE, SIDE, SINGLE, TEXT, WARM, Host
from measure import (
    KINDS,
    EachKind,
    InnerTime,
    Model,
    Spread,
    Timing,
    cpu_seconds,
    forget_peak,
    memory,
    message,
    of_pairs,
    peak_anonymous,
    surroundings,
    timed,
    write,
)
from rich.console import Console
from rich.table import Table
from runners import INTERVAL, METHODS, MODES, PLAIN, Method, MissingError, Mode, Runner, configure, work
from workloads import DEPTHS, WORKLOADS, Workload, quick

import duca_compile

ABSENT = "not installed"
PARTS = ("start", "loops", "calls", "host", "depth")
DEPTH_METHODS = ("PyTorch, plain", "duca_compile, duca")
STARTING = INTERVAL + 2  # calls until all variants have run, and a full step again
WARMING = 2  # loops that are not counted; some peers recompile in the second
HERE = Path(__file__).resolve()


def workloads(is_quick: bool) -> dict[str, Workload]:
    return quick() if is_quick else WORKLOADS


def rows(modes: list[Mode]) -> list[tuple[Method, Mode]]:
    return [(method, mode) for mode in modes for method in METHODS]


def key(method: Method, mode: Mode) -> str:
    return f"{method.label}, {mode}"


# ---- the whole loop


class Loops:
    """Runs the loop of one model in all ways, in turn."""

    def __init__(self, workload: Workload, modes: list[Mode], seed: int) -> None:
        self.workload, self.arguments, self.noise = workload, workload.arguments(seed), workload.noise(seed)
        self.model = workload.build(seed)
        self.found: dict[str, dict[str, Any]] = {}
        self.runners: dict[str, Runner] = {}
        self.timings: dict[str, list[Timing]] = defaultdict(list)
        for method, mode in rows(modes):
            self.found[key(method, mode)] = {"library": method.library, "method": method.name, "mode": mode}
            self._attempt(key(method, mode), lambda method=method, mode=mode: self._make(method, mode))
        done: dict[str, dict[str, Any]] = {}
        for method, mode in rows(modes):  # a request executes the same in both modes
            if key(method, mode) in self.runners:
                self._attempt(key(method, mode), lambda method=method, mode=mode: self._work(method, mode, done))

    def _attempt(self, name: str, action: Callable[[], None]) -> None:
        try:
            action()
        except MissingError:
            self.found[name]["status"] = ABSENT
        except Exception as error:
            self.found[name]["status"] = message(error)
            self.runners.pop(name, None)
        else:
            self.found[name]["status"] = OK

    def _make(self, method: Method, mode: Mode) -> None:
        if not method.available():
            raise MissingError
        self.runners[key(method, mode)] = method.build(self.model, self.workload.steps, mode)

    def _work(self, method: Method, mode: Mode, done: dict[str, dict[str, Any]]) -> None:
        if method.label not in done:
            runner = self.runners[key(method, mode)]
            if mode == "compile" and runner.optimized is not None:  # counted in an eager one instead
                runner = method.build(self.model, self.workload.steps, "eager")
            done[method.label] = work(runner, self.workload, self.arguments, self.noise)
        self.found[key(method, mode)] |= done[method.label]

    def _loop(self, name: str, calls: int | None = None) -> None:
        runner = self.runners[name]
        runner.start()
        self.timings[name].append(timed(self.workload.denoise, runner.call, self.arguments, self.noise, calls))
        runner.start()  # drops its caches

    def run(self, rounds: int) -> dict[str, dict[str, Any]]:
        uncached = {key(method, mode) for method, mode in rows([*MODES]) if not method.caches}
        for _ in range(WARMING):  # these compile, and are not counted
            for name in [*self.runners]:
                self._attempt(name, lambda name=name: self._loop(name, calls=2 if name in uncached else None))
        self.timings.clear()
        gc.collect()
        for _ in range(rounds):
            for name in [*self.runners]:
                self._attempt(name, lambda name=name: self._loop(name))
        for name in self.runners:
            self._judge(name)
        return self.found

    def _judge(self, name: str) -> None:
        row, own = self.found[name], self.timings[name]
        wall, cpu = [each.wall for each in own], [each.cpu for each in own]
        row |= {"seconds": asdict(Spread.of(wall)), "cpu_seconds": asdict(Spread.of(cpu)), "rounds": wall}
        for mode in MODES:
            base = self.timings.get(f"PyTorch, {PLAIN}, {mode}")
            if base:
                row[f"speedup_over_{mode}"] = asdict(of_pairs([each.wall for each in base], wall))
                row[f"cpu_speedup_over_{mode}"] = asdict(of_pairs([each.cpu for each in base], cpu))
        plain = next(each for each in self.found.values() if each["method"] == PLAIN and "flops" in each)
        row["ideal"] = plain["flops"] / row["flops"]
        over = row.get(f"speedup_over_{row['mode']}")
        if over:  # the plain model in the same mode
            row["efficiency"] = over["median"] / row["ideal"]
            row["cpu_efficiency"] = row[f"cpu_speedup_over_{row['mode']}"]["median"] / row["ideal"]


def run_loops(workload: Workload, modes: list[Mode], rounds: int, seed: int) -> dict[str, Any]:
    return Loops(workload, modes, seed).run(rounds)


# ---- single calls of each kind of step


@torch.no_grad()
def run_calls(workload: Workload, mode: Mode, rounds: int, seed: int) -> dict[str, Any]:
    """Times, in each round, a call of the plain model and a request of each kind of step; the first round compiles.

    All requests have the same timesteps, as those of a schedule have, so timestep-only values are precomputed when a
    request starts.
    """
    model, arguments, noise = workload.build(seed), workload.arguments(seed), workload.noise(seed)
    optimized = duca_compile.optimize(model, EachKind(), "inductor" if mode == "compile" else "eager", strict=True)
    plain = torch.compile(model, fullgraph=True) if mode == "compile" else model
    timings: dict[str, list[Timing]] = defaultdict(list)
    outside: dict[str, list[float]] = defaultdict(list)
    inner: InnerTime | None = None
    latent = torch.cat([noise] * workload.rows)

    def call(of: Model, step: int) -> Timing:
        timestep = torch.full((workload.rows,), 999.0 - step) * workload.time_scale
        return timed(of, hidden_states=latent, timestep=timestep, **arguments)

    for _ in range(rounds + 1):
        found = {PLAIN: call(plain, 0)}
        optimized.reset()
        for place, kind in enumerate(KINDS):
            before = inner.seconds if inner else 0.0
            found[kind.value] = call(optimized, place)
            assert optimized.history[-1].kind is kind
            if inner:
                assert inner.seconds > before, "the timed programs did not run"
                outside[kind.value].append(found[kind.value].wall - (inner.seconds - before))
        if inner:
            for name, value in found.items():
                timings[name].append(value)
        inner = inner or InnerTime(optimized)
    flops = {each.kind.value: each.flops for each in optimized.history}
    full = {clock: statistics.median(getattr(each, clock) for each in timings["full"]) for clock in ("wall", "cpu")}
    return {
        name: {
            "seconds": asdict(Spread.of([each.wall for each in own])),
            "of_full": statistics.median(each.wall for each in own) / full["wall"],
            "of_full_by_cpu_time": statistics.median(each.cpu for each in own) / full["cpu"],
            "flops_of_full": flops[name] / flops["full"] if name in flops else None,
            "host_seconds_outside_the_graph": asdict(Spread.of(outside[name])) if name in outside else None,
        }
        for name, own in timings.items()
    }


# ---- the first request of a process, and memory


def run_start(workload: Workload, method: Method, mode: Mode, seed: int) -> dict[str, Any]:
    """Measures the first calls of this process, and the peak memory of a later request."""
    before = memory("RssAnon")
    model, arguments, noise = workload.build(seed), workload.arguments(seed), workload.noise(seed)
    weights = sum(tensor.numel() * tensor.element_size() for tensor in model.parameters())
    started = time.perf_counter()
    runner = method.build(model, workload.steps, mode)
    runner.start()
    ready = time.perf_counter() - started
    seconds, cpu = list[float](), list[float]()

    def call(**kwargs: Any) -> Any:
        began, worked = time.perf_counter(), cpu_seconds()
        result = runner.call(**kwargs)
        seconds.append(time.perf_counter() - began)
        cpu.append(cpu_seconds() - worked)
        return result

    workload.denoise(call, arguments, noise, calls=STARTING)
    first = [*seconds]
    whole = peak_anonymous() - before
    forget_peak()
    runner.start()
    workload.denoise(call, arguments, noise, calls=STARTING)
    return {
        "set_up_seconds": ready,
        "first_call_seconds": first[0],
        "first_calls_seconds": sum(first),
        "later_calls_seconds": sum(seconds[len(first) :]),
        "first_calls_cpu_seconds": sum(cpu[: len(first)]),
        "later_calls_cpu_seconds": sum(cpu[len(first) :]),
        "weight_bytes": weights,
        "peak_bytes_with_start": whole,
        "peak_bytes": peak_anonymous() - before,
    }


# Stages of the first calls: for each label in the table, the end of a file's path and a function.
STAGES = {
    "torch.export": ("duca_compile/frontend/capture.py", "capture"),
    "verification of the analysis": ("duca_compile/compiler/verification.py", "verified"),
    "rewriting": ("duca_compile/passes/pipeline.py", "build_variant"),
    "tracing by AOTAutograd": ("_aot_autograd/graph_compile.py", "aot_stage1_graph_capture"),
    "Inductor, with the C++ compiler": ("torch/_inductor/compile_fx.py", "codegen_and_compile"),
    "the C++ compiler": ("subprocess.py", "run"),
}


def run_profile(workload: Workload, method: Method, mode: Mode, seed: int) -> dict[str, float]:
    """Seconds of each stage of the first calls, under cProfile, which slows Python but not the C++ compiler."""
    model, arguments, noise = workload.build(seed), workload.arguments(seed), workload.noise(seed)
    runner = method.build(model, workload.steps, mode)
    runner.start()
    profile = cProfile.Profile()
    profile.runcall(workload.denoise, runner.call, arguments, noise, calls=STARTING)
    found: dict[str, float] = {}
    for (file, _, name), (*_, cumulative, _callers) in pstats.Stats(profile).stats.items():  # type: ignore[attr-defined]
        for stage, (end, function) in STAGES.items():
            if file.endswith(end) and name == function:
                found[stage] = found.get(stage, 0.0) + cumulative
    return found


# ---- processes


def in_process(task: dict[str, Any], folder: Path, script: Path = HERE) -> dict[str, Any]:
    """Runs one task of a script in a new process, with Inductor's cache in ``folder``."""
    single = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    single["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
    command = [sys.executable, str(script), "--task", json.dumps(task)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **single})
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return {"status": last[:300]}
    return {"status": OK, "found": json.loads(done.stdout.splitlines()[-1])}


def perform(task: dict[str, Any]) -> Any:
    configure()
    what, seed = task["what"], task["seed"]
    if what == "host":
        return {mode: Host(mode, task["rounds"], seed, *task["size"]).measure() for mode in task["modes"]}
    workload = (workloads(task["quick"]) | DEPTHS)[task["workload"]]
    if what == "loops":
        return run_loops(workload, task["modes"], task["rounds"], seed)
    if what == "calls":
        return run_calls(workload, task["mode"], task["rounds"], seed)
    method = next(each for each in METHODS if each.label == task["method"])
    if what == "profile":
        return run_profile(workload, method, task["mode"], seed)
    return run_start(workload, method, task["mode"], seed)


class Suite:
    """Runs the parts one after the other, and writes the results after each."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.modes: list[Mode] = args.modes
        self.console = Console(width=170)
        self.workloads = workloads(args.quick)
        names = args.models or [*self.workloads]
        self.found: dict[str, Any] = {
            "what": __doc__.splitlines()[0],
            "arguments": {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()},
            "surroundings": surroundings(1),
            "interval": INTERVAL,
            "starting_calls": STARTING,
            "load_average_at_start": os.getloadavg(),
        }
        known = json.loads(args.out.read_text()) if args.out and args.out.exists() else {}
        models = known.pop("models", {})
        self.found = {**known, **self.found, "models": models}
        self.names = names
        for name in names:
            models[name] = {"commits": {}, **models.get(name, {}), **self._describe(self.workloads[name])}

    @staticmethod
    def _describe(workload: Workload) -> dict[str, Any]:
        loop = {"scheduler": workload.scheduler, "scheduler_options": workload.scheduler_options}
        config = {"class": workload.model_class, **workload.config}
        return {"shape": workload.shape(), "steps": workload.steps, "loop": loop, "config": config}

    def run(self) -> None:
        for name in self.names:
            with tempfile.TemporaryDirectory(prefix="duca_suite_") as folder:
                self._model(name, Path(folder))
        if "host" in self.args.parts:
            self._host()
        if "depth" in self.args.parts:
            self._depth()
        self.found["load_average_at_end"] = os.getloadavg()
        self._save()

    def _model(self, name: str, folder: Path) -> None:
        common = {"seed": self.args.seed, "quick": self.args.quick, "workload": name}
        found, warm = self.found["models"][name], folder / "all"
        found["commits"] |= dict.fromkeys(self.args.parts, self.found["surroundings"]["commit"])
        load = os.getloadavg()[0]
        if "start" in self.args.parts:
            found["start"] = {}
            for method, mode in rows(self.modes):
                found["start"][key(method, mode)] = self._start(method, mode, common, folder, warm)
            self.console.print(start_table(name, found["start"]))
            found["load_average_before_and_after_the_start"] = [load, os.getloadavg()[0]]
            self._save()
        load = os.getloadavg()[0]
        if "loops" in self.args.parts:
            task = {**common, "what": "loops", "modes": self.modes, "rounds": self.args.rounds}
            found["loops"] = in_process(task, warm)
            if "found" in found["loops"]:
                self.console.print(loops_table(name, found["loops"]["found"]))
            else:
                self.console.print(name, found["loops"]["status"])
            found["load_average_before_and_after_the_loops"] = [load, os.getloadavg()[0]]
        if "calls" in self.args.parts:
            task = {**common, "what": "calls", "mode": self.modes[-1], "rounds": self.args.calls}
            found["calls"] = in_process(task, warm)
        self._save()

    def _start(self, method: Method, mode: Mode, common: dict[str, Any], folder: Path, warm: Path) -> dict[str, Any]:
        """Runs a process with an empty compile cache, and if it compiles anything, a second one with its cache."""
        if not method.available():
            return {"status": ABSENT}
        task = {**common, "what": "start", "method": method.label, "mode": mode}
        own = folder / "own"
        found: dict[str, Any] = {"status": OK}
        for run in ("cold", "warm") if mode == "compile" else ("cold",):
            each = in_process(task, own)
            if each["status"] != OK:
                return {"status": each["status"]}
            found[run] = each["found"]
        if own.exists():
            shutil.copytree(own, warm, dirs_exist_ok=True)  # so that the process that times loops need not compile
            shutil.rmtree(own)
        return found

    def _host(self) -> None:
        size = (2, 2) if self.args.quick else (DOUBLE, SINGLE)
        with tempfile.TemporaryDirectory(prefix="duca_suite_") as folder:
            task = {
                "what": "host",
                "modes": self.modes,
                "rounds": self.args.host_rounds,
                "size": size,
                "seed": self.args.seed,
            }
            load = os.getloadavg()[0]
            found = in_process(task, Path(folder))
        model = {"double": size[0], "single": size[1], "image_tokens": SIDE * SIDE, "text_tokens": TEXT, "batch": 1}
        self.found["host"] = {
            "model": model,
            "rounds_not_counted": WARM,
            "commit": self.found["surroundings"]["commit"],
            **found,
            "load_average_before_and_after": [load, os.getloadavg()[0]],
        }
        if "found" in found:
            self.console.print(host_table(found["found"]))
        else:
            self.console.print("host", found["status"])

    def _depth(self) -> None:
        load, runs = os.getloadavg()[0], []
        chosen = [*DEPTHS.values()][: 1 if self.args.quick else None]
        for workload in chosen:
            common = {"seed": self.args.seed, "quick": False, "workload": workload.name}
            for method in (each for each in METHODS if each.label in DEPTH_METHODS):
                with tempfile.TemporaryDirectory(prefix="duca_suite_") as folder:
                    found = self._start(method, "compile", common, Path(folder), Path(folder) / "all")
                    if method.label.startswith("duca_compile"):
                        task = {**common, "what": "profile", "method": method.label, "mode": "compile"}
                        found["profile"] = in_process(task, Path(folder) / "profile")
                runs.append({"method": method.label, "blocks": workload.config["num_layers"], **found})
        self.found["depth"] = {
            "runs": runs,
            "commit": self.found["surroundings"]["commit"],
            "blocks": [each.config["num_layers"] for each in chosen],
            "load_average_before_and_after": [load, os.getloadavg()[0]],
        }
        self._save()

    def _save(self) -> None:
        if self.args.out:
            write(self.found, self.args.out)


# ---- tables


def loops_table(name: str, found: dict[str, Any]) -> Table:
    columns = (
        "time, s: median (IQR)",
        "over compile",
        "over eager",
        "ideal",
        "achieved / ideal",
        "by CPU time",
        "blocks run",
    )
    result = Table("run", *columns, title=f"{name}: the whole loop")
    for label, row in found.items():
        if row["status"] != OK:
            result.add_row(label, row["status"])
            continue
        over = [
            f"{row[f'speedup_over_{mode}']['median']:.2f}x" if f"speedup_over_{mode}" in row else ""
            for mode in ("compile", "eager")
        ]
        efficiency = [f"{row[each]:.2f}" if each in row else "" for each in ("efficiency", "cpu_efficiency")]
        ran = f"{row['blocks_run']} of {row['blocks_uncached']}" if "blocks_run" in row else ""
        steps = ", ".join(f"{count} {kind}" for kind, count in row.get("steps", {}).items())
        seconds = Spread(**row["seconds"]).whole_seconds()
        result.add_row(label, seconds, *over, f"{row['ideal']:.2f}x", *efficiency, ran or steps)
    return result


def start_table(name: str, found: dict[str, Any]) -> Table:
    columns = ("first call, s: cold", "warm", f"first {STARTING} calls, s: cold", "warm", "later", "peak memory, MiB")
    result = Table("run", *columns, title=f"{name}: the first request of a process")
    for label, row in found.items():
        if row["status"] != OK:
            result.add_row(label, row["status"])
            continue
        cold, warm = row["cold"], row.get("warm")
        pairs = [
            f"{each[name]:.1f}" if each else ""
            for name in ("first_call_seconds", "first_calls_seconds")
            for each in (cold, warm)
        ]
        last = warm or cold
        peak = f"{last['peak_bytes'] / 2**20:.0f}"
        result.add_row(label, *pairs, f"{last['later_calls_seconds']:.1f}", peak)
    return result


def host_table(found: dict[str, Any]) -> Table:
    result = Table("step", "mode", "call, ms", "outside of the graph, ms", title="The host's work, on a tiny FLUX")
    for mode, each in found.items():
        for name, row in each.items():
            if "status" in row:
                result.add_row(name, mode, row["status"])
                continue
            outside = row.get("host_seconds_outside_the_graph")
            cells = [Spread(**spread).milliseconds() if spread else "" for spread in (row["seconds"], outside)]
            result.add_row(name, mode, *cells)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    parser.add_argument("--models", nargs="+", help="names of the models; by default, all")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=[*MODES])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[*PARTS])
    parser.add_argument("--rounds", type=int, default=3, help="timed loops of each way")
    parser.add_argument("--calls", type=int, default=25, help="timed calls of each variant")
    parser.add_argument("--host-rounds", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights, prompts and latents")
    parser.add_argument("--quick", action="store_true", help="tiny models and one round, to try everything out")
    parser.add_argument("--task", type=json.loads, help=argparse.SUPPRESS)  # for its own processes
    args = parser.parse_args()
    if args.task is not None:
        print(json.dumps(perform(args.task)))
        return
    del args.task
    if args.quick:
        args.rounds, args.calls, args.host_rounds = 1, 2, 5
    configure()
    Suite(args).run()


if __name__ == "__main__":
    main()
