"""`pscope table3`: one entity, resolved layer by layer."""

from __future__ import annotations

from typing import Annotated

import typer
from pscope.cli.console import out, print_json, tell
from pscope.cli.frame import Frame, command
from pscope.cli.options import (
    JsonOption,
)
from pscope.cli.prompts import (
    AtIndexOption,
    NameOptions,
    TargetOptions,
    parse_one_position,
    stop_at_comma_option,
    tell_sink,
)


@command
def table3(
    frame: Frame,
    *,
    entity: Annotated[str, typer.Argument(help="The name of somebody or something.", show_default=False)],
    names: NameOptions,
    target: TargetOptions,
    at: Annotated[
        str | None,
        typer.Option(help="Which token of the name is read: its text, an index, or last.", show_default="last"),
    ] = None,
    at_index: AtIndexOption = None,
    stop_at_comma: Annotated[bool, stop_at_comma_option()] = False,
    reference: Annotated[
        str | None, typer.Option(help="A description to score the continuations against, by ROUGE-L.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Table 3: how the name of one entity is resolved, layer by layer, in the model's own words.

    The state of the name's last token is patched over the placeholder of a prompt that describes entities. The last
    row is the control: the placeholder alone.
    """
    read = parse_one_position(at, at_index, entity)
    model = frame.load()

    import pscope
    from pscope.experiments.entity_resolution import EntityLayers, name_prompt
    from pscope.show.entity_resolution import resolution_table

    pairs = names.pairs(model)
    source = name_prompt(model, entity, names.before, read)
    patched = target.prompt(model, pscope.ENTITY_DESCRIPTION)
    decoding = names.decoding(stop_at_comma=stop_at_comma)
    experiment = EntityLayers(model, patched, source, pairs, decoding, reference, memory=frame.memory)
    frame.read([source.text, patched.text])
    table = frame.carry_out(
        experiment,
        source=source.text,
        source_position=source.position,
        target=patched.text,
        target_positions=patched.positions,
        pairs=pairs,
        stop=decoding.stop,
    )
    frame.finish()
    if as_json:
        print_json(table)
    else:
        out.print(resolution_table(table, entity, scored=reference is not None))
    tell_sink(source)
    tell(f"table: {frame.folder / 'table.parquet'}")
