"""The layer sweep: N source states of every layer, patched into one target prompt at the same layer.

Contestants get the same states. What takes long per row answers for fewer of them, always the first ones, and times
are per row. Answers are compared before anything is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor

import pscope
from benchmarks.hooked import Hooked
from benchmarks.peers import PEERS, installed
from benchmarks.timing import Contestant, against, in_turn
from pscope.texts import shipped_texts

BATCH = 128
STAIRCASE = "staircase"
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

    def first(self, samples: int) -> tuple[Tensor, list[int]]:
        """The rows of the first samples."""
        rows = samples * (self.model.n_layers + 1)
        return self.states[:rows], self.layers[:rows]


def sweep_of(model: pscope.LanguageModel, samples: int) -> Sweep:
    """Texts that ship with pscope, read at their last token, for the token-identity prompt."""
    texts = shipped_texts()
    sources = [model.prompt(text) for text in texts[:: max(1, len(texts) // samples)][:samples]]
    states = pscope.capture(model, sources)  # (samples, layers, hidden)
    layers = [*range(model.n_layers + 1)] * len(sources)
    return Sweep(model, model.prompt(pscope.TOKEN_IDENTITY), sources, states.flatten(0, 1), layers)


def logits_compared(sweep: Sweep, batched: int, one_by_one: int, seconds: float) -> pd.DataFrame:
    """Logits of every row; batched contestants answer for `batched` samples, row by row ones for `one_by_one`.

    One row per contestant: `seconds` per row, `ratio` to the staircase with its band, `rows`, the largest difference
    to the staircase's logits and how many argmaxes are equal. A peer that is not installed has no numbers. Raises
    AssertionError, before anything is timed, if a contestant's answers are not the staircase's.
    """
    staircase, plain = (pscope.Patchscope(sweep.model, sweep.target, path=path) for path in (STAIRCASE, "plain"))
    contestants: dict[str, tuple[Callable, int]] = {
        STAIRCASE: (_of(staircase), len(sweep.sources)),
        "plain path": (_of(plain), batched),
        f"hooks, batches of {BATCH}": (Hooked(sweep.model, sweep.target, BATCH).logits, batched),
        "hooks, one row": (Hooked(sweep.model, sweep.target, 1).logits, one_by_one),
    }
    for name, peer in PEERS.items():
        if installed(name):
            contestants[f"{name}, one row"] = (torch.no_grad()(peer(sweep.model, sweep.target)), one_by_one)
    expected = _of(staircase)(sweep.states, sweep.layers)
    agreement = []
    for name, (run, samples) in contestants.items():
        got = run(*sweep.first(samples))
        difference = (got - expected[: len(got)]).abs().max().item()
        equal = int((got.argmax(dim=-1) == expected[: len(got)].argmax(dim=-1)).sum())
        assert difference < TOLERANCE[sweep.model.dtype], f"{name} is {difference:.1e} from the staircase"
        assert equal == len(got) or sweep.model.dtype != torch.float32, f"{name}: {len(got) - equal} argmaxes differ"
        agreement.append({"contestant": name, "rows": len(got), "difference": difference, "equal": equal})
    times = in_turn(
        {
            name: Contestant(lambda run=run, samples=samples: run(*sweep.first(samples)), row["rows"])
            for (name, (run, samples)), row in zip(contestants.items(), agreement, strict=True)
        },
        seconds,
    )
    absent = [{"contestant": f"{name}, one row"} for name in PEERS if not installed(name)]
    return pd.concat([against(times, STAIRCASE).merge(pd.DataFrame(agreement)), pd.DataFrame(absent)])


def continuations_compared(
    sweep: Sweep, new_tokens: int, samples: int, one_by_one: int, seconds: float
) -> pd.DataFrame:
    """Continuations of the rows of `samples` samples, as `logits_compared`; `one_by_one` is a number of rows here.

    In fp32 all contestants must say the same, token for token.
    """
    staircase, plain = (pscope.Patchscope(sweep.model, sweep.target, path=path) for path in (STAIRCASE, "plain"))
    decoding = pscope.Decoding(new_tokens)
    some = len(sweep.first(samples)[0])
    contestants = {
        STAIRCASE: (lambda *rows: staircase.generate(*rows, decoding).patched, some),
        "plain path": (lambda *rows: plain.generate(*rows, decoding).patched, some),
        f"hooks and generate, batches of {BATCH}": (
            lambda *rows: Hooked(sweep.model, sweep.target, BATCH).generate(*rows, new_tokens),
            some,
        ),
        "hooks and generate, one row": (
            lambda *rows: Hooked(sweep.model, sweep.target, 1).generate(*rows, new_tokens),
            one_by_one,
        ),
    }
    expected = contestants[STAIRCASE][0](sweep.states[:some], sweep.layers[:some])
    agreement = []
    for name, (run, rows) in contestants.items():
        got = run(sweep.states[:rows], sweep.layers[:rows])
        equal = sum(ours == theirs for ours, theirs in zip(got, expected[:rows], strict=True))
        assert equal == rows or sweep.model.dtype != torch.float32, f"{name}: {rows - equal} rows say something else"
        agreement.append({"contestant": name, "rows": rows, "equal": equal})
    times = in_turn(
        {
            name: Contestant(lambda run=run, rows=rows: run(sweep.states[:rows], sweep.layers[:rows]), rows)
            for name, (run, rows) in contestants.items()
        },
        seconds,
    )
    return against(times, STAIRCASE).merge(pd.DataFrame(agreement))


def _of(scope: pscope.Patchscope) -> Callable[[Tensor, list[int]], Tensor]:
    return lambda states, layers: torch.cat([part.patched for part in scope.logits(states, layers)])
