"""Rows that speak, pass after pass: those that are left of one wait for those of the next, and go on with them.

Rows end one by one, and a step costs nearly the same for few as for many, above all on a GPU. Rows that have said
equally many tokens after prompts of one length keep keys and values for equally many, so that they can go on in one
batch, whenever they began.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

from pscope.engine.generate import CachedRows, Decoding, Ends, Rows, check_finite


class _Batch(NamedTuple):
    """Rows, by number, (rows,), and what they have said, (rows, tokens), of which the last token is yet to be run."""

    rows: Rows
    numbers: Tensor
    said: Tensor

    @classmethod
    def joined(cls, one: _Batch, other: _Batch) -> _Batch:
        rows = CachedRows.joined(cast(Sequence[CachedRows], [one.rows, other.rows]))
        return cls(rows, torch.cat([one.numbers, other.numbers]), torch.cat([one.said, other.said]))


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

    def take(self, rows: Rows, numbers: Sequence[int], room: int = 0) -> None:
        """Let rows speak that have their prompt behind them, until all have ended or, where there is room, some wait.

        With `room` for so many rows in all, they keep a cache, after prompts of one length. A quarter of it is few, and
        at most half of it waits. Raises RowError, with its number, if the logits of a row are not finite.
        """
        nothing = torch.empty(len(numbers), 0, dtype=torch.long)
        self._go_on(self._choose(_Batch(rows, torch.tensor(numbers), nothing)), room)

    def finish(self) -> dict[int, list[int]]:
        """What each row has said, by its number, once those that wait have ended too. Raises RowError as `take`."""
        while self._waiting:
            self._go_on(self._waiting.pop(min(self._waiting)), 0)
        return self._said

    @torch.no_grad()
    def _go_on(self, batch: _Batch | None, room: int) -> None:
        while batch is not None:
            tokens = batch.said.shape[1]
            if tokens in self._waiting:
                batch = _Batch.joined(self._waiting.pop(tokens), batch)
            if len(batch.numbers) <= room // 4 and len(batch.numbers) + self.waiting <= room // 2:
                self._waiting[tokens] = batch
                return
            batch.rows.step(batch.said[:, -1])
            batch = self._choose(batch)

    def _choose(self, batch: _Batch) -> _Batch | None:
        """The rows that have not ended by the next token, which is chosen here; None if all have."""
        rows, numbers, said = batch
        check_finite(rows.logits, numbers)
        step, last = said.shape[1], self._decoding.new_tokens - 1
        tokens = self._decoding.choose(rows.logits, self._draws[numbers, step])
        said = torch.cat([said, tokens[:, None].cpu()], dim=1)
        ended = self._ends(numbers, said) if step < last else torch.ones(len(said), dtype=torch.bool)
        for number, own in zip(numbers[ended].tolist(), said[ended].tolist(), strict=True):
            # The clean row comes with every pass, and says the same.
            self._said.setdefault(number, own)
        if ended.all():
            return None
        if ended.any():
            left = ~ended
            numbers, said = numbers[left], said[left]
            rows.keep(left.nonzero().squeeze(1).to(rows.logits.device))
        return _Batch(rows, numbers, said)
