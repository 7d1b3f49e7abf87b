"""How figures look: sizes that can be read in a column, and lines that nobody needs colours to tell apart."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import Any, NamedTuple

import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.backend_bases import RendererBase
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

PAGE = 6.75
"""Inches: the text of a page in two columns is as wide, and its captions are as large as the letters here."""

# seaborn's palette for the colour-blind, by name.
BLUE, ORANGE, GREEN, VERMILION, PINK, BROWN, PALE_PINK, GREY, YELLOW, SKY = sns.color_palette("colorblind")
INK = (0.15, 0.15, 0.15)

SHADES = "crest"
"""From light to dark in even steps, also in grey."""

_SIZES = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "figure.titlesize": 9,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.title_fontsize": 7,
    "lines.linewidth": 1.2,
    "lines.markersize": 4,
    "axes.linewidth": 0.6,
    "grid.linewidth": 0.4,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "xtick.major.pad": 2,
    "ytick.major.pad": 2,
    "patch.linewidth": 0.5,
}


class Look(NamedTuple):
    """A line: its colour, its dashes, and the marks on it."""

    colour: tuple[float, float, float]
    dashes: str = "-"
    mark: str | None = None


class Drawing(Figure):
    """A figure in the sizes of the theme, which a notebook shows by itself, whether or not pyplot is imported there."""

    def __init__(self, style: str, **options: Any) -> None:
        super().__init__(**options)
        self._style = style

    def draw(self, renderer: RendererBase) -> None:
        # Ticks are made only now.
        with _themed(self._style):
            super().draw(renderer)

    def _repr_png_(self) -> bytes:
        file = BytesIO()
        with _any_script():
            self.savefig(file, dpi=150, bbox_inches="tight")
        return file.getvalue()


@contextmanager
def drawing(width: float, height: float, style: str = "whitegrid") -> Iterator[Drawing]:
    """A figure of so many inches to draw on, and everything drawn meanwhile in the sizes of the theme."""
    with _themed(style):
        yield Drawing(style, figsize=(width, height), layout="constrained")


@contextmanager
def _themed(style: str) -> Iterator[None]:
    with sns.axes_style(style, {"axes.edgecolor": "0.6"}), sns.plotting_context("paper", rc=_SIZES):
        yield


@contextmanager
def _any_script() -> Iterator[None]:
    """A block in which scripts that matplotlib's font lacks are drawn as boxes, without a warning for each letter."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")
        yield


def plot(axes: Axes, x: pd.Series, y: pd.Series, look: Look, label: str, *, width: float = 1.2) -> None:
    """A line with a few marks on it, the first at another place for each kind of mark, whole also on the frame."""
    every = max(1, len(x) // 6)
    start = sum(map(ord, look.mark or "")) % every
    axes.plot(
        x,
        y,
        look.dashes,
        color=look.colour,
        marker=look.mark,
        markersize=2.6 * width,
        markevery=(start, every),
        linewidth=width,
        label=label,
        clip_on=False,
        zorder=3,
    )


def fill(axes: Axes, x: pd.Series, low: pd.Series, high: pd.Series, look: Look, *, faint: bool = False) -> None:
    """The band around a line."""
    bounds = (low.astype(float), high.astype(float))
    axes.fill_between(x, *bounds, color=look.colour, alpha=0.08 if faint else 0.18, linewidth=0)


def label_layers(axes: Axes, label: str) -> None:
    """Layers on x, of which there are whole ones only."""
    axes.set_xlabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True, steps=[1, 2, 5, 10]))
