"""The model's own words: prompts continued as they are, many at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor
from transformers import DynamicCache

from pscope.errors import RowError
from pscope.generate import GREEDY, CachedRows, Decoding, Rows, Settled, continue_rows
from pscope.models import LanguageModel
from pscope.patchscope import MEMORY
from pscope.prompts import Prompt


def continue_prompts(
    model: LanguageModel,
    prompts: Sequence[Prompt],
    decoding: Decoding = GREEDY,
    *,
    settled: Settled | None = None,
    memory: int = MEMORY,
    cached: bool = True,
) -> Iterator[tuple[int, list[int]]]:
    """Continue every prompt; yields its index and its new token ids, batch by batch, the shortest prompts first.

    A prompt of which `settled(index, text)` says so need not go on. Prompts of one length share a batch, so that none
    is padded, in about `memory` bytes beside the model. Without `cached`, the whole text is run again for every token:
    slow, and right for models whose cache cannot be relied on.

    Raises PromptError for a prompt that leaves no room in the window, RowError if the logits of a row are not finite.
    """
    for prompt in prompts:
        model.check_window(len(prompt) + decoding.new_tokens)
    draws = decoding.draws(len(prompts))
    start = _start_cached if cached else _UncachedRows
    by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    for length, same_length in groupby(by_length, key=lambda index: len(prompts[index])):
        indices = list(same_length)
        together = max(1, memory // _row_bytes(model, length + decoding.new_tokens))
        for first in range(0, len(indices), together):
            batch = indices[first : first + together]
            ends = decoding.ends(model.end_tokens, model.tokenizer, settled and _renumbered(settled, batch))
            ids = torch.tensor([prompts[index].ids for index in batch], device=model.device)
            try:
                spoken = continue_rows(start(model, ids), decoding, draws[batch], ends)
            except RowError as error:
                raise RowError(batch[error.row], error.reason) from error
            yield from zip(batch, spoken, strict=True)


def _renumbered(settled: Settled, batch: Sequence[int]) -> Settled:
    return lambda row, text: settled(batch[row], text)


def _start_cached(model: LanguageModel, ids: Tensor) -> Rows:
    # Plain full-length cache layers, as on the staircase: the model's own mask does the windowing.
    cache = DynamicCache()
    return CachedRows(model, cache, model.next_token_logits(ids, cache))


class _UncachedRows:
    """Rows that run all their tokens again at every step."""

    def __init__(self, model: LanguageModel, ids: Tensor) -> None:
        self._model, self._ids = model, ids
        self.logits = model.next_token_logits(ids)

    def step(self, tokens: Tensor) -> None:
        self._ids = torch.cat([self._ids, tokens[:, None]], dim=1)
        self.logits = self._model.next_token_logits(self._ids)

    def keep(self, kept: Tensor) -> None:
        self._ids = self._ids[kept]


def _row_bytes(model: LanguageModel, tokens: int) -> int:
    """About how much memory a row takes, its keys and values, as wide as they can be, included."""
    cached = 2 * model.n_layers * model.hidden_size * model.dtype.itemsize
    return tokens * cached + model.activation_bytes(tokens)
