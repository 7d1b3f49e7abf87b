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
    loaded = frame.load(model)

    from pscope.engine.examine import examine
    from pscope.show.tables import literal, narrow_table

    with working("Checking"):
        found = examine(loaded)
    if rank():
        return
    if as_json:
        print_json(asdict(found))
        return
    shown = narrow_table("")
    shown.show_header = False
    shown.add_column(no_wrap=True, style="bold")
    shown.add_column(overflow="fold")
    for name, told in _lines(found):
        shown.add_row(name, literal(told))
    out.print(shown)


def _lines(found: Examination) -> list[tuple[str, str]]:
    """What is told, line by line: a name and what was found."""
    check, window = found.check, found.window
    measured = f"{check.difference:.1e} sd of the logits, at most" if check.difference is not None else "not measured"
    accepted = f"; {check.tolerance:.1e} are accepted there" if check.tolerance is not None else ""
    return [
        ("model", f"{found.model_class}, {found.dtype} on {found.device}"),
        ("layers", f"0 (embedding output) to {found.n_layers}: {found.layer_class} in {found.layers_at}"),
        ("width", f"{found.hidden_size}" + (f", window of {window} tokens" if window else "")),
        ("path", str(check)),
        ("difference", measured + accepted),
        ("logit lens", f"layer {found.n_layers} is {found.lens_difference:.1e} sd from the model's own logits"),
        (
            "start token",
            f"{found.start_token} is put before a text" if found.start_token else "none is put before a text",
        ),
        ("first token", f"its state is {found.first_token_norm:.1f} times as long as others, in the middle layer"),
        ("end tokens", " ".join(found.end_tokens) or "none"),
        ("chat template", "yes" if found.chat_template else "no"),
        ("placeholders", _placeholders(found)),
        ("speed", _speed(found)),
    ]


def _placeholders(found: Examination) -> str:
    told = []
    for mark, token in found.placeholders.items():
        told.append(f"{mark!r} is one token" if token == mark else f"{mark!r} is no token of its own but {token!r}")
    return ", ".join(told)


def _speed(found: Examination) -> str:
    staircase, plain = found.ms_per_row.get("staircase"), found.ms_per_row["plain"]
    told = f"{plain:.2f} ms per row on the plain path"
    return (
        told if staircase is None else f"{staircase:.2f} ms per row on the staircase, {told}: {plain / staircase:.1f} ×"
    )
