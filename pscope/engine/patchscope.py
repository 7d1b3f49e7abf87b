"""A Patchscope: hidden states patched into a target prompt, and what the model makes of them there.

This is the paper's (S, i, M, ℓ) → f → (T, i*, M*, ℓ*) with the target half fixed: the model M*, the prompt T and its
marked position i*. Each row brings its state, f(h), and its target layer ℓ*.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import replace
from functools import partial
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from pscope.arguments import as_int, as_list, as_python, as_vectors, check_name, check_numbers, excerpt, is_int
from pscope.engine.generate import (
    GREEDY,
    Continuations,
    Decoding,
    Rows,
    Settled,
    check_decoding,
    check_finite,
    renumbered,
)
from pscope.engine.plain import PlainPath
from pscope.engine.queue import Queue
from pscope.engine.relevance import relevance_of
from pscope.engine.scores import MEASURES, Choices, Measure, Scores, Tokens, choose_rows, score_rows
from pscope.engine.selfcheck import PATHS, PathName, SelfCheck, choose_path
from pscope.engine.staircase import Staircase
from pscope.engine.writes import NOWHERE, Writes, over_clean, spread_over
from pscope.errors import PromptError, PscopeError, RowError
from pscope.models.internals.configs import attention
from pscope.models.model import LanguageModel, as_prompt
from pscope.models.prompts import Prompt, candidate_tokens, continuing_tokens
from pscope.models.residual import as_layers, capture, others_intervene
from pscope.models.states import States

T = TypeVar("T")

MEMORY = 2**30
"""The default budget for the rows of one pass, in bytes."""

Patch = States | Tensor | Writes
"""What rows are patched with: a state each, (rows, hidden), or, where the target marks several positions, one for each
of them, (rows, positions, hidden); or writes, which say themselves where they go.
"""

TargetLayers = Sequence[int] | int | None
"""The layer of each row, or of all; none for writes."""


class Logits(NamedTuple):
    """The logits after the target prompt, for some of the rows that were asked for."""

    rows: slice
    patched: Tensor
    """(rows, vocab)"""
    clean: Tensor
    """(vocab,): the target prompt unpatched, the control."""


class Patchscope:
    """Patches states into `target` at its marked position, for any number of (state, target layer) rows.

    Rows run on the staircase, many layers in one pass, if a self-check on this model and prompt finds that it agrees
    with passes over the whole patched prompt; otherwise on the plain path, with the model's own cache if that agrees
    too, else without. `path` overrides the check, or is one that was made of the same model and a prompt alike. As many
    rows share a pass as fit in about `memory` bytes beside the model.

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
        path: PathName | SelfCheck | Literal["auto"] = "auto",
    ) -> None:
        self.model, self.target = model, as_prompt(model, target)
        self.memory = as_int(memory, "the memory in bytes")
        if not isinstance(path, SelfCheck):
            check_name(path, ("auto", *PATHS), "path")
            path = path if path == "auto" else SelfCheck(path, "asked for, not checked")
        self._override = None if path == "auto" else path
        self._checks: dict[int, SelfCheck] = {}
        self._paths: dict[tuple[PathName, Tokens], Staircase | PlainPath] = {}
        self._attention = attention(model.hf.config)
        self._now()

    def __repr__(self) -> str:
        return f"Patchscope({self.model!r}, {self.target!r}, {self.check.path} path)"

    def writes(
        self,
        states: States | Tensor,
        target_layers: Sequence[int] | int,
        *,
        hold: Sequence[int] = (),
        scale: float | Sequence[float] = 1.0,
        norm: bool = False,
        add: bool = False,
    ) -> Writes:
        """What a row writes for each of `states`, (rows, hidden) or (rows, positions, hidden), at its layer.

        It writes in all layers of `hold` too, so that the target's own states there are not seen beside the patch (the
        paper's appendix D.3). With `norm` a vector is first given the length of the clean target's state in
        its place; then it is scaled, by one number or by one for each row; with `add` it is added to that state, which
        with a `scale` of 0 makes the clean row.
        """
        states, layers = self._as_rows(states, target_layers)
        hold = as_layers(self.model, () if hold is None else hold, least=0)
        row_layers = [[layer, *(NOWHERE if other == layer else other for other in hold)] for layer in layers.tolist()]
        writes = spread_over(states, torch.tensor(row_layers), self.target.positions)
        try:
            scales = torch.as_tensor(scale, dtype=states.dtype, device=states.device).reshape(-1, 1, 1)
        except (TypeError, ValueError, RuntimeError) as error:
            raise PscopeError(f"scale is {excerpt(scale)}; give a number, or a list of one for each state") from error
        if len(scales) not in (1, len(states)):
            raise PscopeError(f"{len(states)} states came with {len(scales)} scales; give one for all, or for each")
        if not (norm or add):
            return replace(writes, vectors=scales * writes.vectors)
        return replace(writes, vectors=over_clean(writes.vectors, self._clean(writes), scales, norm=norm, add=add))

    def logits(self, states: Patch, target_layers: TargetLayers = None) -> Iterator[Logits]:
        """Patch `states`, (rows, hidden), into the target, each row at its layer; yield the logits that follow.

        Where the target marks several positions, a state goes to all of them, or, given as (rows, positions, hidden),
        each has its own. They may be of any device and floating-point type.

        `target_layers` has one layer of 0..L for each row, or is one layer for all. Instead of states, rows may come
        as `Writes`, in several layers or otherwise than by replacing, which are made by `writes`. The rows come in the
        order given, in chunks, so that any number takes no more memory than the budget. Raises RowError if those of a
        row are not finite.
        """
        writes = self._as_writes(states, target_layers)
        chunks = self._read(writes, torch.arange(len(writes)), (), 1, _patched_and_clean)
        return (Logits(slice(int(rows[0]), int(rows[-1]) + 1), *each) for rows, each in chunks)

    def generate(
        self,
        states: Patch,
        target_layers: TargetLayers = None,
        decoding: Decoding = GREEDY,
        settled: Settled | None = None,
    ) -> Continuations:
        """Patch each of `states`, as `logits` takes them, into the target, and let the model go on from there.

        What is patched is the target: tokens that are said after it are the model's own, nothing is written over them.
        Rows that have ended leave the batch, and those of which `settled(row, text)` says that they need not go on (the
        clean row is never asked); the last ones of a pass wait for those of the next. Sampled tokens depend on the seed
        and the row's index, not on which rows share its pass. Raises RowError if the logits of a row are not finite.
        """
        check_decoding(decoding, self.model, self.target, settled)
        writes = self._as_writes(states, target_layers)
        # The clean row, which has no number of its own, comes first.
        numbers = [-1, *range(len(writes))]
        ends = decoding.ends(self.model.end_tokens, self.model.tokenizer, renumbered(settled, numbers))
        queue, start = Queue(decoding, decoding.draws(len(numbers)), ends), 0
        try:
            while start < len(writes):
                path, most = self._now()[0], self.rows_speaking(decoding)
                part = range(start, min(start + max(1, most - queue.waiting), len(writes)))
                start = part.stop
                following = len(self.target) if start < len(writes) else None
                if not isinstance(path, Staircase):
                    # Its caches may hold more than the keys and values of each token: nobody waits to join them.
                    queue.finish()
                    following = None
                queue.take(
                    # Under no name, so that they are gone before the next ones are made.
                    path.start(writes[part.start : part.stop], decoding.new_tokens),
                    [0, *(1 + row for row in part)],
                    len(self.target),
                    most,
                    following,
                )
            said = queue.finish()
        except RowError as error:
            raise RowError(numbers[error.row], error.reason) from error
        clean, *patched = (said[number] for number in range(len(numbers)))
        return Continuations(patched, clean, partial(decoding.text, tokenizer=self.model.tokenizer))

    def start(self, states: Tensor, target_layers: Sequence[int], decoding: Decoding) -> Rows:
        """The patched rows, after the clean one, ready to go on: what `generate` continues, in one pass.

        As many are given as fit in the memory budget (`rows_speaking`).
        """
        check_decoding(decoding, self.model, self.target)
        return self._now()[0].start(self.writes(states, target_layers), decoding.new_tokens)

    def score(
        self,
        states: Patch,
        target_layers: TargetLayers,
        continuation: str | Sequence[str | Tokens],
        *,
        ranks: bool = False,
    ) -> Scores:
        """How probable a given continuation is after the target, where each of `states` is patched in.

        States are as `logits` takes them. The continuation is one text for all rows, or one for each, and begins with
        a blank where a word follows the target; or the tokens that a row has said, as `generate` gives them. Rows of
        one continuation share passes over target and continuation. With `ranks` also the place of each
        token among the vocabulary. Raises PromptError for a continuation whose tokens do not follow those of the
        target, RowError if the logits of a row are not finite.
        """
        writes = self._as_writes(states, target_layers)
        listed = as_python(continuation)
        continuations = list(listed) if isinstance(listed, (list, tuple)) else [continuation] * len(writes)
        if len(continuations) != len(writes):
            raise PscopeError(
                f"{len(writes)} states came with {len(continuations)} continuations; give one for all, or for each"
            )
        keys = [_as_key(each) for each in continuations]
        tokens = {each: self._following(each) for each in dict.fromkeys(keys)}
        return score_rows(partial(self._read, writes), [tokens[each] for each in keys], ranks)

    def choose(
        self,
        states: Patch,
        target_layers: TargetLayers,
        candidates: Sequence[str],
        *,
        by: Measure = "start",
    ) -> Choices:
        """Which of some candidates goes on most probably after the target, where each of `states` is patched in.

        Candidates begin with a blank where a word follows the target. They are held against each other by the
        log-probability of their "start", the fewest first tokens that tell them apart; of the "whole"; or by the "mean"
        over all tokens. One that another one begins with, as "Guinea" and "Guinea-Bissau" do, is scored as not going
        on so. By "start", a pass that reads all first tokens is nearly all there is to do: candidates that begin alike
        are only told apart in rows where their beginning is more probable than all others, and elsewhere have the score
        of what they share.

        Raises PscopeError if there are no candidates, or no such measure; PromptError for two with the same tokens, and
        for one whose tokens do not follow those of the target; RowError if the logits of a row are not finite.
        """
        writes = self._as_writes(states, target_layers)
        check_name(by, MEASURES, "measure")
        if isinstance(candidates, (str, Set)):
            raise PscopeError(f"candidates are a list of texts, not {excerpt(candidates)}")
        candidates = as_list(str, candidates, "candidates", "give texts")
        tokens = [self._following(each) for each in candidate_tokens(self.model.tokenizer, self.target, candidates)]
        return Choices(*choose_rows(partial(self._read, writes), len(writes), tokens, by), tuple(candidates))

    def relevance(self, states: Patch, target_layers: TargetLayers, spoken: Sequence[Sequence[int]]) -> Tensor:
        """How much each token that rows have said owes to the patch, (rows, tokens): see `engine.relevance`.

        `spoken` are the tokens of each row, as `generate` gives them. Whole prompts are run, whatever the path.
        """
        writes = self._as_writes(states, target_layers)
        if not isinstance(spoken, Sequence) or len(spoken) != len(writes):
            raise PscopeError(
                f"{len(writes)} states came with {excerpt(spoken)}; give the tokens that each row has said"
            )
        spoken = [self._following(_as_key(row)) for row in spoken]
        return relevance_of(self.model, self.target, writes, spoken, self.memory)

    def rows_per_pass(self, new_tokens: int = 0) -> int:
        """How many rows fit in the memory budget at once; at least one."""
        return max(1, self.memory // self._now()[0].row_bytes(as_int(new_tokens, "new_tokens", 0)))

    def rows_speaking(self, decoding: Decoding) -> int:
        """How many rows that go on fit in the memory budget at once; at least one."""
        choosing = decoding.choosing_bytes(self.model.config.vocab_size)
        return max(1, self.memory // (self._now()[0].row_bytes(decoding.new_tokens) + choosing))

    @property
    def check(self) -> SelfCheck:
        """What the self-check found, or, while there was no moment for it, why whole prompts are run."""
        return self._checks.get(0) or self._now()[1]

    @property
    def path(self) -> PathName:
        """The path that a call would take now."""
        return self._now()[1].path

    def _now(self, forced: Tokens = ()) -> tuple[Staircase | PlainPath, SelfCheck]:
        """The path for the hooks that stand on the model now, over the target and the tokens that are to follow it.

        Without hooks of others, the first call for so many tokens chooses it.
        """
        if self._attention != (now := attention(self.model.hf.config)):
            # What a mask has to fit was found out with another one, or with none.
            self._attention = now
            self._checks.clear()
            self._paths.clear()
        target = self.target
        if forced:
            target = replace(target, ids=target.ids + forced, tokens=target.tokens + ("",) * len(forced))
        check = self._override
        if check is None and others_intervene(self.model):
            check = SelfCheck("uncached", "hooks of others may have to see whole prompts")
        if check is None:
            if len(forced) not in self._checks:
                path, check = choose_path(self.model, target)
                self._checks[len(forced)], self._paths[check.path, forced] = check, path
            check = self._checks[len(forced)]
        if (check.path, forced) not in self._paths:
            self._paths[check.path, forced] = PATHS[check.path](self.model, target)
        return self._paths[check.path, forced], check

    def _following(self, text: str | Tokens) -> Tokens:
        """The tokens of a text that follows the target, or those given. Raises PromptError."""
        tokens = continuing_tokens(self.model.tokenizer, self.target, text) if isinstance(text, str) else text
        most = self.model.embeddings
        if not isinstance(tokens, tuple) or not tokens or not all(is_int(id) and 0 <= id < most for id in tokens):
            raise PromptError(
                f"{excerpt(tokens)} is neither a text nor tokens of {self.model.name}: numbers below {most}"
            )
        # What comes after its last token is not asked.
        self.model.check_window(len(self.target) + len(tokens) - 1)
        return tokens

    def _as_writes(self, states: Patch, target_layers: TargetLayers) -> Writes:
        """What rows write, once it is known to fit the target and the model."""
        if not isinstance(states, Writes):
            states = self.writes(states, target_layers)  # type: ignore[arg-type]  # None is refused there.
        elif target_layers is not None:
            raise PscopeError("writes have layers of their own; leave the target layers out")
        else:
            states.check(self.target.positions, self.model.n_layers, self.model.hidden_size)
        check_numbers(states.vectors)
        return states

    def _clean(self, writes: Writes) -> Tensor:
        """The clean target's states in the places of writes: (rows, writes, hidden)."""
        target, present = self.target, writes.present
        states = capture(self.model, [target], layers=present)  # (positions, layers, hidden)
        row_of = {position: number for number, position in enumerate(target.positions)}
        column_of = {layer: number for number, layer in enumerate(present)}
        rows = [[row_of[position] for position in row] for row in writes.positions.tolist()]
        columns = [[column_of.get(layer, 0) for layer in row] for row in writes.layers.tolist()]
        return states[rows, columns]

    def _as_rows(self, states: States | Tensor, target_layers: Sequence[int] | int | None) -> tuple[Tensor, Tensor]:
        """States (rows, positions, hidden) and the target layer of every row, once they are known to fit the model."""
        states = as_vectors(states.vectors if isinstance(states, States) else states)
        if target_layers is None:
            raise PscopeError("each state has a target layer; give one for all, or a list of one for each")
        positions, hidden = len(self.target.positions), self.model.hidden_size
        if states.shape[1:] not in [(hidden,), (positions, hidden)]:
            width_fits = states.shape[-1:] == (hidden,)
            hint = "" if width_fits else "; those of another width need a mapping, as `pscope fit --target-model` makes"
            raise PscopeError(
                f"states of shape {tuple(states.shape)} do not fit {self.model.name} at {positions} position(s), which "
                f"take (rows, {hidden}) or (rows, {positions}, {hidden}){hint}"
            )
        if len(states) == 0:
            raise PscopeError("there is no state to patch")
        one = as_python(target_layers)
        layers = as_layers(self.model, [one] * len(states) if is_int(one) else one, least=0)
        if len(layers) != len(states):
            raise PscopeError(f"{len(states)} states came with {len(layers)} target layers; each state has one")
        if states.ndim == 2:
            states = states[:, None].expand(-1, positions, -1)
        return states.detach(), torch.tensor(layers)

    def _read(
        self, writes: Writes, rows: Tensor, forced: Tokens, last: int, of: Callable[[Tensor], T]
    ) -> Iterator[tuple[Tensor, T]]:
        """What is made `of` the logits of some rows where tokens are forced to follow the target: see `scores.Read`."""
        start = 0
        while start < len(rows):
            path, _ = self._now(forced)
            part = rows[start : start + max(1, self.memory // path.row_bytes(0, last))]
            numbers = torch.cat([torch.tensor([-1]), part])
            yield part, _once_finite(path.read(writes[part], last), numbers, of)
            start += len(part)


def _patched_and_clean(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The logits of patched rows, (rows, vocab), and of the clean one, (vocab,), a copy: a view would keep all."""
    return logits[1:, -1], logits[0, -1].clone()


def _once_finite(logits: Tensor, rows: Tensor, of: Callable[[Tensor], T]) -> T:
    """What is made `of` logits (rows, last, vocab), if they are finite. Raises RowError."""
    for place in range(logits.shape[1]):
        check_finite(logits[:, place], rows)
    return of(logits)


def _as_key(continuation: Any) -> Any:
    """A continuation that can be looked up: tokens as a tuple of Python's own numbers, a text as it is."""
    continuation = as_python(continuation)
    return tuple(map(as_python, continuation)) if isinstance(continuation, (list, tuple)) else continuation
