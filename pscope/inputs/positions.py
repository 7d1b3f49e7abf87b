"""Positions drawn at random from texts, for experiments that read what a model makes of them there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from transformers import PreTrainedTokenizerBase

from pscope.arguments import as_int, as_list, as_seed
from pscope.errors import DataError
from pscope.models.model import LanguageModel, check_model
from pscope.models.prompts import Prompt, tokenize


@dataclass(frozen=True)
class Sampled:
    """A text, cut after the last position drawn in it, and the positions drawn, in ascending order."""

    text: int
    prompt: Prompt
    positions: tuple[int, ...]


@dataclass(frozen=True)
class Paired:
    """A text in the tokens of two models, and positions that come after the same characters of it."""

    source: Sampled
    target: Sampled


def draw_positions(
    model: LanguageModel, texts: Sequence[str], samples: int | None, seed: int, most_tokens: int = 512
) -> list[Sampled]:
    """Draw `samples` positions at random from the first `most_tokens` tokens of the texts, or the window; None is all.

    No text gives a second position before each has given one, and none is drawn twice. The first token of a text is
    left out: it has no context. Raises DataError if the texts cannot give that many.
    """
    prompts = _beginnings(model, texts, most_tokens)
    draws = _draw([range(1, length) for _, length in prompts], samples, seed)
    return [_cut(text, prompts[text][0], positions) for text, positions in draws]


def draw_paired(
    source: LanguageModel,
    target: LanguageModel,
    texts: Sequence[str],
    samples: int | None,
    seed: int,
    most_tokens: int = 512,
) -> tuple[list[Paired], float]:
    """As `draw_positions`, where the tokens of both models end at the same character; and what share of all does.

    The share is of the source's positions. Raises DataError too where a tokenizer does not tell where tokens end.
    """
    prompts = list(zip(_beginnings(source, texts, most_tokens), _beginnings(target, texts, most_tokens), strict=True))
    ends = [tuple(_ends(*of, model) for of, model in zip(both, (source, target), strict=True)) for both in prompts]
    common = [sorted(own.keys() & theirs.keys()) for own, theirs in ends]
    available = sum(length - 1 for (_, length), _ in prompts)
    draws = _draw(common, samples, seed)

    def cut(text: int, side: int, characters: list[int]) -> Sampled:
        return _cut(text, prompts[text][side][0], [ends[text][side][character] for character in characters])

    paired = [Paired(cut(text, 0, characters), cut(text, 1, characters)) for text, characters in draws]
    return paired, sum(map(len, common)) / max(1, available)


def _draw(places: Sequence[Sequence[int]], samples: int | None, seed: int) -> list[tuple[int, list[int]]]:
    """The texts that give some of their places, and which, in ascending order."""
    available = sum(map(len, places))
    samples = available if samples is None else as_int(samples, "the number of samples")
    if samples > available:
        raise DataError(
            f"{samples} samples were asked for, but the {len(places)} texts have only {available} positions to give"
        )
    random = np.random.default_rng(as_seed(seed))
    orders = [random.permutation(len(each)) for each in places]
    by_text: dict[int, list[int]] = {}
    missing, turn = samples, 0
    while missing:
        able = [text for text in random.permutation(len(places)).tolist() if len(orders[text]) > turn]
        for text in able[:missing]:
            by_text.setdefault(text, []).append(places[text][orders[text][turn]])
        missing, turn = missing - len(able[:missing]), turn + 1
    return [(text, sorted(positions)) for text, positions in sorted(by_text.items())]


def _beginnings(model: LanguageModel, texts: Sequence[str], most_tokens: int) -> list[tuple[Prompt, int]]:
    """The prompts of texts, and how many tokens of each are there to be read."""
    check_model(model)
    most_tokens = min(as_int(most_tokens, "most_tokens"), model.window or most_tokens)
    texts = as_list(str, texts, "texts", "give strings")
    prompts = [_beginning(model.tokenizer, text, most_tokens) for text in texts]
    return [(prompt, min(len(prompt), most_tokens)) for prompt in prompts]


def _ends(prompt: Prompt, length: int, model: LanguageModel) -> dict[int, int]:
    """After how many characters tokens end, and which: of several that share a character, the last."""
    if not prompt.spans:
        raise DataError(f"the tokenizer of {model.name} does not tell where tokens end, so that none can be paired")
    spans = list(enumerate(prompt.spans[:length]))[1:]
    return {end: position for position, (start, end) in spans if end > start}


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
    ids, tokens, spans = prompt.ids[:end], prompt.tokens[:end], prompt.spans[:end]
    return Sampled(text, replace(prompt, ids=ids, tokens=tokens, spans=spans, positions=(end - 1,)), tuple(positions))
