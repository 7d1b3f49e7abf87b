"""The lens page: a prompt's tokens at every layer as one HTML file, which asks for nothing from elsewhere."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib.resources import files
from pathlib import Path

import pandas as pd
from jinja2 import Environment

from pscope.characters import visible
from pscope.engine.generate import Decoding
from pscope.errors import DataError
from pscope.experiments.token_grid import grid_of
from pscope.files import written_whole
from pscope.mappings.mapping_set import MappingSet
from pscope.models.fingerprint import fingerprint
from pscope.models.model import LanguageModel

_TEMPLATES = files("pscope.show").joinpath("templates")


def lens_page(table: pd.DataFrame, title: str, made: Mapping[str, str], vocabulary: int) -> str:
    """The page of a table of `TokenGrid`, over a model with so many tokens; `made` tells how it came about."""
    cells = table[table["position"].notna()]
    first = cells[cells["rank"] == 1]
    tokens = first.drop_duplicates("position").sort_values("position")
    words: dict[str, int] = {}
    data = {
        "tokens": [_shown(token) for token in tokens["token"]],
        "answers": [_shown(answer) for answer in tokens["answer"]],
        "layers": sorted(first["layer"].unique().tolist()),
        "vocabulary": vocabulary,
        "lenses": [_lens(name, rows, table, words) for name, rows in cells.groupby("lens", sort=False)],
    }
    # Tokens stand once, and cells name them by number.
    data["words"] = [_shown(word) for word in words]
    page = {
        **data,
        "title": visible(title),
        "made": {name: visible(told) for name, told in made.items()},
        "top_k": int(cells["rank"].max()),
        # Of the first lens, layer by layer: what stands there before any script has run.
        "first": [
            [_first(cell, data["words"]) for cell in row] for row in zip(*data["lenses"][0]["cells"], strict=True)
        ],
    }
    environment = Environment(autoescape=True, trim_blocks=False)
    template = environment.from_string(_TEMPLATES.joinpath("lens.html").read_text("utf-8"))
    style, script = (_TEMPLATES.joinpath(f"lens.{kind}").read_text("utf-8") for kind in ("css", "js"))
    return template.render(page=page, style=style, script=script, data=_embedded(data))


@dataclass(frozen=True)
class LensPage:
    """A page and the table that it shows. A notebook shows the page, in a frame of its own."""

    html: str = field(repr=False)
    cells: pd.DataFrame = field(repr=False)
    title: str

    def table(self) -> pd.DataFrame:
        """What is in the page: see `pscope.experiments.token_grid.TokenGrid`."""
        return self.cells

    def save(self, path: str | Path) -> None:
        """Write the page to a new file. Raises DataError where something is there already."""
        path = Path(path)
        if path.exists():
            raise DataError(f"{path} is there already; name a new file")
        with written_whole(path) as unfinished:
            unfinished.write_text(self.html, "utf-8")

    def _repr_html_(self) -> str:
        # In a frame, so that neither its styles nor its script meet those of the notebook, or of another page.
        frame = 'style="width: 100%; height: 46rem; border: 0" sandbox="allow-scripts"'
        return f'<iframe {frame} title="{escape(self.title)}" srcdoc="{escape(self.html)}"></iframe>'


def lens(
    model: LanguageModel,
    text: str,
    layers: Sequence[int] | None = None,
    *,
    mappings: Mapping[str, MappingSet] | None = None,
    describe: Decoding | None = None,
    top_k: int = 5,
) -> LensPage:
    """The lens page of a text: every token at every layer, by the logit lens, token identity and `mappings`, by name.

    With `describe`, as Decoding(20, stop=(",",)), every state also describes an entity. Raises PscopeError for what
    cannot be read.
    """
    table = grid_of(model, text, layers, mappings=mappings, describe=describe, top_k=top_k).table()
    made = {"model": model.name, "weights": fingerprint(model)[:16]}
    return LensPage(lens_page(table, text, made, model.config.vocab_size), table, text)


def _lens(name: str, rows: pd.DataFrame, table: pd.DataFrame, words: dict[str, int]) -> dict:
    """One lens: for every token and layer its cell, None where it reads none, and what its prompt says unpatched."""
    positions, layers = sorted(table["position"].dropna().unique()), sorted(table["layer"].dropna().unique())
    found = {key: _cell(cell, words) for key, cell in rows.groupby(["position", "layer"], sort=False)}
    clean = table[(table["lens"] == name) & table["position"].isna()]
    return {
        "name": name,
        "cells": [[found.get((position, layer)) for layer in layers] for position in positions],
        "clean": _cell(clean, words) if len(clean) else None,
    }


def _cell(rows: pd.DataFrame, words: dict[str, int]) -> dict:
    """The rows of one cell, one for each rank."""
    top = rows.iloc[0]
    return {
        "tokens": [words.setdefault(token, len(words)) for token in rows["next_token"]],
        "probabilities": [round(float(probability), 4) for probability in rows["probability"]],
        "entropy": round(float(top["entropy"]), 3),
        "rank": None if pd.isna(top["answer_rank"]) else int(top["answer_rank"]),
        "continuation": None if pd.isna(top["continuation"]) else _shown(top["continuation"]),
    }


def _first(cell: dict | None, words: list[str]) -> dict | None:
    """What is written in a cell, and how sure of it the lens is."""
    return cell and {"text": words[cell["tokens"][0]], "probability": cell["probabilities"][0]}


def _shown(text: str) -> str:
    """Text in one line, of which nothing steers a reader."""
    return visible(text).replace("\n", "⏎").replace("\t", "⇥")


def _embedded(data: dict) -> str:
    """JSON that cannot end the tag that it stands in."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
