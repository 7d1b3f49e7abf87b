"""What the two commands over grids of layers share: `table2` and `fig4`, which score all pairs and say some aloud."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from pscope.cli.console import tell
from pscope.cli.options import layers_option, parse_layers, parse_target_layers, target_layers_option

if TYPE_CHECKING:
    import pandas as pd

    from pscope.experiments.experiment import Experiment
    from pscope.models.model import LanguageModel
    from pscope.models.residual import Pair

    Best = Mapping[str, Mapping[int, Pair]]

FEW = 10

ASKED = 3
"""With --quick, so many times as many are asked plainly as are read: enough, if the model knows a third of them."""


@dataclass(frozen=True)
class GridOptions:
    """The pairs of layers that are scored, and those at which rows speak. Raises PscopeError for what is no layer."""

    layers: Annotated[str | None, layers_option("all; every fifth with --quick")] = None
    target_layers: Annotated[str | None, target_layers_option("all; every fifth with --quick")] = None
    score: Annotated[
        Literal["start", "whole", "mean"],
        typer.Option(
            help="What of an answer is scored: the first tokens that tell it from the others, the whole of it, or the "
            "mean over its tokens."
        ),
    ] = "start"
    said_at: Annotated[
        Literal["best", "grid", "all"],
        typer.Option(
            help="Where answers are also said: at the pair that scores best on other samples; on a coarse grid, or "
            "that of --layers and --target-layers; or at all pairs, which takes long."
        ),
    ] = "best"
    quick: Annotated[bool, typer.Option("--quick", help="Fewer layers and samples: some two minutes.")] = False

    def __post_init__(self) -> None:
        _ = parse_layers(self.layers), parse_target_layers(self.target_layers)

    def pairs(self, model: LanguageModel) -> list[Pair]:
        """The pairs that are scored."""
        from pscope.experiments.grid import layer_pairs

        every = self._every(model)
        layers, target_layers = parse_layers(self.layers), parse_target_layers(self.target_layers)
        return layer_pairs(model, layers or every, target_layers or every)

    def _every(self, model: LanguageModel) -> range:
        """The layers that are scored where no others are asked for."""
        return range(0, model.n_layers + 1, 5 if self.quick else 1)

    def asked(self, samples: int, of: int, seed: int) -> list[int]:
        """The numbers of those of whom it is found out whether the model knows them, so that `samples` can be read."""
        from pscope.experiments.experiment import permuted

        return sorted(permuted(seed, of)[: ASKED * samples]) if self.quick else list(range(of))

    def settings(self, pairs: Sequence[Pair]) -> dict[str, object]:
        """What stands in the settings of the scores at these pairs."""
        source, target = (sorted(set(layers)) for layers in zip(*pairs, strict=True))
        return {"source_layers": source, "target_layers": target, "scored_by": self.score}

    def said_pairs(
        self, model: LanguageModel, coarse: tuple[Sequence[float], Sequence[float]], best: Best | None
    ) -> list[Pair] | Best:
        """Where answers are said: `best` are the pairs that score best; None, in a dry run, stands for as many.

        `coarse` are source and target layers of the grid as fractions of the depth.
        """
        if self.said_at == "best":
            return self._as_many_as_best(model) if best is None else best
        return self.pairs(model) if self.said_at == "all" else self.coarse(model, coarse)

    def agreement(
        self, scores: pd.DataFrame, words: pd.DataFrame, key: str, unit: list[str], group: str, seed: int
    ) -> pd.DataFrame:
        """How alike scores and words rank: see `rank_agreement`. Empty where rows speak at the best pairs alone."""
        from pscope.experiments.agreement import rank_agreement

        return rank_agreement(scores, words[:0] if self.said_at == "best" else words, key, unit, group, seed)

    def _as_many_as_best(self, model: LanguageModel) -> list[Pair]:
        """A pair for every fold, of those that lead downwards where there are any: back-patching has no others."""
        from pscope.experiments.held_out import FOLDS

        pairs = self.pairs(model)
        return [(layer, target) for layer, target in pairs if target < layer][:FOLDS] or pairs[:FOLDS]

    def coarse(self, model: LanguageModel, fractions: tuple[Sequence[float], Sequence[float]]) -> list[Pair]:
        """The grid that is asked for, or that of scored source and target layers near these fractions of the depth."""
        from pscope.experiments.grid import layer_pairs, spread_layers

        def near(layer: int) -> int:
            return min(self._every(model), key=lambda each: abs(each - layer))

        coarse = (spread_layers(model, each[:: 2 if self.quick else 1]) for each in fractions)
        source, target = (sorted(set(map(near, layers))) for layers in coarse)
        layers, target_layers = parse_layers(self.layers), parse_target_layers(self.target_layers)
        return layer_pairs(model, layers or source, target_layers or target)


def tell_price(scores: Experiment[Any]) -> None:
    """How many rows will be scored."""
    tell(f"{sum(unit.rows for unit in scores.units)} rows will be scored")


def warn_few(counts: Mapping[str, int]) -> None:
    """Name what there are few of: each of them may decide which pair of layers is best for others, and the bands."""
    few = [f"{count} {what}" for what, count in counts.items() if count < FEW]
    if few:
        tell(f"only {', '.join(few)}: below {FEW}, single ones decide the pair of layers that is chosen and the bands")
