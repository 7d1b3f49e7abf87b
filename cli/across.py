"""What `pscope fig2`, `fig3` and `table3` do with another model: fit the maps to it, and read through them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from pscope.cli.console import out, tell

from pscope.errors import PscopeError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pscope.cli.frame import Frame
    from pscope.cli.options import TargetModelOptions
    from pscope.cli.prompts import TargetOptions

    from pscope.mappings.mapping_set import MappingSet
    from pscope.models.model import LanguageModel
    from pscope.models.prompts import Prompt
    from pscope.models.residual import Pair

LensOption = Annotated[
    str | None,
    typer.Option(
        metavar="FILE|FOLDER|ID",
        help="Maps to --target-model, of `pscope fit`.",
        show_default="fitted on the shipped texts",
    ),
]

SOURCE_LAYERS = (0, 1 / 6, 1 / 3, 1 / 2, 2 / 3, 5 / 6, 1)
TARGET_LAYERS = (0, 0.2, 0.4, 0.6, 0.8, 1)
"""Fractions of the depth: a pair of layers takes as much memory as a map between them, in each fold."""


def refuse_lens_alone(lens: str | None, target_model: TargetModelOptions) -> None:
    """Raise PscopeError for maps to a model that is not named."""
    if lens is not None and not target_model.differs:
        raise PscopeError("--lens holds maps to another model; name it with --target-model, or its adapter")


def fit_across(
    frame: Frame,
    model: LanguageModel,
    other: LanguageModel,
    pairs: Sequence[Pair],
    lens: str | None = None,
    *,
    controls: bool = True,
) -> dict[str, MappingSet] | None:
    """The maps from one model to another, and the controls: those of shuffled pairs, and the mean state.

    They are fitted on the texts that come with pscope, or read from `lens`. None in a dry run.
    """
    from pscope.experiments.cross_model import MAPPED, MEAN, SHUFFLED
    from pscope.inputs.positions import draw_paired
    from pscope.inputs.texts import shipped_texts
    from pscope.mappings.fit import Fit
    from pscope.models.fingerprint import fingerprint

    frame.read([fingerprint(model), fingerprint(other)])
    mappings = None if lens is None else frame.lens(lens, model, other)
    if mappings is not None:
        for pair in pairs:
            mappings.at(pair)
    if lens is not None and not controls:
        return None if mappings is None else {MAPPED: mappings}
    texts = shipped_texts()
    paired, share = draw_paired(model, other, texts, None, seed=0)
    tell(f"{share:.0%} of positions of the texts to fit on are cut at the same character by both tokenizers")
    fit, what = Fit(model, other, tuple(pairs)), f"maps to {other.name}"
    if lens is None:
        mappings = frame.fitted(fit, texts, paired, what)
    if not controls:
        return None if mappings is None else {MAPPED: mappings}
    shuffled = frame.fitted(replace(fit, shuffled=0), texts, paired, f"{what} of shuffled pairs, the control,")
    if mappings is None or shuffled is None:
        return None
    return {MAPPED: mappings, SHUFFLED: shuffled, MEAN: shuffled.to_means()}


def target_prompts(target: TargetOptions, default: str, *models: LanguageModel) -> list[Prompt]:
    """The target prompt in the tokens of each model. Raises PscopeError where an index would be that of one of them."""
    text = default if target.text is None else target.text
    at = target.position(text)
    if any(isinstance(each, int) and each >= 0 for each in (at if isinstance(at, list) else [at])):
        raise PscopeError(f"--target-at {at} counts the tokens of one model; mark the placeholder by its text")
    return [target.prompt(model, default) for model in models]


def across(
    frame: Frame,
    model: LanguageModel,
    other: LanguageModel,
    *,
    passages: list[str],
    texts: str,
    target: TargetOptions,
    layers: list[int] | None,
    target_layers: list[int] | Literal["same", "all"] | None,
    lens: list[str],
    samples: int,
    seed: int,
) -> None:
    """Figures 10 and 11."""
    import pscope
    from pscope.experiments.cross_model import MAPPED, MEAN, SHUFFLED, CrossModel, best_pairs, summarise
    from pscope.experiments.grid import layer_pairs, spread_layers
    from pscope.experiments.together import Together
    from pscope.inputs.positions import draw_paired
    from pscope.mappings.mapping_set import MappingSet
    from pscope.show.cross_model import best_pairs_table, cross_model_figure

    if other is model:
        raise PscopeError(f"--target-model is {model.name} itself; its own reading is that of fig2 without it")
    if other.name == model.name:
        raise PscopeError(f"both models are called {model.name}, so that their readings could not be told apart")
    if len(lens) > 1:
        raise PscopeError("one --lens leads from --model to --target-model, not several")
    if layers is None:
        layers = spread_layers(model, SOURCE_LAYERS)
        # Layers that both have, where each is read by its own.
        layers = [layer for layer in layers if target_layers != "same" or layer <= other.n_layers]
    pairs = layer_pairs(other, layers, target_layers or spread_layers(other, TARGET_LAYERS), model)
    target_prompt, own_prompt = target_prompts(target, pscope.TOKEN_IDENTITY, other, model)
    paired, share = draw_paired(model, other, passages, samples, seed)
    frame.read([*passages, target_prompt.text])
    mappings = fit_across(frame, model, other, pairs, *lens)
    theirs, ours = [each.target for each in paired], [each.source for each in paired]
    diagonals = [[(layer, layer) for layer in sorted({pair[end] for pair in pairs})] for end in (0, 1)]
    own, other_own = ({MAPPED: MappingSet.identity(*each)} for each in zip((model, other), diagonals, strict=True))
    # In a dry run there are no maps, and any stand for them.
    mappings = mappings or dict.fromkeys((MAPPED, SHUFFLED, MEAN), other_own[MAPPED])
    readers = {
        f"{other.name} reads {model.name}": (model, other, target_prompt, mappings, passages, ours, pairs),
        f"{model.name} reads itself": (model, model, own_prompt, own, passages, ours, diagonals[0]),
        f"{other.name} reads itself": (other, other, target_prompt, other_own, passages, theirs, diagonals[1]),
    }
    table = frame.carry_out(
        Together({name: CrossModel(*each, memory=frame.memory) for name, each in readers.items()}),
        texts=texts,
        samples=samples,
        seed=seed,
        pairs=pairs,
        target=target_prompt.text,
        target_model=other.name,
        positions_paired=share,
    )
    first, on = next(iter(readers)), f"{samples} samples"
    summary, best = summarise(table, seed), best_pairs(table[table["reader"] == first], seed)
    frame.run.note("summary", summary)
    frame.run.note("best_pairs", best)
    figure = frame.run.draw(cross_model_figure(summary, on, first))
    frame.run.draw(cross_model_figure(summary, on, first, "surprisal"), "figure-surprisal")
    frame.finish()
    out.print(best_pairs_table(best, summary, first))
    tell(f"{share:.0%} of positions of the texts that were read could be paired")
    tell(f"table: {frame.run.folder / 'table.parquet'}\nfigure: {figure}")
