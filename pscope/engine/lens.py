"""The logit lens: what a hidden state says when the model's own tail (final norm and unembedding) reads it at once."""

from __future__ import annotations

from pscope.engine.patchscope import MEMORY, Patchscope
from pscope.models.model import LanguageModel
from pscope.models.prompts import Prompt

ANY_TOKEN = Prompt(text="", ids=(0,), tokens=("",), positions=(0,))
"""What the logit lens patches."""


def logit_lens(model: LanguageModel, memory: int = MEMORY) -> Patchscope:
    """The logit lens as the Patchscope it is: target layer L, identity mapping.

    Call `.logits(states, model.n_layers)` on it. At layer L and the last position the target prompt plays no part any
    more, so it is a single token, no matter which. Whatever the model does after its last layer is done by the model.
    """
    return Patchscope(model, ANY_TOKEN, memory=memory)
