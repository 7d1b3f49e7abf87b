"""Figures 10 and 11: what a model will say next, read by another model from the states of the first.

The paper's section 4.4. States of layer ℓ of M are mapped to layer ℓ* of M*, patched there into a target prompt, and
what M* decodes is held against M's own prediction, as text: the two may cut it differently.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from pscope.engine.lens import logit_lens
from pscope.engine.patchscope import MEMORY, Patchscope
from pscope.experiments.bands import token_measures
from pscope.experiments.experiment import Experiment, Work, tidy
from pscope.experiments.held_out import best_on_half
from pscope.experiments.next_token import SampledText, most_probable_tokens, sampled_states
from pscope.inputs.positions import Sampled
from pscope.mappings.mapping_set import MappingSet
from pscope.models.model import LanguageModel
from pscope.models.prompts import Prompt, decode
from pscope.models.residual import Pair, as_pairs

MAPPED, SHUFFLED, MEAN, ANOTHER = "mapped", "shuffled pairs", "mean state", "another text"
"""The states of the text, and the controls: maps fitted on pairs that do not belong together, the mean state whatever
the text, and what another text's state said."""

_TYPES = {
    "text": "int64",
    "position": "int64",
    "token": "string",
    "condition": "string",
    "layer": "int64",
    "target_layer": "int64",
    "next_token": "string",
    "decoded": "string",
    "correct": "bool",
    "surprisal": "float64",
}


class CrossModel(Experiment[SampledText]):
    """States of `source` at sampled positions of `texts`, read by `model` through mappings, at every pair of layers.

    `mappings` are, by the condition that they stand for, sets that map the same `pairs`. A row of the table is one
    sample × pair × condition: `text`, `position`, `token`, `condition`, `layer`, `target_layer`, `next_token` (the
    source's own prediction), `decoded`, `correct` (one of the two texts begins with the other) and `surprisal`, in
    nats: that of the source at the first of its own tokens of what was decoded. Raises PscopeError for a layer out of
    range.
    """

    def __init__(
        self,
        source: LanguageModel,
        model: LanguageModel,
        target: Prompt,
        mappings: Mapping[str, MappingSet],
        texts: Sequence[str],
        sampled: Sequence[Sampled],
        pairs: Sequence[Pair],
        *,
        memory: int = MEMORY,
    ) -> None:
        super().__init__(model, target, memory)
        pairs = as_pairs(source, model, pairs)
        self._source, self._mappings, self._texts, self._pairs = source, dict(mappings), texts, pairs
        rows = len(pairs) * len(mappings)
        self.units = [SampledText(f"text {each.text}", len(each.positions) * rows, target, each) for each in sampled]

    def work(self, unit: SampledText) -> Work:
        positions, suffix = len(unit.sampled.positions), len(self.target) - min(self.target.positions)
        targets = [target for _, target in self._pairs] * len(self._mappings)
        return Work(len(unit.sampled.prompt), suffix, tuple(targets) * positions, spoken=positions)

    def read(self, units: Sequence[SampledText]) -> pd.DataFrame:
        source, layers = self._source, sorted({layer for layer, _ in self._pairs})
        places, states = sampled_states(source, units, [*layers, source.n_layers])  # (samples, layers + 1, hidden)
        self._tail.memory = self.memory
        logits = [part.patched for part in self._tail.logits(states[:, -1], source.n_layers)]
        own = torch.cat(logits).float().log_softmax(-1)
        states = states[:, [layers.index(layer) for layer, _ in self._pairs]]
        frames = [
            self._rows(condition, places, states, own).assign(condition=condition) for condition in self._mappings
        ]
        return tidy(pd.concat(frames, ignore_index=True), _TYPES)

    def _rows(self, condition: str, places: list[tuple[Sampled, int]], states: Tensor, own: Tensor) -> pd.DataFrame:
        """What states (samples, pairs, hidden) say, held against the source's log-probabilities (samples, vocab)."""
        mappings, pairs = self._mappings[condition], self._pairs
        texts = [self._texts[item.text] for item, _ in places]
        # What is the same for all samples is read once.
        batch, times = (states[:1], len(places)) if mappings.constant else (states, 1)
        scope, targets = self.scope(self.target), [target for _, target in pairs]
        decoded = most_probable_tokens(scope, mappings.apply(batch, pairs, texts[: len(batch)]), targets)
        tokens = decoded.flatten().tolist() * times
        spelled = {token: decode(self.model.tokenizer, [token]) for token in set(tokens)}
        first = {token: self._in_source(token, text) for token, text in spelled.items()}
        predictions = np.repeat(own.argmax(dim=-1).tolist(), len(pairs)).tolist()
        spelled_in_source = {token: decode(self._source.tokenizer, [token]) for token in set(predictions)}
        # A model says the same as itself where it is the same token, whatever that is as text.
        itself = self._source is self.model
        column = torch.tensor([first[token] for token in tokens], device=own.device)
        sample = torch.arange(len(places), device=own.device).repeat_interleave(len(pairs))
        surprisals = -own[sample, column.clamp_min(0)]
        return pd.DataFrame(
            {
                "text": np.repeat([item.text for item, _ in places], len(pairs)),
                "position": np.repeat([position for _, position in places], len(pairs)),
                "token": np.repeat([item.prompt.tokens[position] for item, position in places], len(pairs)),
                "layer": np.tile([layer for layer, _ in pairs], len(places)),
                "target_layer": np.tile([target for _, target in pairs], len(places)),
                "next_token": [spelled_in_source[token] for token in predictions],
                "decoded": [spelled[token] for token in tokens],
                "correct": [
                    token == prediction if itself else agree(spelled[token], spelled_in_source[prediction])
                    for token, prediction in zip(tokens, predictions, strict=True)
                ],
                "surprisal": surprisals.masked_fill(column < 0, torch.nan).tolist(),
            }
        )

    def _in_source(self, token: int, text: str) -> int:
        """The first of the source's own tokens of what a token says; -1 if it says nothing."""
        if self._source is self.model:
            return token
        return next(iter(self._source.tokenizer(text, add_special_tokens=False)["input_ids"]), -1)

    def join(self, table: pd.DataFrame) -> pd.DataFrame:
        """In the order of the texts; and what the state of a sample half-way round said, as a control of each one.

        Its surprisal is not known; samples of the same text are passed over.
        """
        keys = ["text", "position"]
        table = table.sort_values(keys, kind="stable", ignore_index=True)
        samples = table[keys].drop_duplicates(ignore_index=True)
        names = {"text": "lender", "position": "lender_position"}
        lenders = samples.iloc[np.roll(np.arange(len(samples)), len(samples) // 2)].reset_index(drop=True)
        borrowers = samples.join(lenders.rename(columns=names))
        mapped = table[table["condition"] == MAPPED]
        lender_rows = mapped[[*keys, "layer", "target_layer", "decoded"]].rename(columns=names)
        theirs = mapped.drop(columns="decoded").merge(borrowers[borrowers["lender"] != borrowers["text"]], on=keys)
        theirs = theirs.merge(lender_rows, on=["lender", "lender_position", "layer", "target_layer"])
        correct = [agree(decoded, own) for decoded, own in zip(theirs["decoded"], theirs["next_token"], strict=True)]
        theirs = theirs.assign(condition=ANOTHER, correct=correct, surprisal=np.nan)
        return pd.concat([table, tidy(theirs, _TYPES)], ignore_index=True)

    @cached_property
    def _tail(self) -> Patchscope:
        return logit_lens(self._source, self.memory)


def agree(decoded: str, prediction: str) -> bool:
    """Whether tokens of two models say the same: one's text begins with the other's, blanks around them apart.

    Of a token that is only a part of a character it is not known what it says.
    """
    if "\ufffd" in decoded + prediction:
        return False
    bare, other = decoded.strip(), prediction.strip()
    return decoded == prediction or (bool(bare) and bool(other) and (bare.startswith(other) or other.startswith(bare)))


def summarise(table: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """Precision@1 and surprisal of every reader, condition and pair of layers, with 95 % bands from resampled texts.

    One row per `reader` × `condition` × `layer` × `target_layer`: the means `precision_at_1` and `surprisal`, and for
    each its band, `…_low` and `…_high` (NaN for a single text, but for a share on which all agree).
    """
    keys, parts = ["reader", "condition", "layer", "target_layer"], []
    for group, rows in table.groupby(keys[:2], sort=False):
        by_text = rows.assign(precision_at_1=rows["correct"].astype(float)).groupby(["text", *keys[2:]])
        measures = by_text[["precision_at_1", "surprisal"]]
        # What is missing is not 0.
        sums = measures.sum().where(measures.count().eq(by_text.size(), axis=0)).unstack(keys[2:])
        counts = (rows.groupby("text").size() / rows.groupby(keys[2:]).ngroups).loc[sums.index].to_numpy()
        parts.append(token_measures(sums, counts, seed).assign(reader=group[0], condition=group[1]))
    summary = pd.concat(parts, ignore_index=True)
    return summary[[*keys, *(column for column in summary if column not in keys)]]


def best_pairs(table: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """Of every reader and condition, the pair of layers that is read best, chosen on half of the texts.

    One row per `reader` × `condition`, as of `best_on_half`; what is scored is precision@1.
    """
    best = []
    for (reader, condition), rows in table.groupby(["reader", "condition"], sort=False):
        scores = rows.groupby(["text", "layer", "target_layer"])["correct"].mean().unstack(["layer", "target_layer"])
        if half := best_on_half(scores, np.random.default_rng(seed), seed):
            best.append({"reader": reader, "condition": condition, **half})
    columns = ["reader", "condition", "layer", "target_layer", "held_out", "low", "high", "maximum"]
    return pd.DataFrame(best, columns=columns)
