"""What the commands share that take prompts of the user's: the target, and the positions in it and in the source."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from pscope.cli.common import tell

from pscope.errors import PscopeError

if TYPE_CHECKING:
    from pscope.models.model import LanguageModel
    from pscope.models.prompts import At, Prompt

_INDEX = r"\s*-?\d{1,9}\s*"
_FILES = (".txt", ".md", ".json", ".jsonl", ".csv", ".tsv")

TargetOption = Annotated[
    str | None,
    typer.Option(
        metavar="FILE|TEXT",
        help="The prompt that is patched, or a file that holds it.",
        show_default="the paper's",
    ),
]
TargetAtOption = Annotated[
    str | None,
    typer.Option(
        help="Its placeholder, which is overwritten: text that stands there, all:x for every x, an index, or last.",
        show_default="last",
    ),
]
TargetAtIndexOption = Annotated[
    str | None, typer.Option(metavar="N[,N…]", help="The same by index, or several, whatever the text holds.")
]
AtIndexOption = Annotated[
    str | None,
    typer.Option(metavar="N", help="The same by index, whatever the text holds; negative ones count from the end."),
]


def parse_position(at: str | None, index: str | None, text: str, option: str = "--at", default: At = -1) -> At:
    """The position in `text` that `--at` or `--at-index` gives, as the library takes it. Raises PscopeError.

    What is no text of the prompt may be given to `--at` too, as long as the prompt does not hold it as text: whole
    numbers, which are indices, and `all:` with a piece of which every place is meant.
    """
    if index is not None:
        if at is not None:
            raise PscopeError(f"{option} and {option}-index were both given; choose one")
        if not _numbers(index):
            raise PscopeError(f"{option}-index {index!r} is neither an index (3) nor several of them (1,2,3)")
        return _indices(index)
    if at is None:
        return default
    if _numbers(at):
        if at in text:
            raise PscopeError(
                f"{option} {at}: the prompt holds {at!r} as text too; give {option}-index {at} for the token of that "
                f"number, and for the text some of what stands before it as well"
            )
        return _indices(at)
    if at.startswith("all:") and at not in text:
        from pscope.models.prompts import Every

        return Every(at.removeprefix("all:"))
    return at


def parse_one_position(at: str | None, index: str | None, text: str, default: At = -1) -> str | int:
    """As `parse_position`, for a source, of which one token is read. Raises PscopeError if several are given."""
    position = parse_position(at, index, text, default=default)
    if not isinstance(position, (str, int)):
        raise PscopeError(
            f"{f'--at {at}' if index is None else f'--at-index {index}'}: one token of the source is read"
        )
    return position


def target_text(target: str | None) -> str | None:
    """The prompt that `--target` gives, from a file where it names one. Raises PscopeError for a file that is not."""
    if target is None:
        return None
    # Also what is no regular file, which is then refused by that name.
    if os.path.exists(target) and not os.path.isdir(target):
        from pscope.inputs.records import read_text

        return read_text(Path(target)).rstrip("\r\n")
    if target.endswith(_FILES) or (os.sep in target and not re.search(r"\s", target)):
        raise PscopeError(f"--target {target!r} is no file, and looks like one; a text of that look goes into a file")
    return target


def target_prompt(model: LanguageModel, text: str | None, default: str, at: str | None, index: str | None) -> Prompt:
    """The prompt that is patched, marked where `--target-at` or `--target-at-index` says. Raises PscopeError."""
    text = default if text is None else text
    return model.prompt(text, parse_position(at, index, text, "--target-at"))


def tell_sink(source: Prompt) -> None:
    """Say so if the very first token is read."""
    if source.at_sink:
        tell(
            f"{source.token!r} is the very first token: models keep an attention sink there, whose state says nothing "
            "of the token"
        )


def _numbers(text: str) -> bool:
    return re.fullmatch(f"{_INDEX}(,{_INDEX})*", text) is not None


def _indices(text: str) -> int | list[int]:
    indices = [int(index) for index in text.split(",")]
    return indices[0] if len(indices) == 1 else indices
