"""Answers scored instead of said: how probable given continuations are after a patched target, and which is most so.

The log-probabilities of a continuation's tokens are read in one pass over the target and the continuation, which a row
of decoded tokens would cost many of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from pscope.notebook import table_in_frame

if TYPE_CHECKING:
    import pandas as pd

Tokens = tuple[int, ...]

Measure = Literal["start", "whole", "mean"]
"""What of a candidate is scored: the first tokens that tell it from the others, all of its tokens, or those on average.
"""

MEASURES: tuple[Measure, ...] = ("start", "whole", "mean")

T = TypeVar("T")

ROWS_AT_ONCE = 64
"""So many rows of logits are summed up together."""


class Read(Protocol):
    """How logits are had, chunk by chunk, and gone again before those of the next pass are made."""

    def __call__(
        self, rows: Tensor, forced: Tokens, last: int, of: Callable[[Tensor], T]
    ) -> Iterator[tuple[Tensor, T]]:
        """Read patched rows, by number, (rows,), where tokens are `forced` to follow the target.

        Yields the numbers of those that shared a pass, with what `of` gives for the logits after the `last` of all
        tokens, (1 + rows, last, vocab), the clean row first.
        """


class Scored(NamedTuple):
    """The tokens of continuations, (rows, tokens): those of a shorter one are followed by NaN, and by rank 0."""

    log_probabilities: Tensor
    """In nats, of each token after those before it."""
    ranks: Tensor | None
    """How many tokens of the vocabulary are at least as probable there, the token itself included: from 1."""


class Scores(NamedTuple):
    """Continuations scored after the target prompt."""

    patched: Scored
    clean: Scored
    """The same continuations after the target unpatched, the control."""

    def _repr_html_(self) -> str:
        return table_in_frame(self)

    def __repr__(self) -> str:
        totals = self.patched.log_probabilities.nansum(dim=1).tolist()
        preview = ", ".join(f"{total:.2f}" for total in totals[:3]) + (", …" if len(totals) > 3 else "")
        return f"Scores({len(totals)} rows, in nats: {preview})"

    def table(self) -> pd.DataFrame:
        """The `log_probability` of each token of each `row`, by its `place`, beside that after the `clean` target."""
        import pandas as pd

        present = ~self.patched.log_probabilities.isnan()
        rows, places = present.nonzero(as_tuple=True)
        columns = {"row": rows.tolist(), "place": places.tolist()}
        for name, scored in (("log_probability", self.patched), ("clean", self.clean)):
            columns[name] = scored.log_probabilities[present].tolist()
        if self.patched.ranks is not None:
            columns["rank"] = self.patched.ranks[present].tolist()
        return pd.DataFrame(columns)


class Choice(NamedTuple):
    """What is chosen among candidates in each row."""

    chosen: Tensor
    """(rows,): the number of the most probable candidate."""
    scores: Tensor
    """(rows, candidates), in nats: the larger, the more probable. See `Patchscope.choose`."""
    first: Tensor
    """(rows, candidates): the log-probability of each candidate's first token."""


class Choices(NamedTuple):
    """A candidate chosen after the target prompt."""

    patched: Choice
    clean: Choice
    """One row: what is chosen after the target unpatched, the control."""
    candidates: tuple[str, ...]

    def _repr_html_(self) -> str:
        return table_in_frame(self)

    def __repr__(self) -> str:
        of = f"{len(self.text)} rows of {len(self.candidates)} candidates"
        preview = ", ".join(map(repr, self.text[:3])) + (", …" if len(self.text) > 3 else "")
        return f"Choices({of}: {preview}; clean: {self.candidates[self.clean.chosen]!r})"

    @property
    def text(self) -> list[str]:
        """The candidate that each patched row has chosen."""
        return [self.candidates[number] for number in self.patched.chosen.tolist()]

    def table(self) -> pd.DataFrame:
        """The `score` of each `candidate` in each `row`, and whether it is `chosen`; the clean row has no number."""
        import pandas as pd

        scores = torch.cat([self.patched.scores, self.clean.scores])
        chosen = torch.cat([self.patched.chosen, self.clean.chosen])
        numbers = [*range(len(scores) - 1), None]
        return pd.DataFrame(
            {
                "row": pd.array([row for row in numbers for _ in self.candidates], dtype="Int64"),
                "candidate": list(self.candidates) * len(scores),
                "score": scores.flatten().tolist(),
                "chosen": [number == own for own in chosen.tolist() for number in range(len(self.candidates))],
            }
        )


def score_rows(read: Read, continuations: Sequence[Tokens], ranks: bool) -> Scores:
    """Score the continuation of each patched row."""
    shape = len(continuations), max(map(len, continuations))
    scores = torch.full((2, *shape), torch.nan, dtype=torch.float32)  # (patched and clean, rows, tokens)
    places = torch.zeros((2, *shape), dtype=torch.long)
    for tokens in dict.fromkeys(continuations):
        alike = torch.tensor([row for row, own in enumerate(continuations) if own == tokens])
        of = partial(_of_each_token, tokens=tokens, ranks=ranks)
        for rows, each in read(alike, tokens[:-1], len(tokens), of):
            for into, values in zip((scores, places), each, strict=False):
                into[0, rows, : len(tokens)], into[1, rows, : len(tokens)] = values[1:], values[0]
    patched, clean = (Scored(*both) for both in zip(scores, places if ranks else (None, None), strict=True))
    return Scores(patched, clean)


def choose_rows(read: Read, rows: int, candidates: Sequence[Tokens], measure: Measure) -> tuple[Choice, Choice]:
    """Choose among distinct candidates after each of so many patched rows, and after the clean one."""
    pieces = [_start(candidate, candidates) if measure == "start" else candidate for candidate in candidates]
    onward = [_onward(piece, pieces) for piece in pieces]
    # Where its last token is scored, or where it is scored that a candidate does not go on as another one does.
    stems = [piece if further else piece[:-1] for piece, further in zip(pieces, onward, strict=True)]
    scores = torch.empty(1 + rows, len(candidates), dtype=torch.float32)  # the clean row first
    everyone = torch.arange(1 + rows)
    begin = [candidate[0] for candidate in candidates]
    for here, each in _with_clean(read, everyone, (), 1, partial(_log_probabilities_at, place=0, tokens=begin)):
        scores[here] = each.cpu()
    first = scores.clone()
    scored = [not stem for stem in stems]
    for stem in _longest(stems):
        members = [n for n, own in enumerate(stems) if not scored[n] and own == stem[: len(own)]]
        needed = everyone
        if measure == "start" and any(scored):
            # What the members have so far can only become less.
            needed = (scores[:, members].amax(dim=1) >= scores[:, scored].amax(dim=1)).nonzero().squeeze(1)
        if len(needed):
            of = partial(_after_first, pieces=[(pieces[n], onward[n]) for n in members])
            for here, more in _with_clean(read, needed, stem, len(stem), of):
                scores[here[:, None], torch.tensor(members)] = first[here][:, members] + more.cpu()
        for n in members:
            scored[n] = True
    if measure == "mean":
        scores /= torch.tensor([len(candidate) for candidate in candidates])
    patched, clean = (Choice(scores[of].argmax(dim=1), scores[of], first[of]) for of in (slice(1, None), slice(1)))
    return patched, clean


def _of_each_token(logits: Tensor, tokens: Tokens, ranks: bool) -> list[Tensor]:
    """The log-probability of each of the last tokens, (rows, tokens), and, if asked for, its rank."""
    each = [_log_probabilities_at(logits, place, [token]) for place, token in enumerate(tokens)]
    results = [torch.cat(each, dim=1)]
    if ranks:
        results.append(torch.cat([_ranks_at(logits, place, token) for place, token in enumerate(tokens)], dim=1))
    return [result.cpu() for result in results]


def _after_first(logits: Tensor, pieces: Sequence[tuple[Tokens, Sequence[int]]]) -> Tensor:
    """What each piece adds to the log-probability of its first token: (rows, pieces).

    With a piece come the tokens by which it must not go on. `logits` (rows, places, vocab) are those after the first
    token and what follows it.
    """
    sums = []
    for piece, onward in pieces:
        terms = [_log_probabilities_at(logits, place, [token])[:, 0] for place, token in enumerate(piece[1:])]
        if onward:
            further = _log_probabilities_at(logits, len(terms), onward)
            terms.append((-further.exp().sum(dim=1).clamp(max=1)).log1p())
        sums.append(torch.stack(terms).sum(dim=0))
    return torch.stack(sums, dim=1)


def _start(candidate: Tokens, candidates: Sequence[Tokens]) -> Tokens:
    """The fewest first tokens that tell a candidate from the others; all of it where another one begins with it."""
    others = [other for other in candidates if other != candidate]
    return next(
        (candidate[:n] for n in range(1, len(candidate)) if all(other[:n] != candidate[:n] for other in others)),
        candidate,
    )


def _onward(piece: Tokens, pieces: Sequence[Tokens]) -> list[int]:
    """The tokens by which others go on that begin with a whole piece."""
    return sorted({other[len(piece)] for other in pieces if len(other) > len(piece) and other[: len(piece)] == piece})


def _longest(stems: Sequence[Tokens]) -> list[Tokens]:
    """The stems that no other one goes on from."""
    return [stem for stem in dict.fromkeys(stems) if stem and not _onward(stem, stems)]


def _with_clean(
    read: Read, needed: Tensor, forced: Tokens, last: int, of: Callable[[Tensor], T]
) -> Iterator[tuple[Tensor, T]]:
    """Read the rows that are `needed`, of which the clean one is 0 and others are counted from 1."""
    patched = needed[needed > 0] - 1
    # A pass has a patched row at least, and brings the clean one along.
    for rows, result in read(patched if len(patched) else torch.tensor([0]), forced, last, of):
        yield torch.cat([torch.tensor([0]), 1 + rows]), result


def _log_probabilities_at(logits: Tensor, place: int, tokens: Sequence[int]) -> Tensor:
    """Those of some tokens, (rows, tokens), after one place of `logits` (rows, places, vocab)."""
    here = logits[:, place]
    return here[:, list(tokens)].float() - _in_parts(here, lambda part: part.float().logsumexp(dim=1, keepdim=True))


def _ranks_at(logits: Tensor, place: int, token: int) -> Tensor:
    """How many tokens are at least as probable as a token, (rows, 1), after one place of `logits`."""
    return _in_parts(logits[:, place], lambda part: (part >= part[:, token, None]).sum(dim=1, keepdim=True))


def _in_parts(logits: Tensor, of: Callable[[Tensor], Tensor]) -> Tensor:
    """What is made `of` logits (rows, vocab), few rows at a time: what stands there meanwhile is as large as they."""
    return torch.cat([of(part) for part in logits.split(ROWS_AT_ONCE)])
