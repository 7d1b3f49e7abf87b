"""The Typer application, and how anything that goes wrong is told: in one line, with exit code 2 for bad input."""

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress
from importlib.metadata import version
from typing import Annotated, Any, NoReturn, cast

import typer
from pscope.cli import (
    check,
    fig1,
    fig2,
    fig3,
    fig4,
    fit,
    lens,
    live,
    read,
    resume,
    show,
    table2,
    table3,
    targets,
)
from pscope.cli.console import rank
from pscope.cli.frame import kept_by
from typer.core import TyperCommand, TyperGroup

from pscope.characters import visible
from pscope.errors import PscopeError

PATIENCE = 5
"""Seconds in which whoever started several processes has ended them all after the first."""


class OneLineErrors(TyperGroup):
    """Tells wrong usage, our own errors, a full disk or memory, and Ctrl-C in one line on standard error."""

    def main(self, *args: Any, **kwargs: Any) -> NoReturn:
        try:
            exit_code = super().main(*args, **{**kwargs, "standalone_mode": False})
        except typer.TyperException as error:
            message = error.format_message()
            # Most of them are the further words of a text.
            hint = "; put a text of several words in quotes" if "unexpected extra argument" in message else ""
            exit_code = _tell(message + hint, 2)
        sys.exit(exit_code)

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().make_context(*args, **kwargs)
        except OSError as error:
            # The help of all commands is printed already here, perhaps to a full device.
            raise typer.TyperException(_message_of(error) or str(error)) from error

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            note = kept_by(stop)
            # Of several processes that are stopped together, one says what was kept.
            return 130 if rank() and not note else _tell(f"stopped; {note or 'nothing was written'}", 130)
        except (typer.Exit, typer.Abort, BrokenPipeError):
            # The first two are RuntimeErrors too; of the third, Typer makes a quiet end.
            raise
        except (PscopeError, OSError, RuntimeError, MemoryError) as error:
            command = cast(TyperCommand | None, self.commands.get(ctx.invoked_subcommand))
            message = None if ctx.params["traceback"] else _message_of(error, command)
            if rank() and not kept_by(error):
                # What all processes find wrong is told by the first, whose end ends the others.
                time.sleep(PATIENCE)
            if message is None:
                raise
            return _tell("; ".join(filter(None, (message, kept_by(error)))), 2)


def _message_of(error: Exception, command: TyperCommand | None = None) -> str | None:
    """What to say of an error, or None for one that nobody foresaw."""
    if isinstance(error, PscopeError):
        return str(error)
    if isinstance(error, OSError) and error.errno:
        # A full disk, a terminal that is gone: the system's word for it.
        return f"{os.strerror(error.errno)}{f': {error.filename}' if error.filename else ''}"
    from pscope.memory import out_of_memory

    if not out_of_memory(error):
        return None
    options = {name for option in command.params for name in option.opts} if command else set()
    ways = {"--memory": "a smaller --memory", "--batch-tokens": "fewer --batch-tokens", "--dtype": "--dtype bfloat16"}
    return f"out of memory; try {', '.join(way for name, way in ways.items() if name in options)} or a smaller model"


def _tell(message: str, exit_code: int) -> int:
    # Where standard error is full or closed nobody can be told; the exit code remains.
    with suppress(OSError):
        typer.echo(f"pscope: {visible(' '.join(message.split()))}", err=True)
    return exit_code


app = typer.Typer(cls=OneLineErrors, invoke_without_command=True, rich_markup_mode="markdown")


def _tell_versions(value: bool) -> None:
    if value:
        typer.echo(", ".join(f"{name} {version(name)}" for name in ("pscope", "torch", "transformers")))
        raise typer.Exit


@app.callback(epilog='For example: `pscope lens "The Eiffel Tower stands in the city of"`')
def pscope(
    ctx: typer.Context,
    _: Annotated[
        bool,
        typer.Option("--version", callback=_tell_versions, is_eager=True, help="Tell the versions numbers depend on."),
    ] = False,
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where in the code an error arose.")] = False,
) -> None:
    """Read what a language model's hidden states hold, by patching them into another prompt (Patchscopes).

    Run `check` first on a new model. Every command named after a figure or table of the paper draws it, and leaves a
    folder with its settings, its table and its figure; `resume` goes on. `lens` makes a page to look at, `app` is a
    live demo. `read` has any state or vector read by any prompt, of which `targets` lists some. `fit` makes maps
    between layers or models.
    """
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())


for panel, commands in {
    "The paper's experiments": (fig1.fig1, fig2.fig2, table2.table2, table3.table3, fig3.fig3, fig4.fig4),
    "Look, and read anything": (lens.lens, read.read, targets.targets, live.app, show.show),
    "Models and runs": (check.check, fit.fit, resume.resume),
}.items():
    for command in commands:
        app.command(rich_help_panel=panel)(command)
