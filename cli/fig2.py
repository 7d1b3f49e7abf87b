"""`pscope fig2`: how early the next token can be read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from pscope.cli.across import across
from pscope.cli.console import out, tell
from pscope.cli.frame import Frame, command
from pscope.cli.options import (
    TargetModelOptions,
    layers_option,
    parse_layers,
    parse_target_layers,
    seed_option,
    target_layers_option,
)
from pscope.cli.prompts import TargetOptions
from pscope.cli.texts import TextOptions

from pscope.errors import PscopeError

if TYPE_CHECKING:
    from pscope.experiments.next_token import Lens
    from pscope.models.model import LanguageModel
    from pscope.models.prompts import Prompt


@command
def fig2(
    frame: Frame,
    samples: Annotated[int, typer.Option(min=1, help="Positions to read, spread evenly over the texts.")] = 200,
    *,
    texts: TextOptions,
    layers: Annotated[str | None, layers_option("all")] = None,
    target: TargetOptions,
    target_model: TargetModelOptions,
    target_layers: Annotated[str | None, target_layers_option("for --target-model, six of its layers")] = None,
    random_prompts: Annotated[
        int, typer.Option(min=0, max=100, help="Token identity with so many prompts of random tokens too.")
    ] = 0,
    lens: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE|FOLDER|ID", help="Another lens: of `pscope fit`, a tuned lens, a Jacobian lens, from the hub."
        ),
    ] = None,
    fit: Annotated[
        bool, typer.Option("--fit/--no-fit", help="Fit the affine maps of the tuned lens, once for a model.")
    ] = True,
    fit_to_prompt: Annotated[
        bool,
        typer.Option("--fit-to-prompt", help="Also fit maps to the states of the target prompt with the right token."),
    ] = False,
    seed: Annotated[int, seed_option("the positions, the random prompts and the bands")] = 0,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens of text in one pass.")] = 1024,
) -> None:
    """Figure 2: how early a model's next token can be read, by logit lens, tuned lens and token identity.

    At a random position of each text, every layer's hidden state is decoded in each way and held against the model's
    own prediction. Without --texts and --dataset, the passages that come with pscope are read. The maps of the tuned
    lens are fitted on these, and each of them is read by a map that has not seen it.

    With --target-model (Figures 10 and 11), that model reads instead, at every pair of layers, what states are mapped
    to; beside it stand both models reading themselves, and the controls.
    """
    layer_numbers, target_numbers = parse_layers(layers), parse_target_layers(target_layers)
    passages = texts.read(samples)
    model = frame.load()
    if target_model.differs:
        if random_prompts or fit_to_prompt or not fit:
            raise PscopeError("--target-model reads through its own maps; leave out the options of other lines")
        other = frame.load_target(target_model, model)
        across(
            frame,
            model,
            other,
            passages=passages,
            texts=texts.named,
            target=target,
            layers=layer_numbers,
            target_layers=target_numbers,
            lens=lens or [],
            samples=samples,
            seed=seed,
        )
        return
    if target_numbers is not None:
        raise PscopeError("--target-layers is for --target-model; each line has target layers of its own")

    import pscope
    from pscope.experiments.next_token import RANDOM_TOKENS, Lens, NextToken, random_token_prompts, summarise
    from pscope.inputs.positions import draw_positions
    from pscope.models.residual import as_layers
    from pscope.show.next_token import next_token_figure, next_token_tables

    target_prompt = target.prompt(model, pscope.TOKEN_IDENTITY)
    layer_numbers = as_layers(model, layer_numbers)
    sampled = draw_positions(model, passages, samples, seed)
    frame.read([*passages, target_prompt.text])
    lenses = _lenses(frame, model, target_prompt, passages, lens or [], fit=fit, fit_to_prompt=fit_to_prompt)
    lenses += [Lens(RANDOM_TOKENS, prompt) for prompt in random_token_prompts(model, random_prompts, seed)]
    table = frame.carry_out(
        NextToken(model, lenses, passages, sampled, layer_numbers, batch_tokens=batch_tokens, memory=frame.memory),
        texts=texts.named,
        samples=samples,
        seed=seed,
        layers=layer_numbers,
        target=target_prompt.text,
        target_positions=target_prompt.positions,
        lenses=[each.name for each in lenses],
    )
    summary = summarise(table, seed)
    frame.run.note("summary", summary)
    figure = frame.run.draw(next_token_figure(summary, f"{model.name}, {samples} samples"))
    frame.finish()
    out.print(*next_token_tables(summary))
    tell(f"table: {frame.run.folder / 'table.parquet'}\nfigure: {figure}")


def _lenses(
    frame: Frame,
    model: LanguageModel,
    target: Prompt,
    passages: list[str],
    others: list[str],
    *,
    fit: bool,
    fit_to_prompt: bool,
) -> list[Lens]:
    """The lines of the figure."""
    from pscope.experiments.next_token import FITTED, LOGIT_LENS, TOKEN_IDENTITY, TUNED_LENS, Lens, lens_of
    from pscope.inputs.positions import Paired, draw_positions
    from pscope.inputs.texts import shipped_texts
    from pscope.mappings.fit import Fit
    from pscope.models.fingerprint import digest

    lenses = [Lens(LOGIT_LENS), Lens(TOKEN_IDENTITY, target)]
    if fit or fit_to_prompt:
        texts, last = shipped_texts(), model.n_layers
        paired = [Paired(each, each) for each in draw_positions(model, texts, None, seed=0)]
        every = range(last + 1)
        if fit:
            to_last = Fit(model, model, tuple((layer, last) for layer in every))
            lenses.insert(1, Lens(TUNED_LENS, None, frame.fitted(to_last, texts, paired, "the tuned lens")))
        if fit_to_prompt:
            to_prompt = Fit(model, model, tuple((layer, layer) for layer in every), into=target)
            lenses.append(Lens(FITTED, target, frame.fitted(to_prompt, texts, paired, "maps to the prompt")))
    for label, mappings in frame.lenses(others, model).items():
        if not mappings.folds and mappings.origin.data_sha256 in (digest(passages), digest(shipped_texts())):
            tell(
                f"{label} was fitted on texts that come with pscope or are read here, and holds no maps without them: "
                "where it reads them, it has seen them"
            )
        lenses.append(lens_of(label, mappings, target, model.n_layers))
    return lenses
