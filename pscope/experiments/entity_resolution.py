"""Entity resolution: what an entity's name has become at each layer, told in the model's own words.

The paper's section 4.3 (Table 3 and Figure 3): the state of the name's last token is patched over the placeholder of
a prompt that describes entities, and the continuation is held against a reference description.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from pscope.arguments import as_list, as_seed
from pscope.engine.generate import GREEDY, Decoding, check_decoding
from pscope.engine.patchscope import MEMORY
from pscope.errors import PromptError, PscopeError
from pscope.experiments.bands import mean_bands
from pscope.experiments.experiment import Experiment, Work, of_kind, permuted, tidy
from pscope.experiments.grid import line_break
from pscope.experiments.held_out import best_on_half
from pscope.experiments.known import Plain, answer_plainly, by_length
from pscope.experiments.sweep import PATCHED, Source, Through, borrowed_rows, sweep
from pscope.inputs.entities import ALL, Entity
from pscope.inputs.records import text_of
from pscope.metrics import rouge_l
from pscope.models.model import LanguageModel, as_prompt
from pscope.models.prompts import At, Prompt, written_out
from pscope.models.residual import Pair, as_pairs

ANOTHER, WRITTEN_OUT = "another entity", "name written out"

_TYPES = {
    "entity": "string",
    "group": "string",
    "condition": "string",
    "layer": "Int64",
    "target_layer": "Int64",
    "state_of": "string",
    "position": "Int64",
    "token": "string",
    "path": "string",
    "continuation": "string",
    "rouge_l": "float64",
    "reference": "string",
}


def name_prompt(model: LanguageModel, name: str, before: str | None = None, at: At = -1) -> Prompt:
    """The source prompt that holds `name`, marked at its last token unless told otherwise.

    `before` stands before the name; by default that is a line break, whichever token is read, where the tokenizer puts
    no start token of its own. Raises PromptError.
    """
    return model.prompt((line_break(model, name) if before is None else before) + name, at)


class EntityLayers(Experiment[Source]):
    """Table 3: what the source token's state says at every (ℓ, ℓ*), and last what the unpatched target says.

    One row of the table per pair: `condition` ("patched", or "clean target", to which no layer belongs), `layer`,
    `target_layer`, `continuation`, and `rouge_l` against the `reference` (none without one). All is one unit. Raises
    PscopeError for what cannot be read.
    """

    def __init__(
        self,
        model: LanguageModel,
        target: Prompt,
        source: Prompt,
        pairs: Sequence[Pair],
        decoding: Decoding = GREEDY,
        reference: str | None = None,
        *,
        through: Through | None = None,
        memory: int = MEMORY,
    ) -> None:
        super().__init__(model, target, memory)
        if reference is not None:
            text_of({"reference": reference}, "reference", "the description to score against")
            if not any(character.isalnum() for character in reference):
                raise PscopeError(f"the reference {reference!r} holds no word")
        check_decoding(decoding, model, target)
        self._decoding, self._reference, self._through = decoding, reference, through
        read_in = model if through is None else through.model
        read, pairs = replace(as_prompt(read_in, source), positions=(source.position,)), as_pairs(read_in, model, pairs)
        self.units = [Source(source.text, target, read, tuple(pairs), {}, random=False)]

    def work(self, unit: Source) -> Work:
        return unit.work(self._decoding.new_tokens)

    def read(self, units: Sequence[Source]) -> pd.DataFrame:
        rows = pd.DataFrame(sweep(self.scope, units, self._decoding, 0, self._through))
        texts, reference = rows["continuation"].tolist(), self._reference
        scores = np.nan if reference is None else rouge_l(texts, [reference] * len(rows))
        columns = ("condition", "layer", "target_layer", "continuation", "rouge_l")
        return tidy(rows.assign(rouge_l=scores), {column: _TYPES[column] for column in columns})


class EntityDescriptions(Experiment[Source | Plain]):
    """Figure 3: every entity described from its state at every (ℓ, ℓ*), beside four controls, scored by ROUGE-L.

    The entities stand in an order drawn by the seed. A row of the table is one entity × pair × condition: `entity`,
    `group`, `condition`, `layer`, `target_layer`, `state_of` and the `position` and `token` of its name where it was
    read, the `path` taken, `continuation`, `rouge_l`, `reference`. The conditions:

    - "patched": the state of the entity's own name;
    - "another entity": that of the one before it in the order (if there is another);
    - "random vector": a random direction of the same norm;
    - "clean target": the target unpatched, and "name written out": the name in the place of the placeholder, likewise
      unpatched, as the ceiling. Neither belongs to a layer.

    States are read in the model of `through`, if it is given, and mapped from there. Without `controls`, there is but
    "patched" and "clean target". Raises PscopeError for an entity that cannot be read, naming it.
    """

    def __init__(
        self,
        model: LanguageModel,
        target: Prompt,
        entities: Sequence[Entity],
        pairs: Sequence[Pair],
        decoding: Decoding = GREEDY,
        *,
        before: str | None = None,
        through: Through | None = None,
        controls: bool = True,
        seed: int = 0,
        memory: int = MEMORY,
    ) -> None:
        super().__init__(model, target, memory)
        entities = as_list(Entity, entities, "entities", "give Entity(name, reference)")
        seed, pairs = as_seed(seed), as_pairs(model if through is None else through.model, model, pairs)
        check_decoding(decoding, model, target)
        self._decoding, self._seed, self._through, self._controls = decoding, seed, through, controls
        self._entities = {entities[index].name: entities[index] for index in permuted(seed, len(entities))}
        units = [self._units(entity, tuple(pairs), before) for entity in self._entities.values()]
        self.units = [source for source, _ in units]
        if controls:
            self.units += by_length(spelled for _, spelled in units)

    def _units(self, entity: Entity, pairs: tuple[Pair, ...], before: str | None) -> tuple[Source, Plain]:
        """An entity's states, and its name written out."""
        try:
            read_in = self.model if self._through is None else self._through.model
            source = name_prompt(read_in, entity.name, before)
            spelled = self.model.prompt(written_out(self.target, entity.name))
            check_decoding(self._decoding, self.model, spelled)
        except PromptError as error:
            raise PromptError(f"{entity.name!r} cannot be read: {error}") from error
        columns = about(entity)
        return (
            Source(
                entity.name,
                self.target,
                source,
                pairs,
                columns,
                random=self._controls,
            ),
            Plain(f"{entity.name}, {WRITTEN_OUT}", 1, WRITTEN_OUT, spelled, {**columns, "condition": WRITTEN_OUT}),
        )

    def work(self, unit: Source | Plain) -> Work:
        return unit.work(self._decoding.new_tokens)

    def read(self, units: Sequence[Source | Plain]) -> pd.DataFrame:
        if sources := of_kind(units, Source):
            return as_table(pd.DataFrame(sweep(self.scope, sources, self._decoding, self._seed, self._through)))
        plain, path = of_kind(units, Plain), self.scope(self.target).path
        return as_table(pd.DataFrame(answer_plainly(self.model, plain, self._decoding, memory=self.memory, path=path)))

    def join(self, table: pd.DataFrame) -> pd.DataFrame:
        """With another entity's description for each: each lends its own to the next one, and the last to the first."""
        names = list(self._entities)
        if len(names) == 1 or not self._controls:
            return table
        borrowers = pd.DataFrame([about(entity) for entity in self._entities.values()])
        borrowers["lender"] = [names[-1], *names[:-1]]
        theirs = borrowed_rows(table, borrowers, "entity").assign(condition=ANOTHER)
        return pd.concat([table, as_table(theirs)], ignore_index=True)


def about(entity: Entity) -> dict[str, str]:
    """The columns that say of whom a row is."""
    return {"entity": entity.name, "group": entity.group, "reference": entity.reference}


def as_table(rows: pd.DataFrame) -> pd.DataFrame:
    """The columns of the table, with each continuation held against its reference."""
    names = rows["entity"].where(rows["condition"] == PATCHED)
    state_of = rows.get("lender", names)
    scores = rouge_l(rows["continuation"].tolist(), rows["reference"].tolist())
    return tidy(rows.assign(state_of=state_of, rouge_l=scores), _TYPES)


def summarise(table: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """Mean ROUGE-L with 95 % bands, of each group and of all entities together.

    One row per group × condition × layer × target layer: the mean `rouge_l`, its band `low` and `high` from resampling
    entities (NaN for a single one), and how many `entities` it is of.
    """
    parts = []
    for group, rows in _groups(table):
        scores = _by_entity(rows)  # (entities, condition × layer × target layer)
        low, high = mean_bands(scores.to_numpy(), np.ones(len(scores)), seed)
        means = scores.mean().rename("rouge_l").reset_index().assign(low=low, high=high, entities=len(scores))
        parts.append(means.assign(group=group).replace({"layer": {-1: pd.NA}, "target_layer": {-1: pd.NA}}))
    columns = ["group", "condition", "layer", "target_layer", "rouge_l", "low", "high", "entities"]
    return pd.concat(parts, ignore_index=True)[columns]


def best_layers(table: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """Where patched entities are described best, chosen on half of them and reported on the other half.

    One row per `group`, and for all entities: see `best_on_half`. Groups of one entity have no other half, and so no
    row.
    """
    random = np.random.default_rng(seed)
    best = []
    for group, rows in _groups(table):
        scores = _by_entity(rows[rows["condition"] == PATCHED])[PATCHED]  # (entities, layer × target layer)
        if half := best_on_half(scores, random, seed):
            best.append({"group": group, **half})
    return pd.DataFrame(best)


def _groups(table: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    groups = [(group, rows) for group, rows in table.groupby("group") if group != ALL]
    return [*groups, (ALL, table)]


def _by_entity(rows: pd.DataFrame) -> pd.DataFrame:
    """ROUGE-L, (entities, condition × layer × target layer); -1 stands for no layer."""
    rows = rows.fillna({"layer": -1, "target_layer": -1}).astype({"layer": int, "target_layer": int})
    return rows.pivot(index="entity", columns=["condition", "layer", "target_layer"], values="rouge_l").sort_index(
        axis=1
    )
