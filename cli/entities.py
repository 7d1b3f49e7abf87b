"""What the two commands on entities share: `table3` and `fig3`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from pscope.experiments.grid import Pair

LowerLayersOption = Annotated[
    str | None,
    typer.Option(
        "--layers", help="Layers to read, as 0-15 or 0,4,8; 0 is the embedding output.", show_default="the lower half"
    ),
]
TargetLayersOption = Annotated[
    str,
    typer.Option(metavar="same|all|LAYERS", help="Layers that are patched: the one that is read, all, or as 0-15."),
]
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


def one_target(pairs: Sequence[Pair]) -> bool:
    """Whether each layer is patched into one layer only, so that it need not be told which."""
    return len({layer for layer, _ in pairs}) == len(pairs)
