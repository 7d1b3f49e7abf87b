"""Whole prompts, one per row, with hooks that overwrite: slow, and always right where the model itself is."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from pscope.engine.generate import CachedRows, Rows, UncachedRows
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

    def read(self, states: Tensor, target_layers: Tensor, last: int = 1) -> Tensor:
        """Patch `states` (rows, positions, hidden) into the target, each row at its layer, (rows,).

        Returns the logits after the `last` tokens of the clean row, and of the patched ones: (1 + rows, last, vocab).
        """
        ids, patching = self._batch(states, target_layers)
        with patching(torch.arange(len(ids))):
            return self.model.logits(ids, last=last)

    def start(self, states: Tensor, target_layers: Tensor, new_tokens: int) -> Rows:
        """As `read`, for rows that go on, the clean row first."""
        ids, patching = self._batch(states, target_layers)
        if not self._cached:
            return UncachedRows(self.model, ids, patching)
        cache = self.model.own_cache()
        with patching(torch.arange(len(ids))):
            return CachedRows(self.model, cache, self.model.next_token_logits(ids, cache))

    def row_bytes(self, new_tokens: int, last: int = 1) -> int:
        """About how much memory a row takes."""
        tokens = len(self.target) + new_tokens
        cached = self.model.cache_bytes(tokens) if self._cached and new_tokens else 0
        return cached + self.model.activation_bytes(tokens, last=last)

    def _batch(
        self, states: Tensor, target_layers: Tensor
    ) -> tuple[Tensor, Callable[[Tensor], AbstractContextManager[None]]]:
        """The ids of the clean row and the patched ones, and, for some of them by number, a block to run them in."""
        ids = torch.tensor([self.target.ids], device=self.model.device).repeat(len(states) + 1, 1)
        # The clean row is patched at no layer.
        layers = torch.cat([target_layers.new_tensor([-1]), target_layers])
        states = torch.cat([torch.zeros_like(states[:1]), states]).to(self.model.device)
        return ids, lambda rows: self._patching(rows, states, layers)

    def _patching(self, rows: Tensor, states: Tensor, layers: Tensor) -> AbstractContextManager[None]:
        """A block within which the rows of the batch, numbers into the others, are overwritten each at its layer."""
        here = layers[rows]
        edits = {
            layer: self._overwrite((here == layer).nonzero().squeeze(1), states[rows[here == layer].to(states.device)])
            for layer in here[here >= 0].unique().tolist()
        }
        return editing(self.model, edits)

    def _overwrite(self, rows: Tensor, states: Tensor) -> Edit:
        def edit(stream: Tensor) -> Tensor:
            stream = stream.clone()
            stream[rows[:, None], self.target.positions] = states.to(stream)
            return stream

        return edit
