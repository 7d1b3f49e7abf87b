"""Figure 1: what one token's hidden state says, layer by layer, to a target prompt and to the logit lens."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import torch
from torch import Tensor

from pscope.engine.generate import Decoding
from pscope.engine.lens import logit_lens
from pscope.engine.patchscope import Patchscope
from pscope.errors import PscopeError
from pscope.models.model import LanguageModel
from pscope.models.prompts import Prompt
from pscope.models.residual import capture, check_layers

PATCHSCOPE, LOGIT_LENS, CLEAN = "patchscope", "logit lens", "clean target"


def read_layers(
    scope: Patchscope, source: Prompt, layers: Sequence[int], *, top_k: int = 1, new_tokens: int = 4
) -> pd.DataFrame:
    """Patch the source token's state of each layer into the target at the same layer (ℓ* = ℓ), and read it.

    One row per reading × layer × rank: `reading` ("patchscope", "logit lens", or "clean target", the control that no
    layer belongs to), `layer`, `rank` from 1 to `top_k`, `token_id`, `token`, `probability` after the prompt, and the
    `continuation` of `new_tokens` tokens (none for the logit lens). Raises PscopeError.
    """
    model = scope.model
    if not layers:
        raise PscopeError("no layer is asked for")
    check_layers(model, layers)
    vocabulary = model.hf.config.get_text_config().vocab_size
    if not 1 <= top_k <= vocabulary:
        raise PscopeError(f"top_k is {top_k}; 1 to {vocabulary} tokens can be shown")
    states = capture(model, [source], [[source.position]], layers)[0]  # (layers, hidden)

    patched = list(scope.logits(states, layers))
    lens = logit_lens(model, scope.memory).logits(states, model.n_layers)
    spoken = scope.generate(states, layers, Decoding(new_tokens))
    continuations = [model.tokenizer.decode(ids) for ids in spoken.patched]
    clean = model.tokenizer.decode(spoken.clean)
    return pd.concat(
        [
            _ranked(model, PATCHSCOPE, layers, torch.cat([part.patched for part in patched]), top_k, continuations),
            _ranked(
                model,
                LOGIT_LENS,
                layers,
                torch.cat([part.patched for part in lens]),
                top_k,
                [None] * len(layers),
            ),
            _ranked(model, CLEAN, [None], patched[0].clean[None], top_k, [clean]),
        ],
        ignore_index=True,
    )


def _ranked(
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
            "token": [model.tokenizer.decode([token]) for token in top.indices.flatten().tolist()],
            "probability": top.values.flatten().tolist(),
            "continuation": pd.array([text for text in continuations for _ in range(top_k)], dtype="string"),
        }
    )
