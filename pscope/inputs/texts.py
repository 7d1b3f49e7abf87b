"""Texts to read hidden states from: those that ship, a file of the user's, or a dataset."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path

from pscope.errors import DataError
from pscope.files import as_path
from pscope.inputs.records import parse_jsonl, read_text, text_of


def shipped_texts() -> list[str]:
    """The passages that come with pscope, written for it in many registers; no network needed."""
    return _texts(files("pscope.data").joinpath("texts.jsonl").read_text("utf-8"), "the shipped texts")


def read_texts(path: str | Path) -> list[str]:
    """The texts in a UTF-8 file: `.jsonl` with a "text" in every line, or `.txt` with one text per line.

    Blank lines are passed over. Raises DataError, naming the line where there is one to name.
    """
    path = as_path(path)
    if path.suffix not in (".jsonl", ".txt"):
        raise DataError(f'{path} is neither .jsonl (an object with a "text" per line) nor .txt (one text per line)')
    content = read_text(path)
    if path.suffix == ".jsonl":
        texts = _texts(content, str(path))
    else:
        texts = [line.strip() for line in content.split("\n") if line.strip()]
    if not texts:
        raise DataError(f"{path} holds no text")
    return texts


def read_dataset(spec: str, most: int) -> list[str]:
    """The first `most` texts of a dataset, named ID[:CONFIG][:SPLIT], through `datasets`.

    ID is a hub id or a local folder; the split is "test" unless named. Raises DataError.
    """
    from datasets import load_dataset
    from huggingface_hub import constants

    from pscope.models.hub import hub_answers

    if not re.fullmatch(r"[^:]+(:[^:]*){0,2}", spec):
        raise DataError(f"{spec!r} is not of the form ID[:CONFIG][:SPLIT]")
    name, config, split = f"{spec}::".split(":")[:3]
    if not (constants.HF_HUB_OFFLINE or Path(name).exists() or hub_answers(name, kind="dataset")):
        raise DataError(
            f"{name} is no folder here, and the hub cannot be reached to look for it there; check the name and network"
        )
    texts: list[str] = []
    try:
        for row in load_dataset(name, config or None, split=split or "test", streaming=True):
            if "text" not in row:
                raise DataError(f"{spec} has no column 'text'; its columns are {', '.join(row)}")
            texts += [row["text"].strip()] if row["text"].strip() else []
            if len(texts) == most:
                break
    except DataError:
        raise
    except Exception as error:
        # Offline, missing, gated, or without that split: datasets has many errors, each of which says what it is.
        reason = " ".join(str(error).split())
        raise DataError(f"cannot read the dataset {spec}: {reason}") from error
    if not texts:
        raise DataError(f"the dataset {spec} holds no text")
    return texts


def _texts(content: str, source: str) -> list[str]:
    return [text_of(record, "text", where) for where, record in parse_jsonl(content, source)]
