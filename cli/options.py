"""The options that commands share, each declared once, and what is read from their texts."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from pscope.errors import PscopeError

MODEL, RUN = "The model", "The run"
"""The panels of the help."""

MOST_MEMORY = 2**20
"""In GiB; no machine has more."""


def option_of(panel: str, *names: str, **options: Any) -> Any:
    """An option in one of the panels of the help."""
    return typer.Option(*names, rich_help_panel=panel, **options)


@dataclass(frozen=True)
class ModelOptions:
    """Which model, and where its weights go."""

    model: Annotated[
        str, option_of(MODEL, help="smollm2 or gemma3-270m (need no hub), a hub id, a folder, or a .gguf file.")
    ] = "smollm2"
    revision: Annotated[str | None, option_of(MODEL, help="Branch, tag or commit of a model from the hub.")] = None
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        option_of(MODEL, help="What to load the weights as; auto is what the checkpoint holds."),
    ] = "auto"
    device: Annotated[str | None, option_of(MODEL, help="cpu, cuda, cuda:1 …; by default a GPU if there is one.")] = (
        None
    )
    device_map: Annotated[
        str | None,
        option_of(MODEL, help="auto, balanced or sequential: spread a large model over devices, through accelerate."),
    ] = None
    tensor_parallel: Annotated[
        bool, option_of(MODEL, "--tensor-parallel", help="Split every layer over the processes that torchrun started.")
    ] = False
    attention: Annotated[
        str | None,
        option_of(
            MODEL, help="sdpa, eager, flash_attention_2 …: how attention is computed.", show_default="transformers'"
        ),
    ] = None


@dataclass(frozen=True)
class TargetModelOptions:
    """Another model M*, which is patched with what the first one's states are mapped to."""

    target_model: Annotated[
        str | None,
        option_of(MODEL, help="Another model that reads the states of --model.", show_default="--model itself"),
    ] = None
    target_revision: Annotated[str | None, option_of(MODEL, help="Its branch, tag or commit on the hub.")] = None
    target_device: Annotated[str | None, option_of(MODEL, help="Where it goes.", show_default="as --device")] = None
    target_adapter: Annotated[
        Path | None,
        option_of(MODEL, help="Folder of an adapter (LoRA) on the target alone, which is --model by default."),
    ] = None

    @property
    def differs(self) -> bool:
        """Whether a target other than the source is asked for."""
        return self.target_model is not None or self.target_adapter is not None


@dataclass(frozen=True)
class RunOptions:
    """Where a run goes, what it may take, and which part of it is done."""

    memory: Annotated[
        float | None,
        option_of(
            RUN,
            help="Memory for the rows of one pass, in GiB, beside the model.",
            show_default="1; half of what is free on a GPU",
        ),
    ] = None
    out: Annotated[
        Path | None,
        option_of(RUN, help="Folder for the run, new or empty.", show_default="runs/COMMAND-DATE-TIME"),
    ] = None
    shard: Annotated[
        str | None,
        option_of(
            RUN, metavar="N/OF", help="Do one share of the run, as 3/16; `pscope resume` joins what all have done."
        ),
    ] = None
    dry_run: Annotated[
        bool, option_of(RUN, "--dry-run", help="Tell what the run would take, from the model's config alone.")
    ] = False
    rate: Annotated[
        float | None,
        option_of(RUN, help="For --dry-run: TFLOP/s that one process reaches.", show_default="measured here"),
    ] = None

    def __post_init__(self) -> None:
        parse_memory(self.memory)
        parse_shard(self.shard)
        if self.rate is not None and not (self.dry_run and 0 < self.rate < 1e6):
            raise PscopeError(f"--rate {self.rate:g}: a positive number of TFLOP/s is needed, beside --dry-run")
        if self.shard is not None and self.out is None:
            raise PscopeError("--shard needs --out, the folder that all shares of the run have in common")


def seed_option(draws: str) -> Any:
    """`--seed`, and what it draws. The range is that which all generators take."""
    return typer.Option(min=0, max=2**32 - 1, help=f"Draws {draws}.")


def layers_option(default: str) -> Any:
    """`--layers`, and which are read without it."""
    return typer.Option(
        "--layers", help="Layers to read, as 0-15 or 0,4,8; 0 is the embedding output.", show_default=default
    )


def target_layers_option(default: str | bool = True) -> Any:
    """`--target-layers`, and which are patched without it."""
    text = "Layers that are patched: the one that is read, all, or as 0-15."
    return typer.Option(metavar="same|all|LAYERS", help=text, show_default=default)


NewTokensOption = Annotated[int, typer.Option(min=1, help="Tokens that a patched prompt goes on for, at most.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def parse_layers(text: str | None, option: str = "--layers", nor: str = "") -> list[int] | None:
    """ "0-3,8" as [0, 1, 2, 3, 8]; None stays None. Raises PscopeError, which tells what else fits by `nor`."""
    if text is None:
        return None
    layers: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,4})(?:\s*-\s*(\d{1,4}))?\s*", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            what = f"{part.strip()!r} is neither a layer (8) nor a range of them (0-15)"
            raise PscopeError(f"{option} {text!r}: {what}{nor and f', {nor}'}")
        layers.update(range(first, last + 1))
    return sorted(layers)


def parse_target_layers(text: str | None) -> list[int] | Literal["same", "all"] | None:
    """ "same", "all", or layers as `parse_layers` reads them; None stays None. Raises PscopeError."""
    match text:
        case "same" | "all":
            return text
    return parse_layers(text, "--target-layers", "nor same or all")


def parse_memory(gib: float | None) -> int | None:
    """GiB as bytes; None stays None. Raises PscopeError."""
    if gib is None:
        return None
    if not 0 < gib <= MOST_MEMORY:
        raise PscopeError(f"--memory {gib:g}: a positive number of GiB is needed, at most {MOST_MEMORY}")
    return int(gib * 2**30)


def parse_shard(text: str | None) -> tuple[int, int] | None:
    """ "3/16" as (3, 16); None stays None. Raises PscopeError."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    number, of = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= number <= of:
        raise PscopeError(f"--shard {text}: the third of sixteen is 3/16, and the last 16/16")
    return number, of
