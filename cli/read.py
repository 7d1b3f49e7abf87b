"""`pscope read`: any states, any vectors, read by any prompt; and `pscope targets`, the prompts that have a name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
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
    parse_layers,
    parse_target_layers,
    seed_option,
    target_layers_option,
)
from pscope.cli.prompts import TargetOptions, parse_position

from pscope.errors import PscopeError

if TYPE_CHECKING:
    from pscope.mappings.mapping_set import MappingSet
    from pscope.models.model import LanguageModel
    from pscope.models.prompts import At, Prompt
    from pscope.models.states import States

SOURCE, WRITTEN, SAID = "What is read", "How it is written", "What is said"


def _of(panel: str, *names: str, **options: Any) -> Any:
    return typer.Option(*names, rich_help_panel=panel, **options)


@dataclass(frozen=True)
class SourceOptions:
    """States of texts or chats, or vectors, and what is made of them."""

    text: Annotated[list[str] | None, _of(SOURCE, help="A text whose states are read; may be given again.")] = None
    at: Annotated[
        list[str] | None,
        _of(
            SOURCE,
            help="Which token: its text, first:TEXT, all:TEXT, an index, or last. Given again, for the next text, or "
            "for another token of the only one.",
            show_default="last",
        ),
    ] = None
    every_token: Annotated[bool, _of(SOURCE, "--every-token", help="Read every token of the texts.")] = False
    chat: Annotated[Path | None, _of(SOURCE, help="A .json file of messages, by the model's template.")] = None
    assistant_turn: Annotated[bool, _of(SOURCE, help="Begin the assistant's turn, or leave its last one open.")] = True
    vectors: Annotated[
        str | None,
        _of(SOURCE, metavar="FILE[:TENSOR]", help="Vectors of .safetensors or .npy: (rows, hidden) or (hidden)."),
    ] = None
    layers: Annotated[
        str | None,
        _of(SOURCE, help="Layers to read; of vectors, the one that they are of.", show_default="all; none of vectors"),
    ] = None
    mean: Annotated[bool, _of(SOURCE, "--mean", help="Read the mean of all that is given, layer by layer.")] = False
    minus: Annotated[
        list[str] | None,
        _of(
            SOURCE,
            metavar="TEXT|FILE",
            help="Subtract the mean of others: a text, a .txt or .jsonl file of them, each read at its last token, or "
            "vectors. May be given again.",
        ),
    ] = None
    difference: Annotated[
        str | None,
        _of(SOURCE, metavar="MODEL", help="Read what this model makes of the texts, minus what --model does."),
    ] = None

    def __post_init__(self) -> None:
        layers = parse_layers(self.layers)
        if not (self.text or self.chat or self.vectors):
            raise PscopeError("there is nothing to read; give --text, --chat or --vectors")
        if self.vectors and (self.text or self.chat):
            raise PscopeError("--vectors come from a file, and texts from a model; give one or the other")
        if self.vectors and layers is not None and len(layers) > 1:
            raise PscopeError(f"--layers {self.layers}: vectors are of one layer, or of none")
        for name, given in (("--at", self.at), ("--every-token", self.every_token), ("--difference", self.difference)):
            if self.vectors and given:
                raise PscopeError(f"{name} is of texts, and --vectors are of none")
        if self.at and self.every_token:
            raise PscopeError("--at and --every-token were both given; choose one")


@dataclass(frozen=True)
class WritingOptions:
    """How a vector is written."""

    scale: Annotated[str, _of(WRITTEN, metavar="NUMBER[,…]", help="Times this, each in turn.")] = "1"
    norm: Annotated[
        bool, _of(WRITTEN, "--norm", help="First at the length of the state that the target has in its place.")
    ] = False
    add: Annotated[bool, _of(WRITTEN, "--add", help="Added to that state, instead of replacing it.")] = False
    hold: Annotated[
        str | None,
        _of(WRITTEN, metavar="LAYERS", help="In these layers too, so that the placeholder's own states are not seen."),
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
        typer.Option(metavar="FOLDER|ID", help="Maps that states go through, of `pscope fit`, or another lens."),
    ] = None,
    new_tokens: NewTokensOption = 20,
    top_k: Annotated[int, _of(SAID, min=1, help="Next tokens to show.")] = 1,
    temperature: Annotated[float, _of(SAID, min=0, help="Sample at this temperature; 0 is greedy.")] = 0.0,
    times: Annotated[int, _of(SAID, min=1, help="How often each row is sampled.")] = 1,
    stop: Annotated[list[str] | None, _of(SAID, help="Text that ends what is said; may be given again.")] = None,
    relevance: Annotated[
        bool, _of(SAID, "--relevance", help="Tell how much of each token said is owed to the patch: |p − p clean|.")
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
    chosen = parse_target_layers(target_layers)
    model = frame.load()
    other = frame.load_target(target_model, model)

    import pscope
    from pscope.experiments.reading import Reading, Writing
    from pscope.inputs.chats import read_chat

    if chat_target is not None:
        messages = read_chat(chat_target)
        text = other.chat(messages).text
        patched = other.chat(messages, target.position(text))
    else:
        patched = target.prompt(other, pscope.ENTITY_DESCRIPTION)
    states, words = _Sources(frame, model, sources).read()
    mappings, chosen = _mappings(frame, model, other, lens, states, chosen)
    frame.read([patched.text])
    decoding = pscope.Decoding(new_tokens, temperature, seed, tuple(stop or ()))
    experiment = Reading(
        other,
        patched,
        states,
        chosen,
        decoding,
        writing=Writing(writing.scales, writing.norm, writing.add, tuple(parse_layers(writing.hold, "--hold") or ())),
        mappings=mappings,
        words=_writable(patched, words),
        times=times,
        top_k=top_k,
        relevance=relevance,
        seed=seed,
        memory=frame.memory,
    )
    table = frame.carry_out(
        experiment, target=patched.text, target_model=other.name, target_positions=patched.positions, seed=seed
    )
    frame.finish()
    if as_json:
        print_json(table)
    else:
        from pscope.show.reading import reading_tables

        out.print(*reading_tables(table))
    tell(f"table: {frame.folder / 'table.parquet'}")


def targets(as_json: JsonOption = False) -> None:
    """The target prompts that have a name, for --target."""
    from dataclasses import asdict

    from rich.table import Table

    from pscope.inputs.targets import shipped_targets
    from pscope.show.tables import literal

    listed = shipped_targets().values()
    if as_json:
        print_json({target.name: asdict(target) for target in listed})
        return
    shown = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("name", "prompt", "placeholder", "asks", "from"):
        shown.add_column(heading, overflow="fold")
    for target in listed:
        shown.add_row(*map(literal, (target.name, repr(target.text)[1:-1], target.at, target.asks, target.source)))
    out.print(shown)


class _Sources:
    """What `SourceOptions` ask for: states of a model, or of a file."""

    def __init__(self, frame: Frame, model: LanguageModel, options: SourceOptions) -> None:
        self._frame, self._model, self._options = frame, model, options
        self._layers = parse_layers(options.layers)
        self._finetune = self._load_finetune() if options.difference else None

    def read(self) -> tuple[States, dict[str, str]]:
        """The states, and for each text what of it they have seen, in words."""
        options, words = self._options, {}
        if options.vectors is not None:
            states = self._from_file(options.vectors)
        else:
            prompts = self._prompts()
            states = self._formed(prompts)
            words = self._words(prompts)
        if options.mean:
            states = states.mean()
            words = {states.labels[0].text: ", ".join(words.values())} if words else {}
        if options.minus:
            states = states - self._others(options.minus)
        return states, words

    def _prompts(self) -> dict[str, Prompt]:
        """What is read, each prompt by the name that it is shown by."""
        from pscope.experiments.grid import line_break, source_prompt
        from pscope.inputs.chats import read_chat

        options, model = self._options, self._model
        texts, at = options.text or [], options.at or []
        if len(texts) > 1 and len(at) not in (0, 1, len(texts)):
            raise PscopeError(f"{len(at)} times --at for {len(texts)} texts; give one for all, or one for each")
        if len(set(texts)) < len(texts):
            raise PscopeError("a text is given twice; mark several tokens of it by several --at")
        # Several for the only text are several tokens of it.
        of_each = [at] * len(texts) if len(at) < 2 or len(texts) == 1 else [[one] for one in at]
        found = {}
        for text, marks in zip(texts, of_each, strict=True):
            if options.every_token:
                found[text] = _every_token(model.prompt(line_break(model, text) + text))
            else:
                found[text] = source_prompt(model, text, _places(text, marks))
        if options.chat is not None:
            messages, begin = read_chat(options.chat), options.assistant_turn
            whole = model.chat(messages, begin=begin)
            marked = model.chat(messages, _places(whole.text, at), begin=begin)
            found[str(options.chat)] = _every_token(whole) if options.every_token else marked
        self._frame.read([prompt.text for prompt in found.values()])
        for prompt in found.values():
            if prompt.at_sink:
                tell(f"{prompt!r}: models keep an attention sink at the first token, whose state says nothing of it")
        return found

    def _formed(self, prompts: dict[str, Prompt]) -> States:
        """The states of prompts, or the difference of two models', with the names that the prompts are shown by."""
        import pscope

        layers = range(self._model.n_layers + 1) if self._layers is None else self._layers
        found = pscope.States.of(self._model, list(prompts.values()), layers=layers)
        if self._finetune is not None:
            for prompt in prompts.values():
                if self._finetune.prompt(prompt.text).ids != prompt.ids:
                    raise PscopeError(
                        f"{self._finetune.name} has other tokens for {prompt.text!r}; no difference is meant"
                    )
            found = pscope.States.of(self._finetune, list(prompts.values()), layers=layers) - found
        names = {prompt.text: name for name, prompt in prompts.items()}
        return replace(found, labels=tuple(label._replace(text=names[label.text]) for label in found.labels))

    def _words(self, prompts: dict[str, Prompt]) -> dict[str, str]:
        """What the last of the tokens that are read has seen of each prompt, without what marks turns in it."""
        decode = self._model.tokenizer.decode
        seen = {name: prompt.ids[: max(prompt.positions) + 1] for name, prompt in prompts.items()}
        return {name: decode(list(ids), skip_special_tokens=True).strip() for name, ids in seen.items()}

    def _from_file(self, name: str) -> States:
        """Vectors of FILE or FILE:TENSOR, of the layer that is named, if one is."""
        import pscope

        path, _, tensor = (name, "", "") if Path(name).exists() else name.rpartition(":")
        states = pscope.States.from_file(path or tensor, (tensor or None) if path else None)
        self._frame.read([sha256(states.vectors.double().numpy().tobytes()).hexdigest()])
        if self._layers is not None:
            states = replace(states, labels=tuple(label._replace(layer=self._layers[0]) for label in states.labels))
        return states

    def _others(self, given: Sequence[str]) -> States:
        """The mean of what is subtracted, layer by layer."""
        from pscope.experiments.grid import source_prompt
        from pscope.inputs.texts import read_texts

        if any(Path(name.split(":")[0]).suffix in (".safetensors", ".npy") for name in given):
            if len(given) > 1:
                raise PscopeError("--minus: vectors are subtracted by themselves; give one file of them")
            return self._from_file(given[0]).mean()
        if self._options.vectors is not None and self._layers is None:
            raise PscopeError("--minus: texts have states in layers; say by --layers of which the vectors are")
        files = {name for name in given if Path(name).suffix in (".txt", ".jsonl")}
        texts = [text for name in given for text in (read_texts(Path(name)) if name in files else [name])]
        self._frame.read(texts)
        return self._formed({text: source_prompt(self._model, text) for text in texts}).mean()

    def _load_finetune(self) -> LanguageModel:
        """The model of `--difference`. Raises PscopeError if its states cannot be held against the model's."""
        from pscope.models.fingerprint import fingerprint

        model, other = self._model, self._frame.load(self._options.difference)
        if (other.n_layers, other.hidden_size) != (model.n_layers, model.hidden_size):
            raise PscopeError(
                f"--difference: {other.name} has {other.n_layers} layers of width {other.hidden_size}, and "
                f"{model.name} {model.n_layers} of {model.hidden_size}; two finetunes of one model are meant"
            )
        self._frame.read([fingerprint(other)])
        return other


def _places(text: str, marks: Sequence[str]) -> At:
    """What `--at` marks in a text: one token, or those of all that were given."""
    places = [parse_position(mark, None, text) for mark in marks] or [-1]
    several = [place for each in places for place in (each if isinstance(each, list) else [each])]
    return several if len(several) > 1 else several[0]


def _every_token(prompt: Prompt) -> Prompt:
    """A prompt with all tokens marked but for the first, where the attention sink is."""
    return replace(prompt, positions=tuple(range(1, len(prompt))))


def _writable(patched: Prompt, words: dict[str, str]) -> dict[str, str]:
    """The words that can take the place of the placeholder; not those of a text that is its own target."""
    from pscope.errors import PromptError
    from pscope.models.prompts import written_out

    try:
        written_out(patched, "")
    except PromptError as error:
        tell(f"the text alone is not asked about: {error}")
        return {}
    return {name: text for name, text in words.items() if name != patched.text}


def _mappings(
    frame: Frame, model: LanguageModel, other: LanguageModel, lens: str | None, states: States, chosen: Any
) -> tuple[MappingSet | None, Any]:
    """The maps that states go through, if there are any, and the layers that are patched."""
    from pscope.experiments.cross_model import MAPPED
    from pscope.experiments.reading import label_layers
    from pscope.models.fingerprint import fingerprint

    if other is not model:
        frame.read([fingerprint(model)])
    if lens is not None:
        mappings = frame.lens(lens, model, other)
        leads_to = sorted({target for _, target in mappings.maps}) if mappings is not None else []
        return mappings, leads_to if chosen is None and len(leads_to) == 1 else chosen or "same"
    chosen = range(other.n_layers + 1) if chosen == "all" else chosen or "same"
    if (model.n_layers, model.hidden_size) == (other.n_layers, other.hidden_size):
        return None, chosen
    pairs = sorted({(label.layer, to) for label in states.labels for to in label_layers(label, chosen)})
    fitted = fit_across(frame, model, other, pairs, controls=False)
    return fitted and fitted[MAPPED], chosen
