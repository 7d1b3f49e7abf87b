"""What any states say: vectors of the residual stream read by a target prompt, as they are or written otherwise."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Literal

import pandas as pd
import torch
from torch import Tensor

from pscope.arguments import as_int, as_python, as_seed, excerpt, is_number
from pscope.engine.generate import GREEDY, Decoding, check_decoding
from pscope.engine.patchscope import MEMORY
from pscope.engine.unpatched import continue_prompts
from pscope.engine.writes import Writes
from pscope.errors import PscopeError, RowError
from pscope.experiments.experiment import Experiment, Unit, Work, check_names, naming_rows, of_kind, seed_of, tidy
from pscope.experiments.known import Plain, by_length
from pscope.experiments.sweep import CLEAN, PATCHED, RANDOM, same_norm
from pscope.mappings.mapping_set import MappingSet, check_mappings
from pscope.models.model import LanguageModel
from pscope.models.prompts import Prompt, decode, written_out
from pscope.models.residual import Pair, as_layers
from pscope.models.states import Label, States

TEXT_ONLY = "text only"

TYPES = {
    "source": "string",
    "token": "string",
    "position": "Int64",
    "layer": "Int64",
    "target_layer": "Int64",
    "scale": "Float64",
    "condition": "string",
    "time": "Int64",
    "path": "string",
    "continuation": "string",
    "relevance": "string",
    "rank": "Int64",
    "next_token": "string",
    "probability": "Float64",
}


@dataclass(frozen=True)
class Writing:
    """How a vector is written: times each of `scales`; with `norm`, at the length of the clean target's state in its
    place before that; with `add`, added to that state; and in all layers of `hold` as well as in its own. Raises
    PscopeError for scales that are no finite numbers, or not apart.
    """

    scales: tuple[float, ...] = (1.0,)
    norm: bool = False
    add: bool = False
    hold: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        scales, hold = as_python(self.scales), as_python(self.hold)
        scales = tuple(map(as_python, scales)) if isinstance(scales, (list, tuple)) else (scales,)
        if not scales or not all(is_number(scale) and abs(scale) < float("inf") for scale in scales):
            raise PscopeError(f"scales are finite numbers, one at least; not {excerpt(self.scales)}")
        object.__setattr__(self, "scales", scales)
        object.__setattr__(self, "hold", tuple(hold) if isinstance(hold, list) else hold)
        if len(set(self.scales)) < len(self.scales):
            raise PscopeError(f"one of the scales {list(self.scales)} is given twice")


@dataclass(frozen=True)
class Vector(Unit):
    """A vector that is patched into the target at each of `target_layers`: the state of this `number`."""

    number: int
    label: Label
    target_layers: tuple[int, ...]

    def pair(self, target_layer: int) -> Pair:
        """The layers from which and to which it is mapped. Raises PscopeError if it is of none."""
        if self.label.layer is None:
            raise PscopeError(f"{self.name} is of no layer, and mappings lead from one; name it with --layers")
        return self.label.layer, target_layer


@dataclass(frozen=True)
class _Row:
    """A vector of a unit as it is patched, before it is scaled."""

    unit: Vector
    condition: str
    target_layer: int
    scale: float
    vector: Tensor

    def __str__(self) -> str:
        return f"{self.unit.name} ({self.condition}) failed at target layer {self.target_layer}, scale {self.scale:g}"


class Reading(Experiment[Vector | Plain]):
    """Any states, each patched into a target prompt at some layers and scales, and what the model says of them.

    A row of the table is one state × target layer × scale × condition × time × rank. `source`, `token`, `position` and
    `layer` are what the state is of. `rank`, up to `top_k`, `next_token` and its `probability` are of what follows the
    target at once; the `continuation` is sampled so many `times`, if the decoding has a temperature. The conditions:

    - "patched", and "random vector", of the same norm, written in the same way;
    - "clean target": the target unpatched;
    - "text only": unpatched too, with what `words` has for a text in the place of the placeholder. The model may know
      the answer from the words alone (arXiv 2509.13316).

    With `relevance` a patched row tells, as JSON, for each token that it says, how much it owes to the patch:
    |p(patched) − p(clean)|, with what was said before it forced (SelfIE). `target_layers` are "same", the layer that a
    state is of, or some for all. States of another model are mapped by `mappings`, each from its layer.

    Raises PscopeError for states that do not fit, or have no layer where one is needed.
    """

    def __init__(
        self,
        model: LanguageModel,
        target: Prompt,
        states: States,
        target_layers: Sequence[int] | Literal["same"] = "same",
        decoding: Decoding = GREEDY,
        *,
        writing: Writing | None = None,
        mappings: MappingSet | None = None,
        words: Mapping[str, str] | None = None,
        times: int = 1,
        top_k: int = 1,
        relevance: bool = False,
        seed: int = 0,
        memory: int = MEMORY,
    ) -> None:
        super().__init__(model, target, memory)
        check_decoding(decoding, model, target)
        if not isinstance(states, States):
            raise PscopeError(f"States are read, not {excerpt(states)}; vectors become some by States(vectors, names)")
        if not len(states):
            raise PscopeError("there is no state to read")
        times, seed = as_int(times, "times"), as_seed(seed)
        if times > 1 and not decoding.temperature:
            raise PscopeError(f"{times} times are asked for; once is always the same without a temperature")
        top_k = as_int(top_k, "top_k", 1, model.config.vocab_size)
        self._writing = Writing() if writing is None else writing
        if not isinstance(self._writing, Writing):
            raise PscopeError(f"how vectors are written is a Writing, as Writing(norm=True), not {excerpt(writing)}")
        as_layers(model, self._writing.hold, least=0)
        if not isinstance(target_layers, str) or target_layers != "same":
            target_layers = as_layers(model, () if target_layers is None else target_layers)
        if mappings is not None:
            check_mappings(mappings)
        self._vectors, self._mappings, self._decoding, self._seed = states.vectors, mappings, decoding, seed
        self._times, self._top_k, self._relevance = times, top_k, relevance
        self.units = [
            self._unit(number, label, label_layers(label, target_layers)) for number, label in enumerate(states.labels)
        ]
        check_names(self.units)
        self._check_states()
        if not isinstance(words, Mapping | None):
            raise PscopeError(f"words are those for each text, as {{text: words}}, not {excerpt(words)}")
        self.units += by_length([self._plain(None), *map(self._plain, (words or {}).items())])

    def _unit(self, number: int, label: Label, target_layers: tuple[int, ...]) -> Vector:
        where = [f"{label.text!r}"]
        where += [] if label.position is None else [f"at {label.position}:{label.token!r}"]
        where += [] if label.layer is None else [f"of layer {label.layer}"]
        rows = 2 * len(target_layers) * len(self._writing.scales) * self._times
        return Vector(" ".join(where), rows, self.target, number, label, target_layers)

    def _plain(self, words: tuple[str, str] | None) -> Plain:
        """The target as it stands, or with the words of a text in the place of its placeholder."""
        if words is None:
            return Plain(CLEAN, self._times, CLEAN, self.target, {"condition": CLEAN})
        source, text = words
        if not isinstance(text, str) or not text.strip():
            raise PscopeError(f"the words for {source!r} are {excerpt(text)}; give a text")
        prompt = self.model.prompt(written_out(self.target, text))
        check_decoding(self._decoding, self.model, prompt)
        about = {"source": source, "condition": TEXT_ONLY}
        return Plain(f"{source!r}, {TEXT_ONLY}", self._times, CLEAN, prompt, about)

    def _check_states(self) -> None:
        """Raise PscopeError unless all vectors can be written, once mapped."""
        vectors = of_kind(self.units, Vector)
        for unit in vectors:
            as_layers(self.model, unit.target_layers)
            if self._mappings is not None:
                for target_layer in unit.target_layers:
                    self._mappings.at(unit.pair(target_layer))
        width, model = self._mapped_vectors(vectors[:1])[0].shape[-1], self.model
        # In a dry run, of a model without weights, there are no mappings.
        if width != model.hidden_size and model.device.type != "meta":
            raise PscopeError(
                f"vectors of width {width} do not fit {model.name}, which is {model.hidden_size} wide; they need "
                "mappings to it, as `pscope fit --target-model` makes"
            )

    def work(self, unit: Vector | Plain) -> Work:
        if isinstance(unit, Plain):
            return replace(unit.work(self._decoding.new_tokens), spoken=self._times)
        suffix = len(self.target) - min(self.target.positions)
        lowest = (min((layer, *self._writing.hold)) for layer in unit.target_layers)
        layers = tuple(lowest) * (unit.rows // len(unit.target_layers))
        return Work(0, suffix, layers, new_tokens=self._decoding.new_tokens)

    def read(self, units: Sequence[Vector | Plain]) -> pd.DataFrame:
        vectors, prompts = of_kind(units, Vector), of_kind(units, Plain)
        return tidy(pd.DataFrame(self._patched_rows(vectors) if vectors else self._plain_rows(prompts)), TYPES)

    def _patched_rows(self, units: Sequence[Vector]) -> Iterator[dict[str, object]]:
        scope, how, rows = self.scope(self.target), self._writing, list(self._rows(units))
        writes = scope.writes(
            torch.stack([row.vector for row in rows]),
            [row.target_layer for row in rows],
            hold=how.hold,
            scale=[row.scale for row in rows],
            norm=how.norm,
            add=how.add,
        )
        with naming_rows(rows):
            next_tokens = [top for part in scope.logits(writes) for top in self._top(part.patched)]
        with naming_rows([row for row in rows for _ in range(self._times)]):
            continuations = list(self._continuations(rows, writes))
        relevance = self._relevances(rows, writes, continuations) if self._relevance else [None] * len(continuations)
        for number, row in enumerate(rows):
            label = row.unit.label
            about: dict[str, object] = {"source": label.text, "token": label.token, "position": label.position}
            about |= {"layer": label.layer, "target_layer": row.target_layer}
            about |= {"scale": row.scale, "condition": row.condition}
            for time in range(self._times):
                place = number * self._times + time
                columns = {"continuation": self._text(continuations[place]), "relevance": relevance[place]}
                for top in next_tokens[number]:
                    yield {**about, "time": time + 1, "path": scope.path, **columns, **top}

    def _plain_rows(self, units: Sequence[Plain]) -> Iterator[dict[str, object]]:
        path = self.scope(self.target).path
        for unit in units:
            ids = torch.tensor([unit.prompt.ids], device=self.model.device)
            (next_tokens,) = self._top(self.model.next_token_logits(ids))
            prompts, decoding = [unit.prompt] * self._times, self._decoding_of(unit)
            with naming_rows([f"{unit.name} failed"] * self._times):
                continuations = sorted(continue_prompts(self.model, prompts, decoding, memory=self.memory, path=path))
            for time, tokens in continuations:
                for top in next_tokens:
                    columns = {"time": time + 1, "path": path, "continuation": self._text(tokens)}
                    yield {**unit.about, **columns, **top}

    def _rows(self, units: Sequence[Vector]) -> Iterator[_Row]:
        """The rows of units, those of one unit together."""
        parts = iter(self._mapped_vectors(units).split([len(unit.target_layers) for unit in units]))
        for unit in units:
            vectors = next(parts)  # (target layers, hidden)
            random = same_norm(vectors[:, None], [unit.name] * len(vectors), [0], self._seed)[:, 0]
            for condition, written in ((PATCHED, vectors), (RANDOM, random)):
                for layer, vector in zip(unit.target_layers, written, strict=True):
                    for scale in self._writing.scales:
                        yield _Row(unit, condition, layer, scale, vector)

    def _mapped_vectors(self, units: Sequence[Vector]) -> Tensor:
        """What is written for each unit at each of its target layers, before it is scaled, (units × layers, hidden)."""
        places = [(unit, target) for unit in units for target in unit.target_layers]
        vectors = self._vectors[[unit.number for unit, _ in places]]
        if self._mappings is None:
            return vectors
        # A state of a text goes through maps that have not seen it; a mean or a vector is of no text.
        texts = [None if unit.label.position is None else unit.label.text for unit, _ in places]
        pairs = [unit.pair(target) for unit, target in places]
        return self._mappings.apply_each(vectors, list(zip(pairs, texts, strict=True)))

    def _continuations(self, rows: Sequence[_Row], writes: Writes) -> Iterator[list[int]]:
        """What each row says, each of its times: greedily all at once, else by draws that are those of its unit."""
        scope, numbers = self.scope(self.target), torch.arange(len(rows))
        together = (
            [rows] if not self._decoding.temperature else [[*of] for _, of in groupby(rows, lambda row: row.unit)]
        )
        start = 0
        for group in together:
            indices = numbers[start : start + len(group)].repeat_interleave(self._times)
            try:
                yield from scope.generate(writes[indices], decoding=self._decoding_of(group[0].unit)).patched
            except RowError as error:
                raise RowError(start * self._times + error.row, error.reason) from error
            start += len(group)

    def _decoding_of(self, unit: Unit) -> Decoding:
        """The decoding with a seed that is the unit's own."""
        return replace(self._decoding, seed=seed_of(self._seed, unit.name))

    def _relevances(self, rows: Sequence[_Row], writes: Writes, tokens: Sequence[list[int]]) -> list[str | None]:
        """How much each token that patched rows say owes to the patch."""
        patched = [place for place in range(len(tokens)) if rows[place // self._times].condition == PATCHED]
        of_patched = writes[torch.tensor(patched) // self._times]
        with naming_rows([rows[place // self._times] for place in patched]):
            relevance = self.scope(self.target).relevance(of_patched, None, [tokens[place] for place in patched])
        texts: list[str | None] = [None] * len(tokens)
        for place, shares in zip(patched, relevance.tolist(), strict=True):
            pieces = [decode(self.model.tokenizer, [token]) for token in tokens[place]]
            pairs = [[piece, round(share, 4)] for piece, share in zip(pieces, shares, strict=False)]
            texts[place] = json.dumps(pairs, ensure_ascii=False)
        return texts

    def _top(self, logits: Tensor) -> list[list[dict[str, object]]]:
        """The most probable next tokens of each row of logits (rows, vocab), as rows of the table."""
        return [
            [
                {"rank": rank, "next_token": token, "probability": probability}
                for rank, (token, probability) in enumerate(tokens, 1)
            ]
            for tokens in self.model.most_probable(logits, self._top_k)
        ]

    def _text(self, tokens: list[int]) -> str:
        return self._decoding.text(tokens, self.model.tokenizer)


def label_layers(label: Label, target_layers: Sequence[int] | Literal["same"]) -> tuple[int, ...]:
    """The target layers of a state. Raises PscopeError where they are those that it is of, and it is of none."""
    if target_layers != "same":
        return tuple(target_layers)
    if label.layer is None:
        raise PscopeError(f"{label.text!r} is of no layer, so that none is the same; give --target-layers")
    return (label.layer,)
