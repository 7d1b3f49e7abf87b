"""The sweep over source and target layers: states in, what they say at every pair out, beside controls.

Every source state is read at each ℓ of a grid and patched into a target at its ℓ*. Beside it stand a random vector of
the same norm, the target unpatched, and, without another pass, what somebody else's state said.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor

from pscope.engine.generate import Decoding, Settled
from pscope.engine.patchscope import Patchscope
from pscope.engine.together import Request, generate_together
from pscope.experiments.experiment import Unit, Work, naming_rows, seed_of
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

    rows: int = field(init=False)
    target: Prompt
    source: Prompt
    pairs: tuple[Pair, ...]
    about: Mapping[str, Any]
    answers: tuple[str, ...] = ()
    lent_to: tuple[tuple[str, ...], ...] = ()
    candidates: tuple[str, ...] = ()
    random: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", len(self.conditions) * len(self.pairs))

    @property
    def shares(self) -> object:
        """Rows of several targets can speak in one batch."""
        return PATCHED

    @property
    def conditions(self) -> list[str]:
        """Those in which its rows are patched."""
        return [PATCHED, RANDOM] if self.random else [PATCHED]

    def work(self, new_tokens: int) -> Work:
        """The least that it asks of a model."""
        rows = tuple(target for _, target in self.pairs) * len(self.conditions)
        return Work(len(self.source), len(self.target) - min(self.target.positions), rows, new_tokens=new_tokens)


@dataclass(frozen=True)
class Through:
    """Another model, in which the states are read, and the mappings to the one that is patched."""

    model: LanguageModel
    mappings: MappingSet


class Row(NamedTuple):
    """What is patched once: the state of a source, or the random vector in its place, at one of its pairs."""

    source: Source
    condition: str
    pair: Pair

    @property
    def key(self) -> tuple[str, str, Pair]:
        """What tells it from all others."""
        return self.source.name, self.condition, self.pair

    def __str__(self) -> str:
        layer, target = self.pair
        return f"{self.source.name!r} ({self.condition}) failed at layer {layer}, target layer {target}"


def read_rows(
    model: LanguageModel, sources: Sequence[Source], seed: int, through: Through | None = None
) -> tuple[list[Row], Tensor]:
    """The rows of sources that share their pairs, first of their states, and what is patched, (rows, hidden)."""
    pairs = sources[0].pairs
    layers, columns = source_layers(pairs)
    read_in = model if through is None else through.model
    states = capture(read_in, [source.source for source in sources], layers=layers)  # (sources, layers, hidden)
    if through is not None:
        states, columns = through.mappings.apply(states[:, columns], pairs, [None] * len(sources)), [*range(len(pairs))]
    controlled = [place for place, source in enumerate(sources) if source.random]
    entries = [(source, PATCHED) for source in sources] + [(sources[place], RANDOM) for place in controlled]
    if controlled:
        # Whatever other layers are read, as where scores are taken everywhere and words at some.
        at = layers if through is None else pairs
        random = same_norm(states[controlled], [sources[place].name for place in controlled], at, seed)
        states = torch.cat([states, random])
    rows = [Row(source, condition, pair) for source, condition in entries for pair in pairs]
    return rows, states[:, columns].flatten(0, 1)


def sweep(
    scope_of: Callable[[Prompt], Patchscope],
    sources: Sequence[Source],
    decoding: Decoding,
    seed: int,
    through: Through | None = None,
) -> Iterator[dict[str, object]]:
    """The rows of the table, by their columns, for sources, and what they say.

    A row is one source × pair × condition: what the source is `about`, the columns of `TYPES`. `position` and `token`
    are where a state was read; `found` is whether an answer stands in the continuation. The clean row has no layers.
    Raises PscopeError, naming the source, for a row that fails.
    """
    model = scope_of(sources[0].target).model
    read = [read_rows(model, [*alike], seed, through) for _, alike in groupby(sources, key=lambda source: source.pairs)]
    rows, states = [row for own, _ in read for row in own], torch.cat([own for _, own in read])
    by_target: dict[Prompt, list[int]] = {}
    for number, row in enumerate(rows):
        by_target.setdefault(row.source.target, []).append(number)
    requests = [
        Request(scope_of(target), states[own], [rows[number].pair[1] for number in own])
        for target, own in by_target.items()
    ]
    rows = [rows[number] for own in by_target.values() for number in own]
    with naming_rows(rows):
        continuations = generate_together(requests, decoding, _settled(rows))
    text = partial(decoding.text, tokenizer=model.tokenizer)
    texts = [text(tokens) for each in continuations for tokens in each.patched]
    said = {row.key: words for row, words in zip(rows, texts, strict=True)}
    clean = {target: text(each.clean) for target, each in zip(by_target, continuations, strict=True)}
    yield from rows_of(
        scope_of,
        sources,
        lambda row: _answer_columns(said[row.key], row.source.answers),
        lambda source: _answer_columns(clean[source.target], source.answers),
    )


def rows_of(
    scope_of: Callable[[Prompt], Patchscope],
    sources: Sequence[Source],
    patched: Callable[[Row], dict[str, object]],
    clean: Callable[[Source], dict[str, object]],
) -> Iterator[dict[str, object]]:
    """The rows of each source together, by their columns: `patched` and `clean` tell what came of them."""
    for source in sources:
        path = {"path": scope_of(source.target).path}
        for condition in source.conditions:
            at = {"position": source.source.position, "token": source.source.token} if condition == PATCHED else {}
            for pair in source.pairs:
                where = {"condition": condition, "layer": pair[0], "target_layer": pair[1], **path, **at}
                yield {**source.about, **where, **patched(Row(source, condition, pair))}
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
    own = [torch.Generator().manual_seed(seed_of(seed, name, layer)) for name in names for layer in layers]
    draws = [torch.randn(states.shape[-1], generator=generator) for generator in own]
    random = torch.stack(draws).reshape(states.shape).to(states)
    return random * (states.norm(dim=-1, keepdim=True) / random.norm(dim=-1, keepdim=True))


def _settled(rows: Sequence[Row]) -> Settled | None:
    """Whether a row need not go on: all whose answers count have been answered. None where nobody has any."""
    groups = [(row.source.answers, *(row.source.lent_to if row.condition == PATCHED else ())) for row in rows]
    if not any(answers for group in groups for answers in group):
        return None
    return lambda row, text: all(answer_settled(text, answers) for answers in groups[row])


def _answer_columns(text: str, answers: Sequence[str]) -> dict[str, object]:
    return {"continuation": text, "found": answer_found(text, answers)}
