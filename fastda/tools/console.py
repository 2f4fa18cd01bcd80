"""What the command line shows on standard error: progress and tables, with rich where it is installed."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

LOG_WIDTH = 200  # a log has no edge to wrap at


class Cell(NamedTuple):
    """A text and its style, one that rich knows."""

    text: str
    style: str = ""


class Column(NamedTuple):
    """`rank`: where the table is too wide, columns of the highest rank go first; those of 0 stay."""

    name: str
    right: bool = False
    rank: int = 0


class Console:
    """Standard error; `rich` is that package's console, None where the package is absent."""

    def __init__(self) -> None:
        self.is_terminal = sys.stderr.isatty()
        self.width = shutil.get_terminal_size().columns
        if not self.is_terminal and "COLUMNS" not in os.environ:
            self.width = LOG_WIDTH
        self.rich: Any = None
        try:
            from rich.console import Console as RichConsole
        except ImportError:
            return
        self.rich = RichConsole(stderr=True, width=self.width, highlight=False)

    def print(self, *cells: Cell | str) -> None:
        """The cells in one line, however long it is."""
        parts = [Cell(c) if isinstance(c, str) else c for c in cells]
        if self.rich is None:
            print("".join(part.text for part in parts), file=sys.stderr)
            return
        from rich.text import Text

        self.rich.print(Text.assemble(*parts), soft_wrap=True)

    def table(self, title: str, columns: Sequence[Column], rows: Sequence[Sequence[Cell | str]]) -> None:
        """A table no wider than the terminal; it says which columns had no room.

        Where the columns of rank 0 alone are too wide, the first one's cells become lines of their own.
        """
        cells = [[Cell(c) if isinstance(c, str) else c for c in row] for row in rows]
        used = [i for i in range(len(columns)) if any(row[i].text for row in cells)]
        widths = {i: max(len(columns[i].name), *(len(row[i].text) for row in cells)) for i in used}
        shown = list(used)
        while self._total(shown, widths) > self.width and any(columns[i].rank for i in shown):
            shown.remove(max(shown, key=lambda i: (columns[i].rank, i)))
        apart = self._total(shown, widths) > self.width
        first, rest = (shown[:1], shown[1:]) if apart else ([], shown)

        def line(row: Sequence[Cell]) -> list[Cell | str]:
            parts: list[Cell | str] = ["  "] if apart else []
            for i in rest:
                pad = " " * (widths[i] - len(row[i].text))
                parts += [pad, row[i]] if columns[i].right else [row[i], pad]
                parts.append("  ")
            while parts and isinstance(parts[-1], str) and not parts[-1].strip():
                parts.pop()
            return parts

        self.print()
        for part in textwrap.wrap(title, self.width):
            self.print(Cell(part, "bold"))
        self.print(*line([Cell(c.name, "bold") for c in columns]))
        self.print("─" * min(self.width, self._total(rest, widths) + 2 * apart))
        before = None
        for row in cells:
            for i in first:
                if row[i].text not in ("", before):
                    self.print(row[i])
                    before = row[i].text
            self.print(*line(row))
        if missing := [columns[i].name for i in used if i not in shown]:
            note = f"no room at {self.width} columns: {', '.join(missing)} (--json has all)"
            for part in textwrap.wrap(note, self.width):
                self.print(Cell(part, "dim"))

    def _total(self, shown: Sequence[int], widths: dict[int, int]) -> int:
        return sum(widths[i] + 2 for i in shown) - 2

    @contextmanager
    def progress(self, what: str, total: float) -> Iterator[Progress]:
        """A bar, while what is inside runs; nothing in a log and without rich."""
        if self.rich is None or not self.is_terminal:
            yield Progress(None, None)
            return
        from rich import progress as bars

        columns = (
            bars.TextColumn("{task.description}"),
            bars.BarColumn(),
            bars.TimeElapsedColumn(),
            bars.TextColumn("{task.fields[left]}"),
        )
        with bars.Progress(*columns, console=self.rich, transient=True) as bar:
            yield Progress(bar, bar.add_task(what, total=total, left=""))


class Progress:
    """One bar; moving it does nothing where none is shown."""

    def __init__(self, bar: Any, task: Any) -> None:
        self._bar, self._task = bar, task

    def update(self, **state: Any) -> None:
        """rich's `description`, `completed`, `total`, and `left`, a text behind the bar."""
        if self._bar is not None:
            self._bar.update(self._task, **state)
