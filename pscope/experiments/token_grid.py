"""A prompt's tokens at every layer, read by lenses side by side: what is looked at before anything is asked."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor

from pscope.arguments import as_int, as_list, excerpt
from pscope.engine.generate import Decoding, check_decoding
from pscope.engine.lens import ANY_TOKEN
from pscope.engine.patchscope import MEMORY
from pscope.errors import PscopeError
from pscope.experiments.experiment import Experiment, Unit, Work, of_kind, tidy
from pscope.experiments.grid import line_break
from pscope.experiments.next_token import LOGIT_LENS, TOKEN_IDENTITY, Lens, lens_of, most_probable_tokens
from pscope.experiments.sweep import CLEAN
from pscope.mappings.mapping_set import MappingSet
from pscope.models.model import LanguageModel, as_prompt, check_model
from pscope.models.prompts import ENTITY_DESCRIPTION as ENTITY_PROMPT
from pscope.models.prompts import TOKEN_IDENTITY as IDENTITY_PROMPT
from pscope.models.prompts import Prompt, decode
from pscope.models.residual import as_layers, as_positions, capture

ENTITY_DESCRIPTION = "entity description"

TYPES = {
    "lens": "string",
    "position": "Int64",
    "token": "string",
    "layer": "Int64",
    "answer": "string",
    "answer_rank": "Int64",
    "entropy": "Float64",
    "rank": "Int64",
    "next_token_id": "Int64",
    "next_token": "string",
    "probability": "Float64",
    "continuation": "string",
}


@dataclass(frozen=True)
class Column(Unit):
    """One token of the prompt, at all layers."""

    position: int


@dataclass(frozen=True)
class Unpatched(Unit):
    """The prompt that a lens patches, as it is."""

    lens: Lens
    prompt: Prompt


class TokenGrid(Experiment[Column | Unpatched]):
    """Every token of a prompt at every layer, by every lens.

    A row of the table is one lens × token × layer × rank: `lens`, `position`, `token`, `layer`; `rank` (to `top_k`),
    `next_token_id`, `next_token` and its `probability`, of what the lens makes of the state; its `entropy`, in nats;
    the `answer`, which is what the model itself says after that token, and its `answer_rank` there, from 1; and the
    `continuation`, of lenses that go on. Tokens are those at `positions`, by default all. For each lens that patches a
    prompt, the rows without a position are those of the prompt unpatched. A lens has no rows for layers that its
    mappings do not lead from, and reads with those that have not seen the `text`, by default that of the prompt. Raises
    PscopeError for what cannot be read.
    """

    def __init__(
        self,
        model: LanguageModel,
        prompt: Prompt,
        lenses: Sequence[Lens],
        layers: Sequence[int] | None = None,
        *,
        positions: Sequence[int] | None = None,
        text: str | None = None,
        top_k: int = 5,
        memory: int = MEMORY,
    ) -> None:
        lenses = as_list(Lens, lenses, "lenses", "give Lens(name, target)")
        prompt, layers = as_prompt(model, prompt), as_layers(model, layers)
        self._targets = [lens.target for lens in lenses if lens.target is not None]
        super().__init__(model, self._targets[0] if self._targets else ANY_TOKEN, memory)
        top_k = as_int(top_k, "top_k", 1, model.config.vocab_size)
        names = [lens.name for lens in lenses]
        if len(set(names)) < len(names) or len(set(layers)) < len(layers):
            raise PscopeError(f"one of the lenses {names}, or of the layers {list(layers)}, is given twice")
        for lens in lenses:
            lens.pairs(layers, model.n_layers)
            if lens.target is not None and lens.decoding is not None:
                check_decoding(lens.decoding, model, lens.target)
        self.prompt, self._text = prompt, prompt.text if text is None else text
        self._lenses, self._layers, self._top_k = lenses, layers, top_k
        rows = len(self._layers) * len(self._lenses)
        (places,) = as_positions([prompt], [range(len(prompt)) if positions is None else positions])
        self._tokens_each = -(-len(prompt) // len(places))
        self.units = [Column(f"token {position}", rows, self.target, position) for position in places]
        # Each beside none: the prompts are of different lengths.
        self.units += [
            Unpatched(f"{lens.name}, {CLEAN}", 1, lens.name, lens, lens.target)
            for lens in lenses
            if lens.target is not None
        ]

    def work(self, unit: Column | Unpatched) -> Work:
        decodings = [lens.decoding for lens in self._lenses if lens.decoding is not None]
        new_tokens = max((decoding.new_tokens for decoding in decodings), default=0)
        if isinstance(unit, Unpatched):
            return Work(len(unit.prompt), spoken=1, new_tokens=new_tokens)
        suffix = max((len(target) - min(target.positions) for target in self._targets), default=1)
        # Those that go on are nearly all there is to do.
        layers = tuple(self._layers) * (len(decodings) or len(self._targets))
        return Work(self._tokens_each, suffix, layers, spoken=0 if layers else len(self._layers), new_tokens=new_tokens)

    def read(self, units: Sequence[Column | Unpatched]) -> pd.DataFrame:
        if unpatched := of_kind(units, Unpatched):
            return tidy([row for unit in unpatched for row in self._clean(unit)], TYPES)
        positions = [unit.position for unit in of_kind(units, Column)]
        states = capture(self.model, [self.prompt], [positions], [*self._layers, self.model.n_layers])
        own = most_probable_tokens(self.scope(ANY_TOKEN), states[:, -1:], [self.model.n_layers])[:, 0]
        cells = [
            row
            for lens in self._lenses
            for row in self._cells(lens, positions, states[:, :-1], own)  # (positions, layers, hidden)
        ]
        return tidy(cells, TYPES)

    def join(self, table: pd.DataFrame) -> pd.DataFrame:
        """By lens, each with what its prompt says unpatched after its cells."""
        order = {lens.name: number for number, lens in enumerate(self._lenses)}
        return table.sort_values("lens", key=lambda names: names.map(order), kind="stable", ignore_index=True)

    def rows_per_part(self, rows_per_pass: int) -> int:
        """As many as of all experiments, of each lens: their rows do not share passes."""
        return super().rows_per_part(rows_per_pass) * len(self._lenses)

    def _cells(self, lens: Lens, positions: Sequence[int], states: Tensor, own: Tensor) -> Iterator[dict[str, object]]:
        """The rows of one lens, from the states (positions, layers, hidden) and what the model itself says."""
        by_column = lens.pairs(self._layers, self.model.n_layers)
        pairs, states = [*by_column.values()], states[:, [*by_column]]
        if lens.mappings is not None:
            states = lens.mappings.apply(states, pairs, [self._text] * len(positions))
        rows, targets = states.flatten(0, 1), [target for _, target in pairs] * len(positions)
        answers = own.repeat_interleave(len(pairs))
        scope = self.scope(lens.target or ANY_TOKEN)
        cells = [cell for part in scope.logits(rows, targets) for cell in self._top(part.patched, answers[part.rows])]
        texts = [None] * len(rows) if lens.decoding is None else scope.generate(rows, targets, lens.decoding).text
        places = [(position, layer) for position in positions for layer, _ in pairs]
        for (position, layer), answer, cell, text in zip(places, answers.tolist(), cells, texts, strict=True):
            about = {"lens": lens.name, "position": position, "token": self.prompt.tokens[position], "layer": layer}
            about |= {"answer": decode(self.model.tokenizer, [answer]), "continuation": text}
            yield from ({**about, **row} for row in cell)

    def _clean(self, unit: Unpatched) -> Iterator[dict[str, object]]:
        """What the prompt of a lens says unpatched."""
        target, lens = unit.prompt, unit.lens
        logits = self.model.next_token_logits(torch.tensor([target.ids], device=self.model.device))
        text = None
        if lens.decoding is not None:
            any_state = torch.zeros(1, self.model.hidden_size, dtype=self.model.dtype, device=self.model.device)
            text = self.scope(target).generate(any_state, self.model.n_layers, lens.decoding).clean_text
        (cell,) = self._top(logits, None)
        for row in cell:
            yield {"lens": lens.name, "token": CLEAN, "continuation": text, **row}

    def _top(self, logits: Tensor, answers: Tensor | None) -> Iterator[list[dict[str, object]]]:
        """For each row of logits (rows, vocab), its most probable tokens, with what is told of the whole row."""
        log_probabilities = logits.float().log_softmax(dim=-1)
        top = log_probabilities.topk(self._top_k)
        entropies = -(log_probabilities.exp() * log_probabilities).nansum(dim=-1)
        ranks: list[int | None] = [None] * len(logits)
        if answers is not None:
            own = log_probabilities.gather(1, answers.to(logits.device)[:, None])
            # Of equals, the model's own is the first.
            ranks = (1 + (log_probabilities > own).sum(dim=-1)).tolist()
        tokenizer = self.model.tokenizer
        for tokens, values, entropy, rank in zip(
            top.indices.tolist(), top.values.tolist(), entropies.tolist(), ranks, strict=True
        ):
            yield [
                {
                    "entropy": entropy,
                    "answer_rank": rank,
                    "rank": number,
                    "next_token_id": token,
                    "next_token": decode(tokenizer, [token]),
                    "probability": math.exp(value),
                }
                for number, (token, value) in enumerate(zip(tokens, values, strict=True), 1)
            ]


def grid_of(
    model: LanguageModel,
    text: str,
    layers: Sequence[int] | None = None,
    *,
    mappings: Mapping[str, MappingSet] | None = None,
    describe: Decoding | None = None,
    top_k: int = 5,
    memory: int = MEMORY,
) -> TokenGrid:
    """The grid of a text by the logit lens, by `mappings`, each a lens of its own, and by token identity; with
    `describe`, also by the entity prompt, which goes on so. Maps to other layers than the last are read by the prompt
    of token identity.
    """
    check_model(model)
    if mappings is not None and not isinstance(mappings, Mapping):
        raise PscopeError(f"mappings are given by name, as {{'tuned': read_mappings(…)}}, not {excerpt(mappings)}")
    identity = model.prompt(IDENTITY_PROMPT)
    lenses = [Lens(LOGIT_LENS)]
    lenses += [lens_of(name, own, identity, model.n_layers) for name, own in (mappings or {}).items()]
    lenses.append(Lens(TOKEN_IDENTITY, identity))
    if describe is not None:
        entity = model.prompt(ENTITY_PROMPT)
        check_decoding(describe, model, entity)
        lenses.append(Lens(ENTITY_DESCRIPTION, entity, decoding=describe))
    prompt = model.prompt(line_break(model, text) + text)
    return TokenGrid(model, prompt, lenses, layers, text=text, top_k=top_k, memory=memory)
