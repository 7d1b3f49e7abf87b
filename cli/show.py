"""`pscope show`: a page of any run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from pscope.cli.console import tell


def show(
    run: Annotated[Path, typer.Argument(help="The folder of a run, finished or not.", show_default=False)],
    out: Annotated[
        Path | None, typer.Option(help="Write the page to this new file.", show_default="show.html in the folder")
    ] = None,
) -> None:
    """A page of a run: its settings, its figures, and its tables, to filter, to sort, and to read side by side.

    One HTML file that needs no network. Where layers are patched into several others, a heatmap opens the rows behind
    each of its cells.
    """
    from pscope.runs.folder import Run
    from pscope.show.run_page import run_page

    page = run_page(run, beside=out is None)
    if out is None:
        out = Run(run).write_page(page.html, "show")
    else:
        page.save(out)
    tell(f"page: {out}")
