"""Relations of subjects and objects: those that ship, or files of the user's."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from pscope.errors import DataError
from pscope.files import as_path
from pscope.inputs.records import parse_csv, parse_json, prompt_of, read_text, text_of, texts_of
from pscope.metrics import same_answer
from pscope.models.prompts import Ending, Nearest

SLOT, PLACEHOLDER = "{}", "x"


@dataclass(frozen=True)
class Marked:
    """A prompt that is yet to be tokenised, and the position in it: an index, a text, or the nearest of several."""

    text: str
    at: str | int | Nearest | Ending


@dataclass(frozen=True)
class Sample:
    """A subject, the answers that are right for it, the usual one first, and prompts in which it is marked."""

    subject: str
    answers: tuple[str, ...]
    sources: tuple[Marked, ...]

    @property
    def object(self) -> str:
        return self.answers[0]


@dataclass(frozen=True)
class Relation:
    """Samples of one relation, and the target prompt that asks for it at a marked placeholder.

    `template` has a slot for the subject, and `phrase` speaks of the object as "the country that {} comes from"; both
    are empty where a file has none.
    """

    name: str
    kind: str
    target: Marked
    samples: tuple[Sample, ...]
    template: str = ""
    phrase: str = ""


def shipped_relations() -> list[Relation]:
    """The relations that come with pscope, written for it; no network needed."""
    folder = files("pscope.data").joinpath("relations")
    contexts = _contexts(folder.joinpath("contexts.json").read_text("utf-8"), "contexts.json")
    names = sorted(file.name for file in folder.iterdir() if file.name.endswith(".json"))
    return [
        _parse_relation(folder.joinpath(name).read_text("utf-8"), name, contexts)
        for name in names
        if name != "contexts.json"
    ]


def read_relations(path: str | Path) -> tuple[list[Relation], list[str]]:
    """The relations in a file or in all files of a folder, and what was skipped, a line for each file.

    A `.json` file holds one relation: "name", "kind", a "template" with one {} for the subject, perhaps a "phrase" for
    the object, and "samples" of "subject", "object", perhaps "aliases" of the object, and "contexts", sentences that
    hold the subject once. A file `contexts.json` beside it may give contexts by subject.

    A `.tsv` file has the columns of the paper's: subject, object, prompt_source, prompt_target, position_source,
    position_target, perhaps source_cropped_toks; others are not looked at. Its positions are another tokenizer's, so
    the subject and the placeholder x are found by their text; of several places the one where source_cropped_toks, a
    list of tokens, ends is meant, or the one at the position. Where the subject does not stand in the prompt, the token
    at the position is read, if the subject ends with it. Further objects of a subject are accepted as well. Rows
    that cannot be used are left out and counted.

    A file that cannot be read is skipped where another can. Raises DataError if none can, naming the line or sample
    where there is one to name.
    """
    path = as_path(path)
    paths = sorted(path.iterdir()) if path.is_dir() else [path]
    paths = [file for file in paths if file.suffix in (".json", ".tsv") and file.name != "contexts.json"]
    if not paths:
        raise DataError(f"{path} holds no relation: a .json or .tsv file, or a folder of them, is needed")
    relations: dict[str, Relation] = {}
    skipped: list[str] = []
    faults: list[DataError] = []
    for file in paths:
        try:
            relation, notes = _read_relation(file)
            if relation.name in relations:
                raise DataError(f"{file}: there is a relation {relation.name!r} already")
        except DataError as fault:
            faults.append(fault)
            skipped.append(f"{fault}; the file is skipped")
        else:
            relations[relation.name] = relation
            skipped += notes
    if not relations:
        raise faults[0]
    return list(relations.values()), skipped


def _read_relation(file: Path) -> tuple[Relation, list[str]]:
    """The relation in a file, and what was skipped of it."""
    if file.suffix == ".tsv":
        return _parse_tsv(read_text(file), str(file), file.stem)
    beside = file.with_name("contexts.json")
    contexts = _contexts(read_text(beside), str(beside)) if beside.is_file() else {}
    return _parse_relation(read_text(file), str(file), contexts), []


def _parse_relation(content: str, source: str, contexts: dict[str, tuple[str, ...]]) -> Relation:
    record = parse_json(content, source)
    name, kind = (text_of(record, key, source) for key in ("name", "kind"))
    template = prompt_of(record, "template", source)
    phrase = text_of(record, "phrase", source) if record.get("phrase") else ""
    for key, text in (("template", template), ("phrase", phrase)):
        if text and text.count(SLOT) != 1:
            raise DataError(
                f"{source}: the {key} {text!r} has {text.count(SLOT)} slots {SLOT} for the subject, not one"
            )
    if not isinstance(record.get("samples"), list) or not record["samples"]:
        raise DataError(f'{source}: "samples" is no list of samples, or an empty one')
    samples: dict[str, Sample] = {}
    for number, entry in enumerate(record["samples"], 1):
        where = f"{source}, sample {number}"
        subject = text_of(entry, "subject", where)
        _refuse(subject, text_of(entry, "object", where), samples, where)
        sentences = texts_of(entry, "contexts", where, prompt_of) or contexts.get(subject, ())
        if not sentences:
            raise DataError(f'{where}: {subject!r} has no "contexts", sentences that hold it')
        for sentence in sentences:
            if subject not in sentence:
                raise DataError(f"{where}: {subject!r} does not stand in its context {sentence!r}")
        answers = (text_of(entry, "object", where), *texts_of(entry, "aliases", where))
        samples[subject] = Sample(subject, answers, tuple(Marked(sentence, subject) for sentence in sentences))
    target = Marked(template.replace(SLOT, PLACEHOLDER), PLACEHOLDER)
    return Relation(name, kind, target, tuple(samples.values()), template, phrase)


def _parse_tsv(content: str, source: str, name: str) -> tuple[Relation, list[str]]:
    targets: set[Marked] = set()
    answers: dict[str, list[str]] = {}
    sources: dict[str, list[Marked]] = {}
    counts: Counter[str] = Counter()
    for where, row in parse_csv(content, source, delimiter="\t"):
        texts = ("prompt_source", "prompt_target", "subject", "object")
        empty = [column for column in texts if not row.get(column, column).strip()]
        if empty:
            counts[f"with an empty {empty[0]}"] += 1
            continue
        if not re.fullmatch(r"-?\d{1,9}", row.get("position_source", "0").strip()):
            counts["whose position_source is no whole number"] += 1
            continue
        subject, answer = (text_of(row, column, where) for column in ("subject", "object"))
        prompt, target = (prompt_of(row, column, where) for column in ("prompt_source", "prompt_target"))
        index, target_index = (_index(row, column, where) for column in ("position_source", "position_target"))
        holds_placeholder = re.search(rf"(?<!\w){PLACEHOLDER}(?!\w)", target)
        targets.add(Marked(target, Nearest(PLACEHOLDER, target_index) if holds_placeholder else target_index))
        if len(targets) > 1:
            raise DataError(f"{where}: a relation has one prompt_target and position_target, here is a second")
        if same_answer(answer, [subject]):
            counts["whose object is the subject"] += 1
            continue
        by_text = Nearest(subject, index, _cropped_end(row, prompt))
        marked = Marked(prompt, by_text if subject in prompt else Ending(subject, index))
        subject_answers, subject_sources = answers.setdefault(subject, []), sources.setdefault(subject, [])
        if answer in subject_answers and marked in subject_sources:
            counts["that repeat others"] += 1
        if answer not in subject_answers:
            if subject_answers:
                counts["with a further object, accepted too"] += 1
            subject_answers.append(answer)
        if marked not in subject_sources:
            subject_sources.append(marked)
    summary = f"{source}: rows " + ", ".join(f"{reason}: {count:,}" for reason, count in counts.items())
    if not sources:
        raise DataError(f"{summary}; no row is left" if counts else f"{source} holds no row")
    samples = tuple(Sample(subject, tuple(answers[subject]), tuple(marked)) for subject, marked in sources.items())
    return Relation(name, "unknown", targets.pop(), samples), [summary] if counts else []


def _cropped_end(row: dict[str, str], prompt: str) -> int | None:
    """Where the text of source_cropped_toks, a list of tokens up to the subject, ends in the prompt, if it is given."""
    try:
        cropped = "".join(ast.literal_eval(row.get("source_cropped_toks", "").strip()))
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return None
    return max(prompt.find(cropped), 0) + len(cropped) if cropped else None


def _refuse(subject: str, answer: str, others: Iterable[str], where: str) -> None:
    if same_answer(answer, [subject]):
        raise DataError(f"{where}: the object of {subject!r} is the subject itself")
    if subject in others:
        raise DataError(f"{where}: {subject!r} is there already")


def _index(row: dict[str, str], key: str, where: str) -> int:
    text = text_of(row, key, where)
    try:
        return int(text)
    except ValueError as error:
        raise DataError(f"{where}: {key} {text!r} is no whole number") from error


def _contexts(content: str, source: str) -> dict[str, tuple[str, ...]]:
    record = parse_json(content, source)
    if not isinstance(record, dict):
        raise DataError(f"{source}: an object with sentences for every subject is needed")
    return {subject: texts_of(record, subject, source, prompt_of) for subject in record}
