"""The staircase: one forward pass over the target prompt that answers for rows patched at every layer.

A patch at layer ℓ* and position i* changes nothing before i*, and nothing below ℓ*. So the tokens before i* are run
once and their keys and values shared, and the pass over the rest starts with a single row, the clean prompt. After
each decoder layer the rows patched there join it, as copies of the clean row with position i* overwritten: the batch
grows as it climbs. In the cache, a row's keys and values below its own layer are the clean row's. A row that writes in
several layers joins at the lowest, and is overwritten again as it climbs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from pscope.engine.batching import fitting, known_batch_axes
from pscope.engine.generate import CachedRows
from pscope.engine.writes import LayerWrites, Writes
from pscope.errors import ModelError
from pscope.models.internals.caches import grown, keep, other_kinds
from pscope.models.model import LanguageModel
from pscope.models.prompts import Prompt
from pscope.models.residual import editing

Regrown = Callable[[Tensor], Tensor]
"""An edit that gives a stream with the rows that are to climb on."""


class Staircase:
    """Runs patched rows of one target prompt. See the module's text for how, `Patchscope` for how to use it.

    Raises ModelError for a model that keeps more than the keys and values of each token, recurrent states for example.
    """

    def __init__(self, model: LanguageModel, target: Prompt) -> None:
        self.model, self._target = model, target
        if others := other_kinds(model.own_cache()):
            raise ModelError(f"its cache has {', '.join(others)}, not only the keys and values of each token")
        first = min(target.positions)
        self._prefix_ids, self._suffix_ids = target.ids[:first], target.ids[first:]
        self._batch_axes = known_batch_axes(
            model,
            (len(self._prefix_ids), len(self._suffix_ids)),
            lambda rows: model.next_token_logits(self._suffix(rows), grown(self._run_prefix(), rows)),
        )

    def read(self, writes: Writes, last: int = 1) -> Tensor:
        """The logits after the `last` tokens of the clean row, and of the patched ones: (1 + rows, last, vocab)."""
        return self._climb(writes, 0, last)[0]

    def start(self, writes: Writes, new_tokens: int) -> CachedRows:
        """As `read`, for rows that go on, the clean row first: with room in their cache for `new_tokens`, 1 or more."""
        logits, cache = self._climb(writes, new_tokens, 1)
        return CachedRows(self.model, cache, logits[:, -1])

    def _climb(self, writes: Writes, new_tokens: int, last: int) -> tuple[Tensor, Cache]:
        """The logits of the clean row and the patched ones, (1 + rows, last, vocab), and their cache."""
        total, top = len(writes) + 1, self.model.n_layers
        lowest = writes.lowest
        # Where in the stream each row stands once all have joined, since they climb by layer.
        places = torch.cat([torch.zeros(1, dtype=torch.long), 1 + lowest.argsort(stable=True).argsort()])
        # 1. At each layer its rows join, and its writes are made: (rows, tokens, hidden) → (rows + joiners, …).
        joiners = {layer: int((lowest == layer).sum()) for layer in writes.present}
        edits = {layer: self._joining_edit(joiners[layer], writes.at(layer), places) for layer in joiners}
        # 2. Before that, at layer 0, only the clean row goes up: (total, tokens, hidden) → (1, tokens, hidden).
        edits[0] = _in_turn(_only_clean, edits.get(0))
        # 3. After that, at the top, all are put in the order given, (total, tokens, hidden): their logits are larger.
        edits[top] = _in_turn(edits.get(top), lambda stream: stream[places.to(stream.device)])
        # The model is given all rows, so that what it does with the whole batch at the top is right; of their streams
        # the first goes up, and the others join it, each at its layer.
        with self.model.lock:
            # Anew in every pass: weights and other people's edits may have changed since the last one.
            cache = grown(self._run_prefix(), total, len(self._suffix_ids) + new_tokens if new_tokens else 0)
            with editing(self.model, edits), fitting(self.model, self._batch_axes):
                logits = self.model.logits(self._suffix(total), cache, last)
        if new_tokens:
            keep(cache, places.to(self.model.device))
        return logits, cache

    def _joining_edit(self, joiners: int, here: LayerWrites, places: Tensor) -> Regrown:
        """The edit that lets rows join, as copies of the clean row, row 0, and makes the writes of one layer.

        `places` are those in the stream of rows as they are numbered, the clean one first.
        """
        rows, columns = places[1 + here.rows], here.positions - len(self._prefix_ids)

        def edit(stream: Tensor) -> Tensor:
            stream = torch.cat([stream, stream[:1].expand(joiners, -1, -1)])
            stream[rows, columns] = here.vectors.to(stream)
            return stream

        return edit

    def row_bytes(self, new_tokens: int, last: int = 1) -> int:
        """About how much memory a row takes at the top of the staircase, its keys and values included."""
        return staircase_row_bytes(self.model, self._target, new_tokens, last)

    def _suffix(self, rows: int) -> Tensor:
        return torch.tensor([self._suffix_ids], device=self.model.device).expand(rows, -1)

    def _run_prefix(self) -> Cache:
        # Plain full-length cache layers: where the model has sliding windows, its mask does the windowing. The
        # layers that transformers would choose drop keys, and then disagree with the mask of a longer suffix.
        prefix = DynamicCache()
        if self._prefix_ids:
            self.model.next_token_logits(torch.tensor([self._prefix_ids], device=self.model.device), prefix)
        return prefix


def staircase_row_bytes(model: LanguageModel, target: Prompt, new_tokens: int, last: int = 1) -> int:
    """About how much memory a row takes at the top of the staircase, its keys and values included."""
    prefix = min(target.positions)
    suffix = len(target) - prefix
    if new_tokens:
        cache_bytes = model.cache_bytes(prefix + suffix + new_tokens)
    else:
        # They are forgotten layer by layer.
        cache_bytes = 2 * max(layer.per_row + (prefix + suffix) * layer.per_token for layer in model.kept)
    return cache_bytes + model.activation_bytes(suffix, prefix, last)


def _only_clean(stream: Tensor) -> Tensor:
    """The edit that lets only the clean row climb."""
    return stream[:1]


def _in_turn(*edits: Regrown | None) -> Regrown:
    """Edits of one layer, each of what the one before made; None for none."""

    def edit(stream: Tensor) -> Tensor:
        for each in edits:
            stream = stream if each is None else each(stream)
        return stream

    return edit
