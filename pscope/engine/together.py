"""Rows of several targets that speak in one batch: where each has few, a batch of its own is hardly worth a pass.

Targets of one length can share one: on the staircase their rows keep keys and values for equally many tokens, and each
goes on from its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import count, groupby, islice
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
        enumerate(requests),
        key=lambda item: (len(item[1].scope.target), item[1].scope.path == "staircase" or item[0]),
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
    model, most = group[0].scope.model, group[0].scope.rows_speaking(decoding)
    draws = torch.cat([decoding.draws(1 + len(each.states)) for each in group])
    ends = decoding.ends(model.end_tokens, model.tokenizer, renumbered(settled, numbers))
    queue = Queue(decoding, draws, ends)
    try:
        for pieces in _batches(group, queue, most):
            parts = [each.scope.start(each.states, each.target_layers, decoding) for each, _ in pieces]
            # As all rows are on the staircase.
            rows = CachedRows.joined(cast(list[CachedRows], parts))
            queue.take(rows, [place for _, places in pieces for place in places], most)
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


def _batches(group: Sequence[Request], queue: Queue, most: int) -> Iterator[list[Piece]]:
    """The rows of a group in batches of as many as fit beside those that wait by then, of `most` in all.

    A request is cut where a batch of its own would be too large.
    """
    batch: list[Piece] = []
    room, clean = most, 0
    for scope, states, layers in group:
        start = 0
        while start < len(states):
            if batch and 1 + len(states) - start > room:
                yield batch
                batch, room = [], most - queue.waiting
            own = slice(start, start + max(1, room - 1))
            places = [clean, *range(clean + 1, clean + 1 + len(states))[own]]
            batch.append((Request(scope, states[own], layers[own]), places))
            start += len(places) - 1
            room -= len(places)
        clean += 1 + len(states)
    yield batch
