"""Let rows speak: continue them token by token, from whatever keeps their past."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor
from transformers import Cache, EosTokenCriteria, PreTrainedTokenizerBase, StoppingCriteriaList, StopStringCriteria

from pscope.arguments import as_int, as_python, as_seed, excerpt, is_number
from pscope.errors import PscopeError, RowError
from pscope.models.internals.caches import joined, keep
from pscope.models.model import LanguageModel, not_finite
from pscope.models.prompts import Prompt, decode
from pscope.notebook import table_in_frame

if TYPE_CHECKING:
    import pandas as pd

Settled = Callable[[int, str], bool]
"""Whether a row, by its number, need not go on after what it said, since nothing asked of it can change any more."""

Ends = Callable[[Tensor, Tensor], Tensor]
"""From the numbers of rows, (rows,), and the tokens they have said, (rows, tokens): which have ended, (rows,)."""


def renumbered(settled: Settled | None, numbers: Sequence[int]) -> Settled | None:
    """`settled` for rows that go by these `numbers`; it is never asked of clean rows, whose number is below 0."""
    if settled is None:
        return None
    return lambda row, text: numbers[row] >= 0 and settled(numbers[row], text)


@dataclass(frozen=True)
class Decoding:
    """How rows are continued: at most `new_tokens`, greedily, or sampled at a `temperature` above 0 with a `seed`.

    A row ends with an end token, or with the token that completes one of the strings in `stop`. What a checkpoint's
    generation settings say about sampling is not looked at.
    """

    new_tokens: int = 20
    temperature: float = 0.0
    seed: int = 0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        stop, temperature = as_python(self.stop), as_python(self.temperature)
        if not isinstance(stop, (list, tuple)) or not all(isinstance(each, str) and each for each in stop):
            raise PscopeError(f"stop is {excerpt(stop)}; strings are needed, none of them empty")
        if not is_number(temperature) or not 0 <= temperature < math.inf:
            raise PscopeError(f"temperature is {excerpt(temperature)}; 0 is greedy, a number above 0 samples")
        new_tokens, seed = as_int(self.new_tokens, "new_tokens"), as_seed(self.seed)
        values = {"new_tokens": new_tokens, "temperature": temperature, "seed": seed, "stop": tuple(stop)}
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def choosing_bytes(self, vocabulary: int) -> int:
        """How much memory the choice of a row's next token takes: sampling has copies in double precision."""
        return 0 if self.temperature == 0 else 4 * 8 * vocabulary

    def draws(self, rows: int) -> Tensor:
        """One number in [0, 1) for every row and step, (rows, new_tokens): a row's do not depend on its batch."""
        generator = torch.Generator().manual_seed(self.seed)
        return torch.rand(rows, self.new_tokens, generator=generator, dtype=torch.float64)

    def choose(self, logits: Tensor, draws: Tensor) -> Tensor:
        """The next token of each row, (rows,), from its logits (rows, vocab) and its draw of this step (rows,)."""
        if self.temperature == 0:
            return logits.argmax(dim=-1)
        # On the CPU, so that every device draws the same tokens, those without float64 too.
        logits_64 = logits.cpu().double()
        # From the largest down, so that none overflows however low the temperature.
        scaled = (logits_64 - logits_64.amax(dim=-1, keepdim=True)) / self.temperature
        cumulative = scaled.softmax(dim=-1).cumsum(dim=-1)
        # The sum is 1 but for rounding; the largest draw must still fall inside.
        tokens = torch.searchsorted(cumulative, draws[:, None] * cumulative[:, -1:], right=True).squeeze(1)
        return tokens.clamp(max=logits.shape[1] - 1).to(logits.device)

    def ends(
        self, end_tokens: frozenset[int], tokenizer: PreTrainedTokenizerBase, settled: Settled | None = None
    ) -> Ends:
        """What tells which rows have ended: said an end token or a stop string, or enough for `settled`."""
        criteria = StoppingCriteriaList()
        if end_tokens:
            criteria.append(EosTokenCriteria(sorted(end_tokens)))
        if self.stop:
            try:
                criteria.append(_stop_strings(tokenizer, self.stop))
            except ValueError as error:
                raise PscopeError(f"no token of the model can say one of the stop strings {self.stop}") from error

        def ends(rows: Tensor, ids: Tensor) -> Tensor:
            ended = criteria(ids, None)
            if settled is not None:
                texts = (self.text(tokens, tokenizer) for tokens in ids.tolist())
                ended |= torch.tensor(
                    [bool(settled(row, text)) for row, text in zip(rows.tolist(), texts, strict=True)]
                )
            return ended

        return ends

    def text(self, tokens: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
        """What a row said, without end tokens, and up to where the first string of `stop` begins."""
        text = decode(tokenizer, tokens, skip_special_tokens=True)
        return text[: min((text.find(string) for string in self.stop if string in text), default=None)]


def check_decoding(decoding: Decoding, model: LanguageModel, prompt: Prompt, settled: Settled | None = None) -> None:
    """Raise PscopeError for what is no Decoding, PromptError where the window has no room for a prompt that goes on."""
    if settled is not None and not callable(settled):
        raise PscopeError(f"settled is a function of a row and what it said, not {excerpt(settled)}")
    if not isinstance(decoding, Decoding):
        raise PscopeError(f"how rows go on is a Decoding, as Decoding(20), not {excerpt(decoding)}")
    model.check_room(len(prompt), decoding.new_tokens)


@lru_cache(maxsize=8)
def _stop_strings(tokenizer: PreTrainedTokenizerBase, stop: tuple[str, ...]) -> StopStringCriteria:
    # Its tables are made of the whole vocabulary.
    return StopStringCriteria(tokenizer, list(stop))


GREEDY = Decoding()


@dataclass(frozen=True)
class Continuations:
    """What rows have said after the target prompt: new token ids, each list up to and with the token that ended it.

    `decode` is how they become text.
    """

    patched: list[list[int]]
    clean: list[int]
    """What follows the target unpatched, the control."""
    decode: Callable[[list[int]], str] = field(repr=False, compare=False)

    def _repr_html_(self) -> str:
        return table_in_frame(self)

    def __repr__(self) -> str:
        preview = ", ".join(map(repr, self.text[:3])) + (", …" if len(self.patched) > 3 else "")
        return f"Continuations({len(self.patched)} rows: {preview}; clean: {self.clean_text!r})"

    @property
    def text(self) -> list[str]:
        """What each patched row has said."""
        return [self.decode(row) for row in self.patched]

    @property
    def clean_text(self) -> str:
        """What the target goes on with, unpatched."""
        return self.decode(self.clean)

    def table(self) -> pd.DataFrame:
        """The `text` and `tokens` of each `row`, the clean one last, which has no number."""
        import pandas as pd

        rows = pd.array([*range(len(self.patched)), None], dtype="Int64")
        return pd.DataFrame({"row": rows, "text": [*self.text, self.clean_text], "tokens": [*self.patched, self.clean]})


class Rows(Protocol):
    """Patched rows after their prompt, able to go on. `logits` (rows, vocab) are those after the last token."""

    logits: Tensor

    def step(self, tokens: Tensor) -> None:
        """Append one token to every row, (rows,), and renew `logits`."""

    def keep(self, indices: Tensor) -> None:
        """Leave only the rows whose indices are given; their logits are gone until the next step."""


class CachedRows:
    """Rows whose past is kept in a cache of the model."""

    def __init__(self, model: LanguageModel, cache: Cache, logits: Tensor) -> None:
        self._model, self._cache, self.logits = model, cache, logits

    @classmethod
    def joined(cls, parts: Sequence[CachedRows]) -> CachedRows:
        """Rows of several prompts as one batch, in which each has keys and values for as many tokens."""
        if len(parts) == 1:
            return parts[0]
        cache = joined([part._cache for part in parts])
        return cls(parts[0]._model, cache, torch.cat([part.logits for part in parts]))

    def step(self, tokens: Tensor) -> None:
        self.forget()
        self.logits = self._model.next_token_logits(tokens[:, None].to(self._model.device), self._cache)

    def keep(self, indices: Tensor) -> None:
        self.forget()
        keep(self._cache, indices)

    def forget(self) -> None:
        """Let go of the logits, so that those of two steps are never there at once."""
        self.logits = self.logits.new_empty(0, self.logits.shape[1])


class UncachedRows:
    """Rows that run all their tokens again at every step.

    `within(rows)`, the numbers of the rows that are left, gives a block to run them in.
    """

    logits: Tensor

    def __init__(
        self, model: LanguageModel, ids: Tensor, within: Callable[[Tensor], AbstractContextManager[None]] | None = None
    ) -> None:
        self._model, self._ids, self._within = model, ids, within or (lambda rows: nullcontext())
        self._rows = torch.arange(len(ids))
        self._run()

    def step(self, tokens: Tensor) -> None:
        self._ids = torch.cat([self._ids, tokens[:, None].to(self._ids)], dim=1)
        self._run()

    def keep(self, indices: Tensor) -> None:
        self.logits = self.logits.new_empty(0, self.logits.shape[1])
        self._ids, self._rows = self._ids[indices], self._rows[indices.cpu()]

    def _run(self) -> None:
        with self._within(self._rows):
            self.logits = self._model.next_token_logits(self._ids)


def check_finite(logits: Tensor, rows: Tensor) -> None:
    """Raise RowError, with its number in `rows`, if a row of `logits` (rows, vocab) has no largest finite value."""
    broken = ~logits.amax(dim=-1).isfinite()
    if broken.any():
        row = int(rows[broken.cpu()][0])
        raise RowError(row, f"its logits are {not_finite(logits.dtype)}")
