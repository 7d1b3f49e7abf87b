"""How time and memory grow with samples, layers, the target's length and new tokens; and what Figure 2 costs in all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import numpy as np
import pandas as pd
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import pscope
from benchmarks.sweep import sweep_of
from benchmarks.timing import Contestant, against, in_turn
from pscope.experiments.next_token import LOGIT_LENS, TOKEN_IDENTITY, Lens, NextToken
from pscope.inputs.positions import draw_positions
from pscope.inputs.texts import shipped_texts
from pscope.models.residual import length_batches

MEMORY = 2**26
"""The budget of a pass: small enough for the fewest samples to fill it."""


def cases(model: pscope.LanguageModel, quick: bool = False) -> Iterator[tuple[str, int, Callable[[], object]]]:
    """What is measured: the quantity that grows, its value, and what to run."""
    width = model.n_layers + 1
    for samples in (2, 4) if quick else (8, 16, 32):
        yield "samples", samples, _sweeping(model, samples)
    for length in (8, 16) if quick else (16, 32, 64):
        target = pscope.Prompt("", tuple(range(100, 100 + length)), ("",) * length, (length // 2,))
        scope = pscope.Patchscope(model, target, memory=MEMORY, path="staircase")
        states = torch.ones(width, model.hidden_size, dtype=model.dtype, device=model.device)
        yield "target tokens", length, lambda scope=scope, states=states: list(scope.logits(states, range(width)))
    sweep = sweep_of(model, 1)
    endless = pscope.LanguageModel(model.hf, model.tokenizer, model.name)
    # No token ends a row, so that all go on.
    endless.__dict__["end_tokens"] = frozenset()
    scope = pscope.Patchscope(endless, sweep.target, memory=MEMORY, path="staircase")
    for tokens in (2, 4) if quick else (5, 10, 20):
        decoding = pscope.Decoding(tokens)
        yield "new tokens", tokens, lambda decoding=decoding: scope.generate(sweep.states, sweep.layers, decoding)
    for layers in (2, 4) if quick else (4, 8, 16, 32):
        yield "layers", layers, _sweeping(_deep_llama(layers, model), 8)


def growth(model: pscope.LanguageModel, quick: bool = False) -> pd.DataFrame:
    """One row per case: `quantity`, `value`, `seconds` (after a first run), `peak` (bytes beside the weights).

    Measured in a process of its own, whose allocator gives back at once what it no longer needs.
    """
    loaded = [model.name, str(model.dtype).removeprefix("torch."), str(model.device)]
    command = [sys.executable, "-m", "benchmarks.memory", *loaded, *(["--quick"] if quick else [])]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    told = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    return pd.DataFrame(json.loads(told.splitlines()[-1]))


def exponents(table: pd.DataFrame) -> pd.DataFrame:
    """The powers of each quantity that time and memory grow with: slopes of straight lines through the logarithms."""
    slopes = [
        {
            "quantity": quantity,
            "values": " ".join(map(str, rows["value"])),
            **{
                measure: np.polyfit(np.log(rows["value"]), np.log(rows[measure]), 1)[0]
                for measure in ("seconds", "peak")
            },
        }
        for quantity, rows in table.groupby("quantity", sort=False)
    ]
    return pd.DataFrame(slopes)


def whole_figure(model: pscope.LanguageModel, samples: int, seconds: float) -> pd.DataFrame:
    """`fig2` without its fit (logit lens, token identity; all layers) against plain passes over the same texts."""
    texts = shipped_texts()
    sampled = draw_positions(model, texts, samples, seed=0)
    lenses = [Lens(LOGIT_LENS), Lens(TOKEN_IDENTITY, model.prompt(pscope.TOKEN_IDENTITY))]
    experiment = NextToken(model, lenses, texts, sampled, range(model.n_layers + 1))
    whole = [model.prompt(texts[item.text]) for item in sampled]

    def forward() -> None:
        for batch in length_batches([len(prompt) for prompt in whole], 1024):
            ids = torch.zeros(len(batch), max(len(whole[index]) for index in batch), dtype=torch.long)
            for row, index in enumerate(batch):
                ids[row, : len(whole[index])] = torch.tensor(whole[index].ids)
            model.next_token_logits(ids.to(model.device))

    contestants = {
        "forward passes": Contestant(forward),
        "fig2": Contestant(experiment.table),
    }
    for contestant in contestants.values():
        contestant.run()
    return against(in_turn(contestants, seconds), "forward passes")


def _sweeping(model: pscope.LanguageModel, samples: int) -> Callable[[], object]:
    scope = pscope.Patchscope(model, model.prompt(pscope.TOKEN_IDENTITY), memory=MEMORY, path="staircase")
    layers = [*range(model.n_layers + 1)] * samples
    states = torch.randn(len(layers), model.hidden_size).to(model.device, model.dtype)

    def run() -> None:
        for _ in scope.logits(states, layers):
            pass

    return run


def _deep_llama(layers: int, like: pscope.LanguageModel) -> pscope.LanguageModel:
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=layers,
        num_attention_heads=4,
        vocab_size=len(like.tokenizer),
    )
    hf = LlamaForCausalLM(config).to(device=like.device, dtype=like.dtype).eval()
    return pscope.LanguageModel(hf, like.tokenizer, f"random Llama of {layers} layers")
