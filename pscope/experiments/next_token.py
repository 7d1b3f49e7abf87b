"""Figure 2: how early a model's next token can be read, by the logit lens and by the token-identity Patchscope.

The paper's section 4.1. At a random position of each text, the hidden state of every layer is decoded in both ways,
and the decoded token is held against the model's own prediction there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from pscope.engine.lens import logit_lens
from pscope.engine.patchscope import MEMORY, Patchscope
from pscope.experiments.bands import mean_bands, share_bands
from pscope.experiments.experiment import Experiment, Unit, Work
from pscope.inputs.positions import Sampled
from pscope.metrics import surprisal
from pscope.models.model import LanguageModel
from pscope.models.prompts import Prompt
from pscope.models.residual import capture, check_layers

LOGIT_LENS, TOKEN_IDENTITY = "logit lens", "token identity"


@dataclass(frozen=True)
class Reading(Unit):
    """The sampled positions of one text, read at every layer."""

    sampled: Sampled


class NextToken(Experiment[Reading]):
    """Figure 2: the states of `layers` at every sampled position, decoded with both lenses, and what comes out scored.

    A row of the table is one sample × layer × lens: `text`, `position`, `token`, `next_token_id` and `next_token` (the
    model's own prediction), `layer`, `lens`, `decoded_id`, `decoded`, `correct` (for precision@1) and `surprisal`
    (nats). Texts share passes of at most `batch_tokens` tokens. Raises PscopeError for a layer out of range.
    """

    def __init__(
        self,
        model: LanguageModel,
        target: Prompt,
        sampled: Sequence[Sampled],
        layers: Sequence[int],
        *,
        batch_tokens: int = 1024,
        memory: int = MEMORY,
    ) -> None:
        super().__init__(model, target, memory)
        check_layers(model, layers)
        self._layers, self._batch_tokens = list(layers), batch_tokens
        # Of one length side by side: those share a pass without padding.
        self.units = [
            Reading(f"text {item.text}", len(item.positions) * len(layers), target, item)
            for item in sorted(sampled, key=lambda item: len(item.prompt))
        ]

    def work(self, unit: Reading) -> Work:
        suffix, positions = len(self.target) - min(self.target.positions), len(unit.sampled.positions)
        # The logit lens is an unembedding, and so is the model's own prediction.
        lens = positions * (len(self._layers) + 1)
        return Work(len(unit.sampled.prompt), suffix, tuple(self._layers) * positions, spoken=lens)

    def read(self, units: Sequence[Reading]) -> pd.DataFrame:
        model, items = self.model, [unit.sampled for unit in units]
        states = capture(
            model,
            [item.prompt for item in items],
            [item.positions for item in items],
            [*self._layers, model.n_layers],
            self._batch_tokens,
        )  # (samples, layers + 1, hidden)
        places = [(item, position) for item in items for position in item.positions]
        identity, lens = self.scope(self.target), self._lens
        lens.memory = self.memory
        together = max(1, identity.rows_per_pass() // len(self._layers))
        parts = [slice(start, start + together) for start in range(0, len(places), together)]
        tables = [
            _scored(lens, identity, places[part], states[part, :-1], states[part, -1], self._layers) for part in parts
        ]
        return pd.concat(tables, ignore_index=True)

    def join(self, table: pd.DataFrame) -> pd.DataFrame:
        """In the order of the texts."""
        return table.sort_values(["text", "position"], kind="stable", ignore_index=True)

    @cached_property
    def _lens(self) -> Patchscope:
        return logit_lens(self.model, self.memory)


def _scored(
    lens: Patchscope,
    identity: Patchscope,
    places: list[tuple[Sampled, int]],
    states: Tensor,
    last_states: Tensor,
    layers: Sequence[int],
) -> pd.DataFrame:
    model = identity.model
    samples, n_layers, hidden = states.shape
    rows = states.reshape(samples * n_layers, hidden)
    own_logits = torch.cat([part.patched for part in lens.logits(last_states, model.n_layers)])  # (samples, vocab)
    own = own_logits.argmax(dim=-1)
    frames = []
    for name, logits in (
        (LOGIT_LENS, lens.logits(rows, model.n_layers)),
        (TOKEN_IDENTITY, identity.logits(rows, list(layers) * samples)),
    ):
        decoded = torch.cat([part.patched.argmax(dim=-1) for part in logits]).reshape(samples, n_layers)
        frames.append(
            pd.DataFrame(
                {
                    "text": np.repeat([item.text for item, _ in places], n_layers),
                    "position": np.repeat([position for _, position in places], n_layers),
                    "token": np.repeat([item.prompt.tokens[position] for item, position in places], n_layers),
                    "next_token_id": np.repeat(own.tolist(), n_layers),
                    "layer": np.tile(layers, samples),
                    "lens": name,
                    "decoded_id": decoded.flatten().tolist(),
                    "correct": (decoded == own[:, None]).flatten().tolist(),
                    "surprisal": surprisal(decoded, own_logits).flatten().tolist(),
                }
            )
        )
    table = pd.concat(frames, ignore_index=True)
    for column in ("next_token", "decoded"):
        spelled = {token: model.tokenizer.decode([token]) for token in table[f"{column}_id"].unique().tolist()}
        table.insert(table.columns.get_loc(f"{column}_id") + 1, column, table[f"{column}_id"].map(spelled))
    return table


def summarise(table: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """Precision@1 and surprisal per lens and layer, with 95 % bands.

    One row per lens × layer: the means `precision_at_1` and `surprisal`, and for each its band, `…_low` and `…_high`.
    The bands come from resampling whole texts, since positions of one text are not independent of each other; a single
    text has none (NaN). Where all texts agree on precision@1, its band is exact, even of one.
    """
    measures = table.assign(precision_at_1=table["correct"].astype(float))
    measures = measures.groupby(["text", "lens", "layer"])[["precision_at_1", "surprisal"]]
    sums = measures.sum().unstack(["lens", "layer"])  # (texts, measure × lens × layer)
    counts = table.groupby("text").size() / table.groupby(["lens", "layer"]).ngroups
    bands = {"precision_at_1": share_bands, "surprisal": mean_bands}
    each = [of(sums[measure].to_numpy(), counts.loc[sums.index].to_numpy(), seed) for measure, of in bands.items()]
    low, high = (np.concatenate(bounds) for bounds in zip(*each, strict=True))
    result = pd.DataFrame(
        {
            "": sums.sum() / counts.sum(),
            "_low": pd.Series(low, sums.columns),
            "_high": pd.Series(high, sums.columns),
        }
    ).unstack(0)
    result.columns = [f"{measure}{bound}" for bound, measure in result.columns]
    columns = [f"{m}{b}" for m in ("precision_at_1", "surprisal") for b in ("", "_low", "_high")]
    return result[columns].reset_index()
