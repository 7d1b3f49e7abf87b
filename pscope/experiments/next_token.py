"""Figure 2: how early a model's next token can be read, by the logit lens, the tuned lens and token identity.

The paper's section 4.1. At a random position of each text, the hidden state of every layer is decoded in each way, and
the decoded token is held against the model's own prediction there. Appendix B.3 tries other target prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from pscope.arguments import as_int, as_list
from pscope.engine.generate import Decoding
from pscope.engine.lens import ANY_TOKEN
from pscope.engine.patchscope import MEMORY, Patchscope
from pscope.errors import PscopeError
from pscope.experiments.bands import token_measures
from pscope.experiments.experiment import Experiment, Unit, Work
from pscope.inputs.positions import Sampled
from pscope.mappings.mapping_set import MappingSet, check_mappings
from pscope.metrics import surprisal
from pscope.models.model import LanguageModel
from pscope.models.prompts import Prompt, decode
from pscope.models.residual import Pair, as_layers, capture

LOGIT_LENS, TUNED_LENS, TOKEN_IDENTITY = "logit lens", "tuned lens (affine)", "token identity"
FITTED, RANDOM_TOKENS = "fitted to the prompt", "random tokens"


@dataclass(frozen=True)
class Lens:
    """A way to decode a state of layer ℓ: patched into `target` at ℓ, or, without one, into the last layer.

    With `mappings`, it is mapped first, and goes to the layer to which they map: the last one is always read by the
    model's own tail, as the logit lens reads it. Layers that they do not map are not decoded. With a `decoding`, a
    `TokenGrid` has the target go on so; without one, the token that follows is all.
    """

    name: str
    target: Prompt | None = None
    mappings: MappingSet | None = None
    decoding: Decoding | None = None

    def __post_init__(self) -> None:
        if self.decoding is not None and (self.target is None or self.decoding.temperature):
            raise PscopeError(f"{self.name}: a lens goes on greedily, from the prompt that it patches")

    def pairs(self, layers: Sequence[int], last: int) -> dict[int, Pair]:
        """By the place of each layer ℓ that is decoded, ℓ and the layer ℓ* at which it is read.

        Raises PscopeError for mappings of none of them.
        """
        pairs = {}
        for place, layer in enumerate(layers):
            natural = (layer, last if self.target is None else layer)
            mapped = [natural] if self.mappings is None else sorted(self.mappings.maps)
            if own := [pair for pair in mapped if pair[0] == layer]:
                pairs[place] = natural if natural in own else own[0]
        if self.mappings is not None and not pairs:
            raise PscopeError(f"{self.name} reads none of the layers {list(layers)}: {self.mappings.covered}")
        return pairs


def lens_of(name: str, mappings: MappingSet, target: Prompt, last: int) -> Lens:
    """The lens of some maps: those to the last layer are read by the model's tail, others by the target prompt.

    Raises PscopeError for maps that lead into another prompt.
    """
    check_mappings(mappings)
    into = mappings.origin.settings.get("into")
    if into not in (None, target.text):
        raise PscopeError(f"the maps of {name} lead into the prompt {into!r}; give it with --target")
    return Lens(name, None if all(pair[1] == last for pair in mappings.maps) else target, mappings)


@dataclass(frozen=True)
class SampledText(Unit):
    """The sampled positions of one text, read at every layer."""

    sampled: Sampled


class NextToken(Experiment[SampledText]):
    """Figure 2: the states of `layers` at every sampled position of `texts`, decoded with every lens, and scored.

    A row of the table is one sample × layer × lens: `text`, `position`, `token`, `next_token_id` and `next_token` (the
    model's own prediction), `layer`, `lens` and its `prompt`, `decoded_id`, `decoded`, `correct` (for precision@1) and
    `surprisal` (nats). Texts share passes of at most `batch_tokens` tokens. Raises PscopeError for a layer out of
    range, and for a lens that maps none of the layers.
    """

    def __init__(
        self,
        model: LanguageModel,
        lenses: Sequence[Lens],
        texts: Sequence[str],
        sampled: Sequence[Sampled],
        layers: Sequence[int],
        *,
        batch_tokens: int = 1024,
        memory: int = MEMORY,
    ) -> None:
        lenses, layers = as_list(Lens, lenses, "lenses", "give Lens(name, target)"), as_layers(model, layers)
        self._prompts = list(dict.fromkeys(lens.target for lens in lenses if lens.target is not None))
        super().__init__(model, self._prompts[0] if self._prompts else ANY_TOKEN, memory)
        self._lenses, self._texts, self._layers = lenses, texts, layers
        self._batch_tokens = as_int(batch_tokens, "batch_tokens")
        rows = sum(len(lens.pairs(layers, model.n_layers)) * (lens.target is not None) for lens in lenses)
        # Of one length side by side: those share a pass without padding.
        self.units = [
            SampledText(f"text {item.text}", len(item.positions) * max(1, rows), self.target, item)
            for item in sorted(
                as_list(Sampled, sampled, "positions", "draw them with draw_positions"),
                key=lambda item: len(item.prompt),
            )
        ]

    def work(self, unit: SampledText) -> Work:
        positions, last = len(unit.sampled.positions), self.model.n_layers
        pairs = [(lens, pair) for lens in self._lenses for pair in lens.pairs(self._layers, last).values()]
        patched_layers = [pair[1] for lens, pair in pairs if lens.target is not None and pair[1] < last]
        suffix = max((len(prompt) - min(prompt.positions) for prompt in self._prompts), default=1)
        # What the tail alone reads is an unembedding, and so is the model's own prediction.
        spoken = positions * (1 + len(pairs) - len(patched_layers))
        return Work(len(unit.sampled.prompt), suffix, tuple(patched_layers) * positions, spoken=spoken)

    def read(self, units: Sequence[SampledText]) -> pd.DataFrame:
        layers = [*self._layers, self.model.n_layers]
        places, states = sampled_states(self.model, units, layers, self._batch_tokens)  # (samples, layers + 1, hidden)
        together = max(1, self.scope(self.target).rows_per_pass() // len(self._layers))
        parts = [slice(start, start + together) for start in range(0, len(places), together)]
        return pd.concat([self._sample_rows(places[part], states[part]) for part in parts], ignore_index=True)

    def join(self, table: pd.DataFrame) -> pd.DataFrame:
        """In the order of the texts."""
        return table.sort_values(["text", "position"], kind="stable", ignore_index=True)

    def _sample_rows(self, places: list[tuple[Sampled, int]], states: Tensor) -> pd.DataFrame:
        """The rows of some samples, from their states (samples, layers + 1, hidden)."""
        model, samples = self.model, len(places)
        texts = [self._texts[item.text] for item, _ in places]
        tail = self.scope(ANY_TOKEN)
        logits = torch.cat([part.patched for part in tail.logits(states[:, -1], model.n_layers)])  # (samples, vocab)
        next_tokens = logits.argmax(dim=-1)
        frames = []
        for lens in self._lenses:
            by_column = lens.pairs(self._layers, model.n_layers)
            pairs, lens_states = [*by_column.values()], states[:, [*by_column]]
            if lens.mappings is not None:
                lens_states = lens.mappings.apply(lens_states, pairs, texts)
            scope, targets = self.scope(lens.target or ANY_TOKEN), [target for _, target in pairs]
            decoded = most_probable_tokens(scope, lens_states, targets)  # (samples, pairs)
            frames.append(
                pd.DataFrame(
                    {
                        "text": np.repeat([item.text for item, _ in places], len(pairs)),
                        "position": np.repeat([position for _, position in places], len(pairs)),
                        "token": np.repeat([item.prompt.tokens[position] for item, position in places], len(pairs)),
                        "next_token_id": np.repeat(next_tokens.tolist(), len(pairs)),
                        "layer": np.tile([layer for layer, _ in pairs], samples),
                        "lens": lens.name,
                        "prompt": pd.Series(lens.target and lens.target.text, range(decoded.numel()), dtype="string"),
                        "decoded_id": decoded.flatten().tolist(),
                        "correct": (decoded == next_tokens[:, None]).flatten().tolist(),
                        "surprisal": surprisal(decoded, logits).flatten().tolist(),
                    }
                )
            )
        table = pd.concat(frames, ignore_index=True)
        for column in ("next_token", "decoded"):
            spelled = {token: decode(model.tokenizer, [token]) for token in table[f"{column}_id"].unique().tolist()}
            table.insert(table.columns.get_loc(f"{column}_id") + 1, column, table[f"{column}_id"].map(spelled))
        return table


def sampled_states(
    model: LanguageModel, units: Sequence[SampledText], layers: Sequence[int], batch_tokens: int = 1024
) -> tuple[list[tuple[Sampled, int]], Tensor]:
    """The samples of some units, each a text and a position, and their states (samples, layers, hidden)."""
    items = [unit.sampled for unit in units]
    states = capture(model, [item.prompt for item in items], [item.positions for item in items], layers, batch_tokens)
    return [(item, position) for item in items for position in item.positions], states


def most_probable_tokens(scope: Patchscope, states: Tensor, targets: Sequence[int]) -> Tensor:
    """What states (samples, pairs, hidden) are decoded as, each patched at the target layer of its pair."""
    parts = scope.logits(states.flatten(0, 1), [*targets] * len(states))
    return torch.cat([part.patched.argmax(dim=-1) for part in parts]).reshape(states.shape[:2])


def random_token_prompts(model: LanguageModel, count: int, seed: int) -> list[Prompt]:
    """Target prompts that repeat tokens drawn at random, as `TOKEN_IDENTITY` does with chosen ones (appendix B.3).

    Each shows 1 to 10 tokens, "tok -> tok" on a line of its own, and ends with the placeholder "?".
    """
    random = np.random.default_rng(seed)
    special = {*model.tokenizer.all_special_ids, *model.tokenizer.get_added_vocab().values()}
    prompts: list[Prompt] = []
    while len(prompts) < count:
        tokens = [_random_token(model, random, special) for _ in range(random.integers(1, 11))]
        prompts.append(model.prompt("".join(f"{token} -> {token}\n" for token in tokens) + "?"))
    return prompts


def _random_token(model: LanguageModel, random: np.random.Generator, special: set[int]) -> str:
    """A token that can be written on a line: one that is a piece of Unicode, and not only blanks."""
    while True:
        token = int(random.integers(len(model.tokenizer)))
        text = decode(model.tokenizer, [token]).strip()
        if token not in special and text.isprintable() and text and "\ufffd" not in text:
            return text


def summarise(table: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """Precision@1 and surprisal per lens and layer, with 95 % bands.

    One row per lens × layer: the means `precision_at_1` and `surprisal`, and for each its band, `…_low` and `…_high`.
    The bands come from resampling whole texts, since positions of one text are not independent of each other; a single
    text has none (NaN). Where all texts agree on precision@1, its band is exact, even of one.
    """
    measures = table.assign(precision_at_1=table["correct"].astype(float))
    # A sample that several prompts of one lens have read is one sample still.
    samples = measures.groupby(["text", "position", "lens", "layer"], sort=False)[
        ["precision_at_1", "surprisal"]
    ].mean()
    sums = samples.groupby(["text", "lens", "layer"]).sum().unstack(["lens", "layer"])  # (texts, measures × lenses)
    counts = table.groupby("text")["position"].nunique().loc[sums.index].to_numpy()
    summary = token_measures(sums, counts, seed)
    return summary.set_index("lens").loc[table["lens"].unique()].reset_index()
