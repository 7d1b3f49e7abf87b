"""The lens page: a prompt's tokens at every layer as one HTML file, which asks for nothing from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from pscope.characters import visible
from pscope.engine.generate import Decoding
from pscope.experiments.token_grid import grid_of
from pscope.mappings.mapping_set import MappingSet
from pscope.models.fingerprint import fingerprint
from pscope.models.model import LanguageModel
from pscope.show.page import Page, as_line, rendered


def lens_page(table: pd.DataFrame, title: str, origin: Mapping[str, str], vocabulary: int) -> str:
    """The page of a table of `TokenGrid`, over a model with so many tokens; `origin` tells how it came about."""
    cells = table[table["position"].notna()]
    first = cells[cells["rank"] == 1]
    tokens = first.drop_duplicates("position").sort_values("position")
    words: dict[str, int] = {}
    data: dict[str, Any] = {
        "tokens": [as_line(token) for token in tokens["token"]],
        "answers": [as_line(answer) for answer in tokens["answer"]],
        "layers": sorted(first["layer"].unique().tolist()),
        "vocabulary": vocabulary,
        "lenses": [_lens(name, rows, table, words) for name, rows in cells.groupby("lens", sort=False)],
    }
    # Tokens stand once, and cells name them by number.
    data["words"] = [as_line(word) for word in words]
    page = {
        **data,
        "title": visible(title),
        "made": {name: visible(text) for name, text in origin.items()},
        "top_k": int(cells["rank"].max()),
        # Of the first lens, layer by layer: what stands there before any script has run.
        "first": [
            [_first(cell, data["words"]) for cell in row] for row in zip(*data["lenses"][0]["cells"], strict=True)
        ],
    }
    return rendered("lens", page, data)


def lens(
    model: LanguageModel,
    text: str,
    layers: Sequence[int] | None = None,
    *,
    mappings: Mapping[str, MappingSet] | None = None,
    describe: Decoding | None = None,
    top_k: int = 5,
) -> Page:
    """The lens page of a text: every token at every layer, by the logit lens, token identity and `mappings`, by name.

    With `describe`, as Decoding(20, stop=(",",)), every state also describes an entity. Raises PscopeError for what
    cannot be read.
    """
    table = grid_of(model, text, layers, mappings=mappings, describe=describe, top_k=top_k).table()
    origin = {"model": model.name, "weights": fingerprint(model)[:16]}
    return Page(lens_page(table, text, origin, model.config.vocab_size), table, text)


def _lens(name: str, rows: pd.DataFrame, table: pd.DataFrame, words: dict[str, int]) -> dict[str, Any]:
    """One lens: for every token and layer its cell, None where it reads none, and what its prompt says unpatched."""
    positions, layers = sorted(table["position"].dropna().unique()), sorted(table["layer"].dropna().unique())
    grid = {key: _cell(cell, words) for key, cell in rows.groupby(["position", "layer"], sort=False)}
    clean = table[(table["lens"] == name) & table["position"].isna()]
    return {
        "name": name,
        "cells": [[grid.get((position, layer)) for layer in layers] for position in positions],
        "clean": _cell(clean, words) if len(clean) else None,
    }


def _cell(rows: pd.DataFrame, words: dict[str, int]) -> dict[str, Any]:
    """The rows of one cell, one for each rank."""
    top = rows.iloc[0]
    return {
        "tokens": [words.setdefault(token, len(words)) for token in rows["next_token"]],
        "probabilities": [round(float(probability), 4) for probability in rows["probability"]],
        "entropy": round(float(top["entropy"]), 3),
        "rank": None if pd.isna(top["answer_rank"]) else int(top["answer_rank"]),
        "continuation": None if pd.isna(top["continuation"]) else as_line(top["continuation"]),
    }


def _first(cell: dict[str, Any] | None, words: list[str]) -> dict[str, Any] | None:
    """What is written in a cell, and how sure of it the lens is."""
    return cell and {"text": words[cell["tokens"][0]], "probability": cell["probabilities"][0]}
