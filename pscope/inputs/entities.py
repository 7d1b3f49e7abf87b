"""Named entities with a reference description each: those that ship, or a file of the user's."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from pscope.errors import DataError
from pscope.files import as_path
from pscope.inputs.records import parse_csv, parse_json, parse_jsonl, read_text, text_of
from pscope.models.prompts import Prompt

ALL = "all entities"
"""The group of entities that are in no group."""

_TOLD = 20
"""How many of the names that are there twice a message lists."""


@dataclass(frozen=True)
class Entity:
    """A name, what it names in one sentence, and the group that it is counted in."""

    name: str
    reference: str
    group: str = ALL


def shipped_entities() -> list[Entity]:
    """The popular and rare entities that come with pscope, described for it; no network needed."""
    source = "the shipped entities"
    return _entities(_json_records(files("pscope.data").joinpath("entities.json").read_text("utf-8"), source), source)


def read_entities(path: str | Path) -> list[Entity]:
    """The entities in a UTF-8 file: a JSON list, JSON Lines or CSV, of "entity", "reference" and perhaps "group".

    Other keys are not looked at. Raises DataError, naming the line or entry where there is one to name, also for a name
    or group of more than 200 characters and a reference of more than 10,000.
    """
    path = as_path(path)
    source = str(path)
    if path.suffix not in (".json", ".jsonl", ".csv"):
        raise DataError(f'{path} is none of .json, .jsonl and .csv, with "entity", "reference" and perhaps "group"')
    content = read_text(path)
    parse = {".json": _json_records, ".jsonl": parse_jsonl, ".csv": parse_csv}[path.suffix]
    return _entities(parse(content, source), source)


def without_demonstrated(entities: Iterable[Entity], target: Prompt) -> tuple[list[Entity], list[Entity]]:
    """The entities that the target prompt does not speak of, and those it does: their descriptions would be given away.

    Whole words count, capitals do not; the marked token is no mention.
    """
    text = target.text
    for start, end in sorted((target.spans[position] for position in target.positions if target.spans), reverse=True):
        text = f"{text[:start]} {text[end:]}"
    kept: list[Entity] = []
    demonstrated: list[Entity] = []
    for entity in entities:
        mentioned = re.search(rf"(?<!\w){re.escape(entity.name)}(?!\w)", text, re.IGNORECASE)
        (demonstrated if mentioned else kept).append(entity)
    return kept, demonstrated


def _json_records(content: str, source: str) -> Iterable[tuple[str, Any]]:
    records = parse_json(content, source)
    if not isinstance(records, list):
        raise DataError(f'{source}: a list of records with "entity" and "reference" is needed')
    return ((f"{source}, entry {number}", record) for number, record in enumerate(records, 1))


def _entities(records: Iterable[tuple[str, Any]], source: str) -> list[Entity]:
    places: dict[str, str] = {}
    repeated = []
    entities = []
    for where, record in records:
        name, reference = (text_of(record, key, where) for key in ("entity", "reference"))
        if not any(character.isalnum() for character in reference):
            raise DataError(f'{where}: the "reference" of {name!r} holds no word')
        group = record.get("group")
        entities.append(Entity(name, reference, text_of(record, "group", where) if group not in (None, "") else ""))
        first = places.setdefault(unicodedata.normalize("NFC", name), where)
        if first != where:
            where, first = (place.removeprefix(f"{source}, ") for place in (where, first))
            repeated.append(f"{where}: {name!r} is there already, in {first}")
    if repeated:
        more = f"; and {len(repeated) - _TOLD} more" if len(repeated) > _TOLD else ""
        raise DataError(f"{source}, {'; '.join(repeated[:_TOLD])}{more}")
    if not entities:
        raise DataError(f"{source} holds no entity")
    ungrouped = "no group" if any(entity.group for entity in entities) else ALL
    return [entity if entity.group else replace(entity, group=ungrouped) for entity in entities]
