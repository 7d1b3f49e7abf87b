"""What a hook costs: the same pass with no hook, with one that does nothing, with capture, and with overwriting."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial

import pandas as pd
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import pscope
from benchmarks.timing import Contestant, against, in_turn

BATCHES, LENGTHS = (1, 8, 64), (16, 128, 512)
NO_HOOK = "no hook"


def wide_llama(like: pscope.LanguageModel) -> pscope.LanguageModel:
    """A random Llama of width 2048, of two layers."""
    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=2,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=4096,
    )
    torch.manual_seed(0)
    hf = LlamaForCausalLM(config).to(device=like.device, dtype=like.dtype).eval()
    return pscope.LanguageModel(hf, like.tokenizer, "random Llama, width 2048")


def overheads(model: pscope.LanguageModel, seconds: float, most_tokens: int) -> pd.DataFrame:
    """One row per phase × batch × tokens × contestant; `ratio` is to the pass without a hook.

    A prefill runs `tokens` tokens; a decode step runs one after `tokens` in the cache. Prefills of more than
    `most_tokens` tokens in all are left out. Raises AssertionError if a hook changes the logits.
    """
    frames = []
    for tokens in LENGTHS:
        for batch in BATCHES:
            ids = torch.arange(tokens, device=model.device).remainder(1000).expand(batch, -1)
            if batch * tokens <= most_tokens:
                frames.append(_timed(model, partial(model.next_token_logits, ids), batch, tokens, "prefill", seconds))
            cache = DynamicCache()
            model.next_token_logits(ids[:1], cache)
            cache.batch_repeat_interleave(batch)

            def step(ids=ids, cache=cache) -> torch.Tensor:
                logits = model.next_token_logits(ids[:, :1], cache)
                cache.crop(-1)
                return logits

            frames.append(_timed(model, step, batch, tokens, "decode", seconds))
    return pd.concat(frames, ignore_index=True).assign(model=model.name)


def _timed(model: pscope.LanguageModel, forward, batch: int, tokens: int, phase: str, seconds: float) -> pd.DataFrame:
    middle = model.n_layers // 2
    with pscope.recording(model, [middle]) as streams:
        clean = forward()
    own = streams[middle][:, -1]
    hooks = {
        NO_HOOK: nullcontext,
        "hook that does nothing": lambda: pscope.editing(model, {middle: lambda stream: None}),
        "capture of one layer": lambda: pscope.recording(model, [middle]),
        "capture of all layers": lambda: pscope.recording(model, range(model.n_layers + 1)),
        "overwrite of one row": lambda: pscope.editing(model, {middle: partial(_overwrite_first, own[0])}),
        "overwrite of every row": lambda: pscope.overwriting(model, middle, -1, own),
    }
    for name, hook in hooks.items():
        # A state written into its own place changes nothing.
        assert _within(hook, forward).equal(clean), f"{name} changes the logits"
    contestants = {name: Contestant(partial(_within, hook, forward)) for name, hook in hooks.items()}
    found = against(in_turn(contestants, seconds), NO_HOOK)
    return found.assign(phase=phase, batch=batch, tokens=tokens)


def _within(hook, forward) -> torch.Tensor:
    block: AbstractContextManager = hook()
    with block:
        return forward()


def _overwrite_first(state: torch.Tensor, stream: torch.Tensor) -> torch.Tensor:
    stream = stream.clone()
    stream[0, -1] = state
    return stream
