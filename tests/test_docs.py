"""The documentation: its Python runs and prints what the pages say, the paths that it names exist, its tables are true.

``python -m tests.test_docs`` writes anew what the blocks print, and the lists of passes and of commands.
"""

import inspect
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from pkgutil import resolve_name
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import typer.main
from torch import Tensor, nn

import duca_compile
from duca_compile.passes.base import CachingPass, Pass, PortablePass
from duca_compile.passes.pipeline import FOR_EXPORT, PREPARE, REWRITE

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
OWN_MODEL, FIRST_PASS, TUTORIAL = "how-to/your-own-model.md", "contributing/first-pass.md", "tutorial.md"
RUN = {OWN_MODEL: "dit.py", FIRST_PASS: "first_pass.py", TUTORIAL: "tutorial.py"}  # pages, and the file that each is
PASSES, COMMANDS = "contributing/passes.md", "reference/command-line.md"
BLOCK = re.compile(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", re.DOTALL)
LIST = re.compile(r"(<!-- list -->\n).*?(<!-- end -->)", re.DOTALL)
PATH = re.compile(r"`([\w.-]+/[\w./-]*)`")  # in code font: of the repository, or of the package
ELSEWHERE = (".venv/", "artifact/tensorrt", "duca_compile/passes/exact/cancel_transposes.py")  # made by the reader
WORDS = {ROOT / "README.md": 700, DOCS / "architecture.md": 1500}
SAY = "run python -m tests.test_docs to write the pages anew"

Names = dict[str, Any]
Printed = list[tuple[re.Match[str], str]]


@contextmanager
def aside() -> Iterator[None]:
    """In a folder of its own, and with the helpers of the unit tests to import."""
    before = Path.cwd()
    sys.path.insert(0, str(ROOT / "tests" / "unit"))
    with TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(before)
            sys.path.pop(0)


def run(page: str) -> tuple[Printed, Names]:
    """Each Python block of a page with what it prints, and the names they define, as if all were one file."""
    names: Names = {"__name__": RUN[page].removesuffix(".py")}
    found: Printed = []
    above = 0
    with aside():
        for block in BLOCK.finditer((DOCS / page).read_text()):
            with redirect_stdout(StringIO()) as printed:
                exec(compile("\n" * above + block[1], RUN[page], "exec"), names)
            above += block[1].count("\n")
            found.append((block, "".join(f"{line.rstrip()}\n" for line in printed.getvalue().strip().splitlines())))
    return found, names


def written(page: str) -> str:
    """The page with what its blocks print."""
    text = (DOCS / page).read_text()
    for block, printed in run(page)[0]:
        if block[2] is not None:
            text = text.replace(block[0], f"```python\n{block[1]}```\n\n```text\n{printed}```")
    return text


def filled(page: str, lines: list[str]) -> str:
    """The page with these lines as its list."""
    text = "\n".join(lines)
    return LIST.sub(lambda match: f"{match[1]}\n{text}\n\n{match[2]}", (DOCS / page).read_text())


def passes() -> str:
    """The page of passes with its tables."""
    head = ["| pass | kind | file | what it does |", "|---|---|---|---|"]
    first = ["## Once for each capture", "", *head, *map(of_pass, PREPARE), ""]
    portable = [each for each in FOR_EXPORT if isinstance(each, PortablePass)]
    first += ["## Once for each capture that is exported", "", *head, *map(of_pass, portable), ""]
    return filled(PASSES, [*first, "## For each variant", "", *head, *map(of_pass, REWRITE)])


def of_pass(each: Pass[Any]) -> str:
    module = inspect.getmodule(each)
    assert module is not None
    assert module.__doc__ is not None
    assert module.__file__ is not None
    path = Path(module.__file__).relative_to(ROOT / "duca_compile")
    kinds = ((CachingPass, "caching"), (PortablePass, "portable"))
    kind = next((name for cls, name in kinds if isinstance(each, cls)), "exact")
    return f"| `{type(each).__name__}` | {kind} | `{path}` | {module.__doc__.splitlines()[0].rstrip('.')} |"


def commands() -> str:
    """The page of the command line with its tables."""
    program = re.search(r'^duca-compile = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert program
    lines = []
    for name, command in typer.main.get_command(resolve_name(program[1])).commands.items():  # type: ignore[attr-defined]
        rows = [of_parameter(each) for each in command.params if each.name != "help"]
        lines += [f"## {name}", "", command.help, "", "| argument or option | default | meaning |", "|---|---|---|"]
        lines += [*rows, ""]
    return filled(COMMANDS, lines[:-1])


def of_parameter(each: Any) -> str:
    named = each.opts[0] if each.param_type_name == "option" else each.name.upper()
    default = "" if each.default is None or each.default is False else f"`{each.default}`"
    return f"| `{named}` | {'required' if each.required else default} | {each.help} |"


def check(printed: Printed) -> None:
    for block, text in printed:
        assert text == (block[2] or ""), SAY


@pytest.fixture(scope="module")
def ran() -> tuple[Printed, Names]:
    return run(OWN_MODEL)


@pytest.fixture
def names(ran: tuple[Printed, Names]) -> Names:
    return ran[1]


def test_pages_that_must_be_short_are() -> None:
    for page, most in WORDS.items():
        assert len(page.read_text().split()) <= most, page.name


def test_paths_in_code_font_exist() -> None:
    pages = [*DOCS.rglob("*.md"), ROOT / "CONTRIBUTING.md"]
    named = {path for page in pages for path in PATH.findall(page.read_text()) if not path.startswith(ELSEWHERE)}
    assert len(named) > 40
    gone = sorted(path for path in named if not any((each / path).exists() for each in (ROOT, ROOT / "duca_compile")))
    assert not gone


def test_the_list_of_passes_is_that_of_the_pipeline() -> None:
    assert passes() == (DOCS / PASSES).read_text(), SAY


def test_the_commands_are_those_of_the_program() -> None:
    assert commands() == (DOCS / COMMANDS).read_text(), SAY


def test_the_blocks_print_what_the_page_says(ran: tuple[Printed, Names]) -> None:
    check(ran[0])
    assert sum(bool(printed) for _, printed in ran[0]) >= 5


def test_the_first_pass_passes_its_tests() -> None:
    printed, names = run(FIRST_PASS)
    check(printed)
    tests = [value for name, value in names.items() if name.startswith("test_")]
    assert len(tests) == 5
    for test in tests:
        test()


@pytest.mark.slow
def test_the_tutorial_runs() -> None:
    check(run(TUTORIAL)[0])


@torch.no_grad()
def test_a_skip_step_returns_what_the_step_before_returned(names: Names) -> None:
    fast, call = duca_compile.optimize(names["model"], "duca", "eager"), names["call"]
    results = [fast(call["latent"] / (1 + i), call["timestep"] - i, call["label"]) for i in range(3)]
    assert [executed.kind.value for executed in fast.history] == ["full", "partial", "skip"]
    assert torch.equal(results[2], results[1])
    assert not torch.equal(results[1], results[0])


@torch.no_grad()
def test_a_mask_of_another_length_is_captured_anew(names: Names) -> None:
    model = names["Padded"]().eval()
    exact = duca_compile.optimize(model, "uncached", "eager")
    for length in (60, 30):
        call = names["call"] | {"mask": torch.arange(64) < length}
        exact.reset()
        result, expected = exact(**call), model(**call)
        assert result.shape == expected.shape
        assert torch.equal(result, expected)


def kinds(names: Names, forward: Callable[..., Tensor]) -> list[str]:
    """The kinds of branches where a block's forward is ``forward(block, x, attention gate, mlp gate)``."""

    def of_block(block: Any, x: Tensor, condition: Tensor) -> Tensor:
        return forward(block, x, *block.gates(condition).unsqueeze(1).chunk(2, dim=-1))

    model = names["TinyDiT"](type("Other", (names["Block"],), {"forward": of_block}), depth=2)
    return [branch.kind for branch in duca_compile.explain(model.eval(), **names["call"]).branches]


def in_place(block: Any, x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    x += first * block.attention(x)
    x += second * block.mlp(x)
    return x


def after_norm(block: Any, x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    x = nn.functional.layer_norm(x + first * block.attention(x), x.shape[-1:])
    return nn.functional.layer_norm(x + second * block.mlp(x), x.shape[-1:])


def scaled(block: Any, x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    x = (x + first * block.attention(x)) / 2**0.5
    return torch.addcmul(x, second, block.mlp(x)) / 2**0.5


def weighed(block: Any, x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    x = torch.lerp(x, block.attention(x), first)
    return torch.where(x.new_ones(x.shape).bool(), x + second * (block.mlp(x) - x), x)


def parallel(block: Any, x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    return x + first * block.attention(x) + second * block.mlp(x)


@pytest.mark.parametrize("forward", [in_place, after_norm, scaled, weighed, parallel])
def test_sums_that_are_understood(names: Names, forward: Callable[..., Tensor]) -> None:
    assert kinds(names, forward) == ["self_attention", "mlp"] * 2


def test_one_sum_of_both_is_one_branch(names: Names) -> None:
    assert kinds(names, lambda b, x, one, two: x + (one * b.attention(x) + two * b.mlp(x))) == ["attention+mlp"] * 2


def test_a_product_within_the_sum_is_no_sum(names: Names) -> None:
    def added(x: Tensor, result: Tensor) -> Tensor:
        return torch.baddbmm(x, result, torch.eye(x.shape[2]).expand(len(x), -1, -1))

    with pytest.raises(duca_compile.StructureError, match="no residual branch found"):
        kinds(names, lambda b, x, one, two: one * two * added(added(x, b.attention(x)), b.mlp(x)))


def test_a_mixing_layer_with_a_sum_of_its_own(names: Names) -> None:
    def smoothed(x: Tensor) -> Tensor:
        return nn.functional.conv1d(x.transpose(1, 2), torch.ones(x.shape[2], x.shape[2], 1)).transpose(1, 2)

    assert kinds(names, lambda b, x, one, two: x + one * smoothed(x) + two * b.mlp(x)) == ["mixing", "mlp"] * 2


def test_a_timestep_that_is_no_wave_is_named(names: Names) -> None:
    class Level(names["TinyDiT"]):
        def __init__(self) -> None:
            super().__init__()
            self.levels = nn.Embedding(1000, 64)

        def forward(self, latent: Tensor, level: Tensor, label: Tensor) -> Tensor:
            x = self.enter(latent)
            for block in self.blocks:
                x = block(x, self.levels(level) + self.embed_label(label))
            return self.leave(x)

    call = {"latent": torch.randn(2, 64, 4), "level": torch.full((2,), 900), "label": torch.tensor([3, 4])}
    with pytest.raises(duca_compile.StructureError, match="no timestep among"):
        duca_compile.explain(Level().eval(), **call)
    named = duca_compile.optimize(Level().eval(), timestep="level")
    assert duca_compile.explain(named, **call).facts.timestep == "level"


if __name__ == "__main__":
    for each in RUN:
        (DOCS / each).write_text(written(each))
    (DOCS / PASSES).write_text(passes())
    (DOCS / COMMANDS).write_text(commands())
