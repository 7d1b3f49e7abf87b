"""The Typer application, and how anything that goes wrong is told: in one line, with exit code 2 for bad input."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from pscope.cli import check, fig1, fig2, fig3, fig4, table2, table3
from typer.core import TyperGroup

from pscope.errors import PscopeError


class OneLineErrors(TyperGroup):
    """Tells wrong usage, our own errors and Ctrl-C in one line on standard error."""

    def main(self, *args, **kwargs):
        try:
            exit_code = super().main(*args, **{**kwargs, "standalone_mode": False})
        except typer.TyperException as error:
            exit_code = _tell(error.format_message(), 2)
        sys.exit(exit_code)

    def invoke(self, ctx: typer.Context) -> int | None:
        try:
            return super().invoke(ctx)
        except PscopeError as error:
            if ctx.params["traceback"]:
                raise
            return _tell(str(error), 2)
        except RuntimeError as error:
            # Torch need not be imported to know its error; ending a command is a RuntimeError too.
            if type(error).__name__ != "OutOfMemoryError" or ctx.params["traceback"]:
                raise
            return _tell("out of memory; try a smaller --memory, fewer --batch-tokens or --dtype bfloat16", 2)
        except KeyboardInterrupt:
            return _tell("stopped; nothing was written", 130)


def _tell(message: str, exit_code: int) -> int:
    typer.echo(f"pscope: {' '.join(message.split())}", err=True)
    return exit_code


app = typer.Typer(cls=OneLineErrors, add_completion=False, invoke_without_command=True, rich_markup_mode="markdown")


@app.callback()
def pscope(
    ctx: typer.Context,
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where in the code an error arose.")] = False,
) -> None:
    """Read what a language model's hidden states hold, by patching them into another prompt (Patchscopes).

    Every other command than `check` draws one figure of the paper and leaves a folder with its settings, its table and
    its figure.
    """
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())


app.command()(check.check)
app.command()(fig1.fig1)
app.command()(fig2.fig2)
app.command()(table2.table2)
app.command()(table3.table3)
app.command()(fig3.fig3)
app.command()(fig4.fig4)
