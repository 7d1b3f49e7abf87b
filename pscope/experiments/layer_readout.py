"""Figure 1: what one token's hidden state says, layer by layer, to a target prompt and to the logit lens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pandas as pd
import torch
from torch import Tensor

from pscope.arguments import as_int
from pscope.engine.generate import Decoding, check_decoding
from pscope.engine.lens import logit_lens
from pscope.engine.patchscope import MEMORY
from pscope.experiments.experiment import Experiment, Unit, Work
from pscope.experiments.sweep import CLEAN
from pscope.models.model import LanguageModel, as_prompt
from pscope.models.prompts import Prompt, decode
from pscope.models.residual import as_layers, capture

PATCHSCOPE, LOGIT_LENS = "patchscope", "logit lens"


class LayerReadout(Experiment[Unit]):
    """The source token's state of each layer, patched into the target at the same layer (ℓ* = ℓ), and read.

    One row of the table per reading × layer × rank: `reading` ("patchscope", "logit lens", or "clean target", the
    control that no layer belongs to), `layer`, `rank` from 1 to `top_k`, `token_id`, `token`, `probability` after the
    prompt, and the `continuation` of `new_tokens` tokens (none for the logit lens). All is one unit. Raises PscopeError
    for what cannot be read.
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
        super().__init__(model, target, memory)
        self._layers, self._decoding = as_layers(model, layers), Decoding(new_tokens)
        self._top_k = as_int(top_k, "top_k", 1, model.config.vocab_size)
        check_decoding(self._decoding, model, target)
        self._source = replace(as_prompt(model, source), positions=(source.position,))
        self.units = [Unit(source.text, len(self._layers), target)]

    def work(self, unit: Unit) -> Work:
        suffix = len(self.target) - min(self.target.positions)
        return Work(len(self._source), suffix, tuple(self._layers), new_tokens=self._decoding.new_tokens)

    def read(self, units: Sequence[Unit]) -> pd.DataFrame:
        model, layers, top_k, scope = self.model, self._layers, self._top_k, self.scope(self.target)
        states = capture(model, [self._source], layers=layers)[0]  # (layers, hidden)
        patched = list(scope.logits(states, layers))
        lens = logit_lens(model, self.memory).logits(states, model.n_layers)
        continuations = scope.generate(states, layers, self._decoding)
        texts = [decode(model.tokenizer, ids) for ids in continuations.patched]
        clean = decode(model.tokenizer, continuations.clean)
        patched_logits, lens_logits = (torch.cat([part.patched for part in parts]) for parts in (patched, lens))
        return pd.concat(
            [
                _top(model, PATCHSCOPE, layers, patched_logits, top_k, texts),
                _top(model, LOGIT_LENS, layers, lens_logits, top_k, [None] * len(layers)),
                _top(model, CLEAN, [None], patched[0].clean[None], top_k, [clean]),
            ],
            ignore_index=True,
        )


def _top(
    model: LanguageModel,
    reading: str,
    layers: Sequence[int | None],
    logits: Tensor,
    top_k: int,
    continuations: Sequence[str | None],
) -> pd.DataFrame:
    top = logits.float().softmax(dim=-1).topk(top_k)
    return pd.DataFrame(
        {
            "reading": reading,
            "layer": pd.array([layer for layer in layers for _ in range(top_k)], dtype="Int64"),
            "rank": list(range(1, top_k + 1)) * len(layers),
            "token_id": top.indices.flatten().tolist(),
            "token": [decode(model.tokenizer, [token]) for token in top.indices.flatten().tolist()],
            "probability": top.values.flatten().tolist(),
            "continuation": pd.array([text for text in continuations for _ in range(top_k)], dtype="string"),
        }
    )
