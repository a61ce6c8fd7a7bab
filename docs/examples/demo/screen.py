"""What the demo prints: text, tables, and where the output is a terminal, bars and a table that changes."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn
from servers import DemoError

QUARTERS = 4


class Output(Console):
    """The standard output. When its reader is gone, as after `| head`, the demo fails with a sentence."""

    def on_broken_pipe(self) -> None:
        """Send what is left to the null device, so that nothing else fails, and raise.

        Raises:
            DemoError: always.
        """
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        raise DemoError("the reader of its output has ended.")


class Screen:
    """The output of one act.

    Attributes:
        is_live: Whether the output is a terminal, so that what was printed can change.
    """

    def __init__(self) -> None:
        self._console = Output(highlight=False)
        self.is_live: bool = sys.stdout.isatty() and not self._console.is_dumb_terminal

    def say(self, text: str) -> None:
        """Print a sentence, broken at the width of the terminal."""
        self._console.print(text, markup=False)

    def say_whole(self, command: str) -> None:
        """Print a command in one line, so that it can be copied."""
        self._console.print(command, markup=False, soft_wrap=True)

    def show(self, table: RenderableType) -> None:
        """Print a table."""
        self._console.print(table)

    def live(self, table: Callable[[], RenderableType]) -> Live:
        """Return a context manager that shows what a function returns, again and again. Use it only if `is_live`."""
        return Live(console=self._console, get_renderable=table, redirect_stdout=False, redirect_stderr=False)


class Bars(Screen):
    """A screen with a bar for each server. Without a terminal, each quarter of a bar is a line of text."""

    def __init__(self, names: list[str], total: int) -> None:
        super().__init__()
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TaskProgressColumn()
        self._progress = Progress(*columns, console=self._console, disable=not self.is_live)
        self._bars = {name: self._progress.add_task(name, total=total) for name in names}
        self._done = dict.fromkeys(names, 0)
        self._total = total

    def __enter__(self) -> None:
        self._progress.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def advance(self, name: str) -> None:
        """Count one more acknowledged line of a server."""
        self._done[name] += 1
        self._progress.update(self._bars[name], completed=self._done[name])
        if not self.is_live and self._done[name] * QUARTERS % self._total < QUARTERS:
            self.say(f"{name}: {self._done[name]:,} of {self._total:,} lines acknowledged")
