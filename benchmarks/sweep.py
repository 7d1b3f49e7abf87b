"""The layer sweep: N source states of every layer, patched into one target prompt at the same layer.

Contestants get the same states. What takes long per row answers for fewer of them, always the first ones, and is timed
on fewer still; times are per row. Answers are compared before anything is timed.
"""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor

import pscope
from benchmarks.hooked import Hooked
from benchmarks.peers import PEERS, Answer, installed
from benchmarks.timing import Contestant, against, in_turn
from pscope.inputs.texts import shipped_texts

BATCH = 128
STAIRCASE = "staircase"
TIMED_ONE_BY_ONE = 10
"""So many rows stand for all where each has a pass of its own: those take the same time at every layer."""
TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.3, torch.bfloat16: 3.0}
"""The largest difference between two logits that still counts as the same answer."""


@dataclass(frozen=True)
class Sweep:
    """The rows that all contestants patch: `states` (samples × layers, hidden), each at its own layer."""

    model: pscope.LanguageModel
    target: pscope.Prompt
    sources: list[pscope.Prompt]
    states: Tensor
    layers: list[int]

    def first(self, rows: int) -> tuple[Tensor, list[int]]:
        """The first rows: those of a sample have its layers in order."""
        return self.states[:rows], self.layers[:rows]


def sweep_of(model: pscope.LanguageModel, samples: int) -> Sweep:
    """Texts that ship with pscope, read at their last token, for the token-identity prompt."""
    texts = shipped_texts()
    sources = [model.prompt(text) for text in texts[:: max(1, len(texts) // samples)][:samples]]
    states = pscope.capture(model, sources)  # (samples, layers, hidden)
    layers = [*range(model.n_layers + 1)] * len(sources)
    return Sweep(model, model.prompt(pscope.TOKEN_IDENTITY), sources, states.flatten(0, 1), layers)


def logits_compared(sweep: Sweep, samples: int, seconds: float) -> pd.DataFrame:
    """Logits of every row; batched contestants answer for those of `samples` samples, row by row ones for one.

    One row per contestant: `seconds` per row, `ratio` to the staircase with its band, `rows`, the largest difference
    to the staircase's logits and how many argmaxes are equal. A peer that is not installed has no numbers. Raises
    AssertionError, before anything is timed, if a contestant's answers are not the staircase's.
    """
    staircase, plain = (pscope.Patchscope(sweep.model, sweep.target, path=path) for path in (STAIRCASE, "plain"))
    one_by_one = sweep.model.n_layers + 1
    batched = samples * one_by_one
    contestants: dict[str, tuple[Answer, int]] = {
        STAIRCASE: (_of(staircase), len(sweep.layers)),
        "plain path": (_of(plain), batched),
        f"hooks, batches of {BATCH}": (Hooked(sweep.model, sweep.target, BATCH).logits, batched),
        "hooks, one row": (Hooked(sweep.model, sweep.target, 1).logits, one_by_one),
    }
    for name, peer in PEERS.items():
        if installed(name):
            contestants[f"{name}, one row"] = (torch.no_grad()(peer(sweep.model, sweep.target)), one_by_one)
    expected = torch.cat(_of(staircase)(sweep.states, sweep.layers))
    agreement = []
    for name, (run, rows) in contestants.items():
        got = torch.cat(run(*sweep.first(rows)))
        difference = (got - expected[:rows]).abs().max().item()
        equal = int((got.argmax(dim=-1) == expected[:rows].argmax(dim=-1)).sum())
        assert difference < TOLERANCE[sweep.model.dtype], f"{name} is {difference:.1e} from the staircase"
        assert equal == rows or sweep.model.dtype != torch.float32, f"{name}: {rows - equal} argmaxes differ"
        agreement.append({"contestant": name, "rows": rows, "difference": difference, "equal": equal})
    absent = [{"contestant": f"{name}, one row"} for name in PEERS if not installed(name)]
    return pd.concat([_timed(sweep, contestants, seconds).merge(pd.DataFrame(agreement)), pd.DataFrame(absent)])


def continuations_compared(sweep: Sweep, new_tokens: int, samples: int, seconds: float) -> pd.DataFrame:
    """Continuations of the rows of `samples` samples, as `logits_compared`; of a few rows where they go one by one.

    In fp32 all contestants must say the same, token for token.
    """
    staircase, plain = (pscope.Patchscope(sweep.model, sweep.target, path=path) for path in (STAIRCASE, "plain"))
    decoding = pscope.Decoding(new_tokens)
    batched = samples * (sweep.model.n_layers + 1)
    contestants: dict[str, tuple[Answer, int]] = {
        STAIRCASE: (lambda *rows: staircase.generate(*rows, decoding).patched, batched),
        "plain path": (lambda *rows: plain.generate(*rows, decoding).patched, batched),
        f"hooks and generate, batches of {BATCH}": (
            lambda *rows: Hooked(sweep.model, sweep.target, BATCH).generate(*rows, new_tokens),
            batched,
        ),
        "hooks and generate, one row": (
            lambda *rows: Hooked(sweep.model, sweep.target, 1).generate(*rows, new_tokens),
            3,
        ),
    }
    expected = contestants[STAIRCASE][0](*sweep.first(batched))
    agreement = []
    for name, (run, rows) in contestants.items():
        got = run(*sweep.first(rows))
        equal = sum(ours == theirs for ours, theirs in zip(got, expected[:rows], strict=True))
        assert equal == rows or sweep.model.dtype != torch.float32, f"{name}: {rows - equal} rows say something else"
        agreement.append({"contestant": name, "rows": rows, "equal": equal})
    return _timed(sweep, contestants, seconds).merge(pd.DataFrame(agreement))


def _timed(sweep: Sweep, contestants: dict[str, tuple[Answer, int]], seconds: float) -> pd.DataFrame:
    timed = {}
    for name, (run, rows) in contestants.items():
        rows = min(rows, TIMED_ONE_BY_ONE) if name.endswith("one row") else rows
        timed[name] = Contestant(lambda run=run, rows=rows: run(*sweep.first(rows)), rows)
    return against(in_turn(timed, seconds), STAIRCASE)


def _of(scope: pscope.Patchscope) -> Answer:
    return lambda states, layers: [part.patched for part in scope.logits(states, layers)]
