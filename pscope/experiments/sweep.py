"""The sweep over source and target layers: states in, what they say at every pair out, beside controls.

Every source state is read at each ℓ of a grid and patched into a target at its ℓ*. Beside it stand a random vector of
the same norm, the target unpatched, and, without another pass, what somebody else's state said.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor

from pscope.engine.generate import Decoding, Settled
from pscope.engine.patchscope import Patchscope
from pscope.engine.together import Request, generate_together
from pscope.errors import PscopeError, RowError
from pscope.experiments.experiment import Unit, Work, seed_of
from pscope.experiments.grid import source_layers
from pscope.mappings.mapping_set import MappingSet
from pscope.metrics import answer_found, answer_settled
from pscope.models.model import LanguageModel
from pscope.models.prompts import Prompt
from pscope.models.residual import Pair, capture

PATCHED, RANDOM, CLEAN = "patched", "random vector", "clean target"

PATCH_TYPES = {
    "condition": "string",
    "layer": "Int64",
    "target_layer": "Int64",
    "position": "Int64",
    "token": "string",
    "path": "string",
}
"""The columns that say what is patched where, beside those that say whose row it is."""

TYPES = {**PATCH_TYPES, "continuation": "string", "found": "bool"}
"""The columns that a sweep fills."""


@dataclass(frozen=True)
class Source(Unit):
    """The state of a prompt's marked token, patched into `target` at every pair of `pairs`.

    `about` are the columns of the table that say what it is. A row need not go on once one of its `answers` stands in
    what it said, and one of those of everybody to whom it is lent. `candidates` are those among which one is chosen
    where rows are scored. `random` asks for the control of the same norm.
    """

    target: Prompt
    source: Prompt
    pairs: tuple[Pair, ...]
    about: Mapping[str, Any]
    answers: tuple[str, ...] = ()
    lent_to: tuple[tuple[str, ...], ...] = ()
    candidates: tuple[str, ...] = ()
    random: bool = True

    @property
    def shares(self) -> object:
        """Rows of several targets of one length can speak in one batch."""
        return len(self.target)

    @property
    def conditions(self) -> list[str]:
        """Those in which its rows are patched."""
        return [PATCHED, RANDOM] if self.random else [PATCHED]

    def work(self, new_tokens: int) -> Work:
        """The least that it asks of a model."""
        rows = tuple(target for _, target in self.pairs) * len(self.conditions)
        return Work(len(self.source), len(self.target) - min(self.target.positions), rows, new_tokens=new_tokens)


def patched_rows(pairs: Sequence[Pair], *, random: bool = True) -> int:
    """How many rows of a source are patched, the control among them."""
    return (1 + random) * len(pairs)


@dataclass(frozen=True)
class Through:
    """Another model, in which the states are read, and the mappings to the one that is patched."""

    model: LanguageModel
    mappings: MappingSet


class Batch(NamedTuple):
    """What is patched for some sources that share their pairs: each in its conditions, (read, pairs, hidden)."""

    sources: list[tuple[Source, str]]
    states: Tensor

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """Those of each of its sources."""
        return self.sources[0][0].pairs


class Row(NamedTuple):
    """One of the rows of a batch: the number of the state that is read, and of the pair."""

    batch: Batch
    place: int
    pair: int

    def __str__(self) -> str:
        (source, condition), (layer, target) = self.batch.sources[self.place], self.batch.pairs[self.pair]
        return f"{source.name!r} ({condition}) failed at layer {layer}, target layer {target}"


def read_states(model: LanguageModel, sources: Sequence[Source], seed: int, through: Through | None = None) -> Batch:
    """The states of sources that share their pairs, and after them the random vectors of those that ask for them."""
    pairs = sources[0].pairs
    layers, columns = source_layers(pairs)
    read_in = model if through is None else through.model
    states = capture(read_in, [source.source for source in sources], layers=layers)  # (sources, layers, hidden)
    if through is not None:
        states, columns = through.mappings.apply(states[:, columns], pairs, [None] * len(sources)), [*range(len(pairs))]
    random_places = [place for place, source in enumerate(sources) if source.random]
    entries = [(source, PATCHED) for source in sources] + [(sources[place], RANDOM) for place in random_places]
    if random_places:
        # Whatever other layers are read, as where scores are taken everywhere and words at some.
        at = layers if through is None else pairs
        random = same_norm(states[random_places], [sources[place].name for place in random_places], at, seed)
        states = torch.cat([states, random])
    return Batch(entries, states[:, columns])


def sweep(
    scope_of: Callable[[Prompt], Patchscope],
    sources: Sequence[Source],
    decoding: Decoding,
    seed: int,
    through: Through | None = None,
) -> Iterator[dict[str, object]]:
    """The rows of the table, by their columns, for sources of targets of one length, and what they say.

    A row is one source × pair × condition: what the source is `about`, the columns of `TYPES`. `position` and `token`
    are where a state was read; `found` is whether an answer stands in the continuation. The clean row has no layers.
    Raises PscopeError, naming the source, for a row that fails.
    """
    scopes = {target: scope_of(target) for target in dict.fromkeys(source.target for source in sources)}
    model = scopes[sources[0].target].model
    by_pairs = [[*alike] for _, alike in groupby(sources, key=lambda source: source.pairs)]
    batches = [read_states(model, alike, seed, through) for alike in by_pairs]
    texts, clean = _continuations(scopes, batches, decoding)
    for batch, alike, said in zip(batches, by_pairs, texts, strict=True):
        yield from rows_of(
            batch,
            alike,
            {target: scope.path for target, scope in scopes.items()},
            partial(_said_columns, batch, said),
            lambda source: _answer_columns(clean[source.target], source.answers),
        )


def rows_of(
    batch: Batch,
    sources: Sequence[Source],
    paths: Mapping[Prompt, str],
    patched: Callable[[int, int], dict[str, object]],
    clean: Callable[[Source], dict[str, object]],
) -> Iterator[dict[str, object]]:
    """The rows of each source together: `patched(place, pair)` and `clean(source)` tell what came of them."""
    places = {(source.name, condition): place for place, (source, condition) in enumerate(batch.sources)}
    for source in sources:
        path = {"path": paths[source.target]}
        for condition in source.conditions:
            at = {"position": source.source.position, "token": source.source.token} if condition == PATCHED else {}
            place = places[source.name, condition]
            for number, (layer, target) in enumerate(source.pairs):
                row = {"condition": condition, "layer": layer, "target_layer": target, **path, **at}
                yield {**source.about, **row, **patched(place, number)}
        yield {**source.about, "condition": CLEAN, **path, **clean(source)}


def borrowed_rows(table: pd.DataFrame, borrowers: pd.DataFrame, key: str, within: Sequence[str] = ()) -> pd.DataFrame:
    """What came of others' states, as rows of those who borrow it: a control that costs no pass.

    `borrowers` has a row for each, with the columns that say what it is, and the `lender` from which it borrows:
    another one's value of the column `key`, of the same `within`. How probable the lender's own answer was is left out.
    """
    lent = table[table["condition"] == PATCHED].rename(columns={key: "lender"})
    columns = [column for column in borrowers if column in lent and column not in ("lender", *within)]
    lent = lent.drop(columns=[*columns, "log_probability"], errors="ignore")
    return borrowers.merge(lent, on=[*within, "lender"], sort=False)


def mark_chosen(table: pd.DataFrame, key: str, best: Mapping[str, Mapping[int, Pair]]) -> pd.DataFrame:
    """A sweep's table with a column `chosen`, True at the pair that is `best`, by the column `key` and the fold."""
    own = [best.get(name, {}).get(fold) for name, fold in zip(table[key], table["fold"], strict=True)]
    pairs = zip(table["layer"], table["target_layer"], strict=True)
    chosen = [None if layer is pd.NA else (layer, target) == of for (layer, target), of in zip(pairs, own, strict=True)]
    return table.assign(chosen=pd.array(chosen, "boolean"))


def same_norm(states: Tensor, names: Sequence[str], layers: Sequence[int | Pair], seed: int) -> Tensor:
    """Vectors of random direction, each as long as the state in its place: (units, layers, hidden).

    Each is drawn from the seed, the unit's name and its layer alone, whatever else is there.
    """
    width = states.shape[-1]
    draws = [[torch.randn(width, generator=_generator(seed, name, layer)) for layer in layers] for name in names]
    random = torch.stack([torch.stack(unit) for unit in draws]).to(states)
    return random * (states.norm(dim=-1, keepdim=True) / random.norm(dim=-1, keepdim=True))


def _generator(*key: object) -> torch.Generator:
    """One that is the key's own."""
    return torch.Generator().manual_seed(seed_of(*key))


def _continuations(
    scopes: Mapping[Prompt, Patchscope], batches: Sequence[Batch], decoding: Decoding
) -> tuple[list[dict[int, list[str]]], dict[Prompt, str]]:
    """What each state that is read says at its pairs, by its place, for each batch; and what each clean target does."""
    places: list[tuple[int, int]] = []
    requests, targets = [], []
    for number, batch in enumerate(batches):
        for target in dict.fromkeys(source.target for source, _ in batch.sources):
            of_target = [place for place, (source, _) in enumerate(batch.sources) if source.target == target]
            places += [(number, place) for place in of_target]
            requests.append(Request(scopes[target], *as_rows(batch, of_target)))
            targets.append(target)
    rows = [Row(batches[of], place, pair) for of, place in places for pair in range(len(batches[of].pairs))]
    with naming_rows(rows):
        by_target = generate_together(requests, decoding, _settled(rows))
    tokenizer = requests[0].scope.model.tokenizer
    texts = iter([decoding.text(row, tokenizer) for each in by_target for row in each.patched])
    said: list[dict[int, list[str]]] = [{} for _ in batches]
    for of, place in places:
        said[of][place] = [next(texts) for _ in batches[of].pairs]
    return said, {target: decoding.text(each.clean, tokenizer) for target, each in zip(targets, by_target, strict=True)}


def _settled(rows: Sequence[Row]) -> Settled | None:
    """Whether a row need not go on: all whose answers count have been answered. None where nobody has any."""
    groups = []
    for row in rows:
        source, condition = row.batch.sources[row.place]
        groups.append((source.answers, *(source.lent_to if condition == PATCHED else ())))
    if not any(answers for group in groups for answers in group):
        return None
    return lambda row, text: all(answer_settled(text, answers) for answers in groups[row])


def as_rows(batch: Batch, places: Sequence[int]) -> tuple[Tensor, list[int]]:
    """Some of the states that are read, (places × pairs, hidden), one after the other, and the target layer of each."""
    return batch.states[list(places)].flatten(0, 1), [target for _, target in batch.pairs] * len(places)


@contextmanager
def naming_rows(rows: Sequence[Row]) -> Iterator[None]:
    """A block in which the error of one of these rows, by number, becomes a PscopeError that names its source."""
    try:
        yield
    except RowError as error:
        if error.row < 0:
            raise
        raise PscopeError(f"{rows[error.row]}: {error.reason}") from error


def _said_columns(batch: Batch, said: Mapping[int, Sequence[str]], place: int, pair: int) -> dict[str, object]:
    return _answer_columns(said[place][pair], batch.sources[place][0].answers)


def _answer_columns(text: str, answers: Sequence[str]) -> dict[str, object]:
    return {"continuation": text, "found": answer_found(text, answers)}
