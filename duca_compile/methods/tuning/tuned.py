"""The result of ``tune``, as a table, a file and a page."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from duca_compile.core.tables import FigureTable
from duca_compile.methods.tuning.report import write_page
from duca_compile.methods.tuning.results import Findings, best_first, counted, judged_cells, trial_cells
from duca_compile.policies.files import save_policy

_WIDTH = 120


@dataclass(frozen=True)
class Tuned(Findings):
    """The result of ``tune``. ``print`` shows it as a table; ``policy`` is the setting that was chosen."""

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the policy to a JSON file, atomically; ``optimize(pipe, path)`` reads it.

        Raises:
            UsageError: the file cannot be written, or the policy is not one of the package.
        """
        how = self.conditions
        about = {
            "wish": str(self.wish), "met": self.met, "speedup": self.speedup, self.wish.metric_name: self.quality,
            "target": how.target, "steps": how.steps, "backend": how.backend, "device": how.device, "torch": how.torch,
        }  # fmt: skip
        save_policy(self.policy, path, about)

    def report(self, path: str | os.PathLike[str]) -> None:
        """Writes an HTML page with pictures, schedules and figures. It needs no other file and no network.

        Raises:
            UsageError: the file cannot be written.
        """
        write_page(self, Path(path))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        wish, how = self.wish, self.conditions
        yield Text(self.verdict, style="bold" if self.met else "bold red")
        names = ("setting", "speed-up", "spread", wish.metric_name, "worst call", "call", "caches")
        table = FigureTable(*names, wrapped={"setting"})
        for each in self.judged:
            table.add_row(each.policy.name, *judged_cells(each, wish))
        yield f"{counted(len(how.judging), 'call')} that did not choose (uncached: {how.uncached_seconds:.2f} s):"
        yield table
        rest = FigureTable("setting", "speed-up", wish.metric_name, "caches", wrapped={"setting"})
        for trial in best_first(self.trials, how.choosing[0]):
            rest.add_row(trial.policy.name, *trial_cells(trial, wish))
        yield f"call {how.labels[how.choosing[0]]}, which chose; time by the median step of each kind:"
        yield rest

    def __str__(self) -> str:
        console = Console(width=shutil.get_terminal_size((_WIDTH, 0)).columns, force_terminal=False)
        with console.capture() as text:
            console.print(self)
        return text.get()
