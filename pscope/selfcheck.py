"""Choose the path that patched rows take: the staircase where it agrees with whole-prompt passes, else those."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from pscope.errors import ModelError
from pscope.models import LanguageModel
from pscope.plain import PlainPath
from pscope.prompts import Prompt
from pscope.residual import recording
from pscope.staircase import Staircase

PathName = Literal["staircase", "plain", "uncached"]
"""One pass for all layers; whole prompts, continued from the model's own cache; whole prompts for every new token."""

PATHS = {"staircase": Staircase, "plain": PlainPath, "uncached": partial(PlainPath, cached=False)}

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.5}
"""In standard deviations of the logits. Rounding stays well below; a wrong mask or cache is of the order of 1."""


@dataclass(frozen=True)
class SelfCheck:
    """Which path was chosen, why, and how far the staircase was from whole-prompt passes.

    `difference` is the largest one between logits, in standard deviations of the logits; None if it was not measured.
    """

    path: PathName
    reason: str
    difference: float | None = None

    def __str__(self) -> str:
        return f"{self.path} path: {self.reason}"


@torch.no_grad()
def choose_path(model: LanguageModel, target: Prompt) -> tuple[Staircase | PlainPath, SelfCheck]:
    """Run the clean row and a few patched ones on each path, and let them go on, also when some have left.

    Raises ModelError if the model's own logits are not finite.
    """
    # From the top down, which is not the order in which rows climb.
    layers = torch.tensor(sorted({0, model.n_layers // 2, model.n_layers - 1, model.n_layers}, reverse=True))
    with recording(model, range(model.n_layers + 1)) as streams:
        model.next_token_logits(torch.tensor([target.ids], device=model.device))
    # States of the clean run, each patched where it does not belong.
    borrowed = [streams[(layer + model.n_layers // 2 + 1) % (model.n_layers + 1)] for layer in layers.tolist()]
    states = torch.stack([stream[0, list(target.positions)].to(model.device) for stream in borrowed])
    yardstick = PATHS["uncached"](model, target)
    expected = _answers(yardstick, states, layers)
    if not all(logits.isfinite().all() for logits in expected):
        raise ModelError(f"{model.name} gives logits that are not finite in {model.dtype}; try another dtype")
    # Quantised weights are unpacked to half precision on the way.
    tolerance = TOLERANCE.get(torch.bfloat16 if model.quantised else model.dtype, TOLERANCE[torch.bfloat16])
    staircase, difference, fault = _tried("staircase", model, target, states, layers, expected)
    if difference is not None and difference <= tolerance:
        return staircase, SelfCheck("staircase", f"within {difference:.0e} of whole-prompt passes", difference)
    reason = f"on {type(model.hf).__name__} the staircase {fault}"
    plain, own_difference, own_fault = _tried("plain", model, target, states, layers, expected)
    if own_difference is not None and own_difference <= tolerance:
        return plain, SelfCheck("plain", reason, difference)
    return yardstick, SelfCheck("uncached", f"{reason}, and going on from its own cache {own_fault}", difference)


def _tried(
    name: PathName, model: LanguageModel, target: Prompt, states: Tensor, layers: Tensor, expected: list[Tensor]
) -> tuple[Staircase | PlainPath | None, float | None, str]:
    """A path, how far it is from what is expected, and what to say of it if that is too far or it does not run."""
    try:
        path = PATHS[name](model, target)
        answers = _answers(path, states, layers)
        # Without room to go on, a path may keep less.
        answers.append(path.start(states, layers).logits)
    except torch.OutOfMemoryError:
        raise
    except (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        # Whatever a model's code says to such a batch or cache, the other paths do not depend on it.
        return None, None, f"does not run ({' '.join(str(error).split())})"
    differences = [_difference(got, right) for got, right in zip(answers, [*expected, expected[0]], strict=True)]
    # Not a number compares as neither more nor less.
    difference = max(differences) if all(value == value for value in differences) else math.inf
    return path, difference, f"is {difference:.1e} off"


def _answers(path: Staircase | PlainPath, states: Tensor, layers: Tensor) -> list[Tensor]:
    """The logits of all rows, then those after a token more, then those of every other row after yet another."""
    rows = path.start(states, layers, new_tokens=2)
    answers = [rows.logits]
    kept = torch.arange(0, len(rows.logits), 2, device=rows.logits.device)
    # Any tokens will do, as long as they are the same on every path.
    tokens = torch.arange(3, 3 + len(rows.logits), device=rows.logits.device) % rows.logits.shape[1]
    rows.step(tokens)
    answers.append(rows.logits)
    rows.keep(kept)
    rows.step(tokens[kept])
    return [*answers, rows.logits]


def _difference(logits: Tensor, expected: Tensor) -> float:
    """The largest difference, in standard deviations of each row's expected logits."""
    logits, expected = logits.cpu().double(), expected.cpu().double()
    return ((logits - expected).abs().amax(dim=-1) / expected.std(dim=-1)).max().item()
