"""Let rows speak: continue them token by token, from whatever keeps their past."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pscope.errors import PscopeError


@dataclass(frozen=True)
class Decoding:
    """How rows are continued: at most `new_tokens`, greedily, or sampled at a `temperature` above 0 with a `seed`.

    What a checkpoint's generation settings say about sampling is not looked at.
    """

    new_tokens: int = 20
    temperature: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.new_tokens < 1:
            raise PscopeError(f"new_tokens is {self.new_tokens}; at least 1 is needed")
        if self.temperature < 0:
            raise PscopeError(f"temperature is {self.temperature}; 0 is greedy, above 0 samples")

    def draws(self, rows: int) -> Tensor:
        """One number in [0, 1) for every row and step, (rows, new_tokens): a row's do not depend on its batch."""
        generator = torch.Generator().manual_seed(self.seed)
        return torch.rand(rows, self.new_tokens, generator=generator, dtype=torch.float64)

    def choose(self, logits: Tensor, draws: Tensor) -> Tensor:
        """The next token of each row, (rows,), from its logits (rows, vocab) and its draw of this step (rows,)."""
        if self.temperature == 0:
            return logits.argmax(dim=-1)
        # On the CPU, so that every device draws the same tokens, those without float64 too.
        cumulative = (logits.cpu().double() / self.temperature).softmax(dim=-1).cumsum(dim=-1)
        # The sum is 1 but for rounding; the largest draw must still fall inside.
        chosen = torch.searchsorted(cumulative, draws[:, None] * cumulative[:, -1:], right=True).squeeze(1)
        return chosen.clamp(max=logits.shape[1] - 1).to(logits.device)


GREEDY = Decoding()


class Rows(Protocol):
    """Patched rows after their prompt, able to go on. `logits` (rows, vocab) are those after the last token."""

    logits: Tensor

    def step(self, tokens: Tensor) -> None:
        """Append one token to every row, (rows,), and renew `logits`."""

    def keep(self, kept: Tensor) -> None:
        """Leave only the rows whose indices are in `kept`."""


@torch.no_grad()
def continue_rows(rows: Rows, decoding: Decoding, draws: Tensor, end_tokens: frozenset[int]) -> list[list[int]]:
    """Each row's new token ids, up to and with the first end token. Rows that have ended leave the batch."""
    spoken: list[list[int]] = [[] for _ in range(rows.logits.shape[0])]
    live = torch.arange(len(spoken))
    for step in range(decoding.new_tokens):
        chosen = decoding.choose(rows.logits, draws[live, step])
        for row, token in zip(live.tolist(), chosen.tolist(), strict=True):
            spoken[row].append(token)
        goes_on = torch.tensor([token not in end_tokens for token in chosen.tolist()])
        if step + 1 == decoding.new_tokens or not goes_on.any():
            break
        if not goes_on.all():
            live = live[goes_on]
            kept = goes_on.nonzero().squeeze(1).to(chosen.device)
            chosen = chosen[kept]
            rows.keep(kept)
        rows.step(chosen)
    return spoken
