"""Rows that speak, pass after pass: those that are left of one wait for those of the next, and go on with them.

Rows end one by one, and a step costs nearly the same for few as for many, above all on a GPU. Rows of which prompt and
said tokens are equally many together keep keys and values for equally many, so that they can go on in one batch,
whenever they began, and whatever their prompts are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.functional import pad

from pscope.engine.generate import CachedRows, Decoding, Ends, Rows, check_finite


class _Batch(NamedTuple):
    """Rows of one length: of the prompt and what has been said, of which the last token is yet to be run."""

    length: int
    rows: Rows
    numbers: Tensor
    """(rows,)"""
    said: Tensor
    """(rows, tokens): what was said, on the right; what stands left of it, where others have said more, is nothing."""
    counts: Tensor
    """(rows,): how many tokens that is."""

    @classmethod
    def joined(cls, one: _Batch, other: _Batch) -> _Batch:
        parts = cast(Sequence[CachedRows], [one.rows, other.rows])
        for each in parts:
            each.forget()
        rows = CachedRows.joined(parts)
        most = max(one.said.shape[1], other.said.shape[1])
        said = [pad(each.said, (most - each.said.shape[1], 0)) for each in (one, other)]
        numbers, counts = torch.cat([one.numbers, other.numbers]), torch.cat([one.counts, other.counts])
        return cls(one.length, rows, numbers, torch.cat(said), counts)


class Queue:
    """Continues rows as `decoding` says, each up to and with the token by which it `ends`.

    They go by numbers, of which none is below 0: those of `draws`, (numbers, new_tokens).
    """

    def __init__(self, decoding: Decoding, draws: Tensor, ends: Ends) -> None:
        self._decoding, self._draws, self._ends = decoding, draws, ends
        self._waiting: dict[int, _Batch] = {}
        self._said: dict[int, list[int]] = {}

    @property
    def waiting(self) -> int:
        """How many rows wait for others."""
        return sum(len(batch.numbers) for batch in self._waiting.values())

    def take(
        self, rows: Rows, numbers: Sequence[int], length: int, room: int = 0, following: int | None = None
    ) -> None:
        """Let rows speak that have their prompt of `length` tokens behind them, till all have ended, or some wait.

        They wait for those that follow, whose prompts have `following` tokens: where there is room for so many rows in
        all, at most half of it waits, those that meet them as they begin, or, later, the last few, a quarter. Rows that
        may wait keep a cache. Raises RowError, with its number, if the logits of a row are not finite.
        """
        nothing, counts = torch.empty(len(numbers), 0, dtype=torch.long), torch.zeros(len(numbers), dtype=torch.long)
        batch = self._choose(_Batch(length, rows, torch.tensor(numbers), nothing, counts))
        self._go_on(batch, room, following)

    def finish(self) -> dict[int, list[int]]:
        """What each row has said, by its number, once those that wait have ended too. Raises RowError as `take`."""
        while self._waiting:
            self._go_on(self._waiting.pop(min(self._waiting)))
        return self._said

    @torch.no_grad()
    def _go_on(self, batch: _Batch | None, room: int = 0, following: int | None = None) -> None:
        while batch is not None:
            if batch.length in self._waiting:
                batch = _Batch.joined(self._waiting.pop(batch.length), batch)
            # Those that follow come by when they have said a token.
            if following is not None and batch.length > following:
                few = room // 2 if batch.length == following + 1 else room // 4
                if len(batch.numbers) <= min(few, room // 2 - self.waiting):
                    self._waiting[batch.length] = batch
                    return
            batch.rows.step(batch.said[:, -1])
            batch = self._choose(batch)

    def _choose(self, batch: _Batch) -> _Batch | None:
        """The rows that have not ended by the next token, which is chosen here; None if all have."""
        length, rows, numbers, said, counts = batch
        check_finite(rows.logits, numbers)
        tokens = self._decoding.choose(rows.logits, self._draws[numbers, counts])
        said, counts = torch.cat([said, tokens[:, None].cpu()], dim=1), counts + 1
        ended = self._have_ended(numbers, said, counts)
        for row in ended.nonzero().squeeze(1).tolist():
            # The clean row comes with every pass, and says the same.
            self._said.setdefault(int(numbers[row]), said[row, -int(counts[row]) :].tolist())
        if ended.all():
            return None
        if ended.any():
            left = ~ended
            numbers, said, counts = numbers[left], said[left], counts[left]
            rows.keep(left.nonzero().squeeze(1).to(rows.logits.device))
        return _Batch(length + 1, rows, numbers, said, counts)

    def _have_ended(self, numbers: Tensor, said: Tensor, counts: Tensor) -> Tensor:
        ended = counts == self._decoding.new_tokens
        for count in counts[~ended].unique().tolist():
            alike = counts == count
            ended[alike] = self._ends(numbers[alike], said[alike, -count:])
        return ended
