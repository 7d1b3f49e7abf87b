"""What states say, as a table for a terminal."""

from __future__ import annotations

import json

import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.table import Table

from pscope.experiments.reading import TEXT_ONLY
from pscope.experiments.sweep import CLEAN, PATCHED, RANDOM
from pscope.show.tables import literal

_ROW = ["layer", "target_layer", "scale", "time"]
_ROOM = 60
"""Characters of a continuation."""


def reading_tables(table: pd.DataFrame) -> list[Table]:
    """For each state that was read, what it says, beside what a random vector says; last, what is said unpatched."""
    patched = table[table["condition"].isin([PATCHED, RANDOM])]
    groups = patched.groupby(["source", "token", "position"], sort=False, dropna=False)
    return [*(_state(_name(*of), rows) for of, rows in groups), _controls(table)]


def _name(source: str, token: str, position: int) -> str:
    return repr(source) if pd.isna(position) else f"{source!r} at {position}:{token!r}"


def _state(name: str, rows: pd.DataFrame) -> Table:
    table = _empty(name)
    optional = {column: rows[column].nunique() > 1 for column in ("scale", "time")}
    for column, heading in (("layer", "ℓ"), ("target_layer", "ℓ*"), ("scale", "scale"), ("time", "time")):
        if optional.get(column, True):
            table.add_column(heading, justify="right")
    for heading in ("next token", "says", "a random vector says"):
        table.add_column(heading, overflow="fold")
    first = rows["rank"] == 1
    random = rows[first & (rows["condition"] == RANDOM)].fillna({"layer": -1}).set_index(_ROW)["continuation"]
    for key, patched in rows[rows["condition"] == PATCHED].fillna({"layer": -1}).groupby(_ROW, sort=False):
        layer, target, scale, time = key
        cells = ["" if layer < 0 else str(layer), str(target)]
        cells += [f"{scale:g}"] if optional["scale"] else []
        cells += [str(time)] if optional["time"] else []
        top = "  ".join(map(_token, patched["next_token"], patched["probability"]))
        text, relevance = patched["continuation"].iloc[0], patched["relevance"].iloc[0]
        table.add_row(*cells, top, _quote(text) if pd.isna(relevance) else _shaded(relevance), _quote(random[key]))
    return table


def _controls(table: pd.DataFrame) -> Table:
    view = _empty("nothing patched")
    for heading in ("", "next token", "says"):
        view.add_column(heading, overflow="fold")
    for condition in (CLEAN, TEXT_ONLY):
        for _, row in table[(table["condition"] == condition) & (table["rank"] == 1)].iterrows():
            name = condition if condition == CLEAN else f"{condition}: {row['source']}"
            view.add_row(literal(name), _token(row["next_token"], row["probability"]), _quote(row["continuation"]))
    return view


def _empty(title: str) -> Table:
    return Table(title=literal(title), title_justify="left", box=SIMPLE_HEAD, pad_edge=False)


def _token(token: str, probability: float) -> str:
    return f"{literal(repr(token))} {probability:.2f}"


def _quote(text: str) -> str:
    return literal(repr(text if len(text) <= _ROOM else f"{text[: _ROOM - 1]}…"))


def _shaded(relevance: str) -> str:
    """What was said, the more of a token is owed to the patch, the more it stands out."""
    styles = ((0.5, "bold"), (0.1, ""), (0.0, "dim"))
    pieces = []
    for token, share in json.loads(relevance):
        style = next(style for least, style in styles if share >= least)
        pieces.append(f"[{style}]{literal(repr(token)[1:-1])}[/{style}]" if style else literal(repr(token)[1:-1]))
    return "".join(pieces)
