"""Positions drawn at random from texts, for experiments that read what a model makes of them there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from transformers import PreTrainedTokenizerBase

from pscope.errors import DataError, PscopeError
from pscope.models.model import LanguageModel
from pscope.models.prompts import Prompt, tokenize


@dataclass(frozen=True)
class Sampled:
    """A text, cut after the last position drawn in it, and the positions drawn, in ascending order."""

    text: int
    prompt: Prompt
    positions: tuple[int, ...]


def draw_positions(
    model: LanguageModel, texts: Sequence[str], samples: int, seed: int, most_tokens: int = 512
) -> list[Sampled]:
    """Draw `samples` positions at random from the first `most_tokens` tokens of the texts, or the window.

    No text gives a second position before each has given one, and none is drawn twice. The first token of a text is
    left out: it has no context. Raises DataError if the texts cannot give that many.
    """
    if samples < 1:
        raise PscopeError(f"{samples} samples were asked for; at least 1 is needed")
    random = np.random.default_rng(seed)
    most_tokens = min(most_tokens, model.window or most_tokens)
    prompts = [_beginning(model.tokenizer, text, most_tokens) for text in texts]
    lengths = [min(len(prompt), most_tokens) for prompt in prompts]
    available = sum(max(0, length - 1) for length in lengths)
    if samples > available:
        raise DataError(
            f"{samples} samples were asked for, but the {len(texts)} texts have only {available} positions to give"
        )
    drawn: dict[int, list[int]] = {}
    orders = [1 + random.permutation(max(0, length - 1)) for length in lengths]
    missing, turn = samples, 0
    while missing:
        able = [text for text in random.permutation(len(texts)).tolist() if len(orders[text]) > turn]
        for text in able[:missing]:
            drawn.setdefault(text, []).append(int(orders[text][turn]))
        missing, turn = missing - len(able[:missing]), turn + 1
    return [_cut(text, prompts[text], sorted(positions)) for text, positions in sorted(drawn.items())]


def _beginning(tokenizer: PreTrainedTokenizerBase, text: str, tokens: int) -> Prompt:
    """The prompt of a text, or of as much of a long one as its first `tokens` tokens need."""
    length = 16 * tokens
    while length < len(text):
        if text[:length].strip():
            prompt = tokenize(tokenizer, text[:length])
            # A cut may change the tokens before it, but none that are as many away as those that are read.
            if len(prompt) >= 2 * tokens:
                return prompt
        length *= 2
    return tokenize(tokenizer, text)


def _cut(text: int, prompt: Prompt, positions: list[int]) -> Sampled:
    # What follows the last position cannot be seen from it, and need not be run.
    end = positions[-1] + 1
    parts = {"ids": prompt.ids[:end], "tokens": prompt.tokens[:end], "spans": prompt.spans[:end]}
    cut = replace(prompt, positions=(end - 1,), **parts)
    return Sampled(text, cut, tuple(positions))
