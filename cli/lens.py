"""`pscope lens`: a page of a prompt's tokens at every layer."""

from __future__ import annotations

from typing import Annotated

import typer
from pscope.cli.console import print_json, tell
from pscope.cli.frame import Frame, command
from pscope.cli.options import JsonOption, NewTokensOption, layers_option, parse_layers

LENS = typer.Option("--lens", metavar="FILE|FOLDER|ID", help="A tuned lens or other maps, as a lens of its own.")


@command
def lens(
    frame: Frame,
    *,
    text: Annotated[str, typer.Argument(help="The text whose tokens are looked at.")] = (
        "The Eiffel Tower stands in the city of"
    ),
    layers: Annotated[str | None, layers_option("all")] = None,
    lens: Annotated[list[str] | None, LENS] = None,
    describe: Annotated[
        bool, typer.Option(help="Have every state describe an entity too, which takes most of the time.")
    ] = True,
    top_k: Annotated[int, typer.Option(min=1, help="Tokens to keep of each cell.")] = 5,
    new_tokens: NewTokensOption = 20,
    as_json: JsonOption = False,
) -> None:
    """A page to look at: every token of a text at every layer, read by lenses side by side.

    One HTML file that needs no network: logit lens, token identity, a description by the entity prompt, and maps that
    are named. Cells are coloured by probability, certainty, the rank of the model's own answer, or agreement with it.
    """
    layer_numbers = parse_layers(layers)
    model = frame.load()

    import pscope
    from pscope.experiments.token_grid import grid_of
    from pscope.show.lens_page import lens_page

    experiment = grid_of(
        model,
        text,
        layer_numbers,
        mappings=frame.lenses(lens or (), model),
        describe=pscope.Decoding(new_tokens, stop=(",",)) if describe else None,
        top_k=top_k,
        memory=frame.memory,
    )
    frame.read([experiment.prompt.text])
    table = frame.carry_out(experiment, text=experiment.prompt.text)
    origin = {
        "model": model.name,
        "weights": frame.run.settings["model"]["fingerprint"][:16],
        "text": repr(experiment.prompt.text),
        "command": frame.run.settings["command_line"],
    }
    page = frame.run.write_page(lens_page(table, text, origin, model.config.vocab_size))
    frame.finish()
    if as_json:
        print_json(table)
    tell(f"page: {page}")
