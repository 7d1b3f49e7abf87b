"""A causal language model and its parts: decoder layers, width, device, what ends a text.

The model stays the HuggingFace model it is; `LanguageModel` only keeps it together with its tokenizer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from threading import RLock
from typing import NamedTuple, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from pscope.arguments import as_int, as_list, excerpt
from pscope.errors import ModelError, PromptError, PscopeError
from pscope.memory import out_of_memory
from pscope.models.chats import Message, chat_text
from pscope.models.internals import calls
from pscope.models.internals.caches import layer_bytes
from pscope.models.internals.configs import attends_eagerly, rescaled_beyond
from pscope.models.internals.hooks import is_offloaded
from pscope.models.prompts import At, Prompt, decode, tokenize


def not_finite(dtype: torch.dtype) -> str:
    """What to say of numbers that are not finite, and what to do about them."""
    name = str(dtype).removeprefix("torch.")
    way_out = "its weights may be damaged" if dtype in (torch.float32, torch.float64) else "try float32"
    return f"not finite in {name}; {way_out}"


_LOCKS: WeakKeyDictionary[nn.ModuleList, RLock] = WeakKeyDictionary()


class Kept(NamedTuple):
    """What a cache layer keeps of a row: bytes however long the row is, and bytes for each of its tokens."""

    per_row: int
    per_token: int


@dataclass(frozen=True, eq=False)
class LanguageModel:
    """A HuggingFace causal LM, its tokenizer, and the name it was asked for by."""

    hf: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str

    def __repr__(self) -> str:
        what = f"{type(self.hf).__name__}, layers 0 to {self.n_layers}, width {self.hidden_size}"
        return f"LanguageModel({self.name!r}: {what}, {str(self.dtype).removeprefix('torch.')} on {self.device})"

    @cached_property
    def layers(self) -> nn.ModuleList:
        """The decoder layers, found by structure: the list of modules in the decoder that holds the most parameters."""
        # Of a model that also sees, the decoder is the language model in it; what transformers calls so may be less.
        for part in (self.hf.get_decoder(), self.hf):
            lists = [module for module in part.modules() if isinstance(module, nn.ModuleList) and len(module)]
            if lists:
                return max(lists, key=lambda module: sum(weight.numel() for weight in module.parameters()))
        raise ModelError(
            f"{type(self.hf).__name__} keeps no list of decoder layers, so there is nothing to hook; "
            "give a decoder-only model of transformers"
        )

    @property
    def n_layers(self) -> int:
        """L: residual streams are numbered 0 (embedding output) to L (what the final norm reads)."""
        return len(self.layers)

    @property
    def lock(self) -> RLock:
        """Held while hooks of ours are on the decoder layers, and in every pass: another thread's pass would see them.

        It belongs to the decoder layers, however many `LanguageModel`s share them.
        """
        return _LOCKS.setdefault(self.layers, RLock())

    @property
    def config(self) -> PreTrainedConfig:
        """The config of the language model, which may be part of a model that also sees or hears."""
        return self.hf.config.get_text_config()

    @property
    def device(self) -> torch.device:
        """Where token ids go. Offloaded weights (on `meta`) are fetched by accelerate, which moves the ids too."""
        device = self._embedding.device
        return torch.device("cpu") if device.type == "meta" and self.offloaded else device

    @property
    def _embedding(self) -> Tensor:
        return cast(Tensor, self.hf.get_input_embeddings().weight)

    @property
    def offloaded(self) -> bool:
        """Whether weights are elsewhere until they are used, as accelerate keeps them."""
        return is_offloaded(self.hf)

    @property
    def hidden_size(self) -> int:
        """The width of the residual stream."""
        return self.config.hidden_size

    @property
    def embeddings(self) -> int:
        """How many tokens the model embeds: those below this number."""
        return len(self._embedding)

    @property
    def window(self) -> int | None:
        """The most tokens that the model can attend to, where its config says."""
        most = getattr(self.config, "max_position_embeddings", None)
        return None if most is None else most - self.first_position

    @cached_property
    def first_position(self) -> int:
        """The number that the model gives the position of a text's first token: 0, but for RoBERTa and its kin."""
        return calls.first_position(self.hf)

    @property
    def dtype(self) -> torch.dtype:
        return self.hf.dtype

    @property
    def quantised(self) -> bool:
        """Whether weights are unpacked as they are used, which rounds otherwise for one row than for many."""
        return getattr(self.hf, "is_quantized", False)

    def activation_bytes(self, tokens: int, attended: int = 0, last: int = 1) -> int:
        """About how much memory a row of `tokens` tokens takes in a forward pass, and the logits of its `last` ones.

        Each token attends to those of the row, and to `attended` more that came before.
        """
        config = self.config
        heads = getattr(config, "num_attention_heads", None) or 1
        width = heads * (getattr(config, "head_dim", None) or self.hidden_size // heads)
        width = max(self.hidden_size, width, max(layer.per_token for layer in self.kept) // self.dtype.itemsize // 2)
        experts = getattr(config, "num_experts_per_tok", None) or 1
        intermediate = max(
            getattr(config, "intermediate_size", None) or 4 * self.hidden_size,
            experts * (getattr(config, "moe_intermediate_size", None) or 0),
        )
        values = tokens * (4 * self.hidden_size + 4 * width + 3 * intermediate)
        # They may stand there twice, as they come and those of the pass before; half precision is summed up in single.
        logits = 2 * last * config.vocab_size * max(4, self.dtype.itemsize)
        scores = 0
        if attends_eagerly(self.hf.config):
            # As they come, masked, and, in single precision, as probabilities.
            scores = heads * tokens * (tokens + attended) * (2 * self.dtype.itemsize + 4)
        return values * self.dtype.itemsize + logits + scores

    def cache_bytes(self, tokens: int) -> int:
        """How much memory a cache of the model takes for a row of `tokens` tokens, at most."""
        return sum(layer.per_row + tokens * layer.per_token for layer in self.kept)

    @cached_property
    def kept(self) -> tuple[Kept, ...]:
        """What each layer of a cache keeps of a row, measured; one that keeps nothing, for a model without a cache."""
        if self._cache_parameter is None:
            return (Kept(0, 0),)
        try:
            one, two = (self._bytes_kept(tokens) for tokens in (2, 3))
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            if out_of_memory(error):
                raise
            # A model that does not run with it takes the path that needs none.
            return (Kept(0, 0),)
        return tuple(
            Kept(max(0, 3 * less - 2 * more), max(0, more - less)) for less, more in zip(one, two, strict=True)
        )

    def _bytes_kept(self, tokens: int) -> list[int]:
        cache = self.own_cache()
        self.next_token_logits(torch.full((1, tokens), self.config.vocab_size // 2, device=self.device), cache)
        return layer_bytes(cache) or [0]

    def own_cache(self) -> Cache:
        """An empty cache of the kind that the model chooses by itself, with windows or recurrent states if it has any.

        It serves whole prompts and what follows them token by token.
        """
        return DynamicCache(config=self.hf.config)

    @cached_property
    def end_tokens(self) -> frozenset[int]:
        """The token ids after which the model has nothing more to say."""
        tokens: set[int] = set()
        for holder in (self.hf.generation_config, self.hf.config, self.tokenizer):
            ids = getattr(holder, "eos_token_id", None)
            tokens.update([ids] if isinstance(ids, int) else ids or [])
        return frozenset(tokens)

    def prompt(self, text: str, at: At = -1) -> Prompt:
        """Tokenise `text` and mark one or several positions in it; see `pscope.models.prompts.tokenize`.

        Raises PromptError also when the prompt is longer than the model's window, or has a token without an embedding.
        """
        return as_prompt(self, tokenize(self.tokenizer, text, at))

    def chat(self, messages: Sequence[Message], at: At = -1, *, begin: bool = True) -> Prompt:
        """The prompt of a chat, by the model's own template, marked as `prompt` marks it.

        `messages` are as [{"role": "user", "content": "…"}]. With `begin`, the assistant's turn is begun, or its last
        message left open. Raises PromptError also where there is no template, or it refuses the messages.
        """
        return self.prompt(chat_text(self.tokenizer, self.name, messages, begin=begin), at)

    def check_window(self, tokens: int) -> None:
        """Raise PromptError if that many tokens are more than the model can attend to."""
        if self.window is not None and as_int(tokens, "the number of tokens", 0) > self.window:
            raise PromptError(
                f"{tokens} tokens are more than the window of {self.name}, which is {self.window}; use fewer"
            )

    def check_room(self, tokens: int, new_tokens: int) -> None:
        """Raise PromptError unless a text of so many `tokens` can go on for so many new ones."""
        self.check_window(tokens + new_tokens)
        limit = rescaled_beyond(self.config)
        if limit is not None and tokens <= limit < tokens + new_tokens:
            raise PromptError(
                f"{tokens} tokens that go on for {new_tokens} pass {limit}, beyond which {self.name} places all of "
                "them otherwise; let them end before, or begin after"
            )

    @cached_property
    def _forward_parameters(self) -> frozenset[str]:
        return calls.parameters(self.hf)

    @cached_property
    def _cache_parameter(self) -> str | None:
        return next((name for name in calls.CACHE_NAMES if name in self._forward_parameters), None)

    def most_probable(self, logits: Tensor, count: int) -> list[list[tuple[str, float]]]:
        """The `count` most probable next tokens of each row of logits (rows, vocab), with their probabilities."""
        top = logits.float().softmax(dim=-1).topk(min(as_int(count, "count"), logits.shape[-1]))
        return [
            [(decode(self.tokenizer, [token]), value) for token, value in zip(tokens, values, strict=True)]
            for tokens, values in zip(top.indices.tolist(), top.values.tolist(), strict=True)
        ]

    def next_token_logits(self, ids: Tensor, cache: Cache | None = None) -> Tensor:
        """One forward pass; the logits after the last token, (batch, vocab). See `logits`."""
        return self.logits(ids, cache)[:, -1]

    @torch.no_grad()
    def logits(self, ids: Tensor, cache: Cache | None = None, last: int = 1) -> Tensor:
        """One forward pass; the logits after each of the `last` tokens, (batch, last, vocab).

        `ids` is (batch, tokens); with a `cache`, they follow what it holds, and it is extended by them. Raises
        ModelError if a cache is given to a model that takes none, PscopeError for ids that are no such tensor.
        """
        if not isinstance(ids, Tensor) or ids.ndim != 2 or not ids.numel() or ids.is_floating_point():
            raise PscopeError(f"ids are a tensor (batch, tokens) of whole numbers, not {excerpt(ids)}")
        if not ids.is_meta and not 0 <= int(ids.min()) <= int(ids.max()) < self.embeddings:
            raise PscopeError(f"ids of {self.name} go from 0 to {self.embeddings - 1}; some of these are others")
        options: dict[str, object] = {"use_cache": cache is not None}
        if cache is not None:
            if self._cache_parameter is None:
                raise ModelError(f"{type(self.hf).__name__} takes no cache")
            options[self._cache_parameter] = cache
        if "logits_to_keep" in self._forward_parameters:
            # As an index, not as a number: for a number some models drop the other tokens half-way up.
            options["logits_to_keep"] = torch.arange(ids.shape[1] - last, ids.shape[1], device=ids.device)
        if "position_ids" in self._forward_parameters:
            start = self.first_position + (0 if cache is None else cache.get_seq_length())
            positions = torch.arange(start, start + ids.shape[1], device=ids.device)
            options["position_ids"] = positions.expand(ids.shape[0], -1)
        with self.lock:
            return self.hf(input_ids=ids, **options).logits[:, -last:]


def check_model(model: LanguageModel) -> None:
    """Raise ModelError for what is no model of pscope's, as transformers' own."""
    if not isinstance(model, LanguageModel):
        raise ModelError(
            f"a model is what pscope.load gives, not {excerpt(model)}; load it, if in memory with its tokenizer"
        )


def as_prompt(model: LanguageModel, prompt: Prompt) -> Prompt:
    """A prompt that the model can read. Raises ModelError and PromptError for what is none."""
    check_model(model)
    if not isinstance(prompt, Prompt):
        raise PromptError(f"a prompt is needed, not {excerpt(prompt)}; make one with model.prompt(text)")
    model.check_window(len(prompt))
    if not 0 <= min(prompt.ids) <= max(prompt.ids) < model.embeddings:
        token = next(token for token in prompt.ids if not 0 <= token < model.embeddings)
        piece = prompt.tokens[prompt.ids.index(token)]
        raise PromptError(
            f"{piece!r} is token {token}, and the embedding of {model.name} has {model.embeddings} rows; leave it out"
        )
    return prompt


def as_prompts(model: LanguageModel, prompts: Iterable[Prompt] | Prompt) -> list[Prompt]:
    """Prompts that the model can read; one alone is a list of one. Raises PscopeError for others, and for none."""
    items = as_list(Prompt, prompts, "prompts", "make them with model.prompt(text)")
    return [as_prompt(model, prompt) for prompt in items]
