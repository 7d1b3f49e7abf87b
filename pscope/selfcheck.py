"""Choose the path that patched rows take: the staircase where it agrees with whole-prompt passes, else those."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pscope.errors import ModelError
from pscope.models import LanguageModel
from pscope.plain import PlainPath
from pscope.prompts import Prompt
from pscope.residual import recording
from pscope.staircase import Staircase

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.5}
"""In standard deviations of the logits. Rounding stays well below; a wrong mask or cache is of the order of 1."""


@dataclass(frozen=True)
class SelfCheck:
    """Which path was chosen, why, and how far the staircase was from whole-prompt passes.

    `difference` is the largest one between logits, in standard deviations of the logits; None if it was not measured.
    """

    path: Literal["staircase", "plain"]
    reason: str
    difference: float | None = None

    def __str__(self) -> str:
        return f"{self.path} path: {self.reason}"


@torch.no_grad()
def choose_path(model: LanguageModel, target: Prompt) -> tuple[Staircase | PlainPath, SelfCheck]:
    """Run the clean row and a few patched ones on both paths, with and without a cache to go on from.

    Raises ModelError if the model's own logits are not finite.
    """
    plain = PlainPath(model, target)
    layers = torch.tensor(sorted({0, model.n_layers // 2, model.n_layers - 1, model.n_layers}))
    with recording(model, range(model.n_layers + 1)) as streams:
        model.next_token_logits(torch.tensor([target.ids], device=model.device))
    # States of the clean run, each patched where it does not belong.
    borrowed = [streams[(layer + model.n_layers // 2 + 1) % (model.n_layers + 1)] for layer in layers.tolist()]
    states = torch.stack([stream[0, target.position].to(model.device) for stream in borrowed])
    expected = plain.start(states, layers)
    if not expected.logits.isfinite().all():
        raise ModelError(f"{model.name} gives logits that are not finite in {model.dtype}; try another dtype")
    try:
        staircase = Staircase(model, target)
        once = staircase.start(states, layers)
        going_on = staircase.start(states, layers, new_tokens=1)
        difference = max(_difference(rows.logits, expected.logits) for rows in (once, going_on))
        token = expected.logits.argmax(dim=-1)
        expected.step(token)
        going_on.step(token)
        difference = max(difference, _difference(going_on.logits, expected.logits))
    except (torch.OutOfMemoryError, ModelError):
        raise
    except (AttributeError, LookupError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        # Whatever a model's code says to a growing batch, the plain path does not depend on it.
        reason = " ".join(str(error).split())
        return plain, SelfCheck("plain", f"the staircase does not run on {type(model.hf).__name__} ({reason})")
    if not difference <= TOLERANCE.get(model.dtype, TOLERANCE[torch.bfloat16]):
        return plain, SelfCheck(
            "plain", f"on {type(model.hf).__name__} the staircase is {difference:.1e} off", difference
        )
    return staircase, SelfCheck("staircase", f"within {difference:.0e} of whole-prompt passes", difference)


def _difference(logits: Tensor, expected: Tensor) -> float:
    """The largest difference, in standard deviations of each row's expected logits."""
    logits, expected = logits.cpu().double(), expected.cpu().double()
    return ((logits - expected).abs().amax(dim=-1) / expected.std(dim=-1)).max().item()
