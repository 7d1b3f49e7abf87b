"""What is printed: results on standard output, everything else on standard error."""

from __future__ import annotations

import json
import os
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.markup import escape

from pscope.characters import visible

if TYPE_CHECKING:
    import pandas as pd

out = Console(highlight=False, emoji=False)
err = Console(stderr=True, highlight=False, emoji=False)


def rank() -> int:
    """The number of this process among those that were started together, 0 for one that is alone."""
    together = os.environ.get("WORLD_SIZE", "1") != "1"
    return int(os.environ.get("RANK", "0")) if together and os.environ.get("RANK", "").isdigit() else 0


def working(what: str) -> AbstractContextManager[object]:
    """A block in which the first of several processes says that something is under way."""
    return err.status(f"{escape(visible(what))} …") if rank() == 0 else nullcontext()


def tell(text: str) -> None:
    """A line on standard error, or several, beside what is printed as the result, by the first of several processes."""
    # Where standard error is full, or its reader gone, a run of hours is not to end for it.
    if rank() == 0:
        with suppress(OSError):
            err.print(visible(text), soft_wrap=True, markup=False)


def print_json(what: pd.DataFrame | dict[str, Any]) -> None:
    """A table, as a list of its rows, or a record as JSON on standard output; what is missing is null."""
    record = what if isinstance(what, dict) else json.loads(what.to_json(orient="records"))
    # Where the stream cannot hold a character, JSON has an escape of its own for it.
    typer.echo(visible(json.dumps(record, ensure_ascii=not out.encoding.startswith("utf"), indent=2)))
