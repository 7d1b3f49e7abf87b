"""`pscope targets`: the target prompts that have a name."""

from __future__ import annotations

from dataclasses import asdict

from pscope.cli.console import out, print_json
from pscope.cli.options import JsonOption


def targets(as_json: JsonOption = False) -> None:
    """The target prompts that have a name, for --target."""
    from rich.table import Table

    from pscope.inputs.targets import shipped_targets
    from pscope.show.tables import literal

    prompts = shipped_targets().values()
    if as_json:
        print_json({target.name: asdict(target) for target in prompts})
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("name", "prompt", "placeholder", "asks", "from"):
        table.add_column(heading, overflow="fold")
    for target in prompts:
        table.add_row(*map(literal, (target.name, repr(target.text)[1:-1], target.at, target.asks, target.source)))
    out.print(table)
