"""What the two commands over grids of layers share: `table2` and `fig4`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer
from pscope.cli.console import tell
from pscope.cli.options import layers_option, parse_layers, parse_target_layers, target_layers_option

from pscope.errors import PscopeError

if TYPE_CHECKING:
    from pscope.experiments.experiment import Experiment
    from pscope.experiments.grid import Pair
    from pscope.models.model import LanguageModel

FEW = 10


@dataclass(frozen=True)
class GridOptions:
    """The pairs of layers that are tried. Raises PscopeError for what cannot be meant."""

    layers: Annotated[str | None, layers_option("five, spread")] = None
    target_layers: Annotated[str | None, target_layers_option("a few early ones")] = None
    full: Annotated[
        bool, typer.Option("--full", help="All pairs of layers: hours where the default takes minutes.")
    ] = False
    quick: Annotated[bool, typer.Option("--quick", help="A smaller grid and fewer samples: a few minutes.")] = False

    def __post_init__(self) -> None:
        _ = parse_layers(self.layers), parse_target_layers(self.target_layers)
        if self.full and (self.layers is not None or self.target_layers is not None):
            raise PscopeError("--full is all pairs of layers; leave out --layers and --target-layers")

    def pairs(self, model: LanguageModel, default: tuple[Sequence[float], Sequence[float]]) -> list[Pair]:
        """The grid that is asked for; `default` are source and target layers as fractions of the depth."""
        from pscope.experiments.grid import layer_pairs, spread_layers

        if self.full:
            return layer_pairs(model, range(model.n_layers + 1), "all")
        # Every second one of those by default.
        source, target = (spread_layers(model, fractions[:: 2 if self.quick else 1]) for fractions in default)
        layers, target_layers = parse_layers(self.layers), parse_target_layers(self.target_layers)
        return layer_pairs(model, layers or source, target_layers or target)


def tell_price(experiment: Experiment, new_tokens: int) -> None:
    """How many rows and tokens a run will decode, at most."""
    rows = sum(unit.rows for unit in experiment.units)
    tell(f"{rows} rows will be decoded, at most {rows * new_tokens} tokens")


def warn_few(counts: Mapping[str, int]) -> None:
    """Name what there are few of: each of them may decide which pair of layers is best for others, and the bands."""
    few = [f"{count} {what}" for what, count in counts.items() if count < FEW]
    if few:
        tell(f"only {', '.join(few)}: below {FEW}, single ones decide the pair of layers that is chosen and the bands")
