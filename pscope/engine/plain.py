"""Whole prompts, one per row, with hooks that overwrite: slow, and always right where the model itself is."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from pscope.engine.generate import CachedRows, Rows, UncachedRows
from pscope.engine.writes import LayerWrites, Writes
from pscope.models.model import LanguageModel
from pscope.models.prompts import Prompt
from pscope.models.residual import Edit, editing


class PlainPath:
    """Runs patched rows of one target prompt, with the same calls as `Staircase`.

    Continuations go on from a cache of the kind that the model chooses by itself; without `cached`, every new token
    runs the whole row again, patch and all.
    """

    def __init__(self, model: LanguageModel, target: Prompt, *, cached: bool = True) -> None:
        self.model, self.target, self._cached = model, target, cached

    def read(self, writes: Writes, last: int = 1, tails: Tensor | None = None) -> Tensor:
        """The logits after the `last` tokens of the clean row, and of the patched ones: (1 + rows, last, vocab).

        Tokens that follow the target in each row are given as `tails`, (1 + rows, tokens).
        """
        ids, patching = self._batch(writes)
        if tails is not None:
            ids = torch.cat([ids, tails], dim=1)
        with patching(torch.arange(len(ids))):
            return self.model.logits(ids, last=last)

    def start(self, writes: Writes, new_tokens: int) -> Rows:
        """As `read`, for rows that go on, the clean row first."""
        ids, patching = self._batch(writes)
        if not self._cached:
            return UncachedRows(self.model, ids, patching)
        cache = self.model.own_cache()
        with patching(torch.arange(len(ids))):
            return CachedRows(self.model, cache, self.model.next_token_logits(ids, cache))

    def row_bytes(self, new_tokens: int, last: int = 1) -> int:
        """About how much memory a row takes."""
        tokens = len(self.target) + new_tokens
        cache_bytes = self.model.cache_bytes(tokens) if self._cached and new_tokens else 0
        return cache_bytes + self.model.activation_bytes(tokens, last=last)

    def _batch(self, writes: Writes) -> tuple[Tensor, Callable[[Tensor], AbstractContextManager[None]]]:
        """The ids of the clean row and the patched ones, and, for some of them by number, a block to run them in."""
        ids = torch.tensor([self.target.ids], device=self.model.device).repeat(len(writes) + 1, 1)
        return ids, lambda rows: self._patching(rows, writes)

    def _patching(self, rows: Tensor, writes: Writes) -> AbstractContextManager[None]:
        """A block within which each of some `rows`, by number, has its writes made; row 0, the clean one, has none."""
        patched = (rows > 0).nonzero().squeeze(1)
        present = writes[rows[patched] - 1]
        return editing(self.model, {layer: _edit(patched, present.at(layer)) for layer in present.present})


def _edit(patched: Tensor, here: LayerWrites) -> Edit:
    """The edit that makes the writes of one layer, of rows that stand in the batch where `patched` says."""
    rows = patched[here.rows]

    def edit(stream: Tensor) -> Tensor:
        stream = stream.clone()
        stream[rows, here.positions] = here.vectors.to(stream)
        return stream

    return edit
