"""Entity resolution: what an entity's name has become at each layer, told in the model's own words.

The paper's section 4.3 (Table 3 and Figure 3): the state of the name's last token is patched over the placeholder of
a prompt that describes entities, and the continuation is held against a reference description.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

import numpy as np
import pandas as pd
import torch

from pscope.engine.generate import GREEDY, Decoding
from pscope.engine.patchscope import Patchscope
from pscope.engine.unpatched import continue_prompts
from pscope.errors import PromptError, PscopeError, RowError
from pscope.experiments.bands import RESAMPLES, mean_bands
from pscope.experiments.grid import Pair, line_break, same_norm, source_layers, source_prompt, speak
from pscope.inputs.entities import ALL, Entity
from pscope.inputs.records import text_of
from pscope.metrics import rouge_l
from pscope.models.model import LanguageModel
from pscope.models.prompts import At, Prompt, written_out
from pscope.models.residual import capture

PATCHED = "patched"
ANOTHER, RANDOM = "another entity", "random vector"
CLEAN, WRITTEN_OUT = "clean target", "name written out"


def name_prompt(model: LanguageModel, name: str, before: str | None = None, at: At = -1) -> Prompt:
    """The source prompt that holds `name`, marked at its last token unless told otherwise.

    `before` stands before the name; by default that is a line break, whichever token is read, where the tokenizer puts
    no start token of its own. Raises PromptError.
    """
    return source_prompt(model, name, at, line_break(model, name) if before is None else before)


def describe_layers(
    scope: Patchscope, source: Prompt, pairs: Sequence[Pair], decoding: Decoding = GREEDY, reference: str | None = None
) -> pd.DataFrame:
    """Table 3: what the source token's state says at every (ℓ, ℓ*), and last what the unpatched target says.

    One row per pair: `condition` ("patched", or "clean target", to which no layer belongs), `layer`, `target_layer`,
    `continuation`, and `rouge_l` against the `reference` (none without one). Raises PscopeError.
    """
    if reference is not None:
        text_of({"reference": reference}, "reference", "the description to score against")
        if not any(character.isalnum() for character in reference):
            raise PscopeError(f"the reference {reference!r} holds no word")
    layers, columns = source_layers(pairs)
    states = capture(scope.model, [source], [[source.position]], layers)[0, columns]  # (pairs, hidden)
    spoken = scope.generate(states, [target for _, target in pairs], decoding)
    texts = [decoding.text(tokens, scope.model.tokenizer) for tokens in [*spoken.patched, spoken.clean]]
    return pd.DataFrame(
        {
            "condition": [PATCHED] * len(pairs) + [CLEAN],
            "layer": pd.array([layer for layer, _ in pairs] + [None], dtype="Int64"),
            "target_layer": pd.array([target for _, target in pairs] + [None], dtype="Int64"),
            "continuation": pd.array(texts, dtype="string"),
            "rouge_l": np.nan if reference is None else rouge_l(texts, [reference] * len(texts)),
        }
    )


def describe_entities(
    scope: Patchscope,
    entities: Sequence[Entity],
    pairs: Sequence[Pair],
    decoding: Decoding = GREEDY,
    *,
    before: str | None = None,
    seed: int = 0,
) -> Iterator[pd.DataFrame]:
    """Figure 3: describe every entity from its state at every (ℓ, ℓ*), beside four controls, scored by ROUGE-L.

    Yields chunks of the table, `rows_of(entities, pairs)` rows in all, the entities in an order drawn by the seed; a
    row is one entity × pair × condition: `entity`, `group`, `condition`, `layer`, `target_layer`, `state_of` and the
    `position` and `token` of its name where it was read, `continuation`, `rouge_l`, `reference`. The conditions:

    - "patched": the state of the entity's own name;
    - "another entity": that of another one, drawn by the seed (if there is another);
    - "random vector": a random direction of the same norm;
    - "clean target": the target unpatched, and "name written out": the name in the place of the placeholder, likewise
      unpatched, as the ceiling. Neither belongs to a layer.

    Raises PscopeError before the first chunk for what cannot be read, and later, naming its entity, for a row that
    fails.
    """
    if not entities:
        raise PscopeError("there is no entity to describe")
    model = scope.model
    model.check_window(len(scope.target) + decoding.new_tokens)
    order = np.random.default_rng(seed).permutation(len(entities))
    entities = [entities[index] for index in order]
    sources, spelled = [], []
    for entity in entities:
        try:
            sources.append(name_prompt(model, entity.name, before))
            spelled.append(model.prompt(written_out(scope.target, entity.name)))
            model.check_window(len(spelled[-1]) + decoding.new_tokens)
        except PromptError as error:
            raise PromptError(f"{entity.name!r} cannot be read: {error}") from error
    return chain(
        _written_out(scope, entities, spelled, decoding), _patched(scope, entities, sources, pairs, decoding, seed)
    )


def rows_of(entities: Sequence[Entity], pairs: Sequence[Pair]) -> int:
    """How many rows the table of `describe_entities` has."""
    return len(entities) * (2 + (3 if len(entities) > 1 else 2) * len(pairs))


def summarise(table: pd.DataFrame, seed: int = 0, resamples: int = RESAMPLES) -> pd.DataFrame:
    """Mean ROUGE-L with 95 % bands, of each group and of all entities together.

    One row per group × condition × layer × target layer: the mean `rouge_l`, its band `low` and `high` from resampling
    entities (NaN for a single one), and how many `entities` it is of.
    """
    parts = []
    for group, rows in _groups(table):
        scores = _by_entity(rows)  # (entities, condition × layer × target layer)
        low, high = mean_bands(scores.to_numpy(), np.ones(len(scores)), seed, resamples)
        means = scores.mean().rename("rouge_l").reset_index().assign(low=low, high=high, entities=len(scores))
        parts.append(means.assign(group=group).replace({"layer": {-1: pd.NA}, "target_layer": {-1: pd.NA}}))
    columns = ["group", "condition", "layer", "target_layer", "rouge_l", "low", "high", "entities"]
    return pd.concat(parts, ignore_index=True)[columns]


def best_layers(table: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """Where patched entities are described best, chosen on half of them and reported on the other half.

    One row per group, and for all entities: `layer` and `target_layer`, the best mean on `chosen_on` entities; its
    mean `held_out` on the `reported_on` others, which had no part in the choice; and beside it the oracle, the
    `maximum` over all layers on all the entities, at `maximum_layer` and `maximum_target_layer`. Groups of one entity
    have no other half, and so no row.
    """
    random = np.random.default_rng(seed)
    found = []
    for group, rows in _groups(table):
        scores = _by_entity(rows[rows["condition"] == PATCHED])[PATCHED]  # (entities, layer × target layer)
        if len(scores) < 2:
            continue
        order = random.permutation(len(scores))
        chosen_on, reported_on = scores.iloc[order[: len(order) // 2]], scores.iloc[order[len(order) // 2 :]]
        best, oracle = chosen_on.mean().idxmax(), scores.mean().idxmax()
        found.append(
            {
                "group": group,
                "layer": best[0],
                "target_layer": best[1],
                "chosen_on": len(chosen_on),
                "held_out": reported_on[best].mean(),
                "reported_on": len(reported_on),
                "maximum_layer": oracle[0],
                "maximum_target_layer": oracle[1],
                "maximum": scores[oracle].mean(),
            }
        )
    return pd.DataFrame(found)


def _groups(table: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    groups = [(group, rows) for group, rows in table.groupby("group") if group != ALL]
    return [*groups, (ALL, table)]


def _by_entity(rows: pd.DataFrame) -> pd.DataFrame:
    """ROUGE-L, (entities, condition × layer × target layer); -1 stands for no layer."""
    known = rows.fillna({"layer": -1, "target_layer": -1}).astype({"layer": int, "target_layer": int})
    return known.pivot(index="entity", columns=["condition", "layer", "target_layer"], values="rouge_l").sort_index(
        axis=1
    )


def _written_out(
    scope: Patchscope, entities: Sequence[Entity], prompts: Sequence[Prompt], decoding: Decoding
) -> Iterator[pd.DataFrame]:
    spoken = continue_prompts(scope.model, prompts, decoding, memory=scope.memory, path=scope.path)
    try:
        yield pd.concat(
            [
                _scored(entities[index], WRITTEN_OUT, [(None, None)], [decoding.text(tokens, scope.model.tokenizer)])
                for index, tokens in spoken
            ],
            ignore_index=True,
        )
    except RowError as error:
        raise PscopeError(f"{entities[error.row].name!r}, written out, failed: {error.reason}") from error


def _patched(
    scope: Patchscope,
    entities: Sequence[Entity],
    sources: Sequence[Prompt],
    pairs: Sequence[Pair],
    decoding: Decoding,
    seed: int,
) -> Iterator[pd.DataFrame]:
    """The conditions in which the target is patched, and the clean one, which comes with every pass."""
    layers, columns = source_layers(pairs)
    together = max(1, scope.rows_per_pass(decoding.new_tokens) // (2 * len(pairs)))
    previous: tuple[list[str], Entity, Prompt] | None = None
    for start in range(0, len(entities), together):
        part, read = entities[start : start + together], sources[start : start + together]
        states = capture(scope.model, read, layers=layers)  # (entities, layers, hidden)
        random = same_norm(states, [entity.name for entity in part], seed)
        states = torch.cat([states, random])[:, columns]  # (2 entities, pairs, hidden)
        names = [f"{entity.name!r} ({condition})" for condition in (PATCHED, RANDOM) for entity in part]
        texts, clean = speak(scope, states, names, pairs, decoding)
        frames = []
        for entity, source, own, random in zip(part, read, texts[: len(part)], texts[len(part) :], strict=True):
            frames.append(_scored(entity, PATCHED, pairs, own, entity, source))
            frames.append(_scored(entity, RANDOM, pairs, random))
            frames.append(_scored(entity, CLEAN, [(None, None)], [clean]))
            # Another entity's continuations are those of its own rows: each lends them to the next one in the order,
            # and the last to the first.
            if previous is not None:
                frames.append(_scored(entity, ANOTHER, pairs, *previous))
            previous = own, entity, source
        if start + together >= len(entities) > 1:
            frames.append(_scored(entities[0], ANOTHER, pairs, *previous))
        yield pd.concat(frames, ignore_index=True)


def _scored(
    entity: Entity,
    condition: str,
    pairs: Sequence[Pair] | Sequence[tuple[None, None]],
    texts: Sequence[str],
    state_of: Entity | None = None,
    source: Prompt | None = None,
) -> pd.DataFrame:
    """The rows of one condition; a state that was read is `state_of` somebody, at the position marked in `source`."""
    return pd.DataFrame(
        {
            "entity": entity.name,
            "group": entity.group,
            "condition": condition,
            "layer": pd.array([layer for layer, _ in pairs], dtype="Int64"),
            "target_layer": pd.array([target for _, target in pairs], dtype="Int64"),
            "state_of": pd.array([None if state_of is None else state_of.name] * len(pairs), dtype="string"),
            "position": pd.array([None if source is None else source.position] * len(pairs), dtype="Int64"),
            "token": pd.array([None if source is None else source.token] * len(pairs), dtype="string"),
            "continuation": pd.array(texts, dtype="string"),
            "rouge_l": rouge_l(texts, [entity.reference] * len(texts)),
            "reference": entity.reference,
        }
    )
