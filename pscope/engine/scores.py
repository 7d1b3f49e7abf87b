"""Answers scored instead of said: how probable given continuations are after a patched target, and which is most so.

The log-probabilities of a continuation's tokens are read in one pass over the target and the continuation, which a row
of decoded tokens would cost many of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

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

Read = Callable[[Tensor, Tokens, int], Iterator[tuple[Tensor, Tensor]]]
"""From the numbers of patched rows, (rows,), tokens that follow the target, and how many of the last of all tokens are
asked for: the logits after those, (1 + rows, last, vocab), the clean row first, with the numbers of the patched ones,
chunk by chunk.
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
    scores = torch.full((2, *shape), torch.nan)  # (patched and clean, rows, tokens)
    places = torch.zeros((2, *shape), dtype=torch.long)
    for tokens in dict.fromkeys(continuations):
        alike = torch.tensor([row for row, own in enumerate(continuations) if own == tokens])
        for rows, logits in read(alike, tokens[:-1], len(tokens)):
            picks = [logits[:, place, token] for place, token in enumerate(tokens)]  # (1 + rows,) for each token
            # One after the other, since a copy of the logits is made on the way.
            each = [_log_probabilities(of_token, logits[:, place]) for place, of_token in enumerate(picks)]
            log_probabilities = torch.stack(each, dim=1).cpu()
            scores[0, rows, : len(tokens)], scores[1, rows, : len(tokens)] = log_probabilities[1:], log_probabilities[0]
            if ranks:
                ahead = [(logits[:, place] >= of_token[:, None]).sum(dim=-1) for place, of_token in enumerate(picks)]
                counts = torch.stack(ahead, dim=1).cpu()
                places[0, rows, : len(tokens)], places[1, rows, : len(tokens)] = counts[1:], counts[0]
    patched, clean = (Scored(*both) for both in zip(scores, places if ranks else (None, None), strict=True))
    return Scores(patched, clean)


def choose_rows(read: Read, rows: int, candidates: Sequence[Tokens], measure: Measure) -> tuple[Choice, Choice]:
    """Choose among distinct candidates after each of so many patched rows, and after the clean one."""
    pieces = [_start(candidate, candidates) if measure == "start" else candidate for candidate in candidates]
    onward = [_onward(piece, pieces) for piece in pieces]
    # Where its last token is scored, or where it is scored that a candidate does not go on as another one does.
    stems = [piece if further else piece[:-1] for piece, further in zip(pieces, onward, strict=True)]
    scores = torch.empty(1 + rows, len(candidates))  # the clean row first
    everyone = torch.arange(1 + rows)
    for here, logits in _with_clean(read, everyone, (), 1):
        scores[here] = _log_probabilities(logits[:, 0, [candidate[0] for candidate in candidates]], logits[:, 0]).cpu()
    first = scores.clone()
    scored = [not stem for stem in stems]
    for stem in _longest(stems):
        members = [n for n, own in enumerate(stems) if not scored[n] and own == stem[: len(own)]]
        needed = everyone
        if measure == "start" and any(scored):
            # What the members have so far can only become less.
            needed = (scores[:, members].amax(dim=1) >= scores[:, scored].amax(dim=1)).nonzero().squeeze(1)
        if len(needed):
            for here, logits in _with_clean(read, needed, stem, len(stem)):
                for n in members:
                    terms = [
                        _log_probabilities(logits[:, place, token], logits[:, place])
                        for place, token in enumerate(pieces[n][1:])
                    ]
                    if onward[n]:
                        further = _log_probabilities(logits[:, len(terms), onward[n]], logits[:, len(terms)])
                        terms.append((-further.exp().sum(dim=1).clamp(max=1)).log1p())
                    scores[here, n] = first[here, n] + torch.stack(terms).sum(dim=0).cpu()
        for n in members:
            scored[n] = True
    if measure == "mean":
        scores /= torch.tensor([len(candidate) for candidate in candidates])
    patched, clean = (Choice(scores[of].argmax(dim=1), scores[of], first[of]) for of in (slice(1, None), slice(1)))
    return patched, clean


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


def _with_clean(read: Read, needed: Tensor, forced: Tokens, last: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits of the rows that are `needed`, of which the clean one is 0 and others are counted from 1."""
    patched = needed[needed > 0] - 1
    # A pass has a patched row at least, and brings the clean one along.
    for rows, logits in read(patched if len(patched) else torch.tensor([0]), forced, last):
        yield torch.cat([torch.tensor([0]), 1 + rows]), logits


def _log_probabilities(token_logits: Tensor, logits: Tensor) -> Tensor:
    """The logits of a token, (rows,), or of some, (rows, tokens), as log-probabilities; `logits` are (rows, vocab)."""
    return token_logits.float() - logits.float().logsumexp(dim=-1, keepdim=token_logits.ndim == 2)
