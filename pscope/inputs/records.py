"""Files of the user's, read with a word on what is wrong and where: UTF-8 text, JSON, JSON Lines and CSV."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pscope.characters import has_surrogates
from pscope.errors import DataError

MOST_CHARACTERS = {
    **dict.fromkeys(("entity", "group", "name", "kind", "subject", "object", "answer", "aliases", "bridge"), 200),
    "reference": 10_000,
}
"""How long a text of a record may be, by its key. Others may have any length: they are cut, or held to the window."""


def read_text(path: Path) -> str:
    """The content of a UTF-8 file, with or without a byte-order mark. Raises DataError."""
    try:
        if path.exists() and not path.is_file():
            # A pipe or a device may have no end, or nobody at the other one.
            raise DataError(f"{path} is no regular file; give one")
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise DataError(f"{path} is not UTF-8 (line {line}); convert it and try again") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


def parse_json(content: str, source: str) -> Any:
    """The value that `content` holds. Raises DataError with the line and the column where it is not JSON."""
    try:
        return _value(content, source)
    except json.JSONDecodeError as error:
        raise DataError(f"{source}, line {error.lineno}, column {error.colno}: not JSON ({error.msg})") from error


def parse_jsonl(content: str, source: str) -> Iterator[tuple[str, Any]]:
    """Where each value stands ("FILE, line 3"), and the value; blank lines are passed over. Raises DataError."""
    for number, line in enumerate(content.split("\n"), 1):
        if line.strip():
            where = f"{source}, line {number}"
            try:
                yield where, _value(line, where)
            except json.JSONDecodeError as error:
                raise DataError(f"{where}, column {error.colno}: not JSON ({error.msg})") from error


def parse_csv(content: str, source: str, delimiter: str = ",") -> Iterator[tuple[str, dict[str, str]]]:
    """Where each row ends ("FILE, line 3"), and its cells by the names in the first line. Raises DataError.

    Blank lines are passed over. A row with fewer or more cells than there are names is an error.
    """
    reader = csv.DictReader(io.StringIO(content, newline=""), delimiter=delimiter, strict=True)
    try:
        for row in reader:
            where = f"{source}, line {reader.line_num}"
            cells = sum(value is not None for value in row.values()) + len(row.get(None, [])[1:])
            if None in row or None in row.values():
                raise DataError(f"{where}: {cells} cells where the first line names {len(reader.fieldnames or ())}")
            yield where, row
    except csv.Error as error:
        raise DataError(f"{source}, line {reader.reader.line_num}: not CSV ({error})") from error


def text_of(record: object, key: str, where: str) -> str:
    """The text under `key` of a record, without the blanks around it. Raises DataError if there is none."""
    text, most = prompt_of(record, key, where).strip(), MOST_CHARACTERS.get(key)
    if most is not None and len(text) > most:
        raise DataError(f'{where}: "{key}" has {len(text)} characters; at most {most} are meant')
    return text


def prompt_of(record: object, key: str, where: str) -> str:
    """The text under `key` of a record as it stands: a blank at its start is part of a prompt. Raises DataError."""
    if not isinstance(record, dict) or key not in record:
        has = f"it has {', '.join(map(repr, record))}" if isinstance(record, dict) else "this is none"
        raise DataError(f'{where}: a record with "{key}" is needed; {has}')
    text = record[key]
    if not isinstance(text, str) or not text.strip():
        raise DataError(f'{where}: "{key}" is empty or no string')
    if has_surrogates(text):
        raise DataError(f'{where}: "{key}" holds half of a surrogate pair')
    return text


def texts_of(
    record: dict[str, Any], key: str, where: str, read: Callable[[object, str, str], str] = text_of
) -> tuple[str, ...]:
    """The texts under a key that may be missing, or hold one text or a list of them."""
    value = record.get(key) or []
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list):
        raise DataError(f'{where}: "{key}" is neither a text nor a list of texts')
    return tuple(read({key: text}, key, where) for text in texts)


def _value(content: str, where: str) -> Any:
    try:
        return json.loads(content)
    except json.JSONDecodeError:
        raise
    except RecursionError as error:
        raise DataError(f"{where}: nested too deep to be read") from error
    except ValueError as error:
        raise DataError(f"{where}: a number has too many digits to be read") from error
