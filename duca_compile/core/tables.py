"""Tables for the terminal that never truncate a figure, however narrow the terminal is."""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Iterable, Iterator, Mapping

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Column, Table
from rich.text import Text

from duca_compile.core.text import printable

_BETWEEN, _EDGES = 3, 4  # characters that rich's box needs between two columns, and at both ends


class FigureTable:
    """A table that shows its cells whole: where its rows are too long for the terminal, each becomes a list.

    Args:
        columns: the headers, all different; they may wrap at spaces. The first cell of a row is its title in a list.
        wrapped: headers of the columns whose cells may wrap at spaces as well; other cells stay on one line.
    """

    def __init__(self, *columns: str, wrapped: Collection[str] = ()) -> None:
        self._columns, self._wrapped = columns, frozenset(wrapped)
        self._rows: list[tuple[Text, ...]] = []

    def add_row(self, *cells: str | Text) -> None:
        """Appends a row, of at most one cell for each column."""
        texts = [cell if isinstance(cell, Text) else Text(printable(cell)) for cell in cells]
        self._rows.append((*texts, *(Text() for _ in self._columns[len(texts) :])))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        widths = self._widths(options.max_width)
        if widths is None:
            yield from self._lists(options.max_width)
            return
        table = Table(*(Column(name, width=width) for name, width in zip(self._columns, widths, strict=True)))
        for row in self._rows:
            table.add_row(*row)
        yield table

    def _widths(self, available: int) -> list[int] | None:
        """The width of each column; None where the columns do not fit side by side."""
        available -= _EDGES + _BETWEEN * (len(self._columns) - 1)
        wanted, widths = [], []
        for place, name in enumerate(self._columns):
            cells = [row[place].plain for row in self._rows]
            wanted.append(max(map(cell_len, [name, *cells])))
            unbroken = _words([name, *cells]) if name in self._wrapped else [*_words([name]), *cells]
            widths.append(max(map(cell_len, unbroken), default=0))
        if sum(widths) > available:
            return None
        for _ in range(min(available, sum(wanted)) - sum(widths)):
            neediest = max(range(len(widths)), key=lambda place: wanted[place] - widths[place])
            widths[neediest] += 1
        return widths

    def _lists(self, available: int) -> Iterator[Text]:
        title, *names = self._columns
        for first, *cells in self._rows:
            yield Text.assemble((f"{title} ", "bold"), first)
            values = {name: cell.plain for name, cell in zip(names, cells, strict=True) if cell.plain}
            yield from _labelled(values, available, indent=2)


class Fields:
    """Labelled values, one below the other."""

    def __init__(self, values: Mapping[str, str]) -> None:
        self._values = values

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from _labelled(self._values, options.max_width, style="bold")


class Items:
    """Indented sentences, one below the other; continuation lines are indented further."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts = tuple(texts)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for text in self._texts:
            yield Text("\n".join(_wrapped(f"  {text}", options.max_width, "    ")))


def _words(texts: Iterable[str]) -> list[str]:
    return [word for text in texts for word in text.split()]


def _labelled(values: Mapping[str, str], available: int, indent: int = 0, style: str = "") -> Iterator[Text]:
    """Each value beside its label, or below it where one of its words would not fit beside it."""
    width = max(map(len, values), default=0)
    for name, value in values.items():
        beside = indent + width + 2
        fits = max(map(len, value.split()), default=0) <= available - beside
        below = " " * (beside if fits else indent + 2)
        text = Text("\n".join(_wrapped(f"{' ' * indent}{name:<{width}}  {printable(value)}", available, below)))
        text.stylize(style, indent, indent + len(name))
        yield text


def _wrapped(text: str, available: int, below: str) -> list[str]:
    return textwrap.wrap(text, available, subsequent_indent=below, break_on_hyphens=False)
