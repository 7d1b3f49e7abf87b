"""The options of commands that read texts: which, and from where."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from pscope.errors import PscopeError


@dataclass(frozen=True)
class TextOptions:
    """Texts to read. Raises PscopeError for two sources at once."""

    texts: Annotated[
        Path | None, typer.Option(help='A file of texts: .jsonl with a "text" per line, or .txt with one per line.')
    ] = None
    dataset: Annotated[
        str | None,
        typer.Option(
            metavar="ID[:CONFIG][:SPLIT]",
            help="Texts from a dataset, such as Salesforce/wikitext:wikitext-2-raw-v1.",
        ),
    ] = None

    def __post_init__(self) -> None:
        if self.texts is not None and self.dataset is not None:
            raise PscopeError("--texts and --dataset were both given; choose one")

    def read(self, most: int) -> list[str]:
        """The texts, of a dataset at most so many; those that ship where none are named. Raises DataError."""
        from pscope.inputs.texts import read_dataset, read_texts, shipped_texts

        if self.texts is not None:
            return read_texts(self.texts)
        return shipped_texts() if self.dataset is None else read_dataset(self.dataset, most)

    @property
    def named(self) -> str:
        """Where they come from, for the settings."""
        return str(self.texts or self.dataset or "shipped with pscope")
