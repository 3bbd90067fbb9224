"""The result of tuning as an HTML page that needs no other file and no network."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, fields
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from duca_compile.core.colors import COLORS
from duca_compile.core.files import atomic_write
from duca_compile.core.steps import StepKind
from duca_compile.errors import UsageError
from duca_compile.methods.tuning.quality import Array, arrays
from duca_compile.methods.tuning.results import Findings, best_first, judged_cells, trial_cells
from duca_compile.methods.tuning.trials import Trial
from duca_compile.policies import Calibrated, Policy
from duca_compile.policies.files import in_package

_CLASS = re.compile(r"\b[A-Z]\w*(?=\()")
_KINDS = {kind.letter: kind for kind in StepKind}
_METHODS = {"RelationalFeatureCaching": "RFC", "Calibrated": "calibrated", "ResidualGate": "residual gate"}
_CALLS = 4  # calls whose pictures are shown
_LEAST_SIDE = 96  # of a picture on the page, in pixels; smaller ones are enlarged
_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light dark; --line: #8884; --soft: #8882; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
.verdict { border-left: .3rem solid $accent; padding: .6rem 1rem; background: var(--soft); overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .8rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
pre { background: var(--soft); padding: .8rem 1rem; overflow-x: auto; }
.schedule { margin: .8rem 0; } .schedule div { display: flex; gap: 1px; height: 1.4rem; }
.schedule i { flex: 1; min-width: 1px; } .key { margin-right: 1rem; white-space: nowrap; }
.key i { display: inline-block; width: .8rem; height: .8rem; margin-right: .3rem; }
figure { display: inline-block; margin: .4rem .6rem .4rem 0; vertical-align: top; max-width: 18rem; }
figure img { display: block; margin-bottom: 2px; max-width: 100%; height: auto; image-rendering: $rendering; }
figcaption { font-size: .85rem; overflow-wrap: anywhere; }
.pareto { width: 100%; max-width: 46rem; background: white; }
</style>
</head>
<body>
<h1>$title</h1>
<p class="verdict">$verdict</p>
<h2>What to paste</h2>
<pre>$paste</pre>
<h2>Judged by calls that did not choose</h2>
<div class="wide">$judged</div>
<h2>Speed against closeness</h2>
<p>$tried</p>
<img class="pareto" alt="Speed-up and $metric of each setting that was tried" src="$pareto">
<h2>Schedules</h2>
<p>$keys</p>
$schedules
<h2>Results side by side</h2>
$pictures
<h2>All that was tried</h2>
<div class="wide">$trials</div>
$left_out
<h2>How it was measured</h2>
<ul>$conditions</ul>
</body>
</html>
""")


def write_page(tuned: Findings, path: Path) -> None:
    """Writes the page, atomically.

    Raises:
        UsageError: the file cannot be written.
    """
    text = page(tuned)
    try:
        with atomic_write(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from error


def page(tuned: Findings) -> str:
    """The page as text."""
    wish, how = tuned.wish, tuned.conditions
    tried = best_first(tuned.trials, how.choosing[0])
    small = all(max(picture.shape[:2]) < _LEAST_SIDE * 4 for result in tuned.uncached for picture in pictures(result))
    names = ("setting", "speed-up", "spread", wish.metric_name, "worst call", "call", "caches")
    return _PAGE.substitute(
        title=escape(f"{how.target}: {wish}"),
        accent="#2e8b57" if tuned.met else "#c0392b",
        rendering="pixelated" if small else "auto",
        verdict=escape(tuned.verdict),
        paste=escape(to_paste(tuned)),
        judged=_table(names, ([each.policy.name, *judged_cells(each, wish)] for each in tuned.judged)),
        tried=escape(
            f"Each point is one setting on the call {how.labels[how.choosing[0]]}. The line joins those that no other "
            "beats in both; finalists have names, and dashes show the wish. Results equal to the uncached ones "
            "have no place in it."
        ),
        metric=escape(wish.metric_name),
        pareto=_pareto(tuned, tried),
        keys=_keys("".join(each.letters for each in tuned.judged)),
        schedules="".join(_schedule(each.policy.name, each.letters) for each in tuned.judged),
        pictures=_side_by_side(tuned),
        trials=_table(
            ("setting", "speed-up", wish.metric_name, "caches", "steps"),
            ([trial.policy.name, *trial_cells(trial, wish), trial.letters] for trial in tried),
        ),
        left_out=_left_out(tuned),
        conditions="".join(f"<li>{escape(line)}</li>" for line in _conditions(tuned)),
    )


def to_paste(tuned: Findings) -> str:
    """Python that uses the policy."""
    how, policy = tuned.conditions, tuned.policy
    name = "pipe" if how.is_pipeline else "model"
    steps = "" if how.is_pipeline else f", num_inference_steps={how.steps}"
    backend = "" if how.backend == "inductor" else f', backend="{how.backend}"'
    if not in_package(policy):
        return f"{name} = duca_compile.optimize({name}, tuned.policy{backend}{steps})  # {policy.name}"
    lines = ["import duca_compile", "", f'{name} = duca_compile.optimize({name}, "tuned.json"{backend}{steps})']
    if not isinstance(policy, Calibrated):
        code = expression(policy)
        lines += ["", "# or, without the file:", f"{name} = duca_compile.optimize({name}, {code}{backend}{steps})"]
    return "\n".join(lines)


def expression(policy: Policy) -> str:
    """The Python that makes a policy of the package, with the parameters that are not the default."""
    given = []
    for each in fields(policy):  # type: ignore[arg-type]
        default = each.default if each.default_factory is MISSING else each.default_factory()
        if getattr(policy, each.name) != default:
            given.append(f"{each.name}={getattr(policy, each.name)!r}")
    code = f"{type(policy).__name__}({', '.join(given)})"
    return _CLASS.sub(r"duca_compile.\g<0>", code)


def _table(names: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _keys(letters: str) -> str:
    used = [kind for kind in StepKind if kind.letter in letters]
    return "".join(f'<span class="key"><i style="background:{COLORS[kind]}"></i>{kind.value}</span>' for kind in used)


def _schedule(name: str, letters: str) -> str:
    full = letters.count(StepKind.FULL.letter)
    steps = "".join(
        f'<i style="background:{COLORS[_KINDS[letter]]}" title="step {step}: {_KINDS[letter].value}"></i>'
        for step, letter in enumerate(letters)
    )
    caption = escape(f"{name}: {full} of {len(letters)} steps are full")
    return f'<section class="schedule">{caption}<div role="img" aria-label="{escape(letters)}">{steps}</div></section>'


def _left_out(tuned: Findings) -> str:
    if not tuned.left_out:
        return ""
    lines = "".join(f"<li>{escape(name)}: {escape(reason)}</li>" for name, reason in tuned.left_out.items())
    return f"<details><summary>Not tried, or given up</summary><ul>{lines}</ul></details>"


def _conditions(tuned: Findings) -> list[str]:
    how, wish = tuned.conditions, tuned.wish
    lines = [
        f"{how.target}, {how.steps} steps, backend {how.backend} on {how.device}; torch {how.torch}, "
        f"{how.threads} threads",
        f"calls that chose: {_named(how.labels, how.choosing)}",
        f"calls that judged: {_named(how.labels, how.judging)}",
        f"an uncached call takes {how.uncached_seconds:.2f} s, with the same backend; a speed-up is the median over "
        "pairs of an uncached run and one of the setting, in turn, and its spread is their range",
        "in the search, the time of a call is that of the median step of each kind",
        f"tuning took {how.seconds:.0f} s" + (", and its time ended before all was tried" if how.cut_short else ""),
    ]
    if wish.metric is None:
        lines.insert(1, f"PSNR is to the uncached result of the same call; its peak is {how.peak:g}")
    return lines


def _named(labels: Sequence[str], numbers: Sequence[int]) -> str:
    return ", ".join(labels[number] for number in numbers)


def _pareto(tuned: Findings, trials: Sequence[Trial]) -> str:
    """The picture of all trials, as a data URL."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    wish = tuned.wish
    shown = [trial for trial in trials if np.isfinite(trial.quality)]
    figure = Figure(figsize=(8, 4.6), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    for kind in sorted({type(trial.policy).__name__ for trial in shown}):
        own = [each for each in shown if type(each.policy).__name__ == kind]
        axes.scatter(
            [each.speedup for each in own],
            [each.quality for each in own],
            s=28,
            label=_METHODS.get(kind, kind),
            alpha=0.85,
        )
    front = _front(shown)
    axes.plot([each.speedup for each in front], [each.quality for each in front], color="#8888", zorder=0)
    finalists = {each.policy.name for each in tuned.judged}
    for trial in shown:
        if trial.policy.name in finalists:
            axes.annotate(
                trial.policy.name, (trial.speedup, trial.quality), (5, 5), textcoords="offset points", fontsize=8
            )
    if wish.wants_speed:
        least = wish.least_speedup(tuned.conditions.uncached_seconds)
        axes.axvline(least, color="#c0392b", linestyle="--", linewidth=1)
    if wish.min_quality is not None:
        axes.axhline(wish.min_quality, color="#c0392b", linestyle="--", linewidth=1)
    axes.set_xlabel("speed-up over the uncached loop")
    axes.set_ylabel(f"{wish.metric_name} to the uncached result" + (" (dB)" if wish.metric is None else ""))
    if shown:
        axes.legend(fontsize=8, frameon=False)
    axes.grid(alpha=0.25)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg")
    return f"data:image/svg+xml;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _front(trials: Sequence[Trial]) -> list[Trial]:
    """Those that no other beats in both, the fastest first."""
    front: list[Trial] = []
    for trial in sorted(trials, key=lambda each: (-each.speedup, -each.quality)):
        if not front or trial.quality > front[-1].quality:
            front.append(trial)
    return front


def pictures(result: Any) -> list[Array]:
    """The pictures in a result: one for each entry of a batch; of a video, its middle frame.

    Returns:
        Arrays (height, width, 3) in [0, 1]; none if the result holds no pictures, as latents of many channels do not.
    """
    return [picture for array in arrays(result) for picture in _as_pictures(array)]


def _as_pictures(array: Array) -> list[Array]:
    while array.ndim > 4:  # videos: (batch, frames, ...) or, with channels second, (batch, channels, frames, ...)
        frames = 2 if array.shape[1] in (1, 3, 4) and array.shape[-1] not in (1, 3, 4) else 1
        array = array.take(array.shape[frames] // 2, axis=frames)
    if array.ndim == 2:
        array = array[None, :, :, None]
    elif array.ndim == 3:
        array = array[None] if array.shape[-1] in (1, 3, 4) or array.shape[0] in (1, 3, 4) else array[..., None]
    if array.ndim != 4 or min(array.shape) == 0:
        return []
    if array.shape[-1] not in (1, 3, 4):
        if array.shape[1] not in (1, 3, 4):
            return []
        array = np.moveaxis(array, 1, -1)
    return [_as_color(each) for each in array]


def _as_color(picture: Array) -> Array:
    values = picture.astype(np.float64)
    if picture.dtype == np.uint8:
        values = values / 255
    elif values.min() < 0:
        values = (
            (values + 1) / 2 if values.min() >= -1 and values.max() <= 1 else (values - values.min()) / np.ptp(values)
        )
    values = values[..., :3]
    return (values if values.shape[-1] == 3 else values[..., :1].repeat(3, axis=-1)).clip(0, 1)


def _side_by_side(tuned: Findings) -> str:
    """For each call: the uncached picture, that of each finalist, and where and how much they differ."""
    how = tuned.conditions
    plain = [pictures(result) for result in tuned.uncached[:_CALLS]]
    if not any(plain):
        return "<p>The results hold no pictures.</p>"
    cached = [[pictures(result) for result in each.results[:_CALLS]] for each in tuned.judged]
    pairs = [
        (a, b)
        for each in cached
        for one, other in zip(each, plain, strict=True)
        for a, b in zip(one, other, strict=True)
    ]
    largest = max(float(np.abs(a - b).max()) for a, b in pairs) or 1.0
    scale = f"white is {largest:.3g} of the range of a pixel"
    parts = [f"<p>Below each picture is its difference to the uncached one, on one scale: {scale}.</p>"]
    for place, wanted in enumerate(plain):
        label = how.labels[how.judging[place]]
        parts.append(f"<h3>Call {escape(label)}</h3><div>{_figure(_sheet(wanted), 'uncached')}")
        for each, results in zip(tuned.judged, cached, strict=True):
            maps = [_difference(a, b, largest) for a, b in zip(results[place], wanted, strict=True)]
            quality = tuned.wish.quality_text(each.qualities[place])
            parts.append(_figure(_sheet(results[place]), f"{each.policy.name}: {quality}", _sheet(maps)))
        parts.append("</div>")
    return "".join(parts)


def _difference(picture: Array, wanted: Array, largest: float) -> Array:
    from matplotlib import colormaps

    colors: Array = colormaps["magma"](np.abs(picture - wanted).max(-1) / largest)[..., :3]
    return colors


def _sheet(shown: Sequence[Array]) -> Array:
    """Pictures of one size in rows, as nearly square as may be."""
    columns = int(np.ceil(np.sqrt(len(shown))))
    blank = np.ones_like(shown[0])
    rows = [[*shown[start : start + columns]] for start in range(0, len(shown), columns)]
    rows[-1] += [blank] * (columns - len(rows[-1]))
    return np.concatenate([np.concatenate(row, axis=1) for row in rows], axis=0)


def _figure(picture: Array, caption: str, difference: Array | None = None) -> str:
    text = escape(caption)
    shown = _image(picture, text)
    if difference is not None:
        shown += _image(difference, f"the difference of {text} to uncached")
    return f"<figure>{shown}<figcaption>{text}</figcaption></figure>"


def _image(picture: Array, text: str) -> str:
    from matplotlib.image import imsave

    buffer = io.BytesIO()
    imsave(buffer, picture, format="png")
    source = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    width = max(picture.shape[1], _LEAST_SIDE * 2)
    return f'<img width="{width}" alt="{text}" src="{source}">'
