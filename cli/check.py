"""`pscope check`: what a user runs first on a new model."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from pscope.cli.console import out, print_json, rank, working
from pscope.cli.frame import Loader, command
from pscope.cli.options import JsonOption

if TYPE_CHECKING:
    from pscope.engine.examine import Examination


@command
def check(
    frame: Loader,
    model: Annotated[
        str, typer.Argument(help="smollm2, gemma3-270m, a hub id, a folder, or a .gguf file.")
    ] = "smollm2",
    as_json: JsonOption = False,
) -> None:
    """Can this model be patched, how, and how fast: its layers, its path, its habits. Run this first on a new model.

    A model that cannot be patched is refused in one line that says why.
    """
    loaded = frame.load()

    from pscope.engine.examine import examine
    from pscope.show.tables import facts_table

    with working("Checking"):
        examination = examine(loaded)
    if rank():
        return
    if as_json:
        print_json(asdict(examination))
    else:
        out.print(facts_table(_lines(examination)))


def _lines(result: Examination) -> list[tuple[str, str]]:
    """What is told, line by line: a name and what was found."""
    check, window = result.check, result.window
    difference = f"{check.difference:.1e} sd of the logits, at most" if check.difference is not None else "not measured"
    tolerance = f"; {check.tolerance:.1e} are accepted there" if check.tolerance is not None else ""
    return [
        ("model", f"{result.model_class}, {result.dtype} on {result.device}"),
        ("layers", f"0 (embedding output) to {result.n_layers}: {result.layer_class} in {result.layers_at}"),
        ("width", f"{result.hidden_size}" + (f", window of {window} tokens" if window else "")),
        ("path", str(check)),
        ("difference", difference + tolerance),
        ("logit lens", f"layer {result.n_layers} is {result.lens_difference:.1e} sd from the model's own logits"),
        (
            "start token",
            f"{result.start_token} is put before a text" if result.start_token else "none is put before a text",
        ),
        ("first token", f"its state is {result.first_token_norm:.1f} times as long as others, in the middle layer"),
        ("end tokens", " ".join(result.end_tokens) or "none"),
        ("chat template", "yes" if result.chat_template else "no"),
        ("placeholders", _placeholders(result)),
        ("speed", _speed(result)),
    ]


def _placeholders(result: Examination) -> str:
    notes = []
    for mark, token in result.placeholders.items():
        notes.append(f"{mark!r} is one token" if token == mark else f"{mark!r} is no token of its own but {token!r}")
    return ", ".join(notes)


def _speed(result: Examination) -> str:
    staircase, plain = result.ms_per_row.get("staircase"), result.ms_per_row["plain"]
    text = f"{plain:.2f} ms per row on the plain path"
    return (
        text if staircase is None else f"{staircase:.2f} ms per row on the staircase, {text}: {plain / staircase:.1f} ×"
    )
