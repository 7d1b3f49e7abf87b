"""What experiments over source and target layers share: the grid, its rows, controls, and the choice of a best pair."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import pandas as pd
import torch
from sklearn.model_selection import GroupKFold
from torch import Tensor

from pscope.engine.generate import Decoding
from pscope.engine.patchscope import Patchscope
from pscope.errors import PscopeError, RowError
from pscope.models.model import LanguageModel
from pscope.models.prompts import At, Every, Nearest, Prompt, continuing_token
from pscope.models.residual import check_layers

Pair = tuple[int, int]
"""A source layer ℓ and a target layer ℓ*."""

FOLDS = 3


def layer_pairs(
    model: LanguageModel, layers: Sequence[int] | None, targets: Sequence[int] | Literal["same", "all"] = "same"
) -> list[Pair]:
    """Every source layer with its target layers: the same one, those given, or all of 0..L.

    `layers` defaults to the lower half, 0..L/2. Raises PscopeError for a layer out of range.
    """
    layers = range(model.n_layers // 2 + 1) if layers is None else layers
    if not layers or not targets:
        raise PscopeError("no layer is asked for")
    check_layers(model, layers)
    if targets == "same":
        return [(layer, layer) for layer in layers]
    targets = range(model.n_layers + 1) if targets == "all" else targets
    check_layers(model, targets)
    return [(layer, target) for layer in layers for target in targets]


def source_prompt(model: LanguageModel, text: str, at: At = -1, before: str | None = None) -> Prompt:
    """A prompt whose state is to be read, never at the first token of the text: a line break is put before that one.

    There, unless the tokenizer adds a start token, a model keeps an attention sink that says nothing of the token.
    With an index that counts from the start, and with a `before` to stand before the text, it is taken as it is; the
    prompt's `at_sink` then tells. Raises PromptError.
    """
    if before is not None:
        return model.prompt(before + text, at)
    prompt = model.prompt(text, at)
    counted = at >= 0 if isinstance(at, int) else not isinstance(at, (str, Every, Nearest))
    return prompt if counted or not prompt.at_sink else model.prompt(line_break(model, text) + text, at)


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


def same_norm(states: Tensor, names: Sequence[str], seed: int) -> Tensor:
    """Vectors of random direction, each as long as the state in its place: (units, …, hidden).

    Those of a unit are drawn from the seed and its name alone, whoever else is there.
    """
    drawn = [
        torch.randn(state.shape, generator=_generator(seed, name)) for state, name in zip(states, names, strict=True)
    ]
    random = torch.stack(drawn).to(states)
    return random * (states.norm(dim=-1, keepdim=True) / random.norm(dim=-1, keepdim=True))


def _generator(seed: int, name: str) -> torch.Generator:
    """One that is the unit's own; Python's `hash` would differ from process to process."""
    key = hashlib.sha256(repr((seed, name)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(key[:8], "big"))


def speak(
    scope: Patchscope,
    states: Tensor,
    names: Sequence[str],
    pairs: Sequence[Pair],
    decoding: Decoding,
    settled: Callable[[int, str], bool] | None = None,
) -> tuple[list[list[str]], str]:
    """What each of `states` (units, pairs, hidden) says, [unit][pair], and what the clean row says.

    A row leaves the batch when `settled(unit, text)` says so. Raises PscopeError, naming the unit, for a row that
    fails.
    """
    rows = states.reshape(-1, states.shape[-1])
    targets = [target for _, target in pairs] * len(names)
    settled_row = None if settled is None else lambda row, text: settled(row // len(pairs), text)
    try:
        spoken = scope.generate(rows, targets, decoding, settled_row)
    except RowError as error:
        if error.row < 0:
            raise
        unit, pair = divmod(error.row, len(pairs))
        raise PscopeError(
            f"{names[unit]} failed at layer {pairs[pair][0]}, target layer {pairs[pair][1]}: {error.reason}"
        ) from error
    texts = iter([decoding.text(tokens, scope.model.tokenizer) for tokens in spoken.patched])
    return [[next(texts) for _ in pairs] for _ in names], decoding.text(spoken.clean, scope.model.tokenizer)


def first_token(
    scope: Patchscope, states: Tensor, words: Sequence[str], pairs: Sequence[Pair]
) -> tuple[list[list[int]], list[list[float]]]:
    """How near each unit's word is without decoding: rank (from 1) and probability of its first token, [unit][pair].

    `states` are (units, pairs, hidden), with one word for each unit; the token is the one right after the patched
    prompt. Raises PromptError for a word that cannot follow it.
    """
    tokens = torch.tensor([continuing_token(scope.model.tokenizer, scope.target, word) for word in words])
    wanted = tokens.repeat_interleave(len(pairs))[:, None]  # (units × pairs, 1)
    ranks, probabilities = [], []
    for part in scope.logits(states.reshape(-1, states.shape[-1]), [target for _, target in pairs] * len(words)):
        logits = part.patched.float()
        own = logits.gather(1, wanted[part.rows].to(logits.device))
        ranks.append(1 + (logits > own).sum(dim=1))
        probabilities.append((own - logits.logsumexp(dim=1, keepdim=True)).exp().squeeze(1))
    shape = (len(words), len(pairs))
    return torch.cat(ranks).reshape(shape).tolist(), torch.cat(probabilities).reshape(shape).tolist()


def draw_folds(groups: Sequence[str], seed: int) -> list[int]:
    """Which of the folds each unit is in, those of one group together; all in the first if there are too few groups.

    `groups` (units,) names the group of each unit.
    """
    if len(set(groups)) < FOLDS:
        return [0] * len(groups)
    folds = np.empty(len(groups), int)
    split = GroupKFold(FOLDS, shuffle=True, random_state=seed).split(groups, groups=groups)
    for fold, (_, held_out) in enumerate(split):
        folds[held_out] = fold
    return folds.tolist()


def chosen_elsewhere(scores: pd.DataFrame, folds: pd.Series) -> pd.DataFrame:
    """For each unit the columns that were best on the other folds: one, or all that tie, True in (units, columns).

    `scores` is (units, columns), `folds` (units,) says which fold each is in, so that a unit has no part in choosing
    its own.
    """
    chosen = pd.DataFrame(False, scores.index, scores.columns)
    for fold in folds.unique():
        means = scores[folds != fold].mean()
        chosen.loc[folds == fold] = (means == means.max()).to_numpy()
    return chosen


def at_chosen(scores: pd.DataFrame, chosen: pd.DataFrame) -> pd.Series:
    """Each unit's score averaged over the columns that `chosen_elsewhere` chose for it: (units,).

    `scores`, (units, columns), may be of some of the units only, as a control's are.
    """
    # A mean of whole numbers, not a sum of fractions: units that are always right score 1 to the last digit.
    return scores.where(chosen.loc[scores.index]).mean(axis=1)
