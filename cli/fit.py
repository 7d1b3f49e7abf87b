"""`pscope fit`: maps from the states of one layer, or one model, to those of another."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from pscope.cli.console import out, tell
from pscope.cli.frame import Loader, command
from pscope.cli.options import TargetModelOptions, layers_option, parse_layers, seed_option
from pscope.cli.progress import progress
from pscope.cli.prompts import TargetOptions
from pscope.cli.texts import TextOptions

from pscope.errors import PscopeError

if TYPE_CHECKING:
    from pscope.mappings.fit import Fit
    from pscope.mappings.mapping_set import MappingSet
    from pscope.models.model import LanguageModel

CHECKPOINT = ".checkpoint.safetensors"

MOST_TEXTS = 10_000
"""Of a dataset, which may have no end; as many as the paper fits on."""


@command
def fit(
    frame: Loader,
    to: Annotated[
        str,
        typer.Option(
            metavar="last|N|same|prompt",
            help="The layer that is mapped to: the last, a number, the one that is read; or, at that layer, the state "
            "of a prompt in which the model's next token is written.",
        ),
    ] = "last",
    *,
    target_model: TargetModelOptions,
    target: TargetOptions,
    texts: TextOptions,
    most: Annotated[
        int | None,
        typer.Option(min=1, help="So many of the texts, from the first on.", show_default="all; 10000 of a dataset"),
    ] = None,
    positions: Annotated[
        int | None, typer.Option(min=1, help="Positions to fit on, spread over the texts.", show_default="all")
    ] = None,
    layers: Annotated[str | None, layers_option("all")] = None,
    ridge: Annotated[
        str,
        typer.Option(
            metavar="auto|NUMBER", help="Ridge, beside features of variance 1; auto is the best on texts held out."
        ),
    ] = "auto",
    tuned: Annotated[
        bool, typer.Option("--tuned", help="Go on from there to the tuned lens: least KL to what the model says.")
    ] = False,
    optimiser: Annotated[
        Literal["adam", "published"] | None,
        typer.Option(
            help="How the tuned lens is trained: by Adam, or as published, from the same start.", show_default="adam"
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of the tuned lens.", show_default="250")] = None,
    jacobian: Annotated[
        bool,
        typer.Option("--jacobian", help="The Jacobian lens instead: how the last layer answers to small changes."),
    ] = False,
    seed: Annotated[int, seed_option("the positions, and the texts of a step")] = 0,
    folder: Annotated[
        Path | None,
        typer.Option("--out", help="Folder for the maps, new or empty.", show_default="mappings/MODEL-TO-DATE-TIME"),
    ] = None,
) -> None:
    """Fit maps f from the states of one layer to those of another, or of another model: affine, in closed form.

    All layers in one pass over the texts, in memory that does not grow with them. Every affine map is fitted six times:
    on all texts, and without each of five folds of them, so that no text is read by a map that has seen it; `--tuned`
    and `--jacobian` have no folds, and `fig2` says where they read texts that they have seen. The folder
    holds safetensors and a card, and can be uploaded to a hub as it is; `pscope fig2 --lens FOLDER` draws its line.
    Long fits (`--tuned`, `--jacobian`) go on where they were stopped when the same command, with its --out, is given
    again.
    """
    layer_numbers, penalty = parse_layers(layers), _parse_ridge(ridge)
    if to not in ("last", "same", "prompt") and not to.isdecimal():
        raise PscopeError(f"--to {to}: last, same, prompt, or the number of a layer is meant")
    _refuse_mixed(to, target.target, across=target_model.differs, tuned=tuned, jacobian=jacobian)
    if not tuned and (optimiser is not None or steps is not None):
        raise PscopeError("--optimiser and --steps are how the tuned lens is trained; give --tuned beside them")
    passages = texts.read(most or MOST_TEXTS)[:most]
    model = frame.load()
    if frame.processes.count > 1 and not frame.processes.tensor_parallel:
        raise PscopeError("fit is done by one process; of several, only with --tensor-parallel, for a model they share")
    other = frame.load_target(target_model, model)

    from pscope.mappings.storage import check_new, save_mappings
    from pscope.mappings.tuned import ADAM, PUBLISHED, fit_tuned
    from pscope.show.mappings import mappings_table

    last = min(model.n_layers, other.n_layers) if to == "same" else model.n_layers
    layer_numbers = list(range(last + 1)) if layer_numbers is None else layer_numbers
    short = f"{model.name.rstrip('/').rpartition('/')[2]}-{to}"
    folder = folder or Path("mappings") / f"{short}-{datetime.now():%Y%m%d-%H%M%S}"
    check_new(folder)
    checkpoint = folder.with_name(f"{folder.name}{CHECKPOINT}")
    kl = None
    with _noting(checkpoint):
        if jacobian:
            mappings = _jacobian(model, passages, layer_numbers, checkpoint)
        else:
            mappings = _affine(_fit_of(model, other, to, layer_numbers, target, penalty), passages, positions, seed)
        if tuned:
            recipe = PUBLISHED if optimiser == "published" else ADAM
            recipe = replace(recipe, steps=steps or recipe.steps)
            with progress(recipe.steps, what="steps") as meter:
                mappings, kl = fit_tuned(
                    model, passages, mappings, recipe, seed=seed, checkpoint=checkpoint, progress=meter
                )
    if not frame.processes.main:
        return
    save_mappings(mappings, folder)
    checkpoint.unlink(missing_ok=True)
    out.print(mappings_table(mappings, kl))
    tell(f"mappings: {folder}")


def _parse_ridge(text: str) -> float | None:
    try:
        ridge = None if text == "auto" else float(text)
    except ValueError:
        ridge = -1.0
    if ridge is not None and not 0 <= ridge < float("inf"):
        raise PscopeError(f"--ridge {text}: auto, or a number from 0 on, is meant")
    return ridge


def _refuse_mixed(to: str, target: str | None, *, across: bool, tuned: bool, jacobian: bool) -> None:
    if tuned and jacobian:
        raise PscopeError("--tuned and --jacobian are two lenses; choose one")
    if (tuned or jacobian) and (to != "last" or across):
        raise PscopeError("--tuned and --jacobian lead to the last layer of the same model; leave out the rest")
    if to == "prompt" and across:
        raise PscopeError("--to prompt writes the model's own next token, so that --target-model cannot read it")
    if target is not None and to != "prompt":
        raise PscopeError(f"--target is for --to prompt, not for --to {to}")


def _fit_of(
    model: LanguageModel, other: LanguageModel, to: str, layers: list[int], target: TargetOptions, ridge: float | None
) -> Fit:
    import pscope
    from pscope.mappings.fit import Fit

    into = target.prompt(model, pscope.TOKEN_IDENTITY) if to == "prompt" else None
    fixed = {"last": other.n_layers, "same": None, "prompt": None}
    to_layer = fixed[to] if to in fixed else int(to)
    return Fit(model, other, tuple((layer, layer if to_layer is None else to_layer) for layer in layers), into, ridge)


def _affine(fit: Fit, passages: list[str], positions: int | None, seed: int) -> MappingSet:
    from pscope.inputs.positions import Paired, draw_paired, draw_positions

    if fit.source is fit.target:
        paired = [Paired(each, each) for each in draw_positions(fit.source, passages, positions, seed)]
    else:
        paired, share = draw_paired(fit.source, fit.target, passages, positions, seed)
        tell(f"{share:.0%} of positions are cut at the same character by both tokenizers")
    fit.check(paired)
    with progress(sum(len(each.source.positions) for each in paired), what="positions") as meter:
        return fit.run(passages, paired, meter)


def _jacobian(model: LanguageModel, passages: list[str], layers: list[int], checkpoint: Path) -> MappingSet:
    from pscope.mappings.jacobian import fit_jacobian

    # That of the last layer is the identity.
    below = [layer for layer in layers if layer != model.n_layers]
    with progress(len(passages), what="texts") as meter:
        mappings, _ = fit_jacobian(model, passages, below, checkpoint=checkpoint, progress=meter)
    settled = mappings.origin.settings["settled_at"]
    tell(
        "the mean still moved with the last text; give more"
        if settled is None
        else f"the mean settled at {settled} of {mappings.origin.texts} texts"
    )
    return mappings


@contextmanager
def _noting(checkpoint: Path) -> Iterator[None]:
    """What is told of a long fit that ends before its time."""
    try:
        yield
    except BaseException as error:
        if checkpoint.exists():
            out_option = shlex.quote(str(checkpoint).removesuffix(CHECKPOINT))
            note = f"how far it has come is kept; the same command goes on, with --out {out_option}"
            error.__notes__ = [note]  # type: ignore[attr-defined]  # As in `Frame`.
        raise
