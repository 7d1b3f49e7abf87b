"""The sweep over source and target layers: states in, what they say at every pair out, beside controls.

Every source state is read at each ℓ of a grid and patched into a target at its ℓ*. Beside it stand a random vector of
the same norm, the target unpatched, and, without another pass, what somebody else's state said.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor

from pscope.engine.generate import Decoding
from pscope.engine.patchscope import Patchscope
from pscope.errors import PscopeError, RowError
from pscope.experiments.experiment import Unit, Work
from pscope.experiments.grid import Pair, source_layers
from pscope.mappings.mapping_set import MappingSet
from pscope.metrics import answer_found, answer_settled
from pscope.models.model import LanguageModel
from pscope.models.prompts import Prompt, continuing_tokens
from pscope.models.residual import capture

PATCHED, RANDOM, CLEAN = "patched", "random vector", "clean target"

TYPES = {
    "condition": "string",
    "layer": "Int64",
    "target_layer": "Int64",
    "position": "Int64",
    "token": "string",
    "path": "string",
    "continuation": "string",
    "found": "bool",
    "rank": "Int64",
    "probability": "Float64",
}
"""The columns that a sweep fills, beside those that say whose row it is."""


@dataclass(frozen=True)
class Source(Unit):
    """The state of a prompt's marked token, patched into `target` at every pair of `pairs`.

    `about` are the columns of the table that say what it is. A row need not go on once one of its `answers` stands in
    what it said, and one of those of everybody to whom it is lent. `random` asks for the control of the same norm.
    """

    source: Prompt
    pairs: tuple[Pair, ...]
    about: Mapping[str, object]
    answers: tuple[str, ...] = ()
    lent_to: tuple[tuple[str, ...], ...] = ()
    random: bool = True

    @property
    def conditions(self) -> list[str]:
        """Those in which its rows are decoded."""
        return [PATCHED, RANDOM] if self.random else [PATCHED]

    def work(self, new_tokens: int) -> Work:
        """The least that it asks of a model."""
        rows = tuple(target for _, target in self.pairs) * len(self.conditions)
        return Work(len(self.source), len(self.target) - min(self.target.positions), rows, new_tokens=new_tokens)


def decoded_rows(pairs: Sequence[Pair], *, random: bool = True) -> int:
    """How many rows of a source are decoded."""
    return (1 + random) * len(pairs)


@dataclass(frozen=True)
class Through:
    """Another model, in which the states are read, and the mappings to the one that is patched."""

    model: LanguageModel
    mappings: MappingSet


def sweep(
    scope: Patchscope, sources: Sequence[Source], decoding: Decoding, seed: int, through: Through | None = None
) -> Iterator[dict[str, object]]:
    """The rows of the table, by their columns, for sources that share a target and their pairs.

    A row is one source × pair × condition: what the source is `about`, the columns of `TYPES`. `position` and `token`
    are where a state was read; `found` is whether an answer stands in the continuation; `rank` (from 1) and
    `probability` are those of the first answer's first token right after the target prompt, where all have answers.
    The clean row has no layers. Raises PscopeError, naming the source, for a row that fails.
    """
    pairs = sources[0].pairs
    layers, columns = source_layers(pairs)
    read_in = scope.model if through is None else through.model
    states = capture(read_in, [source.source for source in sources], layers=layers)  # (sources, layers, hidden)
    if through is not None:
        states, columns = through.mappings.apply(states[:, columns], pairs, [None] * len(sources)), range(len(pairs))
    drawn = [place for place, source in enumerate(sources) if source.random]
    read = [(source, PATCHED) for source in sources] + [(sources[place], RANDOM) for place in drawn]
    if drawn:
        random = same_norm(states[drawn], [sources[place].name for place in drawn], seed)
        states = torch.cat([states, random])
    states = states[:, list(columns)]  # (read, pairs, hidden)
    names = [f"{source.name!r} ({condition})" for source, condition in read]
    wanted = [(source.answers, *(source.lent_to if condition == PATCHED else ())) for source, condition in read]
    settles = any(answers for group in wanted for answers in group)

    def settled(place: int, text: str) -> bool:
        return all(answer_settled(text, answers) for answers in wanted[place])

    texts, clean = _spoken(scope, states, names, pairs, decoding, settled if settles else None)
    # Who walks through a query of his own need not know its answer.
    words = [source.answers[0] for source, _ in read if source.answers]
    near = first_token(scope, states, words, pairs) if len(words) == len(read) else None
    places = {(source.name, condition): place for place, (source, condition) in enumerate(read)}
    for source in sources:
        for condition in source.conditions:
            place = places[source.name, condition]
            for number, (layer, target) in enumerate(pairs):
                row = {"condition": condition, "layer": layer, "target_layer": target, "path": scope.path}
                if condition == PATCHED:
                    row.update(position=source.source.position, token=source.source.token)
                if near is not None:
                    row.update(rank=near[0][place][number], probability=near[1][place][number])
                yield {**source.about, **row, **_answered(texts[place][number], source.answers)}
        yield {**source.about, "condition": CLEAN, "path": scope.path, **_answered(clean, source.answers)}


def borrowed(table: pd.DataFrame, borrowers: pd.DataFrame, key: str, within: Sequence[str] = ()) -> pd.DataFrame:
    """What others' states said, as rows of those who borrow it: a control that costs no pass.

    `borrowers` has a row for each, with the columns that say what it is, and the `lender` from which it borrows:
    another one's value of the column `key`, of the same `within`. What was said of the lender's own answer is left out.
    """
    said = table[table["condition"] == PATCHED].rename(columns={key: "lender"})
    theirs = [column for column in borrowers if column in said and column not in ("lender", *within)]
    said = said.drop(columns=[*theirs, "rank", "probability"], errors="ignore")
    return borrowers.merge(said, on=[*within, "lender"], sort=False)


def same_norm(states: Tensor, names: Sequence[str], seed: int) -> Tensor:
    """Vectors of random direction, each as long as the state in its place: (units, …, hidden).

    Those of a unit are drawn from the seed and its name alone, whoever else is there.
    """
    drawn = [
        torch.randn(state.shape, generator=_generator(seed, name)) for state, name in zip(states, names, strict=True)
    ]
    random = torch.stack(drawn).to(states)
    return random * (states.norm(dim=-1, keepdim=True) / random.norm(dim=-1, keepdim=True))


def first_token(
    scope: Patchscope, states: Tensor, words: Sequence[str], pairs: Sequence[Pair]
) -> tuple[list[list[int]], list[list[float]]]:
    """How near each unit's word is without decoding: rank (from 1) and probability of its first token, [unit][pair].

    `states` are (units, pairs, hidden), with one word for each unit; the token is the one right after the patched
    prompt. Raises PromptError for a word that cannot follow it.
    """
    tokens = torch.tensor([continuing_tokens(scope.model.tokenizer, scope.target, f" {word}")[0] for word in words])
    wanted = tokens.repeat_interleave(len(pairs))[:, None]  # (units × pairs, 1)
    ranks, probabilities = [], []
    for part in scope.logits(states.reshape(-1, states.shape[-1]), [target for _, target in pairs] * len(words)):
        logits = part.patched.float()
        own = logits.gather(1, wanted[part.rows].to(logits.device))
        ranks.append(1 + (logits > own).sum(dim=1))
        probabilities.append((own - logits.logsumexp(dim=1, keepdim=True)).exp().squeeze(1))
    shape = (len(words), len(pairs))
    return torch.cat(ranks).reshape(shape).tolist(), torch.cat(probabilities).reshape(shape).tolist()


def _generator(seed: int, name: str) -> torch.Generator:
    """One that is the unit's own; Python's `hash` would differ from process to process."""
    key = hashlib.sha256(repr((seed, name)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(key[:8], "big"))


def _spoken(
    scope: Patchscope,
    states: Tensor,
    names: Sequence[str],
    pairs: Sequence[Pair],
    decoding: Decoding,
    settled: Callable[[int, str], bool] | None,
) -> tuple[list[list[str]], str]:
    """What each of `states` (units, pairs, hidden) says, [unit][pair], and what the clean row says."""
    rows = states.reshape(-1, states.shape[-1])
    targets = [target for _, target in pairs] * len(names)
    settled_row = None if settled is None else lambda row, text: settled(row // len(pairs), text)
    try:
        spoken = scope.generate(rows, targets, decoding, settled_row)
    except RowError as error:
        if error.row < 0:
            raise
        unit, pair = divmod(error.row, len(pairs))
        raise PscopeError(
            f"{names[unit]} failed at layer {pairs[pair][0]}, target layer {pairs[pair][1]}: {error.reason}"
        ) from error
    texts = iter([decoding.text(tokens, scope.model.tokenizer) for tokens in spoken.patched])
    return [[next(texts) for _ in pairs] for _ in names], decoding.text(spoken.clean, scope.model.tokenizer)


def _answered(text: str, answers: Sequence[str]) -> dict[str, object]:
    return {"continuation": text, "found": answer_found(text, answers)}
