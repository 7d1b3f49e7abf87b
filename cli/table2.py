"""`pscope table2`: what subjects' hidden states tell of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from pscope.cli.console import out, tell
from pscope.cli.frame import Frame, command
from pscope.cli.grids import GridOptions, tell_price, warn_few
from pscope.cli.options import NewTokensOption, seed_option

from pscope.errors import PscopeError

if TYPE_CHECKING:
    from pscope.experiments.attribute_extraction import Question
    from pscope.inputs.relations import Relation
    from pscope.models.model import LanguageModel

GRID = (1 / 15, 1 / 5, 1 / 3, 1 / 2, 2 / 3), (1 / 30, 2 / 15, 4 / 15, 2 / 5, 8 / 15)


@command
def table2(
    frame: Frame,
    *,
    relations: Annotated[
        Path | None,
        typer.Argument(
            help="A relation (.json, or .tsv as the paper's), or a folder of them.",
            show_default="those that ship",
        ),
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=3, help="Subjects of each relation.", show_default="12; 5 with --quick")
    ] = None,
    contexts: Annotated[
        int | None, typer.Option(min=1, help="Sentences to read each subject in.", show_default="2; 1 with --quick")
    ] = None,
    grid: GridOptions,
    new_tokens: NewTokensOption = 20,
    seed: Annotated[int, seed_option("subjects, folds, random vectors and bands")] = 0,
) -> None:
    """Table 2: attributes of subjects, extracted by Patchscopes and by a logistic-regression probe.

    A subject's state, read in a sentence that mentions it, is patched over the placeholder of "The official currency of
    x is". An answer is right where it is the most probable of the objects of all subjects read, at every pair of
    layers, and, at some, where the row says it. Of the subjects whose answer the model knows, some of each relation are
    read. Beside the accuracy stand those of a probe per layer, the majority class, another subject's state, a random
    vector and the target unpatched.
    """
    samples, contexts = samples or (5 if grid.quick else 12), contexts or (1 if grid.quick else 2)

    from pscope.inputs.relations import read_relations, shipped_relations

    relation_list, skipped = (shipped_relations(), []) if relations is None else read_relations(relations)
    for line in skipped:
        tell(line)
    model = frame.load()

    import pscope
    from pscope.experiments.attribute_extraction import AttributeExtraction, AttributeScores, plain_questions
    from pscope.experiments.attribute_summary import over_layers, summarise
    from pscope.experiments.held_out import FOLDS
    from pscope.experiments.known import PlainWords
    from pscope.experiments.scored_sweep import best_pairs
    from pscope.show.agreement import agreement_table
    from pscope.show.attribute_extraction import accuracy_figure, accuracy_heatmaps, accuracy_table

    pairs = grid.pairs(model)
    decoding = pscope.Decoding(new_tokens)
    readable = _readable_questions(model, relation_list, contexts)
    all_questions = [question.of(grid.asked(samples, len(question.samples), seed)) for question in readable]
    frame.read(repr(relation) for relation in relation_list)
    texts = frame.known(PlainWords(model, plain_questions(all_questions), decoding, memory=frame.memory))
    questions, counts = [], {}
    for candidate in all_questions:
        question, known_count = candidate.known(texts, samples, seed)
        name, subjects = candidate.relation.name, len(candidate.samples)
        counts[name] = [subjects, known_count, len(question.samples)]
        fate = (
            f"{len(question.samples)} are read"
            if question.enough
            else f"skipped, fewer than the {FOLDS} folds, or of one object"
        )
        tell(f"{name}: {known_count} of {subjects} subjects are known, {fate}")
        questions += [question] if question.enough else []
    if not questions:
        raise PscopeError("no relation is left: the model knows too few subjects of each")
    warn_few({f"subjects of {question.relation.name}": len(question.samples) for question in questions})
    options = {"seed": seed, "memory": frame.memory}
    experiment = AttributeScores(model, questions, pairs, by=grid.score, **options)
    tell_price(experiment)
    scores = frame.score(
        experiment,
        relations=str(relations or "shipped with pscope"),
        counts=counts,
        samples=samples,
        contexts=contexts,
        **grid.settings(pairs),
        folds=FOLDS,
        seed=seed,
    )
    best = None if scores is None else best_pairs(scores, "relation", ["subject", "context"])
    said_at = grid.said_pairs(model, GRID, best)
    continuations = frame.say(AttributeExtraction(model, questions, said_at, decoding, **options), best_pairs=best)
    summary, accuracy = summarise(scores, continuations, seed), over_layers(scores, seed)
    frame.run.note("summary", summary)
    frame.run.note("accuracy", accuracy)
    agreement = grid.agreement(scores, continuations, "relation", ["subject", "context"], "subject", seed)
    if len(agreement):
        frame.run.note("agreement", agreement)
    figure = frame.run.draw(accuracy_figure(accuracy, model.name))
    heatmaps = frame.run.draw(accuracy_heatmaps(scores, model.name), "heatmaps")
    frame.finish()
    out.print(accuracy_table(summary))
    if len(agreement):
        out.print(agreement_table(agreement))
    folder = frame.run.folder
    tell(f"tables: {folder / 'table.parquet'} {folder / 'said.parquet'}\nfigures: {figure} {heatmaps}")


def _readable_questions(model: LanguageModel, relations: Sequence[Relation], contexts: int) -> list[Question]:
    """The questions that can be asked of the model; what cannot be read is told. Raises PscopeError if none can."""
    from pscope.experiments.attribute_extraction import question_of

    questions = []
    for relation in relations:
        try:
            question = question_of(model, relation, contexts)
        except PscopeError as error:
            tell(f"{error}; the relation is skipped")
            continue
        if question.unread:
            lost = f"{relation.name}: source prompts left out: {len(question.unread)}"
            tell(f"{lost}, the first because {question.unread[0]}")
        questions.append(question)
    if not questions:
        raise PscopeError("no relation is left: the target prompt of none can be read")
    return questions
