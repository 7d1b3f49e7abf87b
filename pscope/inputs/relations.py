"""Relations of subjects and objects, and the multi-hop queries composed of them: shipped, or files of the user's."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from pscope.errors import DataError
from pscope.inputs.records import parse_csv, parse_json, prompt_of, read_text, text_of
from pscope.metrics import gives_away
from pscope.models.prompts import Nearest

SLOT, PLACEHOLDER = "{}", "x"


@dataclass(frozen=True)
class Marked:
    """A prompt that is yet to be tokenised, and the position in it: an index, a text, or the nearest of several."""

    text: str
    at: str | int | Nearest


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


@dataclass(frozen=True)
class Query:
    """A question of two hops: `second` asks something of what `first` describes.

    As in the paper's section 5, `first` is π1, "the company that created Visual Basic Script", and `second` is π2, "The
    current CEO of". `bridge` are the answers to the first hop, `answers` those to both; `hop_one` and `hop_two` ask
    for either hop alone. `source` says which relations it is composed of.
    """

    first: str
    second: str
    answers: tuple[str, ...]
    bridge: tuple[str, ...] = ()
    hop_one: str = ""
    hop_two: str = ""
    source: str = ""

    @property
    def text(self) -> str:
        """The whole question, "The current CEO of the company that created Visual Basic Script"."""
        return f"{self.second} {self.first}"


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


def read_relations(path: Path) -> tuple[list[Relation], list[str]]:
    """The relations in a file or in all files of a folder, and what was skipped, a line for each file.

    A `.json` file holds one relation: "name", "kind", a "template" with one {} for the subject, perhaps a "phrase" for
    the object, and "samples" of "subject", "object", perhaps "aliases" of the object, and "contexts", sentences that
    hold the subject once. A file `contexts.json` beside it may give contexts by subject.

    A `.tsv` file has the columns of the paper's: subject, object, prompt_source, prompt_target, position_source,
    position_target, perhaps source_cropped_toks; others are not looked at. Its positions are another tokenizer's, so
    the subject and the placeholder x are found by their text; of several places the one where source_cropped_toks, a
    list of tokens, ends is meant, or the one at the position. Further objects of a subject are accepted as well. Rows
    that cannot be used are left out and counted.

    A file that cannot be read is skipped where another can. Raises DataError if none can, naming the line or sample
    where there is one to name.
    """
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


def compose(relations: Sequence[Relation]) -> list[Query]:
    """Every query of two hops: all pairs of relations of which objects of the one are subjects of the other.

    The first needs a phrase, the second a template that ends with its slot, or with its slot and "is". A query whose
    answer stands in it already, or in its bridge, is left out.
    """
    queries = []
    for one in relations:
        for two in relations:
            second, _, rest = two.template.partition(SLOT)
            if one is two or not one.phrase or not second.strip() or rest.strip() not in ("", "is"):
                continue
            subjects = {_bare(sample.subject): sample for sample in two.samples}
            for sample in one.samples:
                bridge = subjects.get(_bare(sample.object))
                if bridge is None:
                    continue
                query = Query(
                    first=one.phrase.replace(SLOT, sample.subject),
                    second=second.strip(),
                    answers=bridge.answers,
                    bridge=(bridge.subject, *sample.answers),
                    hop_one=one.template.replace(SLOT, sample.subject),
                    hop_two=two.template.replace(SLOT, bridge.subject),
                    source=f"{one.name} → {two.name}",
                )
                if not gives_away(query.text, query.answers) and not gives_away(bridge.subject, query.answers):
                    queries.append(query)
    return queries


def read_queries(path: Path) -> tuple[list[Query], list[str]]:
    """Queries from a `.json` list of "first", "second", "answer", and perhaps "aliases" and "bridge".

    Aliases and bridge are a text or a list of texts. A folder, or any other file that `read_relations` takes, is
    composed; what that skipped is returned beside the queries. Raises DataError.
    """
    if path.suffix == ".json" and path.is_file():
        records = parse_json(read_text(path), str(path))
        if isinstance(records, list):
            return _queries(records, str(path)), []
    relations, skipped = read_relations(path)
    queries = compose(relations)
    if not queries:
        raise DataError(
            f"{path}: no query can be composed; objects of one relation (with a phrase) must be subjects of another"
        )
    return queries, skipped


def _queries(records: list, source: str) -> list[Query]:
    queries = []
    for number, record in enumerate(records, 1):
        where = f"{source}, entry {number}"
        first, second, answer = (text_of(record, key, where) for key in ("first", "second", "answer"))
        bridge = _texts(record, "bridge", where)
        query = Query(
            first=first,
            second=second,
            answers=(answer, *_texts(record, "aliases", where)),
            bridge=bridge,
            hop_two=f"{second} {bridge[0]} is" if bridge else "",
            hop_one=f"{first[:1].upper()}{first[1:]} is",
            source=source,
        )
        if gives_away(query.text, query.answers):
            raise DataError(f"{where}: the answer {answer!r} stands in the query itself")
        queries.append(query)
    if not queries:
        raise DataError(f"{source} holds no query")
    if len({query.text for query in queries}) < len(queries):
        raise DataError(f"{source}: some query is there twice")
    return queries


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
        sentences = _texts(entry, "contexts", where, prompt_of) or contexts.get(subject, ())
        if not sentences:
            raise DataError(f'{where}: {subject!r} has no "contexts", sentences that hold it')
        for sentence in sentences:
            if subject not in sentence:
                raise DataError(f"{where}: {subject!r} does not stand in its context {sentence!r}")
        answers = (text_of(entry, "object", where), *_texts(entry, "aliases", where))
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
        if _bare(subject) == _bare(answer):
            counts["whose object is the subject"] += 1
            continue
        if subject not in prompt:
            counts["whose prompt_source does not hold the subject"] += 1
            continue
        marked = Marked(prompt, Nearest(subject, index, _cropped_end(row, prompt)))
        known, seen = answers.setdefault(subject, []), sources.setdefault(subject, [])
        if answer in known and marked in seen:
            counts["that repeat others"] += 1
        if answer not in known:
            if known:
                counts["with a further object, accepted too"] += 1
            known.append(answer)
        if marked not in seen:
            seen.append(marked)
    told = f"{source}: rows " + ", ".join(f"{reason}: {count:,}" for reason, count in counts.items())
    if not sources:
        raise DataError(f"{told}; no row is left" if counts else f"{source} holds no row")
    samples = tuple(Sample(subject, tuple(answers[subject]), tuple(marked)) for subject, marked in sources.items())
    return Relation(name, "unknown", targets.pop(), samples), [told] if counts else []


def _cropped_end(row: dict[str, str], prompt: str) -> int | None:
    """Where the text of source_cropped_toks, a list of tokens up to the subject, ends in the prompt, if it is given."""
    try:
        cropped = "".join(ast.literal_eval(row.get("source_cropped_toks", "").strip()))
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return None
    return max(prompt.find(cropped), 0) + len(cropped) if cropped else None


def _refuse(subject: str, answer: str, others: Iterable[str], where: str) -> None:
    if _bare(subject) == _bare(answer):
        raise DataError(f"{where}: the object of {subject!r} is the subject itself")
    if subject in others:
        raise DataError(f"{where}: {subject!r} is there already")


def _index(row: dict[str, str], key: str, where: str) -> int:
    text = text_of(row, key, where)
    try:
        return int(text)
    except ValueError as error:
        raise DataError(f"{where}: {key} {text!r} is no whole number") from error


def _texts(record: dict, key: str, where: str, read: Callable[[object, str, str], str] = text_of) -> tuple[str, ...]:
    """The texts under a key that may be missing, or hold one text or a list of them."""
    value = record.get(key) or []
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list):
        raise DataError(f'{where}: "{key}" is neither a text nor a list of texts')
    return tuple(read({key: text}, key, where) for text in texts)


def _contexts(content: str, source: str) -> dict[str, tuple[str, ...]]:
    record = parse_json(content, source)
    if not isinstance(record, dict):
        raise DataError(f"{source}: an object with sentences for every subject is needed")
    return {subject: _texts(record, subject, source, prompt_of) for subject in record}


def _bare(name: str) -> str:
    """A name without its article and its capitals, by which objects and subjects are matched."""
    return name.casefold().removeprefix("the ")
