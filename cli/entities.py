"""What the two commands on entities share: `table3` and `fig3`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

import typer

from pscope.errors import PscopeError

LowerLayersOption = Annotated[
    str | None,
    typer.Option(
        "--layers", help="Layers to read, as 0-15 or 0,4,8; 0 is the embedding output.", show_default="the lower half"
    ),
]
TargetLayerOption = Annotated[
    str, typer.Option(metavar="same|N|all", help="The layer that is patched: the one that is read, layer N, or all.")
]
TargetOption = Annotated[
    str | None,
    typer.Option(
        metavar="FILE|TEXT",
        help="The prompt that is patched, or a file that holds it.",
        show_default="the paper's descriptions of entities",
    ),
]
TargetAtOption = Annotated[str, typer.Option(help="Its placeholder, which is overwritten: text, an index, or last.")]
BeforeOption = Annotated[
    str | None,
    typer.Option(
        help="What stands before the name: the state of a text's first token says nothing of it.",
        show_default="a line break where the tokenizer adds no start token",
    ),
]
NewTokensOption = Annotated[int, typer.Option(min=1, help="Tokens the patched prompt goes on for, at most.")]
StopAtCommaOption = Annotated[
    bool,
    typer.Option(
        "--stop-at-comma/--no-stop-at-comma", help="End a description at its first comma, as those of the prompt do."
    ),
]


def parse_target_layer(text: str) -> list[int] | Literal["same", "all"]:
    """ "same", "all" or the number of a layer, as the library takes them. Raises PscopeError."""
    if text in ("same", "all"):
        return text
    if text.isdecimal() and len(text) < 5:
        return [int(text)]
    raise PscopeError(f"--target-layer {text!r} is neither same, nor all, nor a layer")


def target_text(target: str | None) -> str | None:
    """The prompt that `--target` gives, from a file where it names one. Raises DataError."""
    if target is None or not os.path.isfile(target):
        return target
    from pscope.records import read_text

    return read_text(Path(target)).rstrip("\r\n")
