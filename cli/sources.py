"""What `pscope read` reads: the options that say it, and the states that come of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pscope.cli.console import tell
from pscope.cli.frame import Frame
from pscope.cli.options import option_of, parse_layers
from pscope.cli.prompts import parse_position, refuse_lost_file, tell_sink

from pscope.errors import PscopeError

if TYPE_CHECKING:
    from pscope.models.model import LanguageModel
    from pscope.models.prompts import At, Prompt
    from pscope.models.states import States

SOURCE = "What is read"


@dataclass(frozen=True)
class SourceOptions:
    """States of texts or chats, or vectors, and what is made of them."""

    text: Annotated[list[str] | None, option_of(SOURCE, help="A text whose states are read; may be given again.")] = (
        None
    )
    at: Annotated[
        list[str] | None,
        option_of(
            SOURCE,
            help="Which token: its text, first:TEXT, all:TEXT, an index, or last. Given again, for the next text, or "
            "for another token of the only one.",
            show_default="last",
        ),
    ] = None
    every_token: Annotated[bool, option_of(SOURCE, "--every-token", help="Read every token of the texts.")] = False
    chat: Annotated[Path | None, option_of(SOURCE, help="A .json file of messages, by the model's template.")] = None
    assistant_turn: Annotated[
        bool, option_of(SOURCE, help="Begin the assistant's turn, or leave its last one open.")
    ] = True
    vectors: Annotated[
        str | None,
        option_of(SOURCE, metavar="FILE[:TENSOR]", help="Vectors of .safetensors or .npy: (rows, hidden) or (hidden)."),
    ] = None
    layers: Annotated[
        str | None,
        option_of(
            SOURCE,
            help="Layers to read; the one that vectors without any are of.",
            show_default="all; none of vectors",
        ),
    ] = None
    mean: Annotated[bool, option_of(SOURCE, "--mean", help="Read the mean of all that is given, layer by layer.")] = (
        False
    )
    minus: Annotated[
        list[str] | None,
        option_of(
            SOURCE,
            metavar="TEXT|FILE",
            help="Subtract the mean of others: a text, a .txt or .jsonl file of them, each read at its last token, or "
            "vectors. May be given again.",
        ),
    ] = None
    difference: Annotated[
        str | None,
        option_of(SOURCE, metavar="MODEL", help="Read what this model makes of the texts, minus what --model does."),
    ] = None

    def __post_init__(self) -> None:
        if not (self.text or self.chat or self.vectors):
            raise PscopeError("there is nothing to read; give --text, --chat or --vectors")
        if self.vectors and (self.text or self.chat):
            raise PscopeError("--vectors come from a file, and texts from a model; give one or the other")
        _ = parse_layers(self.layers)
        for name, value in (("--at", self.at), ("--every-token", self.every_token), ("--difference", self.difference)):
            if self.vectors and value:
                raise PscopeError(f"{name} is of texts, and --vectors are of none")
        if self.at and self.every_token:
            raise PscopeError("--at and --every-token were both given; choose one")


class Sources:
    """What `SourceOptions` ask for: states of a model, or of a file."""

    def __init__(self, frame: Frame, model: LanguageModel, options: SourceOptions) -> None:
        self._frame, self._model, self._options = frame, model, options
        self._layers = parse_layers(options.layers)
        self._finetune = self._load_finetune(options.difference) if options.difference else None

    def read(self) -> tuple[States, dict[str, str]]:
        """The states, and for each text what of it they have seen, in words."""
        options = self._options
        words: dict[str, str] = {}
        if options.vectors is not None:
            states = self._of_layers(self._from_file(options.vectors))
        else:
            prompts, words = self._prompts()
            states = self._states_of(prompts, self._layers)
        if options.mean:
            states = states.mean()
            words = {states.labels[0].text: ", ".join(words.values())} if words else {}
        if options.minus:
            states = states - self._others(options.minus, states)
        _refuse_nothing(states)
        return states, words

    def _prompts(self) -> tuple[list[tuple[str, Prompt]], dict[str, str]]:
        """What is read, each prompt with the name that it is shown by, and in words what its last token has seen."""
        from pscope.experiments.grid import line_break, source_prompt
        from pscope.inputs.chats import read_chat

        options, model = self._options, self._model
        texts, chat = options.text or [], options.chat
        if len(set(texts)) < len(texts):
            raise PscopeError("a text is given twice; mark several tokens of it by several --at")
        prompts, words = [], {}
        marks = _marks_of_each(options.at or [], len(texts) + (chat is not None))
        for text, own in zip(texts, marks, strict=False):
            if options.every_token:
                prompt = _every_token(model.prompt(line_break(model, text) + text))
            else:
                prompt = source_prompt(model, text, _places(text, own))
            prompts.append((text, prompt))
            words[text] = _text_read(prompt)
        if chat is not None:
            messages, begin = read_chat(chat), options.assistant_turn
            unmarked = model.chat(messages, begin=begin)
            marked = _every_token(unmarked) if options.every_token else None
            prompts.append((chat.name, marked or model.chat(messages, _places(unmarked.text, marks[-1]), begin=begin)))
            words[chat.name] = "\n".join(message["content"] for message in messages)
        self._frame.read([prompt.text for _, prompt in prompts])
        for _, prompt in prompts:
            tell_sink(prompt)
        return prompts, words

    def _states_of(self, prompts: Sequence[tuple[str, Prompt]], layers: Sequence[int] | None) -> States:
        """The states of prompts, or the difference of two models', with the names that the prompts are shown by."""
        import pscope

        layers = range(self._model.n_layers + 1) if layers is None else layers
        bare_prompts = [prompt for _, prompt in prompts]
        states = pscope.States.of(self._model, bare_prompts, layers=layers)
        if self._finetune is not None:
            for prompt in bare_prompts:
                if self._finetune.prompt(prompt.text).ids != prompt.ids:
                    raise PscopeError(f"{self._finetune.name} cuts {prompt.text!r} into other tokens: no finetune")
            states = pscope.States.of(self._finetune, bare_prompts, layers=layers) - states
        names = [name for name, prompt in prompts for _ in prompt.positions for _ in layers]
        labels = (label._replace(text=name) for label, name in zip(states.labels, names, strict=True))
        return replace(states, labels=tuple(labels))

    def _from_file(self, name: str) -> States:
        """The vectors of FILE or FILE:TENSOR; in a dry run, no more than their number."""
        import pscope

        path, _, tensor = (name, "", "") if Path(name).exists() else name.rpartition(":")
        states = pscope.States.from_file(path or tensor, (tensor or None) if path else None)
        self._frame.read([sha256(states.vectors.double().numpy().tobytes()).hexdigest()])
        return states if self._model.device.type != "meta" else states.map(lambda vectors: vectors.to("meta"))

    def _of_layers(self, states: States) -> States:
        """Those of `--layers`; where they are of none, of the one that is named."""
        if self._layers is None:
            return states
        if any(label.layer is None for label in states.labels):
            if len(self._layers) > 1:
                raise PscopeError(f"--layers {self._options.layers}: vectors are of one layer, or of none")
            labels = (label._replace(layer=self._layers[0]) for label in states.labels)
            return replace(states, labels=tuple(labels))
        rows = [row for row, label in enumerate(states.labels) if label.layer in self._layers]
        if not rows:
            raise PscopeError(f"--layers {self._options.layers}: none of {states!r} is of these")
        return states[rows]

    def _others(self, names: Sequence[str], states: States) -> States:
        """The mean of what is subtracted, layer by layer."""
        from pscope.experiments.grid import source_prompt
        from pscope.inputs.texts import read_texts

        if any(Path(name.split(":")[0]).suffix in (".safetensors", ".npy") for name in names):
            if len(names) > 1:
                raise PscopeError("--minus: vectors are subtracted by themselves; give one file of them")
            return self._from_file(names[0]).mean()
        layers = list(dict.fromkeys(label.layer for label in states.labels if label.layer is not None))
        if any(label.layer is None for label in states.labels):
            raise PscopeError("--minus: texts have states in layers; say by --layers of which the vectors are")
        texts = []
        for name in names:
            if Path(name).suffix in (".txt", ".jsonl"):
                texts += read_texts(Path(name))
            else:
                refuse_lost_file(name, "--minus")
                texts.append(name)
        self._frame.read(texts)
        return self._states_of([(text, source_prompt(self._model, text)) for text in texts], layers).mean()

    def _load_finetune(self, name: str) -> LanguageModel:
        """The model of `--difference`. Raises PscopeError if its states cannot be held against the model's."""
        from pscope.models.fingerprint import fingerprint

        model, other = self._model, self._frame.load_other(name)
        if (other.n_layers, other.hidden_size) != (model.n_layers, model.hidden_size):
            raise PscopeError(
                f"--difference: {other.name} has {other.n_layers} layers of width {other.hidden_size}, and "
                f"{model.name} {model.n_layers} of {model.hidden_size}; two finetunes of one model are meant"
            )
        self._frame.read([fingerprint(other)])
        return other


def _marks_of_each(marks: Sequence[str], prompts: int) -> list[list[str]]:
    """The `--at` of each prompt: one for all, one for each, or several for the only one. Raises PscopeError."""
    if prompts == 1 or len(marks) < 2:
        return [list(marks)] * prompts
    if len(marks) != prompts:
        raise PscopeError(f"{len(marks)} times --at for {prompts} texts; give one for all, or one for each")
    return [[mark] for mark in marks]


def _places(text: str, marks: Sequence[str]) -> At:
    """What `--at` marks in a text: one token, or those of all that were given."""
    from pscope.models.prompts import places_of

    places = [place for mark in marks for place in places_of(parse_position(mark, None, text))] or [-1]
    return places if len(places) > 1 else places[0]


def _every_token(prompt: Prompt) -> Prompt:
    """A prompt with all tokens marked but for the first, where the attention sink is."""
    return replace(prompt, positions=tuple(range(1, len(prompt))))


def _text_read(prompt: Prompt) -> str:
    """The text up to the last token that is read."""
    last = max(prompt.positions)
    return prompt.text[: prompt.spans[last][1] if prompt.spans else None].strip()


def _refuse_nothing(states: States) -> None:
    """Raise PscopeError where nothing is left to read, and name what is nothing beside others."""
    if states.vectors.device.type == "meta":
        return
    zero = [label for label, vector in zip(states.labels, states.vectors, strict=True) if not vector.any()]
    if len(zero) == len(states):
        raise PscopeError(
            "all vectors are 0, or what is subtracted is what it is subtracted from: nothing is left to read"
        )
    if zero:
        layers = sorted({label.layer for label in zero if label.layer is not None})
        tell(f"{len(zero)} of {len(states)} vectors are 0{f', at layers {layers}' if layers else ''}: they say nothing")
