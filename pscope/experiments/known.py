"""What the model knows without a patch: its own words to prompts as they stand."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from pscope.engine.generate import GREEDY, Decoding
from pscope.engine.patchscope import MEMORY
from pscope.engine.selfcheck import PathName
from pscope.engine.unpatched import continue_prompts
from pscope.errors import PscopeError
from pscope.experiments.experiment import Experiment, Unit, Work, naming_rows, tidy
from pscope.metrics import answer_found, answer_settled
from pscope.models.model import LanguageModel
from pscope.models.prompts import Prompt

Inquiry = tuple[str, Sequence[str]]
"""A text that is asked, and the answers of which one is hoped for."""


@dataclass(frozen=True)
class Plain(Unit):
    """A prompt that is asked as it stands; `target` is the way of asking, `about` the columns that say what it is."""

    target: str
    prompt: Prompt
    about: Mapping[str, Any]
    answers: tuple[str, ...] = ()

    def work(self, new_tokens: int) -> Work:
        """The least that it asks of a model."""
        return Work(len(self.prompt), spoken=1, new_tokens=new_tokens)


def by_length(units: Iterable[Plain]) -> list[Plain]:
    """Units whose prompts have one length side by side: those begin in one pass."""
    return sorted(units, key=lambda unit: len(unit.prompt))


def answer_plainly(
    model: LanguageModel, units: Sequence[Plain], decoding: Decoding, *, memory: int, path: PathName
) -> list[dict[str, object]]:
    """The rows of units that are asked as they stand: `continuation`, whether an answer is `found`, and the `path`."""
    continuations = say(model, [(unit.prompt.text, unit.answers) for unit in units], decoding, memory=memory, path=path)
    return [
        {
            **unit.about,
            "path": path,
            "continuation": continuations[unit.prompt.text],
            "found": answer_found(continuations[unit.prompt.text], unit.answers),
        }
        for unit in units
    ]


def say(
    model: LanguageModel, questions: Iterable[Inquiry], decoding: Decoding, *, memory: int, path: PathName
) -> dict[str, str]:
    """What the model says after each text, at least until it has said what is wanted of it.

    Texts that coincide are run once, until all who ask are answered. Raises PscopeError, naming the text, for one that
    fails.
    """
    answers_by_text = _answers_by_text(questions)
    texts = list(answers_by_text)

    def settled(index: int, continuation: str) -> bool:
        return all(answer_settled(continuation, answers) for answers in answers_by_text[texts[index]])

    prompts = [model.prompt(text) for text in texts]
    with naming_rows([f"{text!r} failed" for text in texts]):
        continuations = dict(continue_prompts(model, prompts, decoding, settled=settled, memory=memory, path=path))
    return {text: decoding.text(continuations[index], model.tokenizer) for index, text in enumerate(texts)}


class PlainWords(Experiment[Plain]):
    """An experiment of texts that are asked as they stand; its table has their `text`, `continuation` and `path`."""

    def __init__(
        self, model: LanguageModel, questions: Iterable[Inquiry], decoding: Decoding = GREEDY, *, memory: int = MEMORY
    ) -> None:
        self._answers, self._decoding = _answers_by_text(questions), decoding
        if not self._answers:
            raise PscopeError("there is nothing to ask")
        self.units = by_length(
            Plain(text, 1, "as it stands", model.prompt(text), {"wanted": groups})
            for text, groups in self._answers.items()
        )
        super().__init__(model, self.units[-1].prompt, memory)

    def read(self, units: Sequence[Plain]) -> pd.DataFrame:
        path = self.check.path
        questions = [(unit.name, answers) for unit in units for answers in self._answers[unit.name]]
        continuations = say(self.model, questions, self._decoding, memory=self.memory, path=path)
        return _table(continuations, path)

    def work(self, unit: Plain) -> Work:
        return unit.work(self._decoding.new_tokens)

    def hoped_for(self) -> pd.DataFrame:
        """The table of a model that knows everything: the most that can come of it."""
        hopes = {text: " / ".join(group[0] for group in groups if group) for text, groups in self._answers.items()}
        return _table(hopes, None)


def _answers_by_text(questions: Iterable[Inquiry]) -> dict[str, list[Sequence[str]]]:
    answers_by_text: dict[str, list[Sequence[str]]] = {}
    for text, answers in questions:
        answers_by_text.setdefault(text, []).append(answers)
    return answers_by_text


def _table(continuations: dict[str, str], path: PathName | None) -> pd.DataFrame:
    rows = [{"text": text, "continuation": continuation, "path": path} for text, continuation in continuations.items()]
    return tidy(rows, dict.fromkeys(("text", "continuation", "path"), "string"))
