"""`pscope table3`: one entity, resolved layer by layer."""

from __future__ import annotations

from typing import Annotated

import typer
from pscope.cli.across import LensOption, fit_across, refuse_lens_alone
from pscope.cli.console import out, print_json, tell
from pscope.cli.frame import Frame, command
from pscope.cli.options import JsonOption, TargetModelOptions
from pscope.cli.prompts import (
    AtIndexOption,
    NameOptions,
    StopAtCommaOption,
    TargetOptions,
    parse_one_position,
    tell_sink,
)


@command
def table3(
    frame: Frame,
    *,
    entity: Annotated[str, typer.Argument(help="The name of somebody or something.", show_default=False)],
    names: NameOptions,
    target: TargetOptions,
    target_model: TargetModelOptions,
    lens: LensOption = None,
    at: Annotated[
        str | None,
        typer.Option(help="Which token of the name is read: its text, an index, or last.", show_default="last"),
    ] = None,
    at_index: AtIndexOption = None,
    stop_at_comma: StopAtCommaOption = False,
    reference: Annotated[
        str | None, typer.Option(help="A description to score the continuations against, by ROUGE-L.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Table 3: how the name of one entity is resolved, layer by layer, in the model's own words.

    The state of the name's last token is patched over the placeholder of a prompt that describes entities. The last
    row is the control: the placeholder alone. With --target-model, that model speaks, of what the state is mapped to.
    """
    position = parse_one_position(at, at_index, entity)
    refuse_lens_alone(lens, target_model)
    source_model = frame.load()
    model = frame.load_target(target_model, source_model)

    import pscope
    from pscope.experiments.cross_model import MAPPED
    from pscope.experiments.entity_resolution import EntityLayers, name_prompt
    from pscope.experiments.sweep import Through
    from pscope.show.entity_resolution import resolution_table

    pairs = names.pairs(model, source_model)
    source = name_prompt(source_model, entity, names.before, position)
    target_prompt = target.prompt(model, pscope.ENTITY_DESCRIPTION)
    decoding = names.decoding(stop_at_comma=stop_at_comma)
    frame.read([source.text, target_prompt.text])
    through = None
    if model is not source_model:
        mappings = fit_across(frame, source_model, model, pairs, lens, controls=False)
        through = None if mappings is None else Through(source_model, mappings[MAPPED])
    table = frame.carry_out(
        EntityLayers(model, target_prompt, source, pairs, decoding, reference, through=through, memory=frame.memory),
        source=source.text,
        source_position=source.position,
        target=target_prompt.text,
        target_model=model.name,
        target_positions=target_prompt.positions,
        pairs=pairs,
        stop=decoding.stop,
    )
    frame.finish()
    if as_json:
        print_json(table)
    else:
        out.print(resolution_table(table, entity, scored=reference is not None))
    tell_sink(source)
    tell(f"table: {frame.run.folder / 'table.parquet'}")
