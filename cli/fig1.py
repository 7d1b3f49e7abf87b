"""`pscope fig1`: one token's hidden state, layer by layer."""

from __future__ import annotations

from typing import Annotated

import typer
from pscope.cli.console import out, print_json, tell
from pscope.cli.frame import Frame, command
from pscope.cli.options import JsonOption, NewTokensOption, layers_option, parse_layers
from pscope.cli.prompts import (
    AtIndexOption,
    TargetOptions,
    parse_one_position,
    tell_sink,
)


@command
def fig1(
    frame: Frame,
    *,
    source: Annotated[
        str, typer.Option(help="The prompt whose hidden state is read.")
    ] = "Amazon's former CEO attended the Oscars",
    at: Annotated[
        str | None, typer.Option(help="Which token of it: its text, an index, or last.", show_default="CEO")
    ] = None,
    at_index: AtIndexOption = None,
    target: TargetOptions,
    layers: Annotated[str | None, layers_option("all")] = None,
    top_k: Annotated[int, typer.Option(min=1, help="Tokens to show for each layer.")] = 1,
    new_tokens: NewTokensOption = 12,
    as_json: JsonOption = False,
) -> None:
    """Figure 1: what one token's hidden state says, layer by layer.

    The state of each layer is patched into the target prompt at the same layer; beside it stands what the logit lens
    makes of it. The last row is the control: the target prompt unpatched.
    """
    layer_numbers = parse_layers(layers)
    position = parse_one_position(at, at_index, source, default="CEO")
    model = frame.load()

    import pscope
    from pscope.experiments.grid import source_prompt
    from pscope.experiments.layer_readout import LayerReadout
    from pscope.show.layer_readout import layer_readout_figure, readout_table

    prompt = source_prompt(model, source, position)
    target_prompt = target.prompt(model, pscope.TOKEN_IDENTITY)
    layer_numbers = list(range(model.n_layers + 1)) if layer_numbers is None else layer_numbers
    options = {"top_k": top_k, "new_tokens": new_tokens, "memory": frame.memory}
    experiment = LayerReadout(model, target_prompt, prompt, layer_numbers, **options)
    frame.read([prompt.text, target_prompt.text])
    table = frame.carry_out(
        experiment,
        source=prompt.text,
        source_position=prompt.position,
        target=target_prompt.text,
        target_positions=target_prompt.positions,
        layers=layer_numbers,
    )
    title = f"{prompt.token.strip()!r} in {source!r}"
    figure = frame.run.draw(layer_readout_figure(table, f"{title}\n{model.name}"))
    frame.finish()
    if as_json:
        print_json(table)
    else:
        out.print(readout_table(table, title))
    tell_sink(prompt)
    tell(f"figure: {figure}")
