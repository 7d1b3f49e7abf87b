"""The model's own words: prompts continued as they are, many at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Literal

import torch
from torch import Tensor
from transformers import DynamicCache

from pscope.arguments import as_int, check_name
from pscope.engine.generate import (
    GREEDY,
    CachedRows,
    Decoding,
    Rows,
    Settled,
    UncachedRows,
    check_decoding,
)
from pscope.engine.patchscope import MEMORY
from pscope.engine.queue import Queue
from pscope.engine.selfcheck import PATHS, PathName, choose_path
from pscope.models.model import LanguageModel, as_prompts
from pscope.models.prompts import Prompt
from pscope.models.residual import others_intervene


def continue_prompts(
    model: LanguageModel,
    prompts: Sequence[Prompt],
    decoding: Decoding = GREEDY,
    *,
    settled: Settled | None = None,
    memory: int = MEMORY,
    path: PathName | Literal["auto"] = "auto",
) -> Iterator[tuple[int, list[int]]]:
    """Continue every prompt; yields its index and its new token ids, length by length, the shortest prompts first.

    A prompt of which `settled(index, text)` says so need not go on. Prompts of one length share a batch, so that none
    is padded, in about `memory` bytes beside the model. `path` is that of a Patchscope's self-check, which says which
    kind of cache can be relied on, if any; by default the longest prompt is checked. While others have hooks on the
    model that may have to see whole prompts, these are run for every token, whatever path is named.

    Raises PscopeError for what is no list of prompts, for an empty one, and for a `path` that there is none of,
    PromptError for a prompt that leaves no room in the window, RowError if the logits of a row are not finite.
    """
    prompts, memory = as_prompts(model, prompts), as_int(memory, "the memory in bytes")
    for prompt in prompts:
        check_decoding(decoding, model, prompt, settled)
    check_name(path, ("auto", *PATHS), "path")
    if others_intervene(model):
        path = "uncached"
    elif path == "auto":
        path = choose_path(model, max(prompts, key=len))[1].path
    draws = decoding.draws(len(prompts))
    ends = decoding.ends(model.end_tokens, model.tokenizer, settled)
    by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    for length, same_length in groupby(by_length, key=lambda index: len(prompts[index])):
        indices = list(same_length)
        tokens = length + decoding.new_tokens
        row_bytes = model.cache_bytes(tokens) + model.activation_bytes(tokens)
        row_bytes += decoding.choosing_bytes(model.config.vocab_size)
        most, first = max(1, memory // row_bytes), 0
        queue = Queue(decoding, draws, ends)
        while first < len(indices):
            batch = indices[first : first + most - queue.waiting]
            ids = torch.tensor([prompts[index].ids for index in batch], device=model.device)
            queue.take(_start(model, ids, path), batch, most if path == "staircase" else 0)
            first += len(batch)
        yield from queue.finish().items()


def _start(model: LanguageModel, ids: Tensor, path: PathName) -> Rows:
    if path == "uncached":
        return UncachedRows(model, ids)
    # Plain full-length cache layers, as on the staircase: the model's own mask does the windowing.
    cache = DynamicCache() if path == "staircase" else model.own_cache()
    return CachedRows(model, cache, model.next_token_logits(ids, cache))
