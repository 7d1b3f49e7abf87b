"""Attribute extraction: what a subject's hidden state tells of it, by a question patched with it and by a probe.

The paper's section 4.2 (Table 2). The state of a subject, read in a sentence that only mentions it, is patched over the
placeholder of a prompt that asks for one of its attributes, "The official currency of x". An answer is scored, right
where it is the most probable of the objects of all subjects that are read; or said, right where it stands in the
continuation.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from pscope.arguments import as_list, as_seed, check_name
from pscope.engine.generate import GREEDY, Decoding
from pscope.engine.patchscope import MEMORY
from pscope.engine.scores import MEASURES, Measure
from pscope.errors import PromptError, PscopeError
from pscope.experiments.experiment import Experiment, U, Unit, Work, of_kind, permuted, tidy
from pscope.experiments.grid import source_layers, source_prompt
from pscope.experiments.held_out import FOLDS, draw_folds
from pscope.experiments.known import Inquiry
from pscope.experiments.probe import probe_elsewhere
from pscope.experiments.scored_sweep import SCORED_TYPES, scored_sweep
from pscope.experiments.sweep import PATCHED, TYPES, Source, borrowed_rows, mark_chosen, sweep
from pscope.inputs.relations import Relation, Sample
from pscope.metrics import answer_found, distinct_answers, same_answer
from pscope.models.model import LanguageModel
from pscope.models.prompts import Prompt, continuing_tokens, spoken_after, written_out
from pscope.models.residual import Pair, as_pairs, capture

ANOTHER, PROBE, MAJORITY = "another subject", "probe", "majority class"

_ABOUT = {
    "relation": "string",
    "kind": "string",
    "subject": "string",
    "object": "string",
    "context": "int64",
    "fold": "int64",
}
ATTRIBUTE_TYPES = {**_ABOUT, **TYPES, "state_of": "string", "chosen": "boolean"}
ATTRIBUTE_SCORE_TYPES = {**_ABOUT, **SCORED_TYPES, "state_of": "string", "chosen": "boolean", "nameable": "boolean"}


@dataclass(frozen=True)
class Question:
    """A relation, ready to be asked of a model: the target prompt that asks, and the samples that have source prompts.

    `samples` come each with its `sources`. `unread` tells of every source prompt in which the subject cannot be found
    why not.
    """

    relation: Relation
    target: Prompt
    samples: tuple[Sample, ...]
    sources: tuple[tuple[Prompt, ...], ...]
    unread: tuple[str, ...] = ()

    @property
    def candidates(self) -> tuple[str, ...]:
        """The objects of its samples, among which one is chosen."""
        return distinct_answers(sample.object for sample in self.samples)

    def candidate(self, sample: Sample) -> str:
        """The one among them that is a sample's own object, perhaps otherwise written."""
        return next(candidate for candidate in self.candidates if same_answer(candidate, [sample.object]))

    @property
    def enough(self) -> bool:
        """Whether there is a subject for every fold, and more than one object to choose among."""
        return len(self.samples) >= FOLDS and len(self.candidates) > 1

    def plain(self, sample: Sample) -> str:
        """The question with the subject in the place of the placeholder."""
        return written_out(self.target, sample.subject)

    def known(self, texts: Mapping[str, str], samples: int, seed: int) -> tuple[Question, int]:
        """The question of so many subjects, drawn by the seed among those whose answer stands in what the model says.

        `texts` are what it says, by plain question. Also returned is among how many they were drawn.
        """
        answered = [n for n, each in enumerate(self.samples) if answer_found(texts[self.plain(each)], each.answers)]
        return self.of(sorted(answered[index] for index in permuted(seed, len(answered))[:samples])), len(answered)

    def of(self, places: Sequence[int]) -> Question:
        """The question of some of its samples, by number."""
        own, sources = tuple(self.samples[place] for place in places), tuple(self.sources[place] for place in places)
        return replace(self, samples=own, sources=sources)


def question_of(model: LanguageModel, relation: Relation, contexts: int) -> Question:
    """The question of a relation, each sample with its first `contexts` source prompts that can be read.

    Raises PromptError, naming the relation, for a target prompt that cannot be read.
    """
    samples, sources, unread = [], [], []
    try:
        target = model.prompt(relation.target.text, relation.target.at)
        for sample in relation.samples:
            prompts, faults = _readable(model, sample)
            unread += faults
            if prompts:
                model.prompt(written_out(target, sample.subject))
                continuing_tokens(model.tokenizer, target, spoken_after(target, sample.object))
                samples.append(sample)
                sources.append(prompts[:contexts])
    except PromptError as error:
        raise PromptError(f"{relation.name}: {error}") from error
    return Question(relation, target, tuple(samples), tuple(sources), tuple(unread))


def plain_questions(questions: Sequence[Question]) -> list[Inquiry]:
    """What is asked to find out what the model knows: every question in plain words, and the answers that count."""
    return [(question.plain(sample), sample.answers) for question in questions for sample in question.samples]


def _readable(model: LanguageModel, sample: Sample) -> tuple[tuple[Prompt, ...], list[str]]:
    """The source prompts of a sample in which its subject is found, and why it is not in the others."""
    prompts, faults = [], []
    for marked in sample.sources:
        try:
            prompts.append(source_prompt(model, marked.text, marked.at))
        except PromptError as error:
            faults.append(str(error))
    return tuple(prompts), faults


@dataclass(frozen=True)
class Probing(Unit):
    """The probes of all layers for one question, whose states are read once more."""

    question: Question
    folds: tuple[int, ...]


class _Attributes(Experiment[U]):
    """What the scores and the words of attributes have in common: every question asked of every source state.

    The folds are of whole subjects. Raises PscopeError for a question with fewer subjects than folds, or one object.
    """

    types: Mapping[str, str]
    answer_column: str

    def __init__(self, model: LanguageModel, questions: Sequence[Question], seed: int, memory: int) -> None:
        questions = as_list(Question, questions, "questions", "make them of relations with question_of")
        for question in questions:
            if not question.enough:
                name, subjects = question.relation.name, len(question.samples)
                objects = len(question.candidates)
                raise PscopeError(
                    f"{name}: {subjects} subjects of {objects} objects; {FOLDS} and 2 are needed, for the folds and to "
                    "choose among"
                )
        self._seed = as_seed(seed)
        self._lenders: list[dict[str, object]] = []
        self.units = [unit for question in questions for unit in self._units(question)]
        super().__init__(model, questions[0].target, memory)

    @abstractmethod
    def _units(self, question: Question) -> Iterable[U]:
        """The units of a question, those that are patched first."""

    def _sources(self, question: Question, pairs: Sequence[Pair]) -> Iterator[Source]:
        samples, name = question.samples, question.relation.name
        folds, lenders = _folds(question, self._seed), _lenders(samples, self._seed)
        for number, (sample, sources) in enumerate(zip(samples, question.sources, strict=True)):
            lent_to = tuple(other.answers for other, of in zip(samples, lenders, strict=True) if of == number)
            for context, source in enumerate(sources):
                about = _about(question, number, folds, context)
                if (lender := lenders[number]) is not None:
                    self._lenders.append({**about, "lender": samples[lender].subject})
                yield Source(
                    f"{name}/{sample.subject}" if context == 0 else f"{name}, context {context}/{sample.subject}",
                    question.target,
                    source,
                    tuple(pairs),
                    about,
                    sample.answers,
                    lent_to,
                    question.candidates,
                    random=context == 0,
                )

    def join(self, table: pd.DataFrame) -> pd.DataFrame:
        """With what came of another subject's state, held against each subject's own answers."""
        if not self._lenders:
            return table
        answers = {
            (unit.about["relation"], unit.about["subject"]): unit.answers for unit in of_kind(self.units, Source)
        }
        theirs = borrowed_rows(table, pd.DataFrame(self._lenders), "subject", ("relation", "context"))
        # Thousands of rows have one answer.
        cases = theirs[["relation", "subject", self.answer_column]].drop_duplicates()
        matches = same_answer if self.answer_column == "answer" else answer_found
        found = [matches(case[-1], answers[case[:-1]]) for case in cases.itertuples(index=False, name=None)]
        theirs = theirs.drop(columns="found").merge(cases.assign(found=found), sort=False)
        theirs = theirs.assign(condition=ANOTHER, state_of=theirs["lender"])
        return pd.concat([table, tidy(theirs, self.types)], ignore_index=True)

    def _table(self, rows: Iterable[Mapping[str, object]]) -> pd.DataFrame:
        table = tidy(rows, self.types)
        return table.assign(state_of=table["subject"].where(table["condition"] == PATCHED))


class AttributeScores(_Attributes[Source | Probing]):
    """Table 2 over all pairs of layers: the most probable of the objects asked for, at every (ℓ, ℓ*), and a probe.

    A row of the table is one source × pair × condition: `relation` and its `kind`, `subject`, `object`, `context` (the
    number of the source prompt), `fold`, the columns of a scored sweep (`pscope.experiments.scored_sweep`), and
    `state_of`. What is chosen among are the objects of the subjects that are read. The conditions:

    - "patched": the state of the subject;
    - "another subject": that of one with another answer, drawn by the seed (where there is one);
    - "random vector": a random direction of the same norm, in the place of each subject's first context;
    - "clean target": the target unpatched;
    - "probe": per layer, a logistic regression from states to the same objects, fitted on the other folds, and
      "majority class", the object most frequent there. Both belong to no target layer. An answer of other subjects
      counts where it is right too; `nameable` says whether any in the other folds would. `chosen` marks the probe's
      layer that was best, or tied, when the other folds were probed by each other alone.
    """

    types, answer_column = ATTRIBUTE_SCORE_TYPES, "answer"

    def __init__(
        self,
        model: LanguageModel,
        questions: Sequence[Question],
        pairs: Sequence[Pair],
        *,
        by: Measure = "start",
        seed: int = 0,
        memory: int = MEMORY,
    ) -> None:
        check_name(by, MEASURES, "measure")
        self._pairs, self._by = tuple(as_pairs(model, model, pairs)), by
        super().__init__(model, questions, seed, memory)

    def _units(self, question: Question) -> Iterator[Source | Probing]:
        yield from self._sources(question, self._pairs)
        name = f"{question.relation.name}: probe"
        yield Probing(name, 0, name, question, tuple(_folds(question, self._seed)))

    def read(self, units: Sequence[Source | Probing]) -> pd.DataFrame:
        if probes := of_kind(units, Probing):
            return pd.concat([self._probe(unit) for unit in probes], ignore_index=True)
        return self._table(scored_sweep(self.scope, of_kind(units, Source), self._seed, self._by))

    def work(self, unit: Source | Probing) -> Work:
        if isinstance(unit, Probing):
            return Work(sum(len(source) for sources in unit.question.sources for source in sources))
        return unit.work(new_tokens=0)

    def _probe(self, unit: Probing) -> pd.DataFrame:
        """A logistic regression per layer, and the majority class, each fitted on the other folds."""
        question, (layers, _) = unit.question, source_layers(self._pairs)
        keys = [(sample, context) for sample, sources in enumerate(question.sources) for context in range(len(sources))]
        prompts = [question.sources[sample][context] for sample, context in keys]
        probed = probe_elsewhere(
            capture(self.model, prompts, layers=layers).float().cpu().numpy(),
            [question.candidate(question.samples[sample]) for sample, _ in keys],
            np.array([unit.folds[sample] for sample, _ in keys]),
            lambda number, answer: same_answer(answer, question.samples[keys[number][0]].answers),
        )
        rows = []
        for number, (sample, context) in enumerate(keys):
            base = {**_about(question, sample, unit.folds, context), "nameable": probed.nameable[number]}
            columns = {"answer": probed.majority[number], "found": probed.majority_right[number]}
            rows.append({**base, "condition": MAJORITY, **columns})
            base.update(position=prompts[number].position, token=prompts[number].token, state_of=base["subject"])
            for place, layer in enumerate(layers):
                columns = {"answer": probed.predicted[number, place], "found": probed.right[number, place]}
                chosen = probed.chosen[number, place]
                rows.append({**base, "condition": PROBE, "layer": layer, **columns, "chosen": chosen})
        return tidy(rows, self.types)


class AttributeExtraction(_Attributes[Source]):
    """Table 2 as the paper has it: every question answered in words, at the pairs of layers that are worth hearing.

    The table is that of `AttributeScores` without the probe, with the columns of a sweep (`pscope.experiments.sweep`).
    `pairs` are those of a grid, or, by relation and fold, those that are best elsewhere (`scored_sweep.best_pairs`):
    then every subject of a relation is asked at those of all folds, and `chosen` marks its own. A row leaves the batch
    as soon as its answer is found, and those of all who borrow its state.
    """

    types, answer_column = ATTRIBUTE_TYPES, "continuation"

    def __init__(
        self,
        model: LanguageModel,
        questions: Sequence[Question],
        pairs: Sequence[Pair] | Mapping[str, Mapping[int, Pair]],
        decoding: Decoding = GREEDY,
        *,
        seed: int = 0,
        memory: int = MEMORY,
    ) -> None:
        self._pairs = pairs if isinstance(pairs, Mapping) else as_pairs(model, model, pairs)
        self._decoding = decoding
        super().__init__(model, questions, seed, memory)
        # Those of targets of one length, which can begin to speak in one batch, side by side.
        self.units = sorted(self.units, key=lambda unit: len(unit.target))

    def _units(self, question: Question) -> Iterator[Source]:
        pairs = self._pairs
        own = pairs[question.relation.name].values() if isinstance(pairs, Mapping) else pairs
        yield from self._sources(question, tuple(dict.fromkeys(own)))

    def read(self, units: Sequence[Source]) -> pd.DataFrame:
        return self._table(sweep(self.scope, units, self._decoding, self._seed))

    def work(self, unit: Source) -> Work:
        return unit.work(self._decoding.new_tokens)

    def join(self, table: pd.DataFrame) -> pd.DataFrame:
        """With the other subjects' words, and the pairs that were chosen."""
        table = super().join(table)
        return mark_chosen(table, "relation", self._pairs) if isinstance(self._pairs, Mapping) else table


def _folds(question: Question, seed: int) -> list[int]:
    return draw_folds([sample.subject for sample in question.samples], seed)


def _about(question: Question, sample: int, folds: Sequence[int], context: int) -> dict[str, object]:
    item = question.samples[sample]
    relation = {"relation": question.relation.name, "kind": question.relation.kind}
    return {**relation, "subject": item.subject, "object": item.object, "context": context, "fold": folds[sample]}


def _counts(answer: str, answers: Sequence[str]) -> bool:
    """Whether an answer is right where it is chosen, or where it is said."""
    return same_answer(answer, answers) or answer_found(answer, answers)


def _lenders(samples: Sequence[Sample], seed: int) -> list[int | None]:
    """For each sample the number of another with another answer, None where there is none."""
    random = np.random.default_rng(seed)
    lenders = []
    for sample in samples:
        others = [
            index
            for index, other in enumerate(samples)
            if other is not sample and not any(_counts(answer, sample.answers) for answer in other.answers)
        ]
        lenders.append(int(random.choice(others)) if others else None)
    return lenders
