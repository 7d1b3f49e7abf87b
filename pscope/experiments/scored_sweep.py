"""The sweep over source and target layers, scored: which of some answers is the most probable at every pair.

Nothing is decoded: the answers' first tokens stand in the logits that a pass over the target ends with, so that every
pair of layers costs what a corner of the grid does when rows have to speak.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

import pandas as pd
import torch

from pscope.engine.patchscope import Patchscope
from pscope.engine.scores import Choice, Measure
from pscope.errors import PscopeError, RowError
from pscope.experiments.experiment import naming_rows
from pscope.experiments.held_out import best_elsewhere, chosen_elsewhere, folds_of, found_at
from pscope.experiments.sweep import PATCH_TYPES, PATCHED, Source, read_rows, rows_of
from pscope.metrics import same_answer
from pscope.models.model import LanguageModel
from pscope.models.prompts import Prompt, candidate_tokens, spoken_after
from pscope.models.residual import Pair

SCORED_TYPES = {**PATCH_TYPES, "answer": "string", "found": "bool", "log_probability": "Float64"}
"""The columns that a scored sweep fills."""


def scored_sweep(
    scope_of: Callable[[Prompt], Patchscope], sources: Sequence[Source], seed: int, by: Measure = "start"
) -> Iterator[dict[str, object]]:
    """The rows of the table, by their columns, for sources: those of one target, candidates and pairs share passes.

    They are as those of a sweep, but for `answer`, the candidate that is most probable by the measure (see
    `Patchscope.choose`); whether it counts as an answer of the source (`found`); and the `log_probability`, in nats, of
    the source's own first answer: of its first token, or, by another measure than "start", its score by that. Raises
    PscopeError, naming the source, for a row that fails.
    """
    for (target, *_), alike in groupby(sources, key=lambda source: (source.target, source.candidates, source.pairs)):
        yield from _scored_rows(scope_of(target), [*alike], seed, by)


def _scored_rows(scope: Patchscope, sources: Sequence[Source], seed: int, by: Measure) -> Iterator[dict[str, object]]:
    rows, states = read_rows(scope.model, sources, seed)
    texts = _candidate_texts(scope.target, sources[0].candidates)
    with naming_rows(rows):
        choices = scope.choose(states, [row.pair[1] for row in rows], texts, by=by)
    judges = {source.name: _Judge(source.candidates, source.answers, by) for source in sources}
    places = {row.key: place for place, row in enumerate(rows)}
    yield from rows_of(
        lambda target: scope,
        sources,
        lambda row: judges[row.source.name](choices.patched, places[row.key]),
        lambda source: judges[source.name](choices.clean, 0),
    )


def scored_plainly(
    scope: Patchscope, candidates: Sequence[str], answers: Sequence[str], by: Measure
) -> dict[str, object]:
    """What is chosen after the target as it stands: `answer`, `found`, `log_probability`, as in a scored sweep."""
    # A row that is patched at the very top is as good as none.
    state = torch.ones(1, scope.model.hidden_size)
    try:
        choices = scope.choose(state, scope.model.n_layers, _candidate_texts(scope.target, candidates), by=by)
    except RowError as error:
        raise PscopeError(f"{scope.target.text!r} failed: {error.reason}") from error
    return _Judge(candidates, answers, by)(choices.clean, 0)


def check_candidates(model: LanguageModel, sources: Sequence[Source]) -> None:
    """Raise PromptError if some candidates cannot be chosen among after a target: before a run, not within it."""
    for target, candidates in dict.fromkeys((source.target, source.candidates) for source in sources):
        candidate_tokens(model.tokenizer, target, _candidate_texts(target, candidates))


def _candidate_texts(target: Prompt, candidates: Sequence[str]) -> list[str]:
    return [spoken_after(target, candidate) for candidate in candidates]


def best_pairs(scores: pd.DataFrame, key: str, unit: list[str]) -> dict[str, dict[int, Pair]]:
    """By the column `key` and by fold, the pair of layers that scores best in the other folds, for patched states."""
    best = {}
    for name, rows in scores[scores["condition"] == PATCHED].groupby(key, sort=False):
        found, near = (found_at(rows, PATCHED, unit, column) for column in ("found", "log_probability"))
        best[name] = best_elsewhere(found, near, folds_of(rows, unit).loc[found.index])
    return best


def at_best_pairs(rows: pd.DataFrame) -> bool:
    """Whether states were patched at the pairs that are best elsewhere alone, which are marked, not over a grid."""
    patched = rows[rows["condition"] == PATCHED]
    return "chosen" in patched and bool(patched["chosen"].notna().any())


def chosen_pairs(rows: pd.DataFrame, patched: pd.DataFrame, unit: list[str]) -> pd.DataFrame:
    """Which pairs count for each unit, those that are best elsewhere: True in (units, layer × target layer).

    `patched` are the scores of the rows that are patched, in the same form.
    """
    if at_best_pairs(rows):
        return found_at(rows, PATCHED, unit, "chosen") > 0
    return chosen_elsewhere(patched, folds_of(rows, unit).loc[patched.index])


class _Judge:
    """Says of a row what was chosen, and whether that is one of the answers."""

    def __init__(self, candidates: Sequence[str], answers: Sequence[str], by: Measure) -> None:
        self._candidates, self._by = candidates, by
        self._matches = [same_answer(candidate, answers) for candidate in candidates]
        self._own = next(place for place, candidate in enumerate(candidates) if same_answer(candidate, answers[:1]))

    def __call__(self, choice: Choice, row: int) -> dict[str, object]:
        chosen = int(choice.chosen[row])
        scores = choice.first if self._by == "start" else choice.scores
        score = {"log_probability": float(scores[row, self._own])}
        return {"answer": self._candidates[chosen], "found": self._matches[chosen], **score}
