"""The model's own words: prompts continued as they are, many at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
    """Continue every prompt; gives its index and its new token ids, once all have ended.

    A prompt of which `settled(index, text)` says so need not go on. Prompts share a batch, without padding, once the
    shorter ones have said what they lack, in about `memory` bytes beside the model. `path` is that of a Patchscope's
    self-check, which says which kind of cache can be relied on, if any; by default the longest prompt is checked. While
    others have hooks on the model that may have to see whole prompts, these are run for every token, whatever path is
    named.

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
    queue = Queue(decoding, draws, ends)
    # The shortest first: they have said what they lack when longer ones come.
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    start = 0
    while start < len(order):
        length = len(prompts[order[start]])
        # Those that wait are of shorter prompts, and take less.
        most = max(1, memory // _row_bytes(model, length, decoding))
        together = order[start : start + max(1, most - queue.waiting)]
        batch = [index for index in together if len(prompts[index]) == length]
        start += len(batch)
        following = len(prompts[order[start]]) if start < len(order) and path == "staircase" else None
        ids = torch.tensor([prompts[index].ids for index in batch], device=model.device)
        queue.take(_start(model, ids, path), batch, length, most, following)
    yield from queue.finish().items()


def _row_bytes(model: LanguageModel, length: int, decoding: Decoding) -> int:
    """About how much memory a row takes that goes on from a prompt of this length."""
    tokens = length + decoding.new_tokens
    choosing = decoding.choosing_bytes(model.config.vocab_size)
    return model.cache_bytes(tokens) + model.activation_bytes(tokens) + choosing


def _start(model: LanguageModel, ids: Tensor, path: PathName) -> Rows:
    if path == "uncached":
        return UncachedRows(model, ids)
    # Plain full-length cache layers, as on the staircase: the model's own mask does the windowing.
    cache = DynamicCache() if path == "staircase" else model.own_cache()
    return CachedRows(model, cache, model.next_token_logits(ids, cache))
