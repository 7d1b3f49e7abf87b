"""Choose the path that patched rows take: the staircase where it agrees with whole-prompt passes, else those."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pscope.engine.plain import PlainPath
from pscope.engine.staircase import Staircase
from pscope.engine.writes import Write, Writes
from pscope.errors import ModelError
from pscope.memory import out_of_memory
from pscope.models.model import LanguageModel, not_finite
from pscope.models.prompts import Prompt
from pscope.models.residual import editing, looking_on, recording

PathName = Literal["staircase", "plain", "uncached"]
"""One pass for all layers; whole prompts, continued from the model's own cache; whole prompts for every new token."""

PATHS: dict[PathName, Callable[[LanguageModel, Prompt], Staircase | PlainPath]] = {
    "staircase": Staircase,
    "plain": PlainPath,
    "uncached": partial(PlainPath, cached=False),
}

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
"""In standard deviations of the logits. Rounding stays well below; a wrong mask or cache is of the order of 1."""

ROUNDINGS = 2
"""How often whole prompts are run with other roundings, to see what those alone change in half precision."""


@dataclass(frozen=True)
class SelfCheck:
    """Which path was chosen, why, and how far the staircase was from whole-prompt passes.

    `difference` is the largest one between logits, in standard deviations of the logits, and `tolerance` what was
    accepted there; None if it was not measured.
    """

    path: PathName
    reason: str
    difference: float | None = None
    tolerance: float | None = None

    def __str__(self) -> str:
        return f"{self.path} path: {self.reason}"


@torch.no_grad()
def choose_path(model: LanguageModel, target: Prompt) -> tuple[Staircase | PlainPath, SelfCheck]:
    """Run the clean row and a few patched ones on each path, and let them go on, also when some have left.

    A path is taken if every state that was patched stands in the residual stream to the last bit, and if the logits are
    those of whole prompts: in single precision within a fixed tolerance, in half precision, for each row, within
    twice what one more rounding in each layer changes. Raises ModelError if the model's own logits are not finite.
    """
    # From the top down, which is not the order in which rows climb.
    layers = sorted({0, model.n_layers // 2, model.n_layers - 1, model.n_layers}, reverse=True)
    with recording(model, range(model.n_layers + 1)) as streams:
        model.next_token_logits(torch.tensor([target.ids], device=model.device))
    # States of the clean run, each patched where it does not belong, but as long as the one that stands there: far
    # too long ones can make a row that no two roundings agree on.
    places = list(target.positions)
    clean = torch.stack([streams[layer][0, places].to(model.device) for layer in range(model.n_layers + 1)])
    borrowed = clean[[(layer + model.n_layers // 2 + 1) % (model.n_layers + 1) for layer in layers]]
    lengths = clean[layers].norm(dim=-1, keepdim=True) / borrowed.norm(dim=-1, keepdim=True)
    states = borrowed * lengths.nan_to_num(nan=1.0, posinf=1.0)
    rows = [
        [Write(layer, position, vector) for position, vector in zip(places, own, strict=True)]
        for layer, own in zip(layers, states, strict=True)
    ]
    # One more that writes in several layers as it climbs.
    rows.append([write for row in rows for write in row if write.layer >= model.n_layers // 2])
    trial = _Trial(model, target, Writes.of(rows))
    yardstick = PlainPath(model, target, cached=False)
    expected = trial.expected(yardstick)
    if not all(logits.isfinite().all() for logits in expected):
        raise ModelError(f"the logits of {model.name} are {not_finite(model.dtype)}")
    tolerances = trial.tolerances(yardstick, expected)

    staircase, gap, fault = _try_path("staircase", trial, expected, tolerances)
    if staircase is not None:
        return staircase, SelfCheck("staircase", f"within {gap.difference:.1e} of whole-prompt passes", *gap)
    reason = f"on {type(model.hf).__name__} the staircase {fault}"
    plain, _, cache_fault = _try_path("plain", trial, expected, tolerances)
    if plain is not None:
        return plain, SelfCheck("plain", reason, *gap)
    return yardstick, SelfCheck("uncached", f"{reason}, and going on from its own cache {cache_fault}", *gap)


class _Gap(NamedTuple):
    """A difference between logits and how much of one was allowed, in standard deviations; None if none was found."""

    difference: float | None = None
    tolerance: float | None = None


@dataclass(frozen=True)
class _Trial:
    """The rows that are run on every path."""

    model: LanguageModel
    target: Prompt
    writes: Writes

    @property
    def room(self) -> int:
        """How many tokens rows go on for, as the window permits."""
        return 2 if self.model.window is None else min(2, self.model.window - len(self.target))

    @property
    def tokens(self) -> Tensor:
        """What each row says at every step, (1 + rows,): any tokens will do that are the same on every path."""
        return torch.arange(3, 4 + len(self.writes), device=self.model.device) % self.model.config.vocab_size

    @property
    def every_other(self) -> Tensor:
        """The rows that are left for the second step: every other one."""
        return torch.arange(0, 1 + len(self.writes), 2, device=self.model.device)

    def expected(self, yardstick: PlainPath) -> list[Tensor]:
        """What `run` should give, from whole prompts: in one pass, since no token changes what stands before it."""
        logits = yardstick.read(self.writes, 1 + self.room, self.tokens[:, None].expand(-1, self.room))
        answers = [logits[:, step] for step in range(self.room and 1 + self.room)]
        return [*answers[:2], *(logits[self.every_other] for logits in answers[2:]), logits[:, 0]]

    def run(self, path: Staircase | PlainPath) -> list[Tensor]:
        """The logits of all rows, then after a token more, then of every other row after yet another; last those of a
        path that need not go on, and may keep less.
        """
        answers = []
        if self.room:
            rows = path.start(self.writes, new_tokens=self.room)
            answers.append(rows.logits)
            rows.step(self.tokens)
            answers.append(rows.logits)
        if self.room > 1:
            rows.keep(self.every_other)
            rows.step(self.tokens[self.every_other])
            answers.append(rows.logits)
        return [*answers, path.read(self.writes)[:, -1]]

    def tolerances(self, yardstick: PlainPath, expected: list[Tensor]) -> list[Tensor]:
        """How far the logits of each row may be from those expected, (rows,) for each answer."""
        # Quantised weights are unpacked to half precision on the way.
        dtype = torch.bfloat16 if self.model.quantised else self.model.dtype
        if dtype in TOLERANCE:
            return [torch.full((len(logits),), TOLERANCE[dtype], dtype=torch.float64) for logits in expected]
        # That of the logits themselves is the least there is.
        least = [
            torch.finfo(dtype).eps * logits.abs().amax(-1).double() / logits.double().std(-1) for logits in expected
        ]
        tolerances = [2 * each.cpu().clamp(min=TOLERANCE[torch.float32]) for each in least]
        for seed in range(ROUNDINGS):
            with _rounding_otherwise(self.model, torch.finfo(dtype).eps, seed):
                changes = _differences(self.expected(yardstick), expected)
            # A row of which these roundings happen to change little is given what they change on average.
            changes = [row.clamp(min=row.mean().item()) for row in changes]
            tolerances = [torch.maximum(most, 2 * more) for most, more in zip(tolerances, changes, strict=True)]
        return tolerances

    def hold(self, streams: Mapping[int, Tensor]) -> bool:
        """Whether the states that are patched stand in the streams that decoder layers have read."""
        # What is patched into the last is read by the model's tail, to which its length is nothing.
        layers = [layer for layer in self.writes.present if layer < self.model.n_layers]
        return all(
            _stands(here.vectors[here.rows == row].to(streams[layer]), streams[layer])
            for layer, here in ((layer, self.writes.at(layer)) for layer in layers)
            for row in here.rows.unique()
        )


def _stands(state: Tensor, stream: Tensor) -> bool:
    """Whether all vectors of `state` (positions, hidden) stand in one row of `stream` (rows, tokens, hidden)."""
    matches = (stream[:, :, None] == state).all(dim=-1)  # (rows, tokens, positions)
    return bool(matches.any(dim=1).all(dim=-1).any())


def _rounding_otherwise(model: LanguageModel, eps: float, seed: int) -> AbstractContextManager[None]:
    """A block within which the stream of each layer is rounded once more, to one side or the other at random."""
    generator = torch.Generator().manual_seed(seed)

    def edit(stream: Tensor, positions: range) -> Tensor:
        aside = torch.rand(stream.shape, generator=generator).to(stream.device) - 0.5
        return (stream.float() * (1 + eps * aside)).to(stream.dtype)

    return editing(model, dict.fromkeys(range(model.n_layers + 1), edit))


def _try_path(
    name: PathName, trial: _Trial, expected: list[Tensor], tolerances: list[Tensor]
) -> tuple[Staircase | PlainPath | None, _Gap, str]:
    """A path if it agrees with what is expected; where it differs most, and what to say of it if it does not agree."""
    streams: dict[int, Tensor] = {}
    try:
        path = PATHS[name](trial.model, trial.target)
        with looking_on(trial.model, streams.__setitem__):
            answers = trial.run(path)
    except (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if out_of_memory(error):
            raise
        # Whatever a model's code says to such a batch or cache, the other paths do not depend on it.
        return None, _Gap(), f"does not run ({' '.join(str(error).split())})"
    differences, most = torch.cat(_differences(answers, expected)), torch.cat(tolerances)
    # Not a number compares as neither more nor less.
    differences = differences.nan_to_num(nan=math.inf)
    over = (differences / most).argmax()
    if differences[over] > most[over]:
        return None, _Gap(differences[over].item(), most[over].item()), f"is {differences[over]:.1e} off"
    largest = differences.argmax()
    gap = _Gap(differences[largest].item(), most[largest].item())
    if not trial.hold(streams):
        return None, gap, "does not hold the states that are patched as they are"
    return path, gap, ""


def _differences(answers: list[Tensor], expected: list[Tensor]) -> list[Tensor]:
    """For each answer the largest difference of each row, (rows,), in standard deviations of its expected logits."""
    pairs = ((got.cpu().double(), right.cpu().double()) for got, right in zip(answers, expected, strict=True))
    return [(got - right).abs().amax(dim=-1) / right.std(dim=-1) for got, right in pairs]
