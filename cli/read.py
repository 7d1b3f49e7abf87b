"""`pscope read`: any states, any vectors, read by any prompt."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pscope.cli.across import fit_across
from pscope.cli.console import out, print_json, tell
from pscope.cli.frame import Frame, command
from pscope.cli.options import (
    JsonOption,
    NewTokensOption,
    TargetModelOptions,
    option_of,
    parse_layers,
    parse_target_layers,
    seed_option,
    target_layers_option,
)
from pscope.cli.prompts import TargetOptions
from pscope.cli.sources import SourceOptions, Sources

from pscope.errors import PscopeError

if TYPE_CHECKING:
    from pscope.mappings.mapping_set import MappingSet
    from pscope.models.model import LanguageModel
    from pscope.models.prompts import Prompt
    from pscope.models.states import States

WRITTEN, SAID = "How it is written", "What is said"


@dataclass(frozen=True)
class WritingOptions:
    """How a vector is written."""

    scale: Annotated[str, option_of(WRITTEN, metavar="NUMBER[,…]", help="Times this, each in turn.")] = "1"
    norm: Annotated[
        bool, option_of(WRITTEN, "--norm", help="First at the length of the state that the target has in its place.")
    ] = False
    add: Annotated[bool, option_of(WRITTEN, "--add", help="Added to that state, instead of replacing it.")] = False
    hold: Annotated[
        str | None,
        option_of(
            WRITTEN, metavar="LAYERS", help="In these layers too, so that the placeholder's own states are not seen."
        ),
    ] = None

    def __post_init__(self) -> None:
        _ = self.scales, parse_layers(self.hold, "--hold")

    @property
    def scales(self) -> tuple[float, ...]:
        """The numbers of `--scale`. Raises PscopeError."""
        try:
            return tuple(float(part) for part in self.scale.split(","))
        except ValueError:
            raise PscopeError(f"--scale {self.scale}: a number, or several, as 0.5,1,2") from None


@command
def read(
    frame: Frame,
    *,
    sources: SourceOptions,
    target: TargetOptions,
    chat_target: Annotated[
        Path | None, typer.Option(help="The prompt that is patched, as a .json file of messages.")
    ] = None,
    target_layers: Annotated[str | None, target_layers_option("same; that to which --lens leads, if it is one")] = None,
    writing: WritingOptions,
    target_model: TargetModelOptions,
    lens: Annotated[
        str | None,
        typer.Option(metavar="FILE|FOLDER|ID", help="Maps that states go through, of `pscope fit`, or another lens."),
    ] = None,
    new_tokens: NewTokensOption = 20,
    top_k: Annotated[int, option_of(SAID, min=1, help="Next tokens to show.")] = 1,
    temperature: Annotated[float, option_of(SAID, min=0, help="Sample at this temperature; 0 is greedy.")] = 0.0,
    times: Annotated[int, option_of(SAID, min=1, help="How often each row is sampled.")] = 1,
    stop: Annotated[list[str] | None, option_of(SAID, help="Text that ends what is said; may be given again.")] = None,
    relevance: Annotated[
        bool,
        option_of(SAID, "--relevance", help="Tell how much of each token said is owed to the patch: |p − p clean|."),
    ] = False,
    seed: Annotated[int, seed_option("random vectors and samples")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Read any states or vectors with any prompt: of texts, chats, files, their means and differences.

    Beside what each of them says stand the controls: a random vector of the same norm, the target unpatched, and the
    target with the text itself in the place of the placeholder, which a model may know how to answer without any state.
    """
    if chat_target is not None and target.target is not None:
        raise PscopeError("--target and --chat-target were both given; choose one")
    patched_layers = parse_target_layers(target_layers)
    model = frame.load()
    other = frame.load_target(target_model, model)

    import pscope
    from pscope.experiments.reading import Reading, Writing
    from pscope.inputs.chats import read_chat

    if chat_target is not None:
        messages = read_chat(chat_target)
        text = other.chat(messages).text
        prompt = other.chat(messages, target.position(text))
    else:
        prompt = target.prompt(other, pscope.ENTITY_DESCRIPTION)
    if prompt.at_sink:
        tell(f"{prompt!r}: models keep an attention sink at the first token; what is patched over it may derail them")
    states, words = Sources(frame, model, sources).read()
    directions = sources.minus is not None or sources.difference is not None
    mappings, patched_layers = _mappings(frame, model, other, lens, states, patched_layers, directions=directions)
    if mappings is not None and sources.layers is None:
        states = _covered(states, mappings)
    frame.read([prompt.text])
    decoding = pscope.Decoding(new_tokens, temperature, seed, tuple(stop or ()))
    experiment = Reading(
        other,
        prompt,
        states,
        patched_layers,
        decoding,
        writing=Writing(writing.scales, writing.norm, writing.add, tuple(parse_layers(writing.hold, "--hold") or ())),
        mappings=mappings,
        words=_written_out(other, prompt, words, new_tokens),
        times=times,
        top_k=top_k,
        relevance=relevance,
        seed=seed,
        memory=frame.memory,
    )
    table = frame.carry_out(
        experiment, target=prompt.text, target_model=other.name, target_positions=prompt.positions, seed=seed
    )
    frame.finish()
    if as_json:
        print_json(table)
    else:
        from pscope.show.reading import reading_tables

        out.print(*reading_tables(table))
    tell(f"table: {frame.run.folder / 'table.parquet'}")


def _written_out(model: LanguageModel, target_prompt: Prompt, words: dict[str, str], new_tokens: int) -> dict[str, str]:
    """The words that can take the place of the placeholder; not those of a text that is its own target."""
    from pscope.errors import PromptError
    from pscope.models.prompts import written_out

    controls = {}
    for name, text in words.items():
        try:
            model.check_room(len(model.prompt(written_out(target_prompt, text))), new_tokens)
        except PromptError as error:
            tell(f"without the control of the text alone, {name!r}: {error}")
            continue
        if name != target_prompt.text:
            controls[name] = text
    return controls


def _mappings(
    frame: Frame,
    model: LanguageModel,
    other: LanguageModel,
    lens: str | None,
    states: States,
    target_layers: Any,
    *,
    directions: bool,
) -> tuple[MappingSet | None, Any]:
    """The maps that states go through, if there are any, and the layers that are patched."""
    from pscope.experiments.cross_model import MAPPED
    from pscope.experiments.reading import label_layers
    from pscope.models.fingerprint import fingerprint

    if other is not model:
        frame.read([fingerprint(model)])
    mappings = None if lens is None else frame.lens(lens, model, other)
    leads_to = set() if mappings is None else {target for _, target in mappings.maps}
    default = [*leads_to] if len(leads_to) == 1 else "same"
    target_layers = range(other.n_layers + 1) if target_layers == "all" else target_layers or default
    if lens is not None:
        if directions:
            tell("what is left of a subtraction is a direction; a map with a constant part adds that to it")
        return mappings, target_layers
    if other is model:
        return None, target_layers
    if _alike(model, other):
        tell(f"states of {model.name} go into {other.name} as they are: the two are of one kind and size")
        return None, target_layers
    if directions:
        raise PscopeError(
            "--minus and --difference leave directions, and the maps between models have a constant part; read states"
        )
    layers = [label.layer for label in states.labels if label.layer is not None]
    if len(layers) < len(states.labels):
        raise PscopeError(f"maps to {other.name} lead from layers; say by --layers of which the vectors are")
    pairs = sorted(
        {(of, to) for label, of in zip(states.labels, layers, strict=True) for to in label_layers(label, target_layers)}
    )
    maps = fit_across(frame, model, other, pairs, controls=False)
    return None if maps is None else maps[MAPPED], target_layers


def _covered(states: States, mappings: MappingSet) -> States:
    """The states of layers that mappings lead from. Raises PscopeError if there are none."""
    leads_from = {source for source, _ in mappings.maps}
    rows = [row for row, label in enumerate(states.labels) if label.layer in leads_from or label.layer is None]
    if not rows:
        raise PscopeError(f"no state is of a layer that these mappings lead from: {mappings.covered}")
    return states[rows]


def _alike(model: LanguageModel, other: LanguageModel) -> bool:
    """Whether a model may be a finetune of another: of one kind, with as many layers, of one width, with one
    vocabulary.
    """
    kinds = [(of.config.model_type, of.n_layers, of.hidden_size, of.tokenizer.get_vocab()) for of in (model, other)]
    return kinds[0] == kinds[1]
