"""What a notebook shows: a result as itself, in a frame of its own, and how far something has come."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html import escape
from typing import TYPE_CHECKING, Protocol

from pscope.characters import visible

if TYPE_CHECKING:
    import pandas as pd

MOST_ROWS = 200
"""Of longer tables only the first are shown; `table()` has all."""

SOON = 2
"""Seconds in which what takes no longer is done, without a bar."""

_STYLE = """
:root { color-scheme: light dark; font: 13px/1.4 system-ui, sans-serif; }
body { margin: .25rem; }
p { margin: 0 0 .4rem; }
table { border-collapse: collapse; }
th, td { padding: .1rem .5rem; text-align: left; vertical-align: top; white-space: pre-wrap; border: 0; }
thead th { position: sticky; top: 0; background: Canvas; border-bottom: 1px solid GrayText; }
tbody tr:nth-child(even) { background: color-mix(in srgb, CanvasText 6%, Canvas); }
"""


class Tabled(Protocol):
    """What has a table."""

    def table(self) -> pd.DataFrame:
        """All of it."""


def framed(page: str, title: str, height: str, *, scripts: bool = False) -> str:
    """A page within another one: neither its styles nor its scripts meet those around it."""
    permissions = "allow-scripts" if scripts else ""
    frame = f'style="width: 100%; height: {height}; border: 0" sandbox="{permissions}"'
    return f'<iframe {frame} title="{escape(visible(title))}" srcdoc="{escape(page)}"></iframe>'


def table_in_frame(result: Tabled) -> str:
    """What a notebook shows of a result: what it says of itself, and its table."""
    table, title = result.table(), visible(repr(result))
    head = table.head(MOST_ROWS).astype(object)
    head = head.where(head.notna(), "")
    more = f"<p>… and {len(table) - MOST_ROWS} more rows</p>" if len(table) > MOST_ROWS else ""
    rows = visible(head.to_html(index=False, border=0, float_format="{:.6g}".format))
    page = f'<!doctype html><meta charset="utf-8"><style>{_STYLE}</style><p>{escape(title)}</p>{rows}{more}'
    return framed(page, title, f"{min(24, 4 + 1.6 * len(head)):.0f}rem")


@contextmanager
def progress(total: int, what: str) -> Iterator[Callable[[int], object]]:
    """A bar in a notebook, which is told how many more are done; nothing is shown anywhere else."""
    if not _within_notebook():
        yield lambda more: None
        return
    from tqdm.auto import tqdm

    with tqdm(total=total, unit=f" {what}", delay=SOON, leave=False) as bar:
        yield bar.update


def _within_notebook() -> bool:
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return shell is not None and "IPKernelApp" in shell.config
