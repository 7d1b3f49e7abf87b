"""The options of commands that take prompts of the user's: target, positions, and how names are read."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from pscope.cli.console import tell
from pscope.cli.options import NewTokensOption, layers_option, parse_layers, parse_target_layers, target_layers_option

from pscope.errors import PscopeError

if TYPE_CHECKING:
    from pscope.engine.generate import Decoding
    from pscope.inputs.targets import Target
    from pscope.models.model import LanguageModel
    from pscope.models.prompts import At, Prompt
    from pscope.models.residual import Pair

_INDEX = r"\s*-?\d{1,9}\s*"
_NAME = r"[a-z]+(-[a-z]+)*"
_FILES = (".txt", ".md", ".json", ".jsonl", ".csv", ".tsv", ".npy", ".pt", ".pth", ".safetensors")

AtIndexOption = Annotated[
    str | None, typer.Option(metavar="N[,N…]", help="The same by index, or several, whatever the text holds.")
]

StopAtCommaOption = Annotated[
    bool,
    typer.Option(
        "--stop-at-comma/--no-stop-at-comma", help="End a description at its first comma, as those of the prompt do."
    ),
]


@dataclass(frozen=True)
class TargetOptions:
    """The prompt that is patched. Raises PscopeError for a file that is none."""

    target: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE|TEXT",
            help="The prompt that is patched: a name of `pscope targets`, a file that holds it, or a text.",
            show_default="the paper's",
        ),
    ] = None
    target_at: Annotated[
        str | None,
        typer.Option(
            help="Its placeholder, which is overwritten: text that stands there, all:x for every x, an index, or last.",
            show_default="last, or that of the name",
        ),
    ] = None
    target_at_index: AtIndexOption = None

    def __post_init__(self) -> None:
        _ = self.text

    @cached_property
    def text(self) -> str | None:
        """The prompt that `--target` gives, from a file where it names one."""
        if self.target is None:
            return None
        if self.named is not None:
            return self.named.text
        # Also what is no regular file, which is then refused by that name.
        if os.path.exists(self.target) and not os.path.isdir(self.target):
            from pscope.inputs.records import read_text

            return read_text(Path(self.target)).rstrip("\r\n")
        refuse_lost_file(self.target, "--target")
        if re.fullmatch(_NAME, self.target):
            tell(f"--target {self.target} is patched as a text; no target of `pscope targets` has that name")
        return self.target

    @cached_property
    def named(self) -> Target | None:
        """The target that `--target` names, if it does."""
        if self.target is None or not re.fullmatch(_NAME, self.target) or os.path.isfile(self.target):
            return None
        from pscope.inputs.targets import named_target

        return named_target(self.target)

    def position(self, text: str) -> At:
        """Where the placeholder is in the text of the prompt. Raises PscopeError."""
        named, unmarked = self.named, self.target_at is None and self.target_at_index is None
        at = named.at if named is not None and unmarked else self.target_at
        return parse_position(at, self.target_at_index, text, "--target-at")

    def prompt(self, model: LanguageModel, default: str) -> Prompt:
        """The prompt, marked where `--target-at` or `--target-at-index` says. Raises PscopeError."""
        text = default if self.text is None else self.text
        return model.prompt(text, self.position(text))


@dataclass(frozen=True)
class NameOptions:
    """How names of entities are read: at which layers, patched into which, after what."""

    layers: Annotated[str | None, layers_option("the lower half")] = None
    target_layers: Annotated[str, target_layers_option()] = "same"
    before: Annotated[
        str | None,
        typer.Option(
            help="What stands before the name: the state of a text's first token says nothing of it.",
            show_default="a line break where the tokenizer adds no start token",
        ),
    ] = None
    new_tokens: NewTokensOption = 20

    def __post_init__(self) -> None:
        _ = parse_layers(self.layers), parse_target_layers(self.target_layers)

    def pairs(self, model: LanguageModel, source: LanguageModel | None = None) -> list[Pair]:
        """The pairs of layers that are asked for; the layers that are read may be those of another model."""
        from pscope.experiments.grid import layer_pairs

        return layer_pairs(model, parse_layers(self.layers), parse_target_layers(self.target_layers) or "same", source)

    def decoding(self, *, stop_at_comma: bool) -> Decoding:
        """How a description goes on."""
        import pscope

        return pscope.Decoding(self.new_tokens, stop=(",",) if stop_at_comma else ())


def refuse_lost_file(text: str, option: str) -> None:
    """Raise PscopeError for a text that looks like a file, which it is not."""
    if text.endswith(_FILES) or (os.sep in text and not re.search(r"\s", text)):
        raise PscopeError(f"{option} {text!r} is no file, and looks like one; a text of that look goes into a file")


def parse_position(at: str | None, index: str | None, text: str, option: str = "--at", default: At = -1) -> At:
    """The position in `text` that `--at` or `--at-index` gives, as the library takes it. Raises PscopeError.

    What is no text of the prompt may be given to `--at` too, as long as the prompt does not hold it as text: whole
    numbers, which are indices, and `all:` with a piece of which every place is meant, or `first:` with one of which the
    first token is.
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
    kind, _, piece = at.partition(":")
    if kind in ("all", "first") and piece and at not in text:
        from pscope.models.prompts import Every, First

        return Every(piece) if kind == "all" else First(piece)
    return at


def parse_one_position(at: str | None, index: str | None, text: str, default: At = -1) -> str | int:
    """As `parse_position`, for a source, of which one token is read. Raises PscopeError if several are given."""
    position = parse_position(at, index, text, default=default)
    if not isinstance(position, (str, int)):
        raise PscopeError(
            f"{f'--at {at}' if index is None else f'--at-index {index}'}: one token of the source is read"
        )
    return position


def tell_sink(source: Prompt) -> None:
    """Say so if the very first token is read."""
    if source.at_sink:
        tell(
            f"{source.tokens[0]!r} is the very first token: models keep an attention sink there, whose state says "
            "nothing of it"
        )


def _numbers(text: str) -> bool:
    return re.fullmatch(f"{_INDEX}(,{_INDEX})*", text) is not None


def _indices(text: str) -> int | list[int]:
    indices = [int(index) for index in text.split(",")]
    return indices[0] if len(indices) == 1 else indices
