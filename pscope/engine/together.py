"""Rows of several targets that speak in one batch: where each has few, a batch of its own is hardly worth a pass.

Targets of one length can share one: on the staircase their rows keep keys and values for equally many tokens, and each
goes on from its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import count, islice
from typing import NamedTuple, cast

import torch
from torch import Tensor

from pscope.engine.generate import CachedRows, Continuations, Decoding, Settled, continue_rows, renumbered
from pscope.engine.patchscope import Patchscope
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
    for group in _groups(requests, decoding):
        continuations += _generate(group, decoding, settled, numbered)
        numbered += sum(len(each.states) for each in group)
    return continuations


def _groups(requests: Sequence[Request], decoding: Decoding) -> Iterator[list[Request]]:
    """Neighbours that can share a batch, and fit into it."""
    group: list[Request] = []
    room = 0
    for each in requests:
        rows = 1 + len(each.states)
        shares = each.scope.path == "staircase" and bool(group) and len(each.scope.target) == len(group[0].scope.target)
        if group and not (shares and rows <= room):
            yield group
            group = []
        if not group:
            room = each.scope.rows_per_pass(decoding.new_tokens) if each.scope.path == "staircase" else 0
        group.append(each)
        room -= rows
    if group:
        yield group


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
    parts = [each.scope.start(each.states, each.target_layers, decoding) for each in group]
    # As all rows are on the staircase.
    rows = CachedRows.joined(cast(list[CachedRows], parts))
    draws = torch.cat([decoding.draws(1 + len(each.states)) for each in group])
    ends = decoding.ends(model.end_tokens, model.tokenizer, renumbered(settled, numbers))
    try:
        tokens = iter(continue_rows(rows, decoding, draws, ends))
    except RowError as error:
        raise RowError(numbers[error.row], error.reason) from error
    continuations = []
    for each in group:
        clean = next(tokens)
        decode = partial(decoding.text, tokenizer=model.tokenizer)
        continuations.append(Continuations([next(tokens) for _ in each.states], clean, decode))
    return continuations
