"""A Patchscope: hidden states patched into a target prompt, and what the model makes of them there.

This is the paper's (S, i, M, ℓ) → f → (T, i*, M*, ℓ*) with the target half fixed: the model M*, the prompt T and its
marked position i*. Each row brings its state, f(h), and its target layer ℓ*.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pscope.errors import PscopeError
from pscope.generate import GREEDY, Decoding, Rows, continue_rows
from pscope.models import LanguageModel
from pscope.plain import PlainPath
from pscope.prompts import Prompt
from pscope.residual import check_layer
from pscope.selfcheck import SelfCheck, choose_path
from pscope.staircase import Staircase

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
    with passes over the whole patched prompt; otherwise on the plain path. `path` overrides the check. As many rows
    share a pass as fit in about `memory` bytes beside the model.

    Raises PscopeError if `memory` is not positive.
    """

    def __init__(
        self,
        model: LanguageModel,
        target: Prompt,
        *,
        memory: int = MEMORY,
        path: Literal["auto", "staircase", "plain"] = "auto",
    ) -> None:
        if memory <= 0:
            raise PscopeError(f"the memory budget is {memory} bytes; it must be positive")
        self.model, self.target, self.memory = model, target, memory
        if path == "auto":
            self._path, self.check = choose_path(model, target)
        else:
            self._path = {"staircase": Staircase, "plain": PlainPath}[path](model, target)
            self.check = SelfCheck(path, "asked for, not checked")

    def logits(self, states: Tensor, target_layers: Sequence[int] | int) -> Iterator[Logits]:
        """Patch each of `states`, (rows, hidden), into the target at its layer; yield the logits that follow.

        `target_layers` has one layer of 0..L for each row, or is one layer for all. The rows come in the order given,
        in chunks, so that any number takes no more memory than the budget.
        """
        passes = self._passes(states, self._checked(states, target_layers), new_tokens=0)
        return (Logits(chunk, rows.logits[1:][order.argsort()], rows.logits[0]) for chunk, rows, order in passes)

    def generate(
        self, states: Tensor, target_layers: Sequence[int] | int, decoding: Decoding = GREEDY
    ) -> Continuations:
        """Patch each of `states`, (rows, hidden), into the target at its layer, and let the model go on from there.

        Rows that have ended leave the batch. Sampled tokens depend on the seed and the row's index, not on which rows
        share its pass.
        """
        self.model.check_window(len(self.target) + decoding.new_tokens)
        layers = self._checked(states, target_layers)
        patched: list[list[int]] = []
        clean: list[int] = []
        draws = decoding.draws(len(states) + 1)
        for chunk, rows, order in self._passes(states, layers, decoding.new_tokens):
            in_climbing_order = torch.cat([draws[:1], draws[1:][chunk][order]])
            clean, *spoken = continue_rows(rows, decoding, in_climbing_order, self.model.end_tokens)
            patched += [spoken[place] for place in order.argsort().tolist()]
        return Continuations(patched, clean)

    def rows_per_pass(self, new_tokens: int = 0) -> int:
        """How many rows fit in the memory budget at once; at least one."""
        return max(1, self.memory // self._path.row_bytes(new_tokens))

    def _checked(self, states: Tensor, target_layers: Sequence[int] | int) -> list[int]:
        """The target layer of every row, once states and layers are known to fit the model."""
        if states.ndim != 2 or states.shape[1] != self.model.hidden_size:
            raise PscopeError(
                f"states of shape {tuple(states.shape)} do not fit {self.model.name}, "
                f"whose residual stream takes (rows, {self.model.hidden_size})"
            )
        if len(states) == 0:
            raise PscopeError("there is no state to patch")
        layers = [target_layers] * len(states) if isinstance(target_layers, int) else list(target_layers)
        if len(layers) != len(states):
            raise PscopeError(f"{len(states)} states came with {len(layers)} target layers; each state has one")
        for layer in set(layers):
            check_layer(self.model, layer)
        return layers

    def _passes(self, states: Tensor, layers: list[int], new_tokens: int) -> Iterator[tuple[slice, Rows, Tensor]]:
        """Chunk, rows in ascending order of layer with the clean one first, and the order they were brought in."""
        at_once = self.rows_per_pass(new_tokens)
        for start in range(0, len(states), at_once):
            chunk = slice(start, min(start + at_once, len(states)))
            chunk_layers = torch.tensor(layers[chunk])
            order = chunk_layers.argsort(stable=True)
            rows = self._path.start(states[chunk][order.to(states.device)], chunk_layers[order], new_tokens)
            yield chunk, rows, order
