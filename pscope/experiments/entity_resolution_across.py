"""Figure 3's other line: entities described by one model from the states of another (the paper's section 4.4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import pandas as pd

from pscope.engine.generate import GREEDY, Decoding
from pscope.engine.patchscope import MEMORY
from pscope.experiments.cross_model import MAPPED, MEAN, SHUFFLED
from pscope.experiments.entity_resolution import EntityDescriptions, about, as_table
from pscope.experiments.sweep import PATCHED, Through
from pscope.experiments.together import Together
from pscope.inputs.entities import Entity
from pscope.mappings.mapping_set import MappingSet
from pscope.models.model import LanguageModel
from pscope.models.prompts import Prompt
from pscope.models.residual import Pair

SOURCE_ITSELF, TARGET_ITSELF = "source model itself", "target model itself"


class DescriptionsAcross(Together):
    """Entities described by `model` from states of `source`, as in `EntityDescriptions`, with further conditions:

    - "source model itself" and "target model itself": each model describes from its own states, at its layers of
      `pairs`, patched where they were read;
    - "mean state" and "shuffled pairs": `model` describes from the mean of its states, whatever the entity, and from
      what maps that were fitted on pairs which do not belong together make of the entity's state.

    `targets` are the prompts of the two models, `mappings` those from one to the other by condition; None for a dry
    run, in which nothing is read.
    """

    def __init__(
        self,
        source: LanguageModel,
        model: LanguageModel,
        targets: tuple[Prompt, Prompt],
        mappings: Mapping[str, MappingSet] | None,
        entities: Sequence[Entity],
        pairs: Sequence[Pair],
        decoding: Decoding = GREEDY,
        *,
        before: str | None = None,
        seed: int = 0,
        memory: int = MEMORY,
    ) -> None:
        describe = partial(EntityDescriptions, decoding=decoding, before=before, seed=seed, memory=memory)

        def across(condition: str, of: Sequence[Entity], *, controls: bool = False) -> EntityDescriptions:
            through = Through(source, mappings[condition]) if mappings is not None else None
            return describe(model, targets[1], of, pairs, through=through, controls=controls)

        def itself(end: int) -> EntityDescriptions:
            diagonal = [(layer, layer) for layer in sorted({pair[end] for pair in pairs})]
            return describe((source, model)[end], targets[end], entities, diagonal, controls=False)

        self._entities = entities
        main, own = across(MAPPED, entities, controls=True), {SOURCE_ITSELF: itself(0), TARGET_ITSELF: itself(1)}
        # The mean state says the same of everybody, so that one is asked.
        others = {MEAN: across(MEAN, entities[:1]), SHUFFLED: across(SHUFFLED, entities)}
        super().__init__({PATCHED: main, **own, **others})

    def join(self, table: pd.DataFrame) -> pd.DataFrame:
        """The table of `EntityDescriptions`, in which the readers are conditions."""
        table = super().join(table)
        mean_rows = self._of_everybody(table[table["reader"] == MEAN])
        table = pd.concat([table[table["reader"] != MEAN], mean_rows])
        main, patched = table["reader"] == PATCHED, table["condition"] == PATCHED
        named = table.assign(condition=table["condition"].mask(patched, table["reader"]))
        return named[main | patched].drop(columns="reader").reset_index(drop=True)

    def _of_everybody(self, continuations: pd.DataFrame) -> pd.DataFrame:
        """What the mean state said, held against each entity's reference."""
        each = pd.DataFrame([about(entity) for entity in self._entities])
        rows = continuations.drop(columns=[*each, "position", "token"]).merge(each, how="cross")
        return as_table(rows.assign(lender=pd.NA)).assign(reader=MEAN)
