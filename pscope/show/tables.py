"""What tables for a terminal share: 80 columns, and text that stands as it is."""

from __future__ import annotations

from collections.abc import Iterable

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from pscope.characters import visible


def literal(text: str) -> str:
    """Text from data or a model for a table or a console, as it stands: no markup, nothing that steers a terminal."""
    return escape(visible(text))


def one_line(text: str) -> str:
    """The same, with every break and run of blanks as one blank."""
    return literal(" ".join(text.split()))


def narrow_table(caption: str, *, tight: bool = False) -> Table:
    """A table without side borders, for numbers in 80 columns; a `tight` one has one blank between columns."""
    padding = 0 if tight else (0, 1, 0, 0)
    return Table(box=SIMPLE_HEAD, pad_edge=False, padding=padding, caption=caption, caption_justify="left")


def facts_table(facts: Iterable[tuple[str, str]]) -> Table:
    """Names, and what is to be said of each."""
    table = narrow_table("")
    table.show_header = False
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for name, text in facts:
        table.add_row(name, literal(text))
    return table


def with_band(mean: float, low: float, high: float, digits: int = 2) -> str:
    """A mean and its band, where there is one."""
    band = "" if low != low else f" ({low:.{digits}f}–{high:.{digits}f})"
    return f"{mean:.{digits}f}{band}"


def number(value: float) -> str:
    """Two digits, or nothing where there is no number."""
    return "" if value != value else f"{value:.2f}"
