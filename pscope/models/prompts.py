"""Prompts, tokenised once, and the position in each that is read or overwritten.

A prompt and its position are half of a Patchscope in the paper's notation: (S, i) for the source, (T, i*) for the
target. A position is an index into the tokens (negative ones count from the end), `"last"`, or a piece of the text:
it must stand in the prompt as whole tokens, exactly once, and its last token is meant, or, by `First("the capital")`,
the first. Several may be marked: a list of positions, or `Every("x")`, as for the placeholders of "x x x x x" (SelfIE).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from pscope.arguments import as_python, excerpt, is_int
from pscope.characters import has_surrogates
from pscope.errors import PromptError

TOKEN_IDENTITY = "cat -> cat\n1135 -> 1135\nhello -> hello\n?"
"""The paper's few-shot prompt (section 4.1) that makes a model repeat the token whose state it reads at `?`."""

ENTITY_DESCRIPTION = (
    "Syria: Country in the Middle East, Leonardo DiCaprio: American actor, Samsung: South Korean multinational major "
    "appliance and consumer electronics corporation, x"
)
"""The paper's few-shot prompt (section 4.3) that makes a model describe the entity whose state it reads at `x`."""

LAST = "last"


@dataclass(frozen=True)
class _Piece:
    """A piece of text. Raises PromptError for what is none."""

    piece: str

    def __post_init__(self) -> None:
        if not isinstance(self.piece, str):
            raise PromptError(f"{type(self).__name__} takes a piece of the prompt's text, not {excerpt(self.piece)}")


class Every(_Piece):
    """Each place where a piece of text stands in a prompt as whole tokens; the last token of each is meant."""


class First(_Piece):
    """The first token of a piece of text that stands in a prompt once, as whole tokens."""


@dataclass(frozen=True)
class Nearest:
    """A position given by a piece of the text that may stand in it several times: the nearest to a place is meant.

    The place is `character`, the number of characters of the text before it, or, where that is not known, `index`,
    that of a token, which may have been counted by another tokenizer.
    """

    piece: str
    index: int
    character: int | None = None

    def choose(self, positions: Sequence[int], offsets: Sequence[tuple[int, int]]) -> int:
        """The nearest of several positions, given where each token of the text begins and ends."""
        character = self.character
        if character is not None:
            return min(positions, key=lambda position: abs(offsets[position][1] - character))
        index = self.index + len(offsets) if self.index < 0 else self.index
        return min(positions, key=lambda position: abs(position - index))


@dataclass(frozen=True)
class Ending:
    """The token of an `index`, which may have been counted by another tokenizer: only if it ends a word of the text
    that is the last one of the `phrase`.
    """

    phrase: str
    index: int


Place = str | int | Every | First | Nearest | Ending

At = Place | Sequence[Place]
"""A position, or several."""


@dataclass(frozen=True)
class Prompt:
    """A tokenised text with one position marked, or several.

    `ids` and `tokens` have the same length; `tokens` are what a person sees, cut from the text itself where the
    tokenizer tells offsets. `positions` are distinct, in the order given, and never negative. `spans` are where tokens
    begin and end in the text, none for any where the tokenizer tells no offsets, and an empty one for a token that it
    added. Raises PromptError for what is no such thing.
    """

    text: str
    ids: tuple[int, ...]
    tokens: tuple[str, ...]
    positions: tuple[int, ...]
    spans: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.text, str) or not self.ids or not all(map(is_int, self.ids)):
            raise PromptError(
                f"a prompt has a text and the ids of its tokens, not {self.text!r} and {excerpt(self.ids)}"
            )
        if len(self.tokens) != len(self.ids):
            raise PromptError(f"a prompt has one text for each token; {len(self.ids)} ids came with {len(self.tokens)}")
        if not self.positions or not all(is_int(each) and 0 <= each < len(self) for each in self.positions):
            raise PromptError(f"positions {excerpt(self.positions)} do not lie within a prompt of {len(self)} tokens")

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        text = self.text if len(self.text) <= 60 else f"{self.text[:40]} … {self.text[-19:]}"
        return f"Prompt({text!r} at {' '.join(f'{index}:{self.tokens[index]!r}' for index in self.positions)})"

    @property
    def position(self) -> int:
        """The marked position. Raises PromptError if there are several."""
        if len(self.positions) > 1:
            raise PromptError(f"{len(self.positions)} positions of {self.text!r} are marked where one is needed")
        return self.positions[0]

    @property
    def token(self) -> str:
        """The token at the marked position."""
        return self.tokens[self.position]

    @property
    def at_sink(self) -> bool:
        """Whether the very first token is marked: models keep an attention sink there, which says nothing of it."""
        return 0 in self.positions


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str, at: At = -1) -> Prompt:
    """Tokenise `text` as the tokenizer does by itself and mark the position `at`, or each of several.

    Start tokens are added where the tokenizer adds any, and not again when the text already begins with them; what a
    tokenizer appends after the text is left off, since the model is to go on from there.

    Raises PromptError for an empty text, for one that is not Unicode, and for a position that is not there, not unique,
    or cannot be resolved.
    """
    if not isinstance(text, str):
        raise PromptError(f"a prompt is one text, not {excerpt(text)}")
    if not text.strip():
        raise PromptError("the prompt is empty; give some text")
    if has_surrogates(text):
        raise PromptError(f"the prompt {text!r} holds bytes that are not UTF-8; convert it and try again")
    encoding = _encode(tokenizer, text)
    ids = tuple(encoding["input_ids"])
    if not ids:
        raise PromptError(f"the tokenizer has no token for anything in {text!r}; give some text")
    offsets = encoding.get("offset_mapping")
    tokens = tuple(tokenizer.convert_ids_to_tokens(list(ids)))
    if offsets is not None:
        # Tokens the tokenizer added have no place in the text.
        tokens = tuple(
            text[start:end] if end > start else token for token, (start, end) in zip(tokens, offsets, strict=True)
        )
    marks = places_of(at)
    for mark in marks:
        if not (is_int(mark) or isinstance(mark, (str, Every, First, Nearest, Ending))):
            raise PromptError(f"{excerpt(mark)} is no position; give text of the prompt, an index, or a list of such")
    positions = tuple(place for mark in marks for place in _places(mark, text, tokens, offsets, tokenizer))
    if not positions or len(set(positions)) < len(positions):
        raise PromptError(f"the positions {marks} of {text!r} are none, or one of them twice: {_listing(tokens)}")
    return Prompt(text, ids, tokens, positions, tuple(map(tuple, offsets or ())))


def decode(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int], *, skip_special_tokens: bool = False) -> str:
    """The text of some tokens."""
    # Only of several lists of tokens does transformers make several texts.
    return cast(str, tokenizer.decode(list(tokens), skip_special_tokens=skip_special_tokens))


def places_of(at: At) -> list[Place]:
    """The positions that are given: several, or one alone."""
    places: Any = as_python(at)
    several = isinstance(places, Sequence) and not isinstance(places, (str, bytes))
    return [*map(as_python, places)] if several else [places]


def written_out(prompt: Prompt, words: str) -> str:
    """The prompt's text with `words` in the place of the marked token; blanks around that token stay.

    Of several marked tokens in a row, as "x x x", the words take the place of all. Raises PromptError if the tokenizer
    tells no offsets, or added a marked token itself.
    """
    places: list[tuple[int, int]] = []
    for position in sorted(prompt.positions):
        start, end = prompt.spans[position] if prompt.spans else (0, 0)
        word = prompt.text[start:end].strip()
        if not word:
            raise PromptError(f"nothing can be written in the place of token {position}, {prompt.tokens[position]!r}")
        start = prompt.text.index(word, start)
        if places and not prompt.text[places[-1][1] : start].strip():
            start, _ = places.pop()
        places.append((start, end))
    text = prompt.text
    for start, end in reversed(places):
        blank = text[start:end][len(text[start:end].rstrip()) :]
        text = text[:start] + words + blank + text[end:]
    return text


def spoken_after(prompt: Prompt, words: str) -> str:
    """Words as they go on after a prompt: with a blank between, unless it ends with one."""
    return words if prompt.text[-1:].isspace() else f" {words}"


def continuing_tokens(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, text: str) -> tuple[int, ...]:
    """The tokens of a text that goes on after the prompt, with a blank before it where there is to be one.

    Raises PromptError for an empty text, and if the tokenizer cuts the prompt otherwise where the text follows.
    """
    if not isinstance(text, str) or not text:
        raise PromptError(f"a continuation is a text with something in it, not {text!r}")
    ids = tuple(_encode(tokenizer, prompt.text + text)["input_ids"])
    if len(ids) <= len(prompt) or ids[: len(prompt)] != prompt.ids:
        raise PromptError(
            f"{text!r} after {prompt.text!r} is not tokenised as its continuation; most tokenizers need a blank before "
            "a word, and none after the prompt"
        )
    return ids[len(prompt) :]


def candidate_tokens(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, candidates: Sequence[str]
) -> list[tuple[int, ...]]:
    """The tokens of each of some texts among which one is chosen to go on after the prompt.

    Raises PromptError as `continuing_tokens` does, and for two with the same tokens, which nothing could tell apart.
    """
    by_tokens: dict[tuple[int, ...], str] = {}
    for text in candidates:
        tokens = continuing_tokens(tokenizer, prompt, text)
        if tokens in by_tokens:
            raise PromptError(f"the candidates {by_tokens[tokens]!r} and {text!r} have the same tokens; leave one out")
        by_tokens[tokens] = text
    return [*by_tokens]


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> Mapping[str, Any]:
    options = {"return_offsets_mapping": tokenizer.is_fast, "return_attention_mask": False}
    bare = tokenizer(text, add_special_tokens=False, **options)
    whole, length = tokenizer(text, **options), len(bare["input_ids"])
    for before in range(len(whole["input_ids"]) - length, -1, -1):
        end = before + length
        if whole["input_ids"][before:end] == bare["input_ids"]:
            if before and bare["input_ids"][:before] == whole["input_ids"][:before]:
                return bare  # the text has the start tokens already
            return {key: whole[key][:end] for key in ("input_ids", "offset_mapping") if key in whole}
    return whole


def _places(
    at: Place,
    text: str,
    tokens: tuple[str, ...],
    offsets: Sequence[tuple[int, int]] | None,
    tokenizer: PreTrainedTokenizerBase,
) -> list[int]:
    """The positions that `at` marks: one, or as many as `Every` finds."""
    if isinstance(at, int):
        if not -len(tokens) <= at < len(tokens):
            raise PromptError(f"position {at} is outside the prompt's {len(tokens)} tokens: {_listing(tokens)}")
        return [at % len(tokens)]
    if isinstance(at, Ending):
        (index,) = _places(at.index, text, tokens, offsets, tokenizer)
        word = tokens[index] if offsets is None else text[: offsets[index][1]]
        last = (word.split() or [""])[-1].lstrip("\"'([{“‘«")
        if not tokens[index].strip() or last != at.phrase.split()[-1]:
            raise PromptError(
                f"{at.phrase!r} stands nowhere in the prompt, nor does it end with its token {index}, {tokens[index]!r}"
            )
        return [index]
    piece = at if isinstance(at, str) else at.piece
    if at == LAST:
        end = len(tokens) - 1
        words = [] if offsets is None else [end for _, end in _whole_token_matches(LAST, text, offsets)]
        if set(words) <= {end} and (offsets is not None or LAST not in text):
            return [end]
        raise PromptError(
            f"'last' is a word of the prompt{f', at {words}' if words else ''}; give the index of that word, or -1 for "
            f"the last token: {_listing(tokens)}"
        )
    if offsets is None:
        raise PromptError(
            f"the tokenizer {type(tokenizer).__name__} tells no offsets, so {piece!r} cannot be looked up; "
            f"give an index from 0 to {len(tokens) - 1}: {_listing(tokens)}"
        )
    matches = _whole_token_matches(piece, text, offsets)
    places = [begin if isinstance(at, First) else end for begin, end in matches]
    if not places:
        where = "only inside longer tokens of" if piece and piece in text else "nowhere in"
        raise PromptError(f"{piece!r} stands {where} the prompt; its tokens are {_listing(tokens)}")
    if isinstance(at, Nearest):
        return [at.choose(places, offsets)]
    if repeated := _repeated(piece):
        raise PromptError(
            f"{piece!r} is one word repeated; mark {_all_of(repeated)}, or give the indices: {_listing(tokens)}"
        )
    if len(places) > 1 and not isinstance(at, Every):
        raise PromptError(
            f"{piece!r} stands {len(places)} times in the prompt, at {places}; give one of these indices, or mark "
            f"{_all_of(piece)}: {_listing(tokens)}"
        )
    return places


def _all_of(piece: str) -> str:
    return f"all of them: Every({piece.strip()!r}), on the command line all:{piece.strip()}"


def _repeated(piece: str) -> str | None:
    """The word that a phrase says again and again, as "x x x" does; a name may say one twice, as "Bora Bora" does."""
    first, *others = piece.split()
    return first if len(others) > (len(first) > 1) and set(others) == {first} else None


def _whole_token_matches(piece: str, text: str, offsets: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The first and last token of every occurrence of `piece` that begins and ends where tokens do, blanks aside."""
    piece = piece.strip()
    matches = []
    start = text.find(piece) if piece else -1
    while start >= 0:
        end = start + len(piece)
        begins = [
            i for i, (left, right) in enumerate(offsets) if left <= start < right and not text[left:start].strip()
        ]
        ends = [i for i, (left, right) in enumerate(offsets) if left < end <= right and not text[end:right].strip()]
        if begins and ends:
            # A character split into bytes has several tokens with the same offsets; the last completes it.
            matches.append((begins[0], ends[-1]))
        start = text.find(piece, start + 1)
    return matches


def _listing(tokens: tuple[str, ...], most: int = 40) -> str:
    listing = " ".join(f"{index}:{token!r}" for index, token in enumerate(tokens[:most]))
    return listing if len(tokens) <= most else f"{listing} … and {len(tokens) - most} more"
