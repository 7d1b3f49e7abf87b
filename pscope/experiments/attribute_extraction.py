"""Attribute extraction: what a subject's hidden state tells of it, by a question patched with it and by a probe.

The paper's section 4.2 (Table 2). The state of a subject, read in a sentence that only mentions it, is patched over the
placeholder of a prompt that asks for one of its attributes, "The official currency of x"; an answer counts when it
stands in the continuation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.stats import permutation_test

from pscope.engine.generate import GREEDY, Decoding
from pscope.engine.patchscope import MEMORY
from pscope.errors import PromptError, PscopeError
from pscope.experiments.bands import share_bands
from pscope.experiments.experiment import Experiment, Unit, Work, permuted, tidy
from pscope.experiments.grid import Pair, source_layers, source_prompt
from pscope.experiments.held_out import FOLDS, at_chosen, chosen_elsewhere, draw_folds, found_at
from pscope.experiments.known import Wanted
from pscope.experiments.probe import probe_elsewhere
from pscope.experiments.sweep import CLEAN, PATCHED, RANDOM, TYPES, Source, borrowed, decoded_rows, sweep
from pscope.inputs.relations import Relation, Sample
from pscope.metrics import answer_found
from pscope.models.model import LanguageModel
from pscope.models.prompts import Prompt, written_out
from pscope.models.residual import capture

ANOTHER, PROBE, MAJORITY = "another subject", "probe", "majority class"

_TYPES = {
    "relation": "string",
    "subject": "string",
    "object": "string",
    "context": "int64",
    "fold": "int64",
    **TYPES,
    "state_of": "string",
    "chosen": "boolean",
    "nameable": "boolean",
}


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
    def enough(self) -> bool:
        """Whether there is a subject for every fold."""
        return len(self.samples) >= FOLDS

    def plain(self, sample: Sample) -> str:
        """The question with the subject in the place of the placeholder."""
        return written_out(self.target, sample.subject)

    def known(self, said: Mapping[str, str], samples: int, seed: int) -> tuple[Question, int]:
        """The question of so many subjects, drawn by the seed among those whose answer stands in what the model `said`.

        `said` is by plain question. Also returned is among how many they were drawn.
        """
        answered = [
            place for place, sample in enumerate(self.samples) if answer_found(said[self.plain(sample)], sample.answers)
        ]
        drawn = sorted(answered[index] for index in permuted(seed, len(answered))[:samples])
        chosen = (tuple(part[place] for place in drawn) for part in (self.samples, self.sources))
        return Question(self.relation, self.target, *chosen, self.unread), len(answered)


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
                samples.append(sample)
                sources.append(prompts[:contexts])
    except PromptError as error:
        raise PromptError(f"{relation.name}: {error}") from error
    return Question(relation, target, tuple(samples), tuple(sources), tuple(unread))


def plain_questions(questions: Sequence[Question]) -> list[Wanted]:
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


class AttributeExtraction(Experiment[Source | Probing]):
    """Table 2: every question asked of every source state at every (ℓ, ℓ*), beside controls and a probe.

    A row of the table is one source × pair × condition: `relation`, `subject`, `object`, `context` (the number of the
    source prompt), `fold`, the columns of a sweep (`pscope.experiments.sweep`), and `state_of`. The conditions:

    - "patched": the state of the subject;
    - "another subject": that of one with another answer, drawn by the seed (where there is one);
    - "random vector": a random direction of the same norm, in the place of each subject's first context;
    - "clean target": the target unpatched;
    - "probe": per layer, a logistic regression from states to answers, fitted on the other folds, and "majority
      class", the answer most frequent there. Both belong to no target layer. An answer of other subjects counts as a
      continuation does; `nameable` says whether any in the other folds would. `chosen` marks the probe's layer that was
      best, or tied, when the other folds were probed by each other alone.

    The folds are of whole subjects. A row leaves the batch as soon as its answer is found, and those of all who borrow
    its state. Raises PscopeError for a question with fewer subjects than folds.
    """

    def __init__(
        self,
        model: LanguageModel,
        questions: Sequence[Question],
        pairs: Sequence[Pair],
        decoding: Decoding = GREEDY,
        *,
        seed: int = 0,
        memory: int = MEMORY,
    ) -> None:
        for question in questions:
            if not question.enough:
                name, subjects = question.relation.name, len(question.samples)
                raise PscopeError(f"{name}: {subjects} subjects are fewer than the {FOLDS} folds")
        self._pairs, self._decoding, self._seed = tuple(pairs), decoding, seed
        self._lenders: list[dict[str, object]] = []
        self.units = [unit for question in questions for unit in self._units(question)]
        super().__init__(model, self.units[0].target, memory)

    def _units(self, question: Question) -> Iterator[Source | Probing]:
        samples, name = question.samples, question.relation.name
        folds = draw_folds([sample.subject for sample in samples], self._seed)
        lenders = _lenders(samples, self._seed)
        for number, (sample, sources) in enumerate(zip(samples, question.sources, strict=True)):
            lent_to = tuple(other.answers for other, of in zip(samples, lenders, strict=True) if of == number)
            for context, source in enumerate(sources):
                about = _about(question, number, folds, context)
                if lenders[number] is not None:
                    self._lenders.append({**about, "lender": samples[lenders[number]].subject})
                yield Source(
                    f"{name}/{sample.subject}" if context == 0 else f"{name}/{sample.subject}/{context}",
                    decoded_rows(self._pairs, random=context == 0),
                    question.target,
                    source,
                    self._pairs,
                    about,
                    sample.answers,
                    lent_to,
                    random=context == 0,
                )
        yield Probing(f"{name}: probe", 0, f"{name}: probe", question, tuple(folds))

    def read(self, units: Sequence[Source | Probing]) -> pd.DataFrame:
        if isinstance(units[0], Probing):
            return pd.concat([self._probed(unit) for unit in units], ignore_index=True)
        table = tidy(sweep(self.scope(units[0].target), units, self._decoding, self._seed), _TYPES)
        return table.assign(state_of=table["subject"].where(table["condition"] == PATCHED))

    def work(self, unit: Source | Probing) -> Work:
        if isinstance(unit, Probing):
            return Work(sum(len(source) for sources in unit.question.sources for source in sources))
        return unit.work(self._decoding.new_tokens)

    def join(self, table: pd.DataFrame) -> pd.DataFrame:
        """With what another subject's state said, held against each subject's own answers."""
        if not self._lenders:
            return table
        answers = {
            (unit.about["relation"], unit.about["subject"]): unit.answers
            for unit in self.units
            if isinstance(unit, Source)
        }
        theirs = borrowed(table, pd.DataFrame(self._lenders), "subject", ("relation", "context"))
        found = [answer_found(row.continuation, answers[row.relation, row.subject]) for row in theirs.itertuples()]
        theirs = theirs.assign(condition=ANOTHER, state_of=theirs["lender"], found=found)
        return pd.concat([table, tidy(theirs, _TYPES)], ignore_index=True)

    def _probed(self, unit: Probing) -> pd.DataFrame:
        """A logistic regression per layer, and the majority class, each fitted on the other folds."""
        question, (layers, _) = unit.question, source_layers(self._pairs)
        read = [(sample, context) for sample, sources in enumerate(question.sources) for context in range(len(sources))]
        prompts = [question.sources[sample][context] for sample, context in read]
        probed = probe_elsewhere(
            capture(self.model, prompts, layers=layers).float().cpu().numpy(),
            [question.samples[sample].object for sample, _ in read],
            np.array([unit.folds[sample] for sample, _ in read]),
            lambda number, answer: answer_found(answer, question.samples[read[number][0]].answers),
        )
        rows = []
        for number, (sample, context) in enumerate(read):
            base = {**_about(question, sample, unit.folds, context), "nameable": probed.nameable[number]}
            told = {"continuation": probed.majority[number], "found": probed.majority_right[number]}
            rows.append({**base, "condition": MAJORITY, **told})
            base.update(position=prompts[number].position, token=prompts[number].token, state_of=base["subject"])
            for place, layer in enumerate(layers):
                told = {"continuation": probed.predicted[number, place], "found": probed.right[number, place]}
                chosen = probed.chosen[number, place]
                rows.append({**base, "condition": PROBE, "layer": layer, **told, "chosen": chosen})
        return tidy(rows, _TYPES)


def _about(question: Question, sample: int, folds: Sequence[int], context: int) -> dict[str, object]:
    read = question.samples[sample]
    names = {"relation": question.relation.name, "subject": read.subject, "object": read.object}
    return {**names, "context": context, "fold": folds[sample]}


def _lenders(samples: Sequence[Sample], seed: int) -> list[int | None]:
    """For each sample the number of another with another answer, None where there is none."""
    random = np.random.default_rng(seed)
    lenders = []
    for sample in samples:
        others = [
            index
            for index, other in enumerate(samples)
            if other is not sample and not answer_found(" , ".join(other.answers), sample.answers)
        ]
        lenders.append(int(random.choice(others)) if others else None)
    return lenders


def summarise(table: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """One row per relation: how often the answer is found, by oracle and by choice on other subjects.

    `subjects` and `samples` (subject × context) count what was read. The paper's number is `oracle`, with
    `oracle_std`: at each ℓ the share of samples for which any ℓ* gives the answer, mean and standard deviation over ℓ;
    `random_oracle` and `another_oracle` are those of the controls. `held_out` is the accuracy at the (ℓ, ℓ*) that was
    best for the subjects of the other folds, averaged over those that tie, and `random_held_out` and
    `another_held_out` those of the controls at the same pairs; its band is from resampling subjects, and exact where
    all agree. `probe` and `probe_std` are over ℓ, `probe_held_out` is at the layer that was best within the other
    folds.

    `p` is that of a paired permutation test of held_out against probe_held_out over the `nameable` subjects, times the
    number of relations (Bonferroni). The others are left out, since no probe could name their answers: nobody in
    the other folds has them. It is missing where so few subjects could not reach .05 whatever they showed.
    """
    relations = list(dict.fromkeys(table["relation"]))
    found = []
    for relation in relations:
        rows = table[table["relation"] == relation].astype({"found": float})
        folds = rows.drop_duplicates(["subject", "context"]).set_index(["subject", "context"])["fold"]
        grid = {name: found_at(rows, name, ["subject", "context"]) for name in (PATCHED, RANDOM, ANOTHER)}
        any_target = {name: cells.T.groupby(level="layer").max().T for name, cells in grid.items() if not cells.empty}
        probe = rows[rows["condition"] == PROBE]
        chosen = chosen_elsewhere(grid[PATCHED], folds.loc[grid[PATCHED].index])
        held_out = at_chosen(grid[PATCHED], chosen)
        probed = probe[probe["chosen"].astype(bool)].groupby(["subject", "context"])["found"].mean()
        per_subject = held_out.groupby("subject").agg(["sum", "count"])
        (low,), (high,) = share_bands(per_subject[["sum"]].to_numpy(), per_subject["count"].to_numpy(), seed)
        result = {
            "relation": relation,
            "subjects": len(per_subject),
            "samples": len(held_out),
            "oracle": any_target[PATCHED].mean().mean(),
            "oracle_std": any_target[PATCHED].mean().std(ddof=0),
            "held_out": held_out.mean(),
            "held_out_low": low,
            "held_out_high": high,
            "probe": probe["found"].mean(),
            "probe_std": probe.groupby("layer")["found"].mean().std(ddof=0),
            "probe_held_out": probed.mean(),
            "majority": rows.loc[rows["condition"] == MAJORITY, "found"].mean(),
            "clean": rows.loc[rows["condition"] == CLEAN, "found"].mean(),
        }
        for condition, name in ((RANDOM, "random"), (ANOTHER, "another")):
            cells = grid[condition]
            result[f"{name}_oracle"] = any_target[condition].mean().mean() if len(cells) else np.nan
            result[f"{name}_held_out"] = at_chosen(cells, chosen).mean() if len(cells) else np.nan
        nameable = probe[probe["nameable"].astype(bool)]["subject"].unique()
        result["nameable"] = len(nameable)
        result["p"] = _corrected_p(held_out.loc[nameable], probed.loc[nameable], len(relations), seed)
        found.append(result)
    return pd.DataFrame(found)


def over_layers(table: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """Accuracy over source layers: per relation × condition × layer the mean `found`, with its band `low` and `high`.

    For patched states and controls it is the oracle, any ℓ* of the grid; bands are from resampling subjects, and exact
    where all agree.
    """
    frames = []
    for (relation, condition), rows in table.dropna(subset=["layer"]).groupby(["relation", "condition"], sort=False):
        units = rows.astype({"found": float}).groupby(["subject", "context", "layer"])["found"].max().unstack("layer")
        sums, counts = units.groupby("subject").sum(), units.groupby("subject").size()
        low, high = share_bands(sums.to_numpy(), counts.to_numpy(), seed)
        frames.append(
            pd.DataFrame(
                {
                    "relation": relation,
                    "condition": condition,
                    "layer": units.columns,
                    "found": units.mean().to_numpy(),
                    "low": low,
                    "high": high,
                }
            )
        )
    return pd.concat(frames, ignore_index=True)


def _corrected_p(one: pd.Series, other: pd.Series, tests: int, seed: int) -> float:
    """Of a paired permutation test over subjects, times the number of tests; NaN if they are too few to reach .05."""
    difference = (one.groupby("subject").mean() - other.groupby("subject").mean()).to_numpy()
    # Of all flips of sign, two are the most extreme.
    if tests * 2 / 2 ** len(difference) > 0.05:
        return np.nan
    if not difference.any():
        return 1.0
    test = permutation_test(
        (difference,),
        lambda values, axis: values.mean(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=9999,
        rng=np.random.default_rng(seed),
    )
    return min(1.0, tests * float(test.pvalue))
