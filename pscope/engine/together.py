"""Rows of several targets that speak in one batch: where each has few, a batch of its own is hardly worth a pass.

On the staircase rows of targets of one length keep keys and values for equally many tokens, and each goes on from its
own. Those of a shorter target join them when they have said what it lacks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import accumulate, count, groupby, islice
from typing import NamedTuple, cast

import torch
from torch import Tensor

from pscope.engine.generate import CachedRows, Continuations, Decoding, Settled, renumbered
from pscope.engine.patchscope import Patchscope
from pscope.engine.queue import Queue
from pscope.errors import RowError


class Request(NamedTuple):
    """States (rows, hidden) to be patched into the target of a Patchscope, each at its layer."""

    scope: Patchscope
    states: Tensor
    target_layers: Sequence[int]

    @property
    def length(self) -> int:
        """How many tokens its target has."""
        return len(self.scope.target)


def generate_together(
    requests: Sequence[Request], decoding: Decoding, settled: Settled | None = None
) -> list[Continuations]:
    """What `Patchscope.generate` gives for each request, token for token; those that can share a batch do.

    The Patchscopes are of one model. Rows are numbered through all requests, for `settled` and in a RowError.
    """
    continuations: list[Continuations] = []
    numbered = 0
    # Neighbours that can share a batch; one that cannot is a group of its own.
    for _, neighbours in groupby(
        enumerate(requests), key=lambda each: -1 if each[1].scope.path == "staircase" else each[0]
    ):
        group = [request for _, request in neighbours]
        continuations += _generate(group, decoding, settled, numbered)
        numbered += sum(len(each.states) for each in group)
    return continuations


def _generate(group: list[Request], decoding: Decoding, settled: Settled | None, first: int) -> list[Continuations]:
    if len(group) == 1:
        ((scope, states, layers),) = group
        try:
            own = renumbered(settled, range(first, first + len(states)))
            return [scope.generate(states, layers, decoding, own)]
        except RowError as error:
            raise RowError(error.row if error.row < 0 else first + error.row, error.reason) from error
    # The clean row of each target, which has no number, comes before its patched ones.
    counter = count(first)
    numbers = [number for each in group for number in (-1, *islice(counter, len(each.states)))]
    model = group[0].scope.model
    draws = torch.cat([decoding.draws(1 + len(each.states)) for each in group])
    ends = decoding.ends(model.end_tokens, model.tokenizer, renumbered(settled, numbers))
    queue = Queue(decoding, draws, ends)
    try:
        for pieces, most, following in _batches(group, queue, decoding):
            places = [place for _, own in pieces for place in own]
            queue.take(_begun(pieces, decoding), places, pieces[0][0].length, most, following)
        said = queue.finish()
    except RowError as error:
        raise RowError(numbers[error.row], error.reason) from error
    tokens = (said[place] for place in range(len(numbers)))
    continuations = []
    for each in group:
        clean = next(tokens)
        decode = partial(decoding.text, tokenizer=model.tokenizer)
        continuations.append(Continuations([next(tokens) for _ in each.states], clean, decode))
    return continuations


Piece = tuple[Request, list[int]]
"""Some rows of a request, and the places of them all, the clean one's first, among those of its group."""


def _begun(pieces: Sequence[Piece], decoding: Decoding) -> CachedRows:
    """The rows of some pieces, whose targets have one length, as one batch."""
    parts = [each.scope.start(each.states, each.target_layers, decoding) for each, _ in pieces]
    # As all rows are on the staircase.
    return CachedRows.joined(cast(list[CachedRows], parts))


def _batches(
    group: Sequence[Request], queue: Queue, decoding: Decoding
) -> Iterator[tuple[list[Piece], int, int | None]]:
    """The rows of a group by the length of their targets, in batches of as many as fit beside those that wait by then.

    A request is cut where a batch of its own would be too large. With a batch comes how many rows fit in all, and the
    length of the targets that follow.
    """
    firsts = accumulate((1 + len(each.states) for each in group), initial=0)
    by_length = sorted(zip(firsts, group, strict=False), key=lambda item: item[1].length)
    batch: list[Piece] = []
    most: dict[int, int] = {}
    for _, each in by_length:
        # What a row takes depends on where its target is patched too.
        fits = each.scope.rows_speaking(decoding)
        most[each.length] = min(fits, most.get(each.length, fits))
    length, room = by_length[0][1].length, most[by_length[0][1].length]
    for clean, (scope, states, layers) in by_length:
        start = 0
        while start < len(states):
            if batch and (1 + len(states) - start > room or len(scope.target) != length):
                yield batch, most[length], len(scope.target)
                batch, length = [], len(scope.target)
                room = most[length] - queue.waiting
            own = slice(start, start + max(1, room - 1))
            places = [clean, *range(clean + 1, clean + 1 + len(states))[own]]
            batch.append((Request(scope, states[own], layers[own]), places))
            start += len(places) - 1
            room -= len(places)
    yield batch, most[length], None
