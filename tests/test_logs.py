"""DUCA_LOG, and what the log says: what was captured and why, what was compiled, what was not."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import duca_compile
from duca_compile import DuCa
from duca_compile.backends.base import Lifted
from duca_compile.backends.inductor.backend import InductorBackend
from duca_compile.compiler.differences import differences
from duca_compile.frontend.binder import Binder
from tests.test_optimize import build, latent

ROOT = str(Path(__file__).parents[1])
HEAVY = "sorted({'torch', 'rich', 'numpy', 'duca_compile.logs'} & {*sys.modules})"


def python(code: str, level: str | None) -> tuple[str, str]:
    """What a process prints, to stdout and to stderr, with this level in the environment."""
    environment = {**os.environ, "PYTHONPATH": ROOT, "DUCA_LOG": level or ""}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip(), done.stderr.strip()


def test_importing_the_package_loads_next_to_nothing() -> None:
    code = f"import duca_compile, sys; print({HEAVY})"
    assert python(code, None) == ("[]", "")
    assert python(code, "info") == ("['duca_compile.logs']", "")


def test_the_level_is_what_was_asked_for() -> None:
    code = "import duca_compile, logging; log = logging.getLogger('duca_compile'); log.debug('one'); log.info('two')"
    assert python(code, None) == ("", "")
    assert re.fullmatch(r"\d\d:\d\d:\d\d duca_compile INFO: two", python(code, "info")[1])
    assert len(python(code, "DEBUG")[1].splitlines()) == 2
    assert python(code, "error") == ("", "")


def test_a_program_with_handlers_of_its_own_gets_each_line_once() -> None:
    code = "import logging; logging.basicConfig(format='mine: %(message)s'); import duca_compile"
    assert python(f"{code}; logging.getLogger('duca_compile').info('two')", "info") == ("", "mine: two")


def test_an_unknown_level_is_said_once_and_changes_nothing() -> None:
    code = "import duca_compile, logging; logging.getLogger('duca_compile').info('two')"
    assert python(code, "loud") == ("", "DUCA_LOG=loud is unknown; choose one of debug, info, warning, error")


Messages = Callable[[], list[str]]


@pytest.fixture
def messages(caplog: pytest.LogCaptureFixture) -> Messages:
    """What was logged since this was last asked."""
    caplog.set_level(logging.DEBUG, "duca_compile")

    def take() -> list[str]:
        found = [record.getMessage() for record in caplog.records if record.name == "duca_compile"]
        caplog.clear()
        return found

    return take


def call(model: nn.Module, index: int = 0, rows: int = 4, **options: Any) -> None:
    labels = torch.ones(rows, dtype=torch.int64)
    with torch.no_grad():
        model(latent(index, batch=rows), timestep=torch.full((rows,), 900 - 90 * index), class_labels=labels, **options)


def test_captures_are_told_with_what_differs(messages: Messages) -> None:
    optimized = duca_compile.optimize(build(1), "none", "eager")
    call(optimized)
    captured, graph = messages()
    assert re.fullmatch(r"captured DiTTransformer2DModel in \d+\.\d s: \d+ nodes, 2 branches in 1 blocks", captured)
    assert re.fullmatch(r"made the graph of full steps: \d+ nodes, in \d+\.\d\d s", graph)
    call(optimized, rows=2)
    why, captured, _ = messages()
    before, now = "float32[4, 3, 8, 8] on cpu", "float32[2, 3, 8, 8] on cpu"
    assert f"(hidden_states: {before} before, {now} now; timestep: int64[4] on cpu before, int64[2]" in why
    assert why.endswith("capturing DiTTransformer2DModel anew")
    call(optimized, cross_attention_kwargs={"scale": 1.5})
    assert "(cross_attention_kwargs: None before, a container, 1.5 now): capturing" in messages()[0]
    call(optimized, rows=2)
    assert not messages()


def test_steps_log_nothing_once_all_is_made(messages: Messages) -> None:
    optimized = duca_compile.optimize(build(1), DuCa(interval=3), "eager", 6)
    for index in range(6):
        call(optimized, index)
    assert len([message for message in messages() if message.startswith("made the graph of")]) >= 3
    for index in range(6):
        call(optimized, index)
    assert not messages()


def test_what_was_compiled_is_told(messages: Messages, monkeypatch: pytest.MonkeyPatch) -> None:
    def lower(self: InductorBackend, lifted: Lifted, weights: list[Tensor], tensors: tuple[Tensor, ...]) -> Any:
        return fx.GraphModule({}, lifted.graph)

    monkeypatch.setattr(InductorBackend, "lower", lower)
    call(duca_compile.optimize(build(1), "none"))
    assert re.fullmatch(r"Inductor compiled the variant of full steps in \d+\.\d s", messages()[-1])


def test_what_runs_under_eager_instead_is_told(messages: Messages, monkeypatch: pytest.MonkeyPatch) -> None:
    def lower(self: InductorBackend, lifted: Lifted, weights: list[Tensor], tensors: tuple[Tensor, ...]) -> Any:
        raise ValueError("no such operator")

    monkeypatch.setattr(InductorBackend, "lower", lower)
    with pytest.warns(RuntimeWarning, match="no such operator"):
        call(duca_compile.optimize(build(1), "none"))
    assert messages()[-2:] == [
        "Inductor could not compile the variant of full steps: no such operator",
        "the variant of full steps runs under eager",
    ]


class Takes(nn.Module):
    def forward(self, x: Tensor, scale: object = 1.0, sizes: object = None) -> Tensor:
        return x


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"scale": 2.0}, ["scale: 1.0 before, 2.0 now"]),
        ({"sizes": (1, 2)}, ["sizes: None before, a container, 1, 2 now"]),
        ({"scale": "cosine", "sizes": 3}, ["scale: 1.0 before, 'cosine' now", "sizes: None before, 3 now"]),
        ({"x": torch.zeros(2, 3, dtype=torch.float16)}, ["x: float32[2, 3] on cpu before, float16[2, 3] on cpu now"]),
        ({"sizes": list(range(99))}, None),
        ({}, []),
    ],
)  # fmt: skip
def test_differences_are_named_by_argument(options: dict[str, Any], told: list[str] | None) -> None:
    bind = Binder(Takes())
    before, now = (bind((), {"x": torch.zeros(2, 3), **given}).key for given in ({}, options))
    found = differences(now, before)
    assert told is None or found == told
    assert all(len(each) < 140 for each in found)


def test_autocast_is_a_difference() -> None:
    bind, x = Binder(Takes()), torch.zeros(2)
    before = bind((x,), {}).key
    with torch.autocast("cpu", torch.bfloat16):
        now = bind((x,), {}).key
    assert differences(now, before) == ["torch.autocast: None before, torch.bfloat16 now"]
