"""What the two commands over grids of layers share: `table2` and `fig4`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated

import typer
from pscope.cli.common import parse_layers, parse_target_layers, tell

from pscope.errors import PscopeError

if TYPE_CHECKING:
    from pscope.experiments.grid import Pair
    from pscope.models.model import LanguageModel

FEW = 10

SourceLayersOption = Annotated[
    str | None, typer.Option("--layers", help="Source layers, as 0-15 or 0,4,8.", show_default="five, spread")
]
TargetLayersOption = Annotated[
    str | None,
    typer.Option(
        metavar="same|all|LAYERS",
        help="Target layers: the one that is read, all, or as 0-15.",
        show_default="five or four early ones",
    ),
]
FullOption = Annotated[bool, typer.Option("--full", help="All pairs of layers: hours where the default takes minutes.")]
QuickOption = Annotated[bool, typer.Option("--quick", help="A smaller grid and fewer samples: a few minutes.")]
NewTokensOption = Annotated[int, typer.Option(min=1, help="Tokens that may hold the answer.")]


def chosen_pairs(
    model: LanguageModel,
    layers: str | None,
    targets: str | None,
    *,
    full: bool,
    quick: bool,
    default: tuple[Sequence[float], Sequence[float]],
) -> list[Pair]:
    """The grid that the options ask for; `default` are source and target layers as fractions of the depth."""
    from pscope.experiments.grid import layer_pairs, spread_layers

    if full:
        return layer_pairs(model, range(model.n_layers + 1), "all")
    # Every second one of those by default.
    source, target = (spread_layers(model, fractions[:: 2 if quick else 1]) for fractions in default)
    return layer_pairs(model, parse_layers(layers) or source, parse_target_layers(targets) or target)


def check_grid(layers: str | None, targets: str | None, full: bool) -> None:
    """Raise PscopeError for what cannot be meant, before anything is loaded."""
    parse_layers(layers)
    parse_target_layers(targets)
    if full and (layers is not None or targets is not None):
        raise PscopeError("--full is all pairs of layers; leave out --layers and --target-layers")


def tell_price(rows: int, new_tokens: int) -> None:
    """How many rows and tokens a run will decode, at most."""
    tell(f"{rows} patched rows will be decoded, at most {rows * new_tokens} tokens")


def warn_few(counts: Mapping[str, int]) -> None:
    """Name what there are few of: each of them may decide which pair of layers is best for others, and the bands."""
    few = [f"{count} {what}" for what, count in counts.items() if count < FEW]
    if few:
        tell(f"only {', '.join(few)}: below {FEW}, single ones decide the pair of layers that is chosen and the bands")
