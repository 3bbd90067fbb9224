"""Write the summary and the full report of the benchmarks, so that each figure in them comes from a file.

python benchmarks/report.py  # writes README.md and results.md
"""

from __future__ import annotations

import argparse
import json
import re
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from compare import OK, TARGET, Match, frontier, matches, peers_of, speed, split

LIMITS = {"partial": 0.10, "reuse": 0.02, "skip": 0.01}  # of a full step
EFFICIENCY = 1.0
LOSSLESS = 0.97  # of torch.compile of the plain model, for the policy that caches nothing
DEEP, DEEPER = 1.0, 1.2  # cold compiling of the deep model, over that of the plain one, and of ours of the shallow one
SECOND = 0.25  # of the first process
CAPTURE_SECONDS, CAPTURE_MEMORY = 20.0, 1.3  # the latter over the memory of the parameters
HOST = 50e-6  # seconds outside of the graph
IDLE = ", nothing computed"
UNJUDGED = ("full", IDLE)  # how labels of calls end that the limit is not for
OWN, FEWER = "duca_compile", "fewer steps"
NONE = "duca_compile, none, compile"
COMPILE, EAGER = "PyTorch, plain, compile", "PyTorch, plain, eager"
MIB = 2**20

Found = dict[str, Any]

FOLDER = Path(__file__).parent
GAIN = (
    "What each method gains in PSNR, image by image, over the fewest plain steps with at least the same FLOPs, to half "
    "a percent (dB, with standard error), and its rank by perceptual distance among all methods of the level, "
    "including plain steps."
)

SUMMARY = """# Benchmarks

How fast, how close and how large, measured on one thread of a CPU. **Nothing here has been run on a GPU.** Every figure
comes from a file in `benchmarks/results`; [all results](results.md) has every row, how each was measured, and
[where we lose](results.md#where-we-lose). `report.py` writes both pages.

```
python3 -m venv .venv && .venv/bin/pip install -c constraints.txt -e '.[bench]'
.venv/bin/python benchmarks/suite.py --out benchmarks/results/suite.json
.venv/bin/python benchmarks/pareto.py --out benchmarks/results/pareto.json
.venv/bin/python benchmarks/methods.py --out benchmarks/results/methods.json
.venv/bin/python benchmarks/report.py
```

With `--quick`, each command tries everything on tiny models or with few settings, in minutes. You need a C++ compiler;
cache-dit is needed for its own rows only.
"""

INTRODUCTION = """# Benchmark results

Everything that [the summary](README.md) is made from. `suite.py` measures time, start-up, memory and host time, on
models with random weights. `pareto.py` compares speed with fidelity, on the trained model in the package. Both run on
one thread of a CPU.

| file | holds |
|---|---|
| `suite.py`, `pareto.py` | the two main commands |
| `methods.py` | every method at matched FLOPs; it continues where it was stopped |
| `scale.py` | what happens before compiling, on a model of real size |
| `artifact.py`, `backends.py` | artifacts under ONNX Runtime, and a step of each kind under each backend |
| `workloads.py` | the models, their sizes and their loops |
| `runners.py`, `peers.py` | the ways to run them: PyTorch, duca_compile, other libraries |
| `host.py` | host time per step, on a tiny FLUX of 57 blocks |
| `measure.py` | clocks, memory, FLOPs |
| `report.py`, `compare.py` | these pages; what beats what |
"""

METHOD = """
**Schedules.** Every method that caches computes the first step and each {nth} after it. TaylorSeer, ours and
diffusers', computes one more near the start. cache-dit runs a static mask with one block before its decision, the
fewest that it accepts. FirstBlockCache has no schedule, so its decision is computed as usual and then replaced by that
of the same mask. By its own patterns, TaylorSeer of diffusers matches next to nothing in some of these models, so it is
given the names of attention and MLPs or, for *lite*, of the blocks and the last projection. Other libraries compile
with `torch.compile(model)`; their hooks break the graph, and the limit of recompilations is raised for them. Ours uses
`backend="inductor"`, and the plain model is compiled with `fullgraph=True`.

**Time.** All rows of a model are interleaved in one process: each round has one loop of each. Loops that compile are
not counted. Rounds counted: {rounds}. Times are medians with the interquartile range; ratios are medians of the ratios
within each round. CPU time leaves out waiting for a core that another process uses. Where the two differ, read the CPU
time.

**Ideal.** FLOPs of the plain loop over those of the row, as torch's counter sees them while the loop runs under eager:
what is counted was executed. *Blocks* counts calls of the first projection of each block's attention, in the same loop.
*Achieved / ideal* divides the speed-up over the plain model in the same mode by that ideal.

**Start.** A fresh process with an empty folder for Inductor's cache, then another process with the folder that the
first left. {calls} calls are enough for every variant to run, and for a full step after them. Importing and building
the model are not counted.

**Memory.** The kernel's record of the highest resident set of the process, without mapped files, minus what the process
held before the model was built; in a second request of the warm process, so compiling does not count."""


def prose(*sentences: str) -> str:
    """A paragraph with empty lines around it."""
    return "\n" + textwrap.fill(" ".join(sentences), 120, break_on_hyphens=False, break_long_words=False) + "\n"


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def head(*cells: str) -> list[str]:
    return [row(*cells), f"|{'---|' * len(cells)}"]


def spread(value: Found, scale: float = 1.0) -> str:
    return f"{scale * value['median']:.2f} ({scale * value['q1']:.2f} to {scale * value['q3']:.2f})"


def times(value: Found | None) -> str:
    return f"{value['median']:.2f}x" if value else ""


def mib(size: float) -> str:
    return f"{size / MIB:.0f}"


def verdict(met: bool, target: str) -> str:
    return f"{target}: {'met' if met else 'missed'}"


def of_part(model: Found, part: str) -> Found:
    """The rows of a part that ran."""
    return model.get(part, {}).get("found", {})


def ran(rows: Found) -> Found:
    return {name: each for name, each in rows.items() if each.get("status", OK) == OK}


def setting(suite: Found) -> list[str]:
    where, before, after = suite["surroundings"], suite["load_average_at_start"][0], suite["load_average_at_end"][0]
    packages = ", ".join(f"{name} {where[name]}" for name in ("torch", "diffusers", "cache-dit") if where[name])
    machine = f"{where['cpu']}, {where['cores']} cores, {', '.join(where['vector_extensions'])}"
    given = suite["arguments"]
    return [
        "## What was measured\n",
        *head("what", "value"),
        row("machine", f"{machine}; {where['threads']} thread used"),
        row("software", f"Python {where['python']}, {packages}, duca_compile at {where['commit']}"),
        row("seed", f"{given['seed']}, of weights, prompts and latents"),
        row("load average", f"{before:.1f} at the start, {after:.1f} at the end"),
        row("date", where["started"]),
        *([prose("**This is a trial with `--quick`, which measures nothing.**")] if given["quick"] else []),
        "",
        *head("model", "class of diffusers", "size", "loop"),
        *(
            row(
                name,
                f"`{each['config']['class']}`",
                each["shape"],
                f"`{each['loop']['scheduler']}`, {each['steps']} steps",
            )
            for name, each in suite["models"].items()
        ),
        "",
        "Weights are random and float32. A batch of 2 is both halves of classifier-free guidance.",
        *method(suite),
    ]


def method(suite: Found) -> list[str]:
    known = {
        "nth": ordinal(suite["interval"]),
        "rounds": suite["arguments"]["rounds"],
        "calls": suite["starting_calls"],
    }
    return [prose(paragraph.format(**known)) for paragraph in METHOD.strip().split("\n\n")]


def ordinal(number: int) -> str:
    return {2: "second", 3: "third", 4: "fourth", 5: "fifth", 6: "sixth", 7: "seventh"}.get(number, f"{number}th")


def loops(suite: Found) -> Iterator[str]:
    yield "\n## The whole loop\n"
    yield f"The target for ours is {EFFICIENCY} of the ideal, by both clocks."
    for name, model in suite["models"].items():
        rows = of_part(model, "loops")
        if not rows:
            continue
        yield f"\n### {name}\n"
        yield measured_part(model, "loops")
        columns = (
            "run",
            "time, s (IQR)",
            "over torch.compile",
            "over eager",
            "ideal",
            "achieved / ideal",
            "by CPU time",
        )
        yield from head(*columns, "executed")
        for label, each in rows.items():
            yield loop_row(label, each)
        compared = {key: rows[key]["seconds"]["median"] for key in (COMPILE, NONE) if key in ran(rows)}
        if len(compared) == 2:
            share = rows[NONE]["speedup_over_compile"]["median"]
            yield f'\n`policy="none"` takes {1 / share:.3f} of torch.compile\'s time; '
            yield verdict(1 / share <= LOSSLESS, f"at most {LOSSLESS}") + "."
    yield ""


def measured(loads: Sequence[float], commit: str) -> str:
    """Under what load, and of which commit."""
    before, after = loads
    return f"Load {before:.1f} before, {after:.1f} after; duca_compile at {commit}."


def measured_part(model: Found, part: str) -> str:
    return measured(model[f"load_average_before_and_after_the_{part}"], model["commits"][part]) + "\n"


def loop_row(label: str, each: Found) -> str:
    if each["status"] != OK:
        return row(label, escaped(each["status"]), *[""] * 6)
    over = [times(each.get(f"speedup_over_{mode}")) for mode in ("compile", "eager")]
    achieved = [f"{each[name]:.2f}" if name in each else "" for name in ("efficiency", "cpu_efficiency")]
    done = ", ".join(f"{count} {kind}" for kind, count in each.get("steps", {}).items())
    if "blocks_run" in each:
        done = f"{each['blocks_run']} of {each['blocks_uncached']} blocks"
    return row(label, spread(each["seconds"]), *over, f"{each['ideal']:.2f}x", *achieved, done)


def escaped(text: str) -> str:
    return text.replace("|", "\\|")


def starts(suite: Found) -> Iterator[str]:
    calls = suite["starting_calls"]
    yield "## Start and memory"
    yield prose(
        f"Seconds of the first call, and of the first {calls}, with nothing compiled (cold) and with what an earlier",
        "process compiled (warm). Rows that compile nothing have one process. *CPU* is the CPU time of the same",
        "calls, including the C++ compiler.",
    )
    for name, model in suite["models"].items():
        rows = model.get("start", {})
        if not rows:
            continue
        yield f"\n### {name}\n"
        yield measured_part(model, "start")
        seconds_of = ("first call: cold", "warm", f"first {calls}: cold", "CPU", "warm", "CPU", "later")
        yield from head("run", *seconds_of, "peak memory, MiB")
        for label, each in rows.items():
            if each["status"] != OK:
                yield row(label, escaped(each["status"]), *[""] * 7)
                continue
            runs = [each["cold"], each.get("warm")]
            seconds = [f"{run['first_call_seconds']:.1f}" if run else "" for run in runs]
            for run in runs:
                seconds += [f"{run[f'first_calls_{clock}']:.1f}" if run else "" for clock in ("seconds", "cpu_seconds")]
            last = runs[1] or runs[0]
            yield row(label, *seconds, f"{last['later_calls_seconds']:.1f}", mib(last["peak_bytes"]))
    yield ""


def depth(found: Found) -> Iterator[str]:
    """Cold and warm starts of models that differ in depth alone."""
    yield "## Compiling by depth"
    yield prose(
        "Seconds of the first calls of a process until each variant of the policy has run, minus what the same calls",
        "take later in that process: capturing, analysing, rewriting and compiling, including the C++ compiler, one",
        "process at a time. DiTs of width 384 and 256 tokens. *Warm* finds what the cold process compiled. The",
        f"verdicts are by CPU time. {measured(found['load_average_before_and_after'], found['commit'])}",
    )
    yield from head("run", "blocks", "cold, s", "CPU time, s", "warm, s", "CPU time, s")
    spent: dict[tuple[str, int], float] = {}
    for each in found["runs"]:
        if each["status"] != OK:
            yield row(each["method"], str(each["blocks"]), escaped(each["status"]), "", "", "")
            continue
        spent[each["method"], each["blocks"]] = preparing(each["cold"])
        runs = (each["cold"], each["warm"])
        cells = [f"{preparing(run, clock):.1f}" for run in runs for clock in ("seconds", "cpu_seconds")]
        yield row(each["method"], str(each["blocks"]), *cells)
    yield ""
    yield from depth_verdicts(found, spent)
    yield from depth_profile({each["blocks"]: each["profile"]["found"] for each in found["runs"] if "profile" in each})


def depth_verdicts(found: Found, spent: dict[tuple[str, int], float]) -> Iterator[str]:
    (own,) = {method for method, _ in spent if method.startswith(OWN)} or {OWN}
    shallow, deep = min(found["blocks"]), max(found["blocks"])
    plain = "PyTorch, plain"
    if {(own, shallow), (own, deep), (plain, deep)} <= spent.keys():
        over, grown = spent[own, deep] / spent[plain, deep], spent[own, deep] / spent[own, shallow]
        yield f"- All variants of {own} at {deep} blocks take {over:.2f} of the plain model's compiling time;"
        yield f"  {verdict(over <= DEEP, f'at most {DEEP}')}."
        yield f"- {deep} blocks take {grown:.2f} of the time of {shallow};"
        yield f"  {verdict(grown <= DEEPER, f'at most {DEEPER}')}."
    worst = max(preparing(r["warm"]) / preparing(r["cold"]) for r in found["runs"] if r["method"] == own)
    yield f"- The second process takes {worst:.2f} of the first at most;"
    yield f"  {verdict(worst <= SECOND, f'at most {SECOND}')}.\n"


def depth_profile(found: dict[int, dict[str, float]]) -> Iterator[str]:
    """What grows with the depth."""
    yield prose(
        "What grows with depth is the work before repeated blocks are merged: torch.export unrolls the model, and",
        "each variant's graph is traced as a whole. The last kernel of a partial step, which adds what all blocks add",
        "to the other tokens, has as many inputs as there are branches. A second process finds the kernels, but",
        "repeats what comes before them: a run of the model itself, torch.export, analysis and rewriting. Seconds",
        "under cProfile, which slows down Python and not the C++ compiler; the stages overlap:",
    )
    yield from head("stage", *(f"{blocks} blocks" for blocks in found))
    for stage in dict.fromkeys(stage for each in found.values() for stage in each):
        yield row(stage, *(f"{each.get(stage, 0.0):.1f}" for each in found.values()))
    yield ""


def preparing(run: Found, clock: str = "cpu_seconds") -> float:
    return float(run[f"first_calls_{clock}"] - run[f"later_calls_{clock}"])


def calls(suite: Found) -> Iterator[str]:
    yield "## One call of each kind"
    yield prose(
        f"Medians of {suite['arguments']['calls']} calls. *Host* is the wall-clock time of a call outside of the",
        "compiled variant: recognising the step, planning, choosing tokens, passing caches.",
    )
    yield from head("model", "call", "time, ms (IQR)", "of full", "by CPU time", "FLOPs of full", "host, ms", "target")
    for name, model in suite["models"].items():
        for kind, each in of_part(model, "calls").items():
            host, flops, limit = each["host_seconds_outside_the_graph"], each["flops_of_full"], LIMITS.get(kind)
            share, by_cpu = each["of_full"], each["of_full_by_cpu_time"]
            cells = [name, kind, spread(each["seconds"], 1e3), f"{share:.4f}", f"{by_cpu:.4f}"]
            cells.append("" if flops is None else f"{flops:.4f}")
            cells.append("" if host is None else f"{1e3 * host['median']:.2f}")
            cells.append("" if limit is None else verdict(max(share, by_cpu) <= limit, f"at most {limit}"))
            yield row(*cells)
    yield ""


def hosts(host: Found) -> Iterator[str]:
    model = host["model"]
    sizes = f"{model['double'] + model['single']} blocks ({model['double']} double, {model['single']} single)"
    yield "## Host time per step"
    yield prose(
        f"A FLUX of {sizes}, so small that its graphs take next to no time, called as pipelines call it (returning a",
        "tuple). All rows alternate, so each finds the processor's caches as another left them.",
        measured(host["load_average_before_and_after"], host["commit"]),
        "*In a row*: steps of one kind with nothing else in between, as if an accelerator did the computing. *Nothing",
        "computed*: the same, with compiled graphs that return what they returned before. For other libraries, the",
        "call is that of a skipped step. *Outside* is the time of one of our calls minus that of its compiled graph.",
    )
    yield from head("step", "mode", "call, ms (IQR)", "outside, ms (IQR)", "target")
    for mode, rows in host.get("found", {}).items():
        for label, each in rows.items():
            if "status" in each:
                yield row(label, mode, escaped(each["status"]), "", "")
                continue
            outside = each.get("host_seconds_outside_the_graph")
            held = outside and mode == "compile" and not label.endswith(UNJUDGED)
            met = verdict(outside["median"] <= HOST, f"at most {1e3 * HOST:.2f} ms") if outside and held else ""
            yield row(label, mode, spread(each["seconds"], 1e3), spread(outside, 1e3) if outside else "", met)
    yield prose(
        *idle(host["found"]),
        "The table shows the stages, measured in separate calls. For steps in a row, the second number is with",
        "nothing computed. The other columns are from a loop whose kinds alternate: a step after a full one looks its",
        "inputs up again, and the last one to read caches frees them.",
    )
    for mode, rows in host["found"].items():
        stages = {label: each["stage_seconds"] for label, each in rows.items() if "stage_seconds" in each}
        judged = [label for label in stages if not label.endswith(UNJUDGED)]
        yield from head("µs", *(f"{label.removeprefix(f'{OWN}, ')}, {mode}" for label in judged))
        for stage in stages[judged[0]]:
            both = [[stages[each][stage] for each in (label, label + IDLE) if each in stages] for label in judged]
            yield row(stage, *(" / ".join(f"{1e6 * each:.1f}" for each in pair) for pair in both))
    yield ""


def idle(found: Found) -> Iterator[str]:
    """What the rows that miss would take without their graphs' use of the processor's caches."""
    rows, times = found.get("compile", {}), []
    for kind in ("partial", "reuse", "skip", "lite forecast"):
        label = f"{OWN}, {kind}, in a row"
        if label + IDLE in rows:
            own, idle = (1e6 * rows[each]["host_seconds_outside_the_graph"]["median"] for each in (label, label + IDLE))
            times.append(f"{kind} {own:.0f} and {idle:.0f}")
    if times:
        yield f"In a row, with the graph and with nothing computed, they take, in µs: {'; '.join(times)}. The code is"
        yield "the same: the difference is the price of finding the processor's caches as the graph left them."


def quality(pareto: Found) -> Iterator[str]:
    where, seeds, classes = pareto["surroundings"], pareto["seeds"], pareto["classes"]
    before, after = pareto["load_average_at_start"][0], pareto["load_average_at_end"][0]
    modes = " and under ".join({"compile": "`torch.compile`"}.get(mode, mode) for mode in pareto["modes"])
    yield "## Speed against fidelity"
    yield prose(
        f"The trained model in the package, {seeds * classes} images ({seeds} of each class), DDIM, duca_compile at",
        f"{where['commit']}, load {before:.1f} at the start, {after:.1f} at the end. Speed-up is over `torch.compile`",
        "of the plain model in the same round. PSNR is measured to its images from the same noise and rounded to a",
        "tenth: it",
        f"says how much changed, not how good an image is. Other libraries ran under {modes}"
        + ("; the faster counts." if len(pareto["modes"]) > 1 else "."),
        "Points that skip nothing are left out.",
        *([f"One in {pareto['every']} of our settings was run."] if pareto["every"] > 1 else []),
        *([f"One in {others} of the others' settings was run."] if (others := pareto["every_of_others"]) > 1 else []),
        *([f"All calibrated ones of ours were run again, at {pareto['again']}."] if "again" in pareto else []),
    )
    yield "![Time against PSNR of all settings](results/pareto.png)"
    for steps in pareto["steps"]:
        by_library = split(pareto["points"], steps)
        yield f"\n### {steps} steps"
        yield prose(claim(by_library, steps))
        yield "The best settings of other libraries (none of theirs is both faster and closer), and our fastest at no"
        yield "lower PSNR:\n"
        yield from versus(matches(by_library[OWN], frontier(peers_of(by_library))))
        yield "\nOur best settings, and plain loops of fewer steps at no lower PSNR:\n"
        yield from against_fewer(by_library)
    failed = {**pareto["failed"], **failures(pareto)}
    if failed:
        yield "\nWhat did not run:\n"
        yield from (f"- {name}: {text}" for name, text in failed.items())
    yield ""


def failures(pareto: Found) -> dict[str, str]:
    failed = [point for point in pareto["points"] if point["status"] != OK]
    return {f"{named(point)}, {point['mode']}, {point['steps']} steps": point["status"] for point in failed}


def named(point: Found) -> str:
    parts = dict.fromkeys(point[name] for name in ("library", "method", "setting"))
    return point["setting"] if point["library"] in (OWN, FEWER) else ", ".join(parts)


def claim(by_library: dict[str, list[Found]], steps: int) -> str:
    found = matches(by_library[OWN], frontier(peers_of(by_library)))
    if not found:
        return "No other library ran."
    ratios = sorted(match.ratio for match in found)
    held = sum(ratio >= TARGET for ratio in ratios)
    middle = ratios[len(ratios) // 2]
    return (
        f"At least {TARGET} times the speed of the best of the others, at an equal or higher PSNR: held at {held} of "
        f"{len(found)} points (lowest ratio {ratios[0]:.2f}, median {middle:.2f}, highest {ratios[-1]:.2f})."
    )


def versus(found: list[Match]) -> Iterator[str]:
    yield from head("other", "mode", "speed-up", "PSNR, dB", "ours", "speed-up", "PSNR, dB", "ratio")
    for match in found:
        other, own = match.other, match.own
        cells = [named(other), other["mode"], times(other["speedup"]), f"{other['psnr']:.1f}"]
        cells += [named(own), times(own["speedup"]), f"{own['psnr']:.1f}"] if own else ["none", "", ""]
        yield row(*cells, f"{match.ratio:.2f}")


def against_fewer(by_library: dict[str, list[Found]]) -> Iterator[str]:
    yield from head("ours", "speed-up", "PSNR, dB", "fewer steps", "speed-up", "PSNR, dB", "ratio")
    for match in matches(by_library.get(FEWER, []), frontier(by_library[OWN])):
        own, plain = match.other, match.own
        cells = [named(own), times(own["speedup"]), f"{own['psnr']:.1f}"]
        cells += [plain["setting"], times(plain["speedup"]), f"{plain['psnr']:.1f}"] if plain else ["none", "", ""]
        yield row(*cells, f"{1 / match.ratio:.2f}" if plain else "")


def losses(suite: Found, pareto: Found | None) -> Iterator[str]:
    yield "## Where we lose"
    yield prose("Everything that the rules in `report.py` find in the files.")
    found = [*loop_losses(suite), *start_losses(suite), *host_losses(suite), *quality_losses(pareto)]
    yield from (f"- {line}" for line in found)
    if not found:
        yield "No rule found anything."


def loop_losses(suite: Found) -> Iterator[str]:
    for name, model in suite["models"].items():
        rows = ran(of_part(model, "loops"))
        own = {label: each for label, each in rows.items() if each["library"] == OWN}
        for label, each in own.items():
            worse = min(each.get("efficiency", 1), each.get("cpu_efficiency", 1))
            if worse < EFFICIENCY:
                yield f"{name}: {label} reaches {worse:.2f} of its ideal {each['ideal']:.2f}x, below {EFFICIENCY}."
        for mode in ("compile", "eager"):
            yield from faster_others(name, mode, {label: each for label, each in rows.items() if each["mode"] == mode})


def faster_others(name: str, mode: str, rows: Found) -> Iterator[str]:
    own = {label: each for label, each in rows.items() if each["library"] == OWN}
    best = max(own, key=lambda label: -own[label]["seconds"]["median"], default=None)
    if best is None:
        return
    for label, each in rows.items():
        mine, theirs = own[best]["seconds"]["median"], each["seconds"]["median"]
        if each["library"] != OWN and theirs < mine:
            yield f"{name}: {label} takes {theirs:.2f} s, {best} {mine:.2f} s."
        better = each.get("efficiency", 0) > own[best].get("efficiency", 0) and each["ideal"] > 1.01
        if each["library"] != OWN and better:
            yield (
                f"{name}: {label} comes nearer to its ideal ({each['efficiency']:.2f}) than {best} to its own "
                f"({own[best]['efficiency']:.2f})."
            )


def start_losses(suite: Found) -> Iterator[str]:
    for name, model in suite["models"].items():
        rows = ran(model.get("start", {}))
        for run, which in (("cold", "first_calls_seconds"), ("warm", "first_calls_seconds")):
            timed = {label: each[run][which] for label, each in rows.items() if run in each and ", compile" in label}
            own = {label: value for label, value in timed.items() if label.startswith(OWN) and label != NONE}
            others = {label: value for label, value in timed.items() if not label.startswith(OWN)}
            if own and others and max(own.values()) > min(others.values()):
                slowest, fastest = max(own, key=lambda each: own[each]), min(others, key=lambda each: others[each])
                yield (
                    f"{name}, {run} start: {slowest} takes {own[slowest]:.1f} s for its first calls, "
                    f"{fastest} {others[fastest]:.1f} s."
                )
        yield from memory_losses(name, rows)


def memory_losses(name: str, rows: Found) -> Iterator[str]:
    peaks = {label: each.get("warm", each["cold"])["peak_bytes"] for label, each in rows.items()}
    own = {label: value for label, value in peaks.items() if label.startswith(OWN)}
    others = {label: value for label, value in peaks.items() if not label.startswith((OWN, "PyTorch"))}
    if own and COMPILE in peaks:
        most = max(own, key=lambda each: own[each])
        line = f"{name}: {most} holds {mib(own[most])} MiB at most, the plain compiled model {mib(peaks[COMPILE])} MiB"
        if others:
            least = min(others, key=lambda each: others[each])
            line += f", {least} {mib(others[least])} MiB"
        if own[most] > peaks[COMPILE]:
            yield f"{line}."


def host_losses(suite: Found) -> Iterator[str]:
    for mode, rows in suite.get("host", {}).get("found", {}).items():
        timed = {label: each for label, each in rows.items() if "seconds" in each}
        others = {label: each for label, each in timed.items() if not label.startswith(OWN)}
        for label, each in timed.items():
            if not label.startswith(OWN) or label.endswith(UNJUDGED):
                continue
            for other, theirs in others.items():
                if "partial" not in label and theirs["seconds"]["median"] < each["seconds"]["median"]:
                    yield (
                        f"Host, {mode}: {label} takes {1e3 * each['seconds']['median']:.2f} ms a call, "
                        f"a skipped step of {other} {1e3 * theirs['seconds']['median']:.2f} ms."
                    )
            outside = each["host_seconds_outside_the_graph"]["median"]
            if mode == "compile" and outside > HOST:
                yield f"Host: {label} takes {1e3 * outside:.2f} ms outside of its graph, above {1e3 * HOST:.2f} ms."


def quality_losses(pareto: Found | None) -> Iterator[str]:
    for steps in pareto["steps"] if pareto else []:
        by_library = split(pareto["points"], steps)
        for match in matches(by_library[OWN], frontier(peers_of(by_library))):
            if match.ratio < TARGET:
                ours = f"{named(match.own)}, {speed(match.own):.2f}x" if match.own else "nothing of ours"
                yield (
                    f"{steps} steps, {match.other['psnr']:.1f} dB: {named(match.other)} is {speed(match.other):.2f}x; "
                    f"at that PSNR ours is {ours}: {match.ratio:.2f} times as fast, below {TARGET}."
                )
        for match in matches(by_library.get(FEWER, []), frontier(by_library[OWN])):
            if match.own and match.ratio > 1:
                yield (
                    f"{steps} steps: {named(match.own)} without any cache are {match.ratio:.2f} times as fast as "
                    f"{named(match.other)} ({match.own['psnr']:.1f} and {match.other['psnr']:.1f} dB)."
                )


def scale(found: dict[str, Any]) -> list[str]:
    sizes, dit, flux = found["arguments"], found["dit"], found["flux"]
    width, tokens = sizes["heads"] * sizes["head_dim"], (sizes["size"] // 2) ** 2
    before, after = dit["load_average_at_start"][0], flux["load_average_at_end"][0]
    base = dit["bytes_before_the_model"] + dit["parameter_bytes"]
    weights = f"{dit['parameters'] / 1e6:.0f} M"
    lines = [
        "\n## Capturing a model of real size\n",
        "What precedes compiling, measured by `scale.py`: the first call captures the model, analyses the graph,",
        "checks the token analysis, and rewrites the graph to the variants of `DuCa(interval=5)` and FORA's reuse",
        f"step. The DiT is diffusers' `DiTTransformer2DModel`, of {weights} parameters in float32 ({sizes['layers']}",
        f"blocks, width {width}, {tokens} tokens, batch {sizes['batch']}, random weights), {dit['nodes']} nodes; the",
        f"FLUX is that of `host.py`, of {flux['nodes']} nodes. Each has its own process and one thread. Load",
        f"{before:.1f} at the start, {after:.1f} at the end. *Memory* is the peak of the process in that stage, minus",
        "what it held before the model was built and minus the parameters: everything else, including torch.export's",
        "own modules.\n",
        row("stage", "DiT, s", "CPU time, s", "memory, MiB", "FLUX, s", "CPU time, s"),
        "|---|---|---|---|---|---|",
    ]
    columns = [each["stages"] | {"all": each["total"]} for each in (dit, flux)]
    for name, own in columns[0].items():
        other = columns[1][name]
        cells = [f"{own['wall']:.2f}", f"{own['cpu']:.2f}", f"{(own['peak_bytes'] - base) / 2**20:.0f}"]
        lines.append(row(name, *cells, f"{other['wall']:.2f}", f"{other['cpu']:.2f}"))
    seconds, share = dit["total"]["wall"], dit["memory_over_parameters"]
    return [
        *lines,
        "",
        f"- Time: {seconds:.1f} s, {dit['total']['cpu']:.1f} s by CPU time;",
        f"  {verdict(seconds < CAPTURE_SECONDS, f'under {CAPTURE_SECONDS:.0f} s')}. By CPU time it is"
        f"{dit['total']['cpu'] / dit['stages']['first call']['cpu']:.1f} times the model's own first call. - Memory,",
        f"parameters included: {share:.3f} times theirs; {verdict(share < CAPTURE_MEMORY, f'under {CAPTURE_MEMORY}')}.",
        "- The first call creates tables that a trace must not create. Verification computes one branch of each kind.",
        "For the FLUX, torch.export takes most of the time.",
    ]


def plus_minus(value: Found, digits: int, sign: str = "") -> str:
    return f"{value['mean']:{sign}.{digits}f} ± {value['error']:.{digits}f}"


def groups(found: Found) -> Iterator[tuple[int, int, list[Found]]]:
    """The points by numbers of steps and level of FLOPs."""
    points = found["points"]
    for steps, level in sorted({(each["steps"], each["level"]) for each in points}):
        yield steps, level, [each for each in points if (each["steps"], each["level"]) == (steps, level)]


def methods_tables(found: Found) -> Iterator[str]:
    """The page beside ``methods.json``: every point."""
    yield "# Every method at matched FLOPs"
    yield prose(
        "Written by `benchmarks/methods.py`. [The benchmarks](../results.md#every-method-at-matched-flops) explain",
        "the columns. Standard errors are over images; that of the Fréchet distance comes from drawing pairs of",
        "images with replacement.",
    )
    for steps, level, points in groups(found):
        yield f"\n## DDIM, {steps} steps, about 1/{level} of the FLOPs"
        base = points[0]["base_seconds"]
        yield prose(
            f"A round of {found['classes']} images takes {spread(base)} s uncached. {loads(points)}",
        )
        columns = ("method", "setting", "FLOPs", "steps", "PSNR, dB", "over plain steps, dB", "perceptual", "Fréchet")
        yield from head(*columns, "time, s (IQR)", "speed-up", "caches, MiB", "images")
        yield from (methods_row(each) for each in points)


def loads(points: list[Found]) -> str:
    values = [each["load"]["median"] for each in points]
    return f"Load {min(values):.1f} to {max(values):.1f}."


def methods_row(each: Found) -> str:
    against = each.get("over_plain")
    kinds = ", ".join(f"{count:g} {kind}" for kind, count in each["kinds"].items())
    return row(
        each["method"],
        each["setting"],
        f"{each['flops']:.3f}",
        kinds,
        plus_minus(each["psnr"], 2),
        f"{plus_minus(against, 2, '+')} ({each['plain']})" if against else "",
        plus_minus(each["perceptual"], 4),
        plus_minus(each["frechet"], 3),
        spread(each["seconds"]),
        times(each["speedup"]),
        f"{each['cache_bytes'] / MIB:.1f}",
        f"{each['images']} of {each['seeds']} seeds",
    )


def speca_settings(speca: Found) -> tuple[str, str]:
    start = "one, too" if speca["start"] == 1 else "two"
    times = "" if speca["drafts"] == 1 else f" {speca['drafts']} times"
    return (
        f"SpeCa has {start}, and drafts at most{times} as many steps in a row as the level's number;",
        "its threshold falls to a hundredth, and that of *SpeCa constant* does not fall.",
    )


def methods(found: Found) -> Iterator[str]:
    where, training = found["surroundings"], found["training"]
    updates, last = training["loops"] * training["updates"], training["losses"][-1]
    yield "## Every method at matched FLOPs"
    yield prose(
        f"The trained model in the package, run by `methods.py`, {found['backend']}, one thread, duca_compile at",
        f"{where['commit']}. In each round, one image of each class is made uncached and then by every method from the",
        "same noise. Everything is compared with the uncached images: it says how much changed, not how good an image",
        "is. *FLOPs* are relative to the uncached loop. Intervals are those nearest to the level; thresholds come",
        "from a bisection on other noise. TaylorSeer has one full step at the start.",
        *speca_settings(found.get("speca", {"start": 2, "drafts": 1})),
        "*Calibrated* was measured on two loops of other noise. Everything else is at its",
        "default. Methods that decide in the step decide for the strictest of a round's 20 rows. DisCa's predictor",
        f"was trained for {updates} updates on {training['loops']} loops of {training['steps']} steps, to a relative",
        f"squared error of {last:.3f}; the paper trains longer, and against a discriminator.",
    )
    yield prose(
        "The perceptual distance is computed like LPIPS without learned weights, in the three convolution blocks of a",
        "small CNN trained on the real Fashion-MNIST (`examples/eval_demo.py`, seed 1; it classifies 92.3 % of the",
        "held-out images correctly; `results/judge.safetensors`). No published metric uses this network, so compare",
        "only within this table. The Fréchet distance is between the network's 64 features of the method's images and",
        "of the uncached ones. It falls with the number of images.",
    )
    yield "![Time against quality of all methods](results/methods.png)"
    yield prose(
        GAIN,
        "[The tables](results/methods.md) have all columns, and so does [the CSV file](results/methods.csv).",
    )
    yield from methods_matrix(found)


def methods_matrix(found: Found, judged: bool = True) -> Iterator[str]:
    """A row for each method and a column for each level; below it, if ``judged``, what is ahead of plain steps."""
    columns = {(steps, level): points for steps, level, points in groups(found)}
    yield from head("method", *(f"{steps} steps, 1/{level}" for steps, level in columns))
    names = dict.fromkeys(each["method"] for each in found["points"] if each["method"] != FEWER)
    for name in names:
        cells = []
        for points in columns.values():
            ranked = sorted(points, key=lambda each: each["perceptual"]["mean"])
            own = next((each for each in points if each["method"] == name), None)
            against = own and own.get("over_plain")
            place = f"; {ranked.index(own) + 1} of {len(ranked)}" if own else ""
            cells.append(f"{plus_minus(against, 2, '+')}{place}" if against else place.removeprefix("; "))
        yield row(name, *cells)
    yield ""
    for (steps, level), points in columns.items() if judged else ():
        gains = {each["method"]: each["over_plain"] for each in points if "over_plain" in each}
        ahead = [name for name, each in gains.items() if each["mean"] > 2 * each["error"]]
        behind = [name for name, each in gains.items() if each["mean"] < -2 * each["error"]]
        counts = sorted({each["images"] for each in points})
        images = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else counts[0]
        yield (
            f"- {steps} steps, about 1/{level} ({images} images each): more than two standard "
            f"errors ahead of plain steps by PSNR: {', '.join(ahead) or 'none'}; behind: {', '.join(behind) or 'none'}."
        )
    yield ""


def read(folder: Path, name: str) -> Found | None:
    """One file of results, if it is there."""
    path = folder / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def summary(folder: Path) -> str:
    """The page of two screens."""
    suite = json.loads((folder / "suite.json").read_text())
    parts = [SUMMARY, *best_loops(suite), *costs(suite)]
    if pareto := read(folder, "pareto"):
        parts += best_quality(pareto)
    if found := read(folder, "methods"):
        parts += ["\n## Methods at matched FLOPs", prose(GAIN), *methods_matrix(found, judged=False)]
        parts.append("![Time against quality of all methods](results/methods.png)")
    return tidy(parts)


def best_loops(suite: Found) -> Iterator[str]:
    where = suite["surroundings"]
    yield "\n## Time of a loop"
    yield prose(
        "Speed-up over `torch.compile` of the plain model, and the speed-up that FLOPs promise, for five models with",
        f"random weights; {where['cpu']}, torch {where['torch']}. Every cached loop computes each",
        f"{ordinal(suite['interval'])} step in full.",
    )
    yield from head("model", "no caching", "DuCa", "ideal", "TaylorSeer lite", "ideal", "best of the others", "ideal")
    for name, model in suite["models"].items():
        rows = {label: each for label, each in ran(of_part(model, "loops")).items() if each["mode"] == "compile"}
        if rows:
            yield best_loop(name, rows)


def best_loop(name: str, rows: Found) -> str:
    others = {label: each for label, each in rows.items() if not label.startswith((OWN, "PyTorch"))}
    fastest = min(others, key=lambda label: others[label]["seconds"]["median"], default="")
    labels = (f"{OWN}, duca, compile", f"{OWN}, taylorseer lite, compile", fastest)
    cells = [times(rows.get(NONE, {}).get("speedup_over_compile"))]
    for label in labels:
        each = rows.get(label, {})
        speedup = times(each.get("speedup_over_compile"))
        by = f" ({label.removesuffix(', compile')})" if label and label == fastest else ""
        cells += [f"{speedup}{by}", f"{each['ideal']:.2f}x" if each else ""]
    return row(name, *cells)


def costs(suite: Found) -> Iterator[str]:
    """What a first request and the caches cost, from least to most over the models."""
    rows = [each for model in suite["models"].values() for each in [ran(model.get("start", {}))] if each]
    labels = {"plain model": COMPILE, "DuCa": f"{OWN}, duca, compile", "TaylorSeer": f"{OWN}, taylorseer, compile"}
    if not rows:
        return
    yield "\n## Start and memory"
    yield prose(
        f"Seconds of the first {suite['starting_calls']} calls of a process, from the least to the most over the",
        "models, with nothing compiled and with what an earlier process compiled; and peak memory over that of the",
        "plain compiled model.",
    )
    yield from head("", "cold, s", "warm, s", "memory")
    for name, label in labels.items():
        found = [(each[label], each[COMPILE]) for each in rows if label in each and COMPILE in each]
        cold, warm = (
            [each[run]["first_calls_seconds"] for each, _ in found if run in each] for run in ("cold", "warm")
        )
        yield cost(name, cold, warm, [peak(each) / peak(plain) for each, plain in found])
    plain = [model[COMPILE] for model in rows if COMPILE in model]
    others = [compiled_others(model) for model in rows if COMPILE in model]
    if all(others):
        cold, warm = (
            [min(each[run]["first_calls_seconds"] for each in of) for of in others] for run in ("cold", "warm")
        )
        memory = [min(map(peak, of)) / peak(each) for of, each in zip(others, plain, strict=True)]
        yield cost("best of the others", cold, warm, memory)


def compiled_others(model: Found) -> list[Found]:
    return [each for label, each in model.items() if "compile" in label and not label.startswith((OWN, "PyTorch"))]


def cost(name: str, cold: list[float], warm: list[float], memory: list[float]) -> str:
    return row(name, *(f"{min(each):.0f} to {max(each):.0f}" for each in (cold, warm)), between(memory))


def peak(each: Found) -> float:
    return float(each.get("warm", each["cold"])["peak_bytes"])


def between(ratios: list[float]) -> str:
    low, high = f"{min(ratios):.2f}x", f"{max(ratios):.2f}x"
    return low if low == high else f"{low} to {high}"


def best_quality(pareto: Found) -> Iterator[str]:
    yield "\n## Speed against fidelity"
    yield prose(
        f"The trained model in the package, {pareto['seeds'] * pareto['classes']} images, compared with those of the",
        "plain loop from the same noise.",
    )
    yield from (f"- {steps} steps: {claim(split(pareto['points'], steps), steps)}" for steps in pareto["steps"])
    yield "\n![Time against PSNR of all settings](results/pareto.png)"


def page(folder: Path) -> str:
    """The page of everything."""
    suite, pareto = json.loads((folder / "suite.json").read_text()), read(folder, "pareto")
    parts = [INTRODUCTION, *setting(suite), *loops(suite), *starts(suite)]
    if any(of_part(model, "calls") for model in suite["models"].values()):
        parts += calls(suite)
    if "depth" in suite:
        parts += depth(suite["depth"])
    if suite.get("host", {}).get("found"):
        parts += hosts(suite["host"])
    if found := read(folder, "scale"):
        parts += scale(found)
    if pareto:
        parts += quality(pareto)
    if found := read(folder, "methods"):
        parts += methods(found)
    return tidy([*parts, *losses(suite, pareto)])


def tidy(parts: Sequence[str]) -> str:
    return re.sub(r"\n{3,}", "\n\n", "\n".join(parts)).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="?", default=FOLDER / "results", help="folder of the JSON files")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the two pages")
    given = parser.parse_args()
    (given.out / "README.md").write_text(summary(given.results))
    (given.out / "results.md").write_text(page(given.results))


if __name__ == "__main__":
    main()
