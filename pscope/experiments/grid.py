"""Grids of source and target layers, and source prompts whose states can be read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pscope.models.model import LanguageModel, check_model
from pscope.models.prompts import At, Ending, Prompt, places_of
from pscope.models.residual import Pair, as_layers


def layer_pairs(
    model: LanguageModel,
    layers: Sequence[int] | None,
    targets: Sequence[int] | Literal["same", "all"] = "same",
    source: LanguageModel | None = None,
) -> list[Pair]:
    """Every source layer with its target layers: the same one, those given, or all of 0..L.

    `layers` defaults to the lower half, 0..L/2. Source layers are those of `source`, by default the same model. Raises
    PscopeError for a layer out of range.
    """
    check_model(model)
    source = model if source is None else source
    layers = as_layers(source, range(min(source.n_layers // 2, model.n_layers) + 1) if layers is None else layers)
    if isinstance(targets, str) and targets == "same":
        return [(layer, layer) for layer in as_layers(model, layers)]
    targets = as_layers(model, None if isinstance(targets, str) and targets == "all" else targets)
    return [(layer, target) for layer in layers for target in targets]


def source_prompt(model: LanguageModel, text: str, at: At = -1) -> Prompt:
    """A prompt whose state is to be read, never at the first token of the text: a line break is put before that one.

    There, unless the tokenizer adds a start token, a model keeps an attention sink that says nothing of the token.
    With an index that counts from the start it is taken as it is; `at_sink` of the prompt then tells. Raises
    PromptError.
    """
    check_model(model)
    prompt = model.prompt(text, at)
    from_start = any(isinstance(mark, Ending) or (isinstance(mark, int) and mark >= 0) for mark in places_of(at))
    return prompt if from_start or not prompt.at_sink else model.prompt(line_break(model, text) + text, at)


def line_break(model: LanguageModel, text: str) -> str:
    """What keeps the sink away from a text's first token: a line break, or nothing where a start token is there."""
    return "" if model.prompt(text).ids[0] in model.tokenizer.all_special_ids else "\n"


def spread_layers(model: LanguageModel, fractions: Sequence[float]) -> list[int]:
    """The layers at these fractions of the model's depth, each once."""
    return sorted({round(fraction * model.n_layers) for fraction in fractions})


def source_layers(pairs: Sequence[Pair]) -> tuple[list[int], list[int]]:
    """The source layers to capture, each once, and for every pair the place of its own among them."""
    layers = list(dict.fromkeys(layer for layer, _ in pairs))
    return layers, [layers.index(layer) for layer, _ in pairs]
