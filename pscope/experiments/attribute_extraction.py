"""Attribute extraction: what a subject's hidden state tells of it, by a question patched with it and by a probe.

The paper's section 4.2 (Table 2). The state of a subject, read in a sentence that only mentions it, is patched over the
placeholder of a prompt that asks for one of its attributes, "The official currency of x"; an answer counts when it
stands in the continuation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
import torch
from scipy.stats import permutation_test

from pscope.engine.generate import GREEDY, Decoding
from pscope.engine.patchscope import MEMORY, Patchscope
from pscope.engine.selfcheck import PathName
from pscope.engine.unpatched import continue_prompts
from pscope.errors import PromptError, PscopeError, RowError
from pscope.experiments.bands import share_bands
from pscope.experiments.grid import (
    FOLDS,
    Pair,
    at_chosen,
    chosen_elsewhere,
    draw_folds,
    first_token,
    same_norm,
    source_layers,
    source_prompt,
    speak,
)
from pscope.experiments.probe import probe_elsewhere
from pscope.inputs.relations import Relation, Sample
from pscope.metrics import answer_found, answer_settled
from pscope.models.model import LanguageModel
from pscope.models.prompts import Prompt, written_out
from pscope.models.residual import capture

PATCHED, ANOTHER, RANDOM, CLEAN = "patched", "another subject", "random vector", "clean target"
PROBE, MAJORITY = "probe", "majority class"


@dataclass(frozen=True)
class Question:
    """A relation, ready to be asked of a model: the target prompt that asks, and the samples it is asked of.

    `subjects` were in the file; the model itself answers for `answered` of them when asked in plain words; of these
    `samples` were drawn, each with its `sources`. `unread` tells of every source prompt of the file in which the
    subject cannot be found why not.
    """

    relation: Relation
    target: Prompt
    samples: tuple[Sample, ...]
    sources: tuple[tuple[Prompt, ...], ...]
    subjects: int
    answered: int
    unread: tuple[str, ...] = ()

    @property
    def enough(self) -> bool:
        """Whether there is a subject for every fold."""
        return len(self.samples) >= FOLDS


def ask_plainly(
    model: LanguageModel,
    relations: Sequence[Relation],
    *,
    samples: int,
    contexts: int,
    decoding: Decoding = GREEDY,
    seed: int = 0,
    memory: int = MEMORY,
    path: PathName | Literal["auto"] = "auto",
) -> list[Question]:
    """Keep what the model knows: the samples whose answer stands in its own continuation of the unpatched question.

    Of those, `samples` of each relation are drawn by the seed, each with its first `contexts` source prompts that can
    be read; the questions of all relations share their passes. Raises PscopeError, naming the relation, for a target
    prompt that cannot be read.
    """
    targets, unread, asked, plain = [], [], [], []
    for relation in relations:
        with _naming(relation):
            targets.append(model.prompt(relation.target.text, relation.target.at))
            unread.append([])
            for sample in relation.samples:
                sources, faults = _readable(model, sample)
                unread[-1] += faults
                if sources:
                    asked.append((relation, sample, sources[:contexts]))
                    plain.append(model.prompt(written_out(targets[-1], sample.subject)))
    known: dict[str, list[tuple[Sample, tuple[Prompt, ...]]]] = {relation.name: [] for relation in relations}
    spoken = continue_prompts(
        model,
        plain,
        decoding,
        settled=lambda index, text: answer_settled(text, asked[index][1].answers),
        memory=memory,
        path=path,
    )
    try:
        for index, tokens in sorted(spoken):
            relation, sample, sources = asked[index]
            if answer_found(decoding.text(tokens, model.tokenizer), sample.answers):
                known[relation.name].append((sample, sources))
    except RowError as error:
        relation, sample, _ = asked[error.row]
        raise PscopeError(f"{relation.name}: {sample.subject!r} failed: {error.reason}") from error
    questions = []
    for relation, target, faults in zip(relations, targets, unread, strict=True):
        answered = known[relation.name]
        order = np.random.default_rng(seed).permutation(len(answered))
        drawn = [answered[index] for index in sorted(order[:samples].tolist())]
        of_samples, of_sources = (tuple(part[place] for part in drawn) for place in (0, 1))
        counts = len(relation.samples), len(answered)
        questions.append(Question(relation, target, of_samples, of_sources, *counts, tuple(faults)))
    return questions


def _readable(model: LanguageModel, sample: Sample) -> tuple[tuple[Prompt, ...], list[str]]:
    """The source prompts of a sample in which its subject is found, and why it is not in the others."""
    prompts, faults = [], []
    for marked in sample.sources:
        try:
            prompts.append(source_prompt(model, marked.text, marked.at))
        except PromptError as error:
            faults.append(str(error))
    return tuple(prompts), faults


@contextmanager
def _naming(relation: Relation) -> Iterator[None]:
    try:
        yield
    except PromptError as error:
        raise PromptError(f"{relation.name}: {error}") from error


def extract(
    scope: Patchscope, question: Question, pairs: Sequence[Pair], decoding: Decoding = GREEDY, seed: int = 0
) -> Iterator[pd.DataFrame]:
    """Ask the question of every source state at every (ℓ, ℓ*), beside controls and a probe.

    `scope` is a Patchscope of the question's target. Yields chunks of the table; a row is one source × pair ×
    condition: `relation`, `subject`, `object`, `context` (the number of the source prompt), `fold`, `condition`,
    `layer`, `target_layer`, `state_of` and the `position` and `token` of its source prompt where it was read, the
    `path` taken, `continuation`, `found`, and for patched and random states `rank` (from 1) and `probability` of the
    answer's first token right after the target prompt. The conditions:

    - "patched": the state of the subject;
    - "another subject": that of one with another answer, drawn by the seed (where there is one);
    - "random vector": a random direction of the same norm, in the place of each subject's first context;
    - "clean target": the target unpatched;
    - "probe": per layer, a logistic regression from states to answers, fitted on the other folds, and "majority
      class", the answer most frequent there. Both belong to no target layer. An answer of other subjects counts as a
      continuation does; `nameable` says whether any in the other folds would. `chosen` marks the probe's layer that was
      best, or tied, when the other folds were probed by each other alone.

    The folds are of whole subjects. A row leaves the batch as soon as its answer is found, and those of all who borrow
    its state. Raises PscopeError, naming the subject, for a row that fails.
    """
    if not question.enough:
        raise PscopeError(f"{len(question.samples)} subjects are fewer than the {FOLDS} folds")
    folds = draw_folds([sample.subject for sample in question.samples], seed)
    yield from _read_states(scope, question, pairs, folds, decoding, seed)
    yield _probed(scope.model, question, source_layers(pairs)[0], folds)


def rows_to_decode(questions: Sequence[Question], pairs: Sequence[Pair]) -> int:
    """How many patched rows `extract` decodes, for all the questions."""
    return sum(len(pairs) * (len(sources) + 1) for question in questions for sources in question.sources)


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
        grid = {
            condition: _cells(rows, condition, ["layer", "target_layer"]) for condition in (PATCHED, RANDOM, ANOTHER)
        }
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


def _cells(rows: pd.DataFrame, condition: str, columns: list[str]) -> pd.DataFrame:
    """Found or not, (subject × context, layers)."""
    here = rows[rows["condition"] == condition].dropna(subset=columns).astype(dict.fromkeys(columns, int))
    return here.pivot(index=["subject", "context"], columns=columns, values="found").sort_index(axis=1)


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


def _read_states(
    scope: Patchscope, question: Question, pairs: Sequence[Pair], folds: Sequence[int], decoding: Decoding, seed: int
) -> Iterator[pd.DataFrame]:
    samples = question.samples
    layers, columns = source_layers(pairs)
    lenders = _lenders(samples, seed)
    borrowers = [[index for index, lender in enumerate(lenders) if lender == sample] for sample in range(len(samples))]
    # A chunk holds as many samples, with all their contexts, as share a pass.
    widest = max(len(sources) for sources in question.sources) + 1
    together = max(1, scope.rows_per_pass(decoding.new_tokens) // (len(pairs) * widest))
    said: dict[int, list[list[str]]] = {}
    for start in range(0, len(samples), together):
        part = range(start, min(start + together, len(samples)))
        own = [(sample, context) for sample in part for context in range(len(question.sources[sample]))]
        firsts = [place for place, (_, context) in enumerate(own) if context == 0]
        units = [(*unit, PATCHED) for unit in own] + [(*own[place], RANDOM) for place in firsts]
        states = capture(scope.model, [question.sources[sample][context] for sample, context in own], layers=layers)
        random = same_norm(states[firsts], [f"{question.relation.name}/{samples[s].subject}" for s in part], seed)
        states = torch.cat([states, random])[:, columns]  # (units, pairs, hidden)
        wanted = [
            [samples[index].answers for index in (sample, *(borrowers[sample] if condition == PATCHED else ()))]
            for sample, _, condition in units
        ]
        names = [
            f"{question.relation.name}: {samples[sample].subject!r} ({condition}, context {context})"
            for sample, context, condition in units
        ]
        texts, clean = speak(
            scope,
            states,
            names,
            pairs,
            decoding,
            lambda unit, text, wanted=wanted: all(answer_settled(text, answers) for answers in wanted[unit]),
        )
        ranks, probabilities = first_token(scope, states, [samples[sample].object for sample, _, _ in units], pairs)
        frames = []
        for unit, (sample, context, condition) in enumerate(units):
            base = _base(question, folds, sample, context)
            frame = _answered(base, condition, pairs, texts[unit], samples[sample].answers)
            if condition == PATCHED:
                frame = frame.assign(**_read_from(question, sample, context))
            frames.append(frame.assign(rank=ranks[unit], probability=probabilities[unit]))
            if condition == PATCHED:
                said.setdefault(sample, []).append(texts[unit])
                frames.append(_answered(base, CLEAN, [(None, None)], [clean], samples[sample].answers))
        for sample, lender in enumerate(lenders):
            # As soon as both have spoken.
            if lender is not None and {sample, lender} <= said.keys() and (sample in part or lender in part):
                for context in range(min(len(said[sample]), len(said[lender]))):
                    base = _base(question, folds, sample, context)
                    frame = _answered(base, ANOTHER, pairs, said[lender][context], samples[sample].answers)
                    frames.append(frame.assign(**_read_from(question, lender, context)))
        yield _table([frame.assign(path=scope.path) for frame in frames])


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


def _probed(model: LanguageModel, question: Question, layers: Sequence[int], folds: Sequence[int]) -> pd.DataFrame:
    """A logistic regression per layer, and the majority class, each fitted on the other folds."""
    units = [(sample, context) for sample, sources in enumerate(question.sources) for context in range(len(sources))]
    states = capture(model, [question.sources[sample][context] for sample, context in units], layers=layers)
    read = [question.samples[sample] for sample, _ in units]
    probed = probe_elsewhere(
        states.float().cpu().numpy(),
        [sample.object for sample in read],
        np.array([folds[sample] for sample, _ in units]),
        lambda unit, answer: answer_found(answer, read[unit].answers),
    )
    rows = []
    for number, unit in enumerate(units):
        base = {**_base(question, folds, *unit), "nameable": probed.nameable[number]}
        told = {"continuation": probed.majority[number], "found": probed.majority_right[number]}
        rows.append({**base, "condition": MAJORITY, **told})
        base.update(_read_from(question, *unit))
        for place, layer in enumerate(layers):
            told = {"continuation": probed.predicted[number, place], "found": probed.right[number, place]}
            chosen = probed.chosen[number, place]
            rows.append({**base, "condition": PROBE, "layer": layer, **told, "chosen": chosen})
    return _table([pd.DataFrame(rows)])


def _base(question: Question, folds: Sequence[int], sample: int, context: int) -> dict:
    read = question.samples[sample]
    return {
        "relation": question.relation.name,
        "subject": read.subject,
        "object": read.object,
        "context": context,
        "fold": folds[sample],
    }


def _read_from(question: Question, sample: int, context: int) -> dict:
    """Whose state it is, and where it was read."""
    source = question.sources[sample][context]
    return {"state_of": question.samples[sample].subject, "position": source.position, "token": source.token}


def _answered(
    base: dict,
    condition: str,
    pairs: Sequence[Pair] | Sequence[tuple[None, None]],
    texts: Sequence[str],
    answers: Sequence[str],
) -> pd.DataFrame:
    frame = pd.DataFrame({"continuation": texts, "found": [answer_found(text, answers) for text in texts]})
    layers, targets = zip(*pairs, strict=True)
    return frame.assign(**base, condition=condition, layer=layers, target_layer=targets)


def _table(frames: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """One table with the columns of them all, of one type whatever is missing in some."""
    dtypes = {
        "relation": "string",
        "subject": "string",
        "object": "string",
        "context": "int64",
        "fold": "int64",
        "condition": "string",
        "layer": "Int64",
        "target_layer": "Int64",
        "state_of": "string",
        "position": "Int64",
        "token": "string",
        "path": "string",
        "continuation": "string",
        "found": "bool",
        "rank": "Int64",
        "probability": "Float64",
        "chosen": "boolean",
        "nameable": "boolean",
    }
    whole = [frame.reindex(columns=list(dtypes)).astype(dtypes) for frame in frames]
    return pd.concat(whole, ignore_index=True)
