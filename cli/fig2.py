"""`pscope fig2`: how early the next token can be read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from pscope.cli.console import out, tell
from pscope.cli.frame import Frame, command
from pscope.cli.options import layers_option, parse_layers, seed_option

from pscope.errors import PscopeError


@command
def fig2(
    frame: Frame,
    samples: Annotated[int, typer.Option(min=1, help="Positions to read, spread evenly over the texts.")] = 200,
    texts: Annotated[
        Path | None, typer.Option(help='A file of texts: .jsonl with a "text" per line, or .txt with one per line.')
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(
            metavar="ID[:CONFIG][:SPLIT]",
            help="Texts from a dataset, such as Salesforce/wikitext:wikitext-2-raw-v1.",
        ),
    ] = None,
    layers: Annotated[str | None, layers_option("all")] = None,
    seed: Annotated[int, seed_option("the positions and the bands")] = 0,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens of text in one pass.")] = 1024,
) -> None:
    """Figure 2: how early a model's next token can be read, by logit lens and token identity.

    At a random position of each text, every layer's hidden state is decoded both ways and held against the model's
    own prediction. Without --texts and --dataset, the passages that come with pscope are read.
    """
    chosen = parse_layers(layers)
    if texts is not None and dataset is not None:
        raise PscopeError("--texts and --dataset were both given; choose one")

    from pscope.inputs.texts import read_dataset, read_texts, shipped_texts

    if texts is not None:
        passages = read_texts(texts)
    else:
        passages = shipped_texts() if dataset is None else read_dataset(dataset, most=samples)
    model = frame.load()

    import pscope
    from pscope.experiments.next_token import NextToken, summarise
    from pscope.inputs.positions import draw_positions
    from pscope.show.next_token import next_token_figure, next_token_table

    target = model.prompt(pscope.TOKEN_IDENTITY)
    chosen = list(range(model.n_layers + 1)) if chosen is None else chosen
    sampled = draw_positions(model, passages, samples, seed)
    experiment = NextToken(model, target, sampled, chosen, batch_tokens=batch_tokens, memory=frame.memory)
    frame.read(passages)
    table = frame.carry_out(
        experiment,
        texts=str(texts or dataset or "shipped with pscope"),
        samples=samples,
        seed=seed,
        layers=chosen,
        target=target.text,
    )
    summary = summarise(table, seed)
    frame.note("summary", summary)
    figure = frame.draw(next_token_figure(summary, f"{model.name}, {samples} samples"))
    frame.finish()
    out.print(next_token_table(summary))
    tell(f"table: {frame.folder / 'table.parquet'}\nfigure: {figure}")
