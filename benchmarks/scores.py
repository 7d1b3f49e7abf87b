"""Answers scored, and the same said: what it costs to know how probable a continuation is after every row of the sweep.

Scores of the staircase are held against whole prompts with hooks, target and continuation, before anything is timed.
"""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
import torch
from torch import Tensor

import pscope
from benchmarks.hooked import Hooked
from benchmarks.sweep import BATCH, STAIRCASE, Sweep
from benchmarks.timing import Contestant, against, in_turn
from pscope.models.prompts import continuing_tokens

CONTINUATION = " -> hello"
CANDIDATES = (" red", " green", " blue", " white", " black", " gold", " iron", " stone", " paper", " north", " south")
TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.3, torch.bfloat16: 3.0}
"""The largest difference between two log-probabilities that still counts as the same answer, in nats."""


def scores_compared(sweep: Sweep, new_tokens: int, samples: int, seconds: float) -> pd.DataFrame:
    """One row per way: `seconds` per row of the sweep, and `ratio` to a score of `CONTINUATION` by the staircase.

    The staircase scores all rows, others those of `samples` samples. Raises AssertionError where hooks give another
    score than the staircase.
    """
    scope = pscope.Patchscope(sweep.model, sweep.target, path=STAIRCASE)
    tokens = continuing_tokens(sweep.model.tokenizer, sweep.target, CONTINUATION)
    fewer = samples * (sweep.model.n_layers + 1)
    few = sweep.first(fewer)
    difference = (_hooked(sweep, few, tokens) - scope.score(*few, CONTINUATION).patched.log_probabilities).abs().max()
    assert difference < TOLERANCE[sweep.model.dtype], f"hooks score {difference:.1e} from the staircase"
    decoding, everything = pscope.Decoding(new_tokens), (sweep.states, sweep.layers)
    scored = f"scored, a continuation of {len(tokens)} tokens"
    contestants = {
        scored: Contestant(lambda: scope.score(*everything, CONTINUATION), len(sweep.layers)),
        f"the most probable of {len(CANDIDATES)}": Contestant(
            lambda: scope.choose(*everything, CANDIDATES), len(sweep.layers)
        ),
        f"scored, hooks in batches of {BATCH}": Contestant(lambda: _hooked(sweep, few, tokens), fewer),
        f"said, {new_tokens} tokens": Contestant(lambda: scope.generate(*few, decoding), fewer),
    }
    for contestant in contestants.values():
        contestant.run()
    times = against(in_turn(contestants, seconds), scored)
    return times.assign(difference=[difference.item() if "hooks" in name else float("nan") for name in contestants])


def _hooked(sweep: Sweep, rows: tuple[Tensor, list[int]], tokens: tuple[int, ...]) -> Tensor:
    """Log-probabilities of the tokens after every row, (rows, tokens), by whole prompts."""
    forced, target = tokens[:-1], sweep.target
    target = replace(target, ids=target.ids + forced, tokens=target.tokens + ("",) * len(forced))
    ids = torch.tensor(tokens)[None, :, None]

    def forward(prompts: Tensor) -> Tensor:
        logits = sweep.model.hf(prompts, use_cache=False, logits_to_keep=len(tokens)).logits.float()
        return logits.log_softmax(-1).gather(-1, ids.expand(len(logits), -1, -1).to(logits.device)).squeeze(-1).cpu()

    return torch.cat(Hooked(sweep.model, target, BATCH).run(*rows, forward))
