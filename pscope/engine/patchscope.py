"""A Patchscope: hidden states patched into a target prompt, and what the model makes of them there.

This is the paper's (S, i, M, ℓ) → f → (T, i*, M*, ℓ*) with the target half fixed: the model M*, the prompt T and its
marked position i*. Each row brings its state, f(h), and its target layer ℓ*.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pscope.engine.generate import GREEDY, Decoding, Settled, check_finite, continue_rows
from pscope.engine.plain import PlainPath
from pscope.engine.selfcheck import PATHS, PathName, SelfCheck, choose_path
from pscope.engine.staircase import Staircase
from pscope.errors import PromptError, PscopeError, RowError
from pscope.models.model import LanguageModel
from pscope.models.prompts import Prompt
from pscope.models.residual import check_layer, others_intervene

MEMORY = 2**30
"""The default budget for the rows of one pass, in bytes."""


class Logits(NamedTuple):
    """The logits after the target prompt, for some of the rows that were asked for."""

    rows: slice
    patched: Tensor
    """(rows, vocab)"""
    clean: Tensor
    """(vocab,): the target prompt unpatched, the control."""


class Continuations(NamedTuple):
    """New token ids after the target prompt, each list up to and with the token that ended it."""

    patched: list[list[int]]
    clean: list[int]


class Patchscope:
    """Patches states into `target` at its marked position, for any number of (state, target layer) rows.

    Rows run on the staircase, many layers in one pass, if a self-check on this model and prompt finds that it agrees
    with passes over the whole patched prompt; otherwise on the plain path, with the model's own cache if that agrees
    too, else without. `path` overrides the check. As many rows share a pass as fit in about `memory` bytes beside the
    model.

    Weights may change between calls, and calls may stand within blocks of `editing`: what is shared by rows is made in
    every pass. While others have hooks on the model that may have to see whole prompts (`residual.others_intervene`),
    rows are run as whole prompts for every token, unless `path` says otherwise. Threads that share a model take turns.

    Raises PscopeError if `memory` is not positive, or for a `path` that there is none of.
    """

    def __init__(
        self,
        model: LanguageModel,
        target: Prompt,
        *,
        memory: int = MEMORY,
        path: PathName | Literal["auto"] = "auto",
    ) -> None:
        if memory <= 0:
            raise PscopeError(f"the memory budget is {memory} bytes; it must be positive")
        if not isinstance(target, Prompt):
            raise PromptError(f"a Patchscope has a prompt as its target, not {target!r}; make one with model.prompt")
        if path not in ("auto", *PATHS):
            raise PscopeError(f"there is no path {path!r}; one of auto, {', '.join(PATHS)}")
        self.model, self.target, self.memory = model, target, memory
        self._chosen: tuple[Staircase | PlainPath, SelfCheck] | None = None
        self._whole_prompts = PATHS["uncached"](model, target) if path == "auto" else None
        if path != "auto":
            self._chosen = PATHS[path](model, target), SelfCheck(path, "asked for, not checked")
        self._now()

    def __repr__(self) -> str:
        return f"Patchscope({self.model!r}, {self.target!r}, {self.check.path} path)"

    def logits(self, states: Tensor, target_layers: Sequence[int] | int) -> Iterator[Logits]:
        """Patch `states`, (rows, hidden), into the target, each row at its layer; yield the logits that follow.

        Where the target marks several positions, a state goes to all of them, or, given as (rows, positions, hidden),
        each has its own.

        `target_layers` has one layer of 0..L for each row, or is one layer for all. The rows come in the order given,
        in chunks, so that any number takes no more memory than the budget. Raises RowError if those of a row are not
        finite.
        """
        states, layers = self._checked(states, target_layers)
        return (self._read(path, part, states[part], layers[part]) for path, part in self._passes(len(states)))

    def generate(
        self,
        states: Tensor,
        target_layers: Sequence[int] | int,
        decoding: Decoding = GREEDY,
        settled: Settled | None = None,
    ) -> Continuations:
        """Patch each of `states`, (rows, hidden), into the target at its layer, and let the model go on from there.

        Rows that have ended leave the batch, and those of which `settled(row, text)` says that they need not go on (the
        clean row is never asked). Sampled tokens depend on the seed and the row's index, not on which rows
        share its pass. Raises RowError if the logits of a row are not finite.
        """
        self.model.check_window(len(self.target) + decoding.new_tokens)
        states, layers = self._checked(states, target_layers)
        draws = decoding.draws(len(states) + 1)
        spoken = [
            self._speak(
                path, part, states[part], layers[part], decoding, torch.cat([draws[:1], draws[1:][part]]), settled
            )
            for path, part in self._passes(len(states), decoding)
        ]
        return Continuations([row for part in spoken for row in part.patched], spoken[0].clean)

    def rows_per_pass(self, new_tokens: int = 0) -> int:
        """How many rows fit in the memory budget at once; at least one."""
        return max(1, self.memory // self._now()[0].row_bytes(new_tokens))

    @property
    def check(self) -> SelfCheck:
        """What the self-check found, or, while there was no moment for it, why whole prompts are run."""
        return self._now()[1] if self._chosen is None else self._chosen[1]

    @property
    def path(self) -> PathName:
        """The path that a call would take now."""
        return self._now()[1].path

    def _now(self) -> tuple[Staircase | PlainPath, SelfCheck]:
        """The path for the hooks that stand on the model now. Without any of others, the first call chooses it."""
        if self._whole_prompts is not None and others_intervene(self.model):
            return self._whole_prompts, SelfCheck("uncached", "hooks of others may have to see whole prompts")
        if self._chosen is None:
            self._chosen = choose_path(self.model, self.target)
        return self._chosen

    def _checked(self, states: Tensor, target_layers: Sequence[int] | int) -> tuple[Tensor, list[int]]:
        """States (rows, positions, hidden) and the target layer of every row, once they are known to fit the model."""
        positions, hidden = len(self.target.positions), self.model.hidden_size
        if states.shape[1:] not in [(hidden,), (positions, hidden)]:
            raise PscopeError(
                f"states of shape {tuple(states.shape)} do not fit {self.model.name} at {positions} position(s), which "
                f"take (rows, {hidden}) or (rows, {positions}, {hidden}); map those of another width to {hidden} first"
            )
        if not states.is_floating_point():
            raise PscopeError(f"states of {states.dtype} are no hidden states; give real floating-point numbers")
        if len(states) == 0:
            raise PscopeError("there is no state to patch")
        layers = [target_layers] * len(states) if isinstance(target_layers, int) else list(target_layers)
        if len(layers) != len(states):
            raise PscopeError(f"{len(states)} states came with {len(layers)} target layers; each state has one")
        for layer in set(layers):
            check_layer(self.model, layer)
        if states.ndim == 2:
            states = states[:, None].expand(-1, positions, -1)
        return states, layers

    def _passes(self, rows: int, decoding: Decoding | None = None) -> Iterator[tuple[Staircase | PlainPath, slice]]:
        """The parts of so many rows that share a pass, each with the path for what stands on the model by then."""
        start = 0
        while start < rows:
            path, _ = self._now()
            row_bytes = path.row_bytes(0 if decoding is None else decoding.new_tokens)
            if decoding is not None:
                row_bytes += decoding.choosing_bytes(self.model.config.vocab_size)
            part = slice(start, min(start + max(1, self.memory // row_bytes), rows))
            yield path, part
            start = part.stop

    def _read(self, path: Staircase | PlainPath, part: slice, states: Tensor, layers: list[int]) -> Logits:
        rows = path.start(states, torch.tensor(layers))
        check_finite(rows.logits, _numbers(part))
        # A view of the clean row would keep the logits of all rows.
        return Logits(part, rows.logits[1:], rows.logits[0].clone())

    def _speak(
        self,
        path: Staircase | PlainPath,
        part: slice,
        states: Tensor,
        layers: list[int],
        decoding: Decoding,
        draws: Tensor,
        settled: Settled | None,
    ) -> Continuations:
        rows = path.start(states, torch.tensor(layers), decoding.new_tokens)
        numbers = _numbers(part).tolist()

        def settled_here(row: int, text: str) -> bool:
            return row > 0 and settled(numbers[row], text)

        ends = decoding.ends(self.model.end_tokens, self.model.tokenizer, None if settled is None else settled_here)
        try:
            clean, *spoken = continue_rows(rows, decoding, draws, ends)
        except RowError as error:
            raise RowError(numbers[error.row], error.reason) from error
        return Continuations(spoken, clean)


def _numbers(part: slice) -> Tensor:
    """The numbers of the rows of a pass, the clean one (-1) first, among all the rows that were given."""
    return torch.tensor([-1, *range(part.start, part.stop)])
