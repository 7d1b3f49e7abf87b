"""The sweep in bfloat16 against the sweep in float32: what it gains, and what it costs in agreement."""

from __future__ import annotations

import pandas as pd
import torch

import pscope
from benchmarks.sweep import Sweep
from benchmarks.timing import Contestant, against, in_turn


def half_compared(sweep: Sweep, half: pscope.LanguageModel, new_tokens: int, seconds: float):
    """Logits of all states, and continuations of one sample's, in both precisions: a table with `ratio` to float32.

    `agreement` is the share of rows with the same argmax, and of rows with every token equal.
    """
    target = half.prompt(pscope.TOKEN_IDENTITY)
    scopes = {
        str(model.dtype).removeprefix("torch."): pscope.Patchscope(model, target, path="staircase")
        for model in (sweep.model, half)
    }
    states, layers = sweep.first(sweep.model.n_layers + 1)
    decoding = pscope.Decoding(new_tokens)
    work = {
        "logits": lambda scope: torch.cat(
            [part.patched.argmax(dim=-1) for part in scope.logits(sweep.states, sweep.layers)]
        ).tolist(),
        "continuations": lambda scope: scope.generate(states, layers, decoding).patched,
    }
    frames = []
    for name, run in work.items():
        exact, rough = (run(scope) for scope in scopes.values())
        same = sum(one == other for one, other in zip(exact, rough, strict=True)) / len(exact)
        contestants = {
            dtype: Contestant(lambda run=run, scope=scope: run(scope), len(exact)) for dtype, scope in scopes.items()
        }
        found = against(in_turn(contestants, seconds), "float32")
        frames.append(found.assign(work=name, agreement=[1.0, same]))
    return pd.concat(frames, ignore_index=True)
