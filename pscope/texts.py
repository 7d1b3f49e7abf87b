"""Texts to read hidden states from: those that ship, a file of the user's, or a dataset."""

from __future__ import annotations

import json
import re
from importlib.resources import files
from pathlib import Path

from pscope.errors import TextsError


def shipped_texts() -> list[str]:
    """The passages that come with pscope, written for it in many registers; no network needed."""
    return _parse_jsonl(files("pscope.data").joinpath("texts.jsonl").read_text("utf-8"), "the shipped texts")


def read_texts(path: Path) -> list[str]:
    """The texts in a UTF-8 file: `.jsonl` with a "text" in every line, or `.txt` with one text per line.

    Blank lines are passed over. Raises TextsError, naming the line where there is one to name.
    """
    if path.suffix not in (".jsonl", ".txt"):
        raise TextsError(f'{path} is neither .jsonl (an object with a "text" per line) nor .txt (one text per line)')
    try:
        content = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise TextsError(f"{path} is not UTF-8 (line {line}); convert it and try again") from error
    except OSError as error:
        raise TextsError(f"cannot read {path}: {error.strerror}") from error
    if path.suffix == ".jsonl":
        texts = _parse_jsonl(content, str(path))
    else:
        texts = [line.strip() for line in content.split("\n") if line.strip()]
    if not texts:
        raise TextsError(f"{path} holds no text")
    return texts


def read_dataset(spec: str, most: int) -> list[str]:
    """The first `most` texts of a dataset, named ID[:CONFIG][:SPLIT], through `datasets`.

    ID is a hub id or a local folder; the split is "test" unless named. Raises TextsError.
    """
    from datasets import load_dataset

    if not re.fullmatch(r"[^:]+(:[^:]*){0,2}", spec):
        raise TextsError(f"{spec!r} is not of the form ID[:CONFIG][:SPLIT]")
    name, config, split = (part or None for part in f"{spec}::".split(":")[:3])
    texts: list[str] = []
    try:
        for row in load_dataset(name, config, split=split or "test", streaming=True):
            if "text" not in row:
                raise TextsError(f"{spec} has no column 'text'; its columns are {', '.join(row)}")
            texts += [row["text"].strip()] if row["text"].strip() else []
            if len(texts) == most:
                break
    except TextsError:
        raise
    except Exception as error:
        # Offline, missing, gated, or without that split: datasets has many errors, each of which says what it is.
        reason = " ".join(str(error).split())
        raise TextsError(f"cannot read the dataset {spec}: {reason}") from error
    if not texts:
        raise TextsError(f"the dataset {spec} holds no text")
    return texts


def _parse_jsonl(content: str, source: str) -> list[str]:
    texts = []
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except json.JSONDecodeError as error:
            raise TextsError(f"{source}, line {number}, column {error.colno}: not JSON ({error.msg})") from error
        except (KeyError, TypeError) as error:
            raise TextsError(f'{source}, line {number}: an object with a "text" is needed') from error
        if not isinstance(text, str) or not text.strip():
            raise TextsError(f'{source}, line {number}: "text" is empty or no string')
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise TextsError(f'{source}, line {number}: "text" holds half of a surrogate pair')
        texts.append(text)
    return texts
