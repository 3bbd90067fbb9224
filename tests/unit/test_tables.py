"""Tables for the terminal: every cell is whole at every width, and no line is longer than the terminal."""

import re
from io import StringIO

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console, RenderableType

from duca_compile.core.tables import Fields, FigureTable, Items

FIGURES = st.from_regex(re.compile(r"[0-9]{1,6}\.[0-9]{1,2} (s|ms|MiB|dB)", re.ASCII), fullmatch=True)
SENTENCES = st.lists(st.text("abcdefgh_.:/", min_size=1, max_size=16), min_size=1, max_size=8).map(" ".join)


def printed(content: RenderableType, width: int) -> list[str]:
    file = StringIO()
    Console(file=file, width=width, force_terminal=False).print(content)
    lines = file.getvalue().splitlines()
    assert all(len(line) <= width for line in lines)
    assert "…" not in file.getvalue()
    return lines


@given(st.lists(st.tuples(SENTENCES, FIGURES, FIGURES, SENTENCES), min_size=1, max_size=4), st.integers(40, 140))
def test_every_cell_is_whole(rows: list[tuple[str, str, str, str]], width: int) -> None:
    table = FigureTable("run", "wall time", "memory of caches", "operators", wrapped={"run", "operators"})
    for row in rows:
        table.add_row(*row)
    text = "\n".join(printed(table, width))
    words = text.split()
    for run, time, memory, operators in rows:
        assert time in text
        assert memory in text
        assert set(run.split()) | set(operators.split()) <= set(words)


def test_what_fits_is_a_table_and_what_does_not_is_a_list() -> None:
    table = FigureTable("policy", "share of a full step", "tokens", wrapped={"policy"})
    table.add_row("DuCa of five", "12.15%")
    assert len(printed(table, 48)) == 5
    assert len(printed(table, 47)) == 6, "the header wraps at a space"
    assert len(printed(table, 38)) == 7, "so does the cell"
    assert printed(table, 26) == ["policy DuCa of five", "  share of a full step", "    12.15%"], "no empty cells"


@pytest.mark.parametrize("width", [24, 60])
def test_values_go_on_beside_their_label_or_below_it(width: int) -> None:
    lines = printed(Fields({"model": "DiT", "weights": "1,234,567 bytes of transformer_blocks.12"}), width)
    assert lines[0] == "model    DiT"
    assert lines[1:] == (
        ["weights  1,234,567 bytes of transformer_blocks.12"]
        if width == 60
        else ["weights  1,234,567 bytes", "  of", "  transformer_blocks.12"]
    )


def test_sentences_are_indented() -> None:
    assert printed(Items(["not understood: add", "mul"]), 20) == ["  not understood:", "    add", "  mul"]


def test_an_empty_table_is_its_headers() -> None:
    assert "graph" in printed(FigureTable("graph", "bytes"), 40)[1]
