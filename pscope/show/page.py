"""What pages share: one HTML file each, which asks for nothing from elsewhere and shows text as text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

import pandas as pd
from jinja2 import Environment, FunctionLoader

from pscope.characters import visible
from pscope.errors import DataError
from pscope.files import written_whole
from pscope.notebook import framed

_TEMPLATES = files("pscope.show").joinpath("templates")


@dataclass(frozen=True)
class Page:
    """A page and the table that it shows. A notebook shows the page, in a frame of its own."""

    html: str = field(repr=False)
    cells: pd.DataFrame = field(repr=False)
    title: str

    def table(self) -> pd.DataFrame:
        """What is in the page."""
        return self.cells

    def save(self, path: str | Path) -> None:
        """Write the page to a new file. Raises DataError where something is there already."""
        path = Path(path)
        if path.exists():
            raise DataError(f"{path} is there already; name a new file")
        with written_whole(path) as unfinished:
            unfinished.write_text(self.html, "utf-8")

    def _repr_html_(self) -> str:
        return framed(self.html, self.title, "46rem", scripts=True)


def rendered(name: str, page: Mapping[str, object], data: Mapping[str, object]) -> str:
    """The page of a template, with its style and its script; `data` is for the script alone."""
    template = Environment(loader=FunctionLoader(_read), autoescape=True).get_template(f"{name}.html")
    style = _read("page.css") + _read(f"{name}.css")
    return template.render(page=page, style=style, script=_read(f"{name}.js"), data=_embedded(data))


def as_line(text: str) -> str:
    """Text in one line, of which nothing steers a reader."""
    line = visible(text).replace("\n", "⏎").replace("\t", "⇥")
    return line if line.strip() else "␣" * len(line)


def _read(name: str) -> str:
    return _TEMPLATES.joinpath(name).read_text("utf-8")


def _embedded(data: Mapping[str, object]) -> str:
    """JSON that cannot end the tag that it stands in."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
