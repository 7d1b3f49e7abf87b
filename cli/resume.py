"""`pscope resume`: go on with a run, from its settings alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, cast

import typer
from pscope.cli.frame import Resuming
from typer.core import TyperGroup

from pscope.errors import RunError


def resume(
    ctx: typer.Context,
    run: Annotated[Path, typer.Argument(help="The folder of a run.", show_default=False)],
    force: Annotated[
        bool, typer.Option("--force", help="Go on although the model, the data or a version has changed; it is noted.")
    ] = False,
    memory: Annotated[
        float | None, typer.Option(help="Memory for the rows of one pass, in GiB.", show_default="as the run was begun")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 …", show_default="as before")] = None,
) -> None:
    """Go on with a run that was stopped, join the shares of one, or draw the figures of a finished one anew.

    What is missing is done with the options that the run was begun with. A run that another process is writing is
    refused, and so is one whose model, data or versions are not what they were.
    """
    from pscope.runs.folder import Run

    settings = Run(run).settings
    command = cast(TyperGroup, ctx.find_root().command).commands.get(settings["command"])
    if command is None or command.name in ("check", "fit", "resume"):
        raise RunError(f"{run} is a run of {settings['command']!r}, which is no command that leaves one")
    options = settings.get("options")
    if not isinstance(options, dict):
        raise RunError(f'the settings of {run} hold no "options", so it cannot be gone on with')
    changes = {name: value for name, value in (("memory", memory), ("device", device)) if value is not None}
    for name in options.keys() - {param.name for param in command.params}:
        raise RunError(f"the settings have an option {name!r} that the command has not")
    # As defaults they are checked as what is typed: settings edited to nonsense are refused as typing errors are.
    given = {**options, "shard": None, **changes}
    resuming = Resuming(run, force)
    with command.make_context(command.name, [], parent=ctx.parent, obj=resuming, default_map=given) as again:
        command.invoke(again)
