"""A table of text: coloured in a terminal, Markdown where it is pasted or piped."""

from __future__ import annotations

from dataclasses import dataclass

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table as RichTable
from rich.text import Text

_WRAPPED_WIDTH = 14  # the least that a column of running text gets


@dataclass(frozen=True)
class Table:
    """Headers and rows of text, numbers to the right from column `numbers_from` on.

    In a terminal, only the columns in `wrapping` are broken into lines, and where there is no room
    the columns in `droppable` are left out, first to last; Markdown always has all.
    """

    headers: tuple[str, ...]
    rows: list[tuple[str, ...]]
    numbers_from: int = 2
    title: str | None = None
    notes: str | None = None
    wrapping: tuple[int, ...] = ()
    droppable: tuple[int, ...] = ()

    def markdown(self) -> str:
        """GitHub Markdown."""
        marks = ["---" if i < self.numbers_from else "---:" for i in range(len(self.headers))]
        lines = [list(self.headers), marks, *(list(row) for row in self.rows)]
        body = "\n".join("| " + " | ".join(_cell(c) for c in line) + " |" for line in lines)
        parts = [self.title, body, self.notes]
        return "\n\n".join(part for part in parts if part)

    def print(self, console: Console) -> None:
        if not console.is_terminal:
            console.print(self.markdown(), markup=False)
            return
        if self.title:
            console.print(self.title, markup=False, style="bold", soft_wrap=False)
        dropped = 0
        table = self._rich(dropped)
        while self._too_wide(table, console) and dropped < len(self.droppable):
            dropped += 1
            table = self._rich(dropped)
        console.print(table, soft_wrap=False)
        if dropped:
            names = ", ".join(self.headers[i] for i in self.droppable[:dropped])
            console.print(f"No room for: {names}.", markup=False, style="dim", soft_wrap=False)
        if self.notes:
            console.print(self.notes, markup=False, style="dim", soft_wrap=False)

    def _rich(self, dropped: int) -> RichTable:
        shown = [i for i in range(len(self.headers)) if i not in self.droppable[:dropped]]
        table = RichTable(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
        for index in shown:
            wraps = index in self.wrapping
            header = self.headers[index] if wraps else self.headers[index].replace(" ", "\n")
            texts = [*header.split("\n"), *(row[index] for row in self.rows)]
            table.add_column(
                header,
                justify="left" if index < self.numbers_from else "right",
                no_wrap=not wraps,
                overflow="fold",
                min_width=_WRAPPED_WIDTH if wraps else max(map(cell_len, texts)),
            )
        for row in self.rows:
            table.add_row(*(Text(row[index]) for index in shown))
        return table

    @staticmethod
    def _too_wide(table: RichTable, console: Console) -> bool:
        unlimited = console.options.update(width=10_000)
        return Measurement.get(console, unlimited, table).minimum > console.width


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
