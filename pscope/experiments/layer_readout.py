"""Figure 1: what one token's hidden state says, layer by layer, to a target prompt and to the logit lens."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from pscope.engine.generate import Decoding
from pscope.engine.patchscope import MEMORY
from pscope.experiments.next_token import LOGIT_LENS, Lens
from pscope.experiments.sweep import CLEAN
from pscope.experiments.token_grid import TokenGrid
from pscope.models.model import LanguageModel, as_prompt
from pscope.models.prompts import Prompt

PATCHSCOPE = "patchscope"


class LayerReadout(TokenGrid):
    """The source token's state of each layer, patched into the target at the same layer (ℓ* = ℓ), and read.

    One row of the table per reading × layer × rank: `reading` ("patchscope", "logit lens", or "clean target", the
    control that no layer belongs to), `layer`, `rank` from 1 to `top_k`, `token_id`, `token`, `probability` after the
    prompt, and the `continuation` of `new_tokens` tokens (none for the logit lens). Raises PscopeError for what cannot
    be read.
    """

    def __init__(
        self,
        model: LanguageModel,
        target: Prompt,
        source: Prompt,
        layers: Sequence[int],
        *,
        top_k: int = 1,
        new_tokens: int = 4,
        memory: int = MEMORY,
    ) -> None:
        positions = [as_prompt(model, source).position]
        lenses = [Lens(PATCHSCOPE, target, decoding=Decoding(new_tokens)), Lens(LOGIT_LENS)]
        super().__init__(model, source, lenses, layers, positions=positions, top_k=top_k, memory=memory)

    def join(self, table: pd.DataFrame) -> pd.DataFrame:
        """What the target says unpatched stands last."""
        table = super().join(table).drop(columns="token")
        table = table.rename(columns={"lens": "reading", "next_token_id": "token_id", "next_token": "token"})
        table["reading"] = table["reading"].where(table["layer"].notna(), CLEAN)
        columns = ["reading", "layer", "rank", "token_id", "token", "probability", "continuation"]
        return table.sort_values("reading", key=lambda of: of == CLEAN, kind="stable", ignore_index=True)[columns]
