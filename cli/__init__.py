"""The command `pscope`: one file per command, each thin. Nothing heavy is imported before the arguments are read."""

from pscope.cli import fig1, fig2
from pscope.cli.app import app

app.command("fig1")(fig1.fig1)
app.command("fig2")(fig2.fig2)


def main() -> None:
    """The console script."""
    app()


__all__ = ["app", "main"]
