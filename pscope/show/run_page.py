"""The page of a run: its settings, its figures, and all of its tables, to filter, sort, and read side by side."""

from __future__ import annotations

import base64
from pathlib import Path

import numpy as np
import pandas as pd

from pscope.characters import visible
from pscope.files import as_path
from pscope.runs.folder import STAGES, TABLE, Run
from pscope.show.page import Page, as_line, rendered

HEAVY = 2**21
"""Bytes: a drawing of more is shown by its points, not its lines."""

_UNITS = ("entity", "subject", "text", "query", "source")
_ALSO = ("relation", "context", "token", "position", "scale", "time")
_WAYS = ("reader", "lens", "reading", "method", "condition")
_MADE = ("command_line", "status", "started", "seconds", "path", "rows")
_NAMES = dict(zip(STAGES, ("what the model knows unpatched", "rows of the run", "what is said"), strict=True))


def run_page(folder: str | Path, *, beside: bool = False) -> Page:
    """The page of the run in a folder; of one that is not finished, of what there is. Raises RunError if it is none.

    What is in the run's tables is in the page, which grows with them, and with how many of their texts differ. A page
    that will stand `beside` what else is in the folder leads to it.
    """
    run = Run(as_path(folder))
    settings = run.settings
    stages = {stage: rows for stage in _NAMES if (rows := run.rows(stage)) is not None}
    notes, named_stages = run.notes(), {_NAMES[stage]: rows for stage, rows in stages.items()}
    # What is looked at first stands first: texts, then numbers.
    order = ["what is said", "rows of the run", *notes, "what the model knows unpatched"]
    tables = {name: rows for name in order if (rows := {**named_stages, **notes}.get(name)) is not None}
    model = settings.get("model", {})
    name = model.get("name", run.folder.name) if isinstance(model, dict) else run.folder.name
    title = visible(f"{settings['command']}: {name}")
    page: dict[str, object] = {
        "title": title,
        "made": {"run": visible(str(run.folder))} | {name: _text(settings[name]) for name in _MADE if name in settings},
        "settings": {visible(name): _text(value) for name, value in settings.items() if name not in _MADE},
        "figures": [_figure(path) for path in sorted(run.folder.glob("*.png"))],
        "lens": beside and (run.folder / "page.html").exists(),
        "unread": ", ".join(sorted({path.stem for path in run.folder.glob("*.csv")} - {*notes})),
    }
    data = {"tables": [_packed(name, rows) for name, rows in tables.items()]}
    return Page(rendered("run", page, data), stages.get(TABLE, pd.DataFrame()), title)


def _text(value: object) -> str:
    if isinstance(value, dict):
        return visible(", ".join(f"{name} {_text(each)}" for name, each in value.items()))
    return visible(", ".join(map(str, value)) if isinstance(value, list) else str(value))


def _figure(png: Path) -> dict[str, str]:
    """A figure as a link that holds it: as lines where that is not too much."""
    svg = png.with_suffix(".svg")
    path, kind = (svg, "svg+xml") if svg.exists() and svg.stat().st_size <= HEAVY else (png, "png")
    return {"name": png.stem, "link": f"data:image/{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"}


def _packed(name: str, table: pd.DataFrame) -> dict[str, object]:
    """A table, column by column, and what its rows are of."""
    columns = [_column(column, table[column]) for column in table]
    ways = [each for each in _WAYS if each in table]
    pairs = table[["layer", "target_layer"]].drop_duplicates() if {"layer", "target_layer"} <= {*table} else table[:0]
    # A table in which a layer is patched into several others.
    several = len(pairs.dropna()) > pairs["layer"].nunique() if len(pairs) else False
    return {
        "name": name,
        "rows": len(table),
        "columns": columns,
        "pairs": several,
        "grid": ways if several else [],
        "measures": [each["name"] for each in columns if each["kind"] in ("number", "flag")],
        "unit": next((each for each in _UNITS if each in table), None),
        "ways": ways,
        "also": [each for each in _ALSO if each in table],
        "says": next((each for each in ("continuation", "answer", "token") if each in table), None),
    }


def _column(name: str, values: pd.Series) -> dict[str, object]:
    """Numbers as they are; of anything else each value once, and for each row which it is, from 1; 0 is for none."""
    if pd.api.types.is_float_dtype(values):
        numbers = values.to_numpy(dtype="<f4", na_value=np.nan)
        return {"name": name, "kind": "number", "packed": base64.b64encode(numbers.tobytes()).decode()}
    kind = "flag" if pd.api.types.is_bool_dtype(values) else "text"
    if pd.api.types.is_integer_dtype(values) and values.abs().max() < 2**53:
        kind = "whole"
    if kind == "text":
        # A list, a date, a number that no script can hold: as it is written.
        values = values.map(str, na_action="ignore")
    codes, uniques = pd.factorize(values)
    size = next(size for size in (1, 2, 4) if len(uniques) < 2 ** (8 * size))
    packed = base64.b64encode((codes + 1).astype(f"<u{size}").tobytes()).decode()
    entries = [as_line(each) if isinstance(each, str) else each for each in uniques.tolist()]
    return {"name": name, "kind": kind, "size": size, "values": entries, "packed": packed}
