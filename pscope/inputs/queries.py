"""Questions of two hops: composed of relations, or a file of the user's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pscope.errors import DataError
from pscope.files import as_path
from pscope.inputs.records import parse_json, read_text, text_of, texts_of
from pscope.inputs.relations import SLOT, Relation, read_relations
from pscope.metrics import gives_away, normalised


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


def compose(relations: Sequence[Relation]) -> list[Query]:
    """Every query of two hops: all pairs of relations of which objects of the one are subjects of the other.

    The first needs a phrase, the second a template that ends with its slot, or with its slot and "is". A query whose
    answer stands in it already, or in its bridge, is left out. Raises DataError where two relations make one query.
    """
    queries: list[Query] = []
    sources: dict[str, str] = {}
    for one in relations:
        for two in relations:
            second, _, rest = two.template.partition(SLOT)
            if one is two or not one.phrase or not second.strip() or rest.strip() not in ("", "is"):
                continue
            subjects = {normalised(sample.subject): sample for sample in two.samples}
            for sample in one.samples:
                bridge = subjects.get(normalised(sample.object))
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
                if gives_away(query.text, query.answers) or gives_away(bridge.subject, query.answers):
                    continue
                if query.text in sources:
                    raise DataError(
                        f"{query.text!r} is composed twice: {sources[query.text]}, and {query.source}; give the "
                        "relations phrases and templates that tell them apart"
                    )
                sources[query.text] = query.source
                queries.append(query)
    return queries


def read_queries(path: str | Path) -> tuple[list[Query], list[str]]:
    """Queries from a `.json` list of "first", "second", "answer", and perhaps "aliases" and "bridge".

    Aliases and bridge are a text or a list of texts. A folder, or any other file that `read_relations` takes, is
    composed; what that skipped is returned beside the queries. Raises DataError.
    """
    path = as_path(path)
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


def _queries(records: list[Any], source: str) -> list[Query]:
    queries = []
    for number, record in enumerate(records, 1):
        where = f"{source}, entry {number}"
        first, second, answer = (text_of(record, key, where) for key in ("first", "second", "answer"))
        bridge = texts_of(record, "bridge", where)
        query = Query(
            first=first,
            second=second,
            answers=(answer, *texts_of(record, "aliases", where)),
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
