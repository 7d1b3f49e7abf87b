"""A causal language model and its parts: decoder layers, width, device, what ends a text.

The model stays the HuggingFace model it is; `LanguageModel` only keeps it together with its tokenizer.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from inspect import signature

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from pscope.errors import ModelError, PromptError
from pscope.prompts import At, Prompt, tokenize


@dataclass(frozen=True, eq=False)
class LanguageModel:
    """A HuggingFace causal LM, its tokenizer, and the name it was asked for by."""

    hf: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str

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
    def device(self) -> torch.device:
        """Where token ids go. Offloaded weights (on `meta`) are fetched by accelerate, which moves the ids too."""
        device = self.hf.get_input_embeddings().weight.device
        return torch.device("cpu") if device.type == "meta" else device

    @property
    def hidden_size(self) -> int:
        """The width of the residual stream."""
        return self.hf.config.get_text_config().hidden_size

    @property
    def window(self) -> int | None:
        """The most tokens that the model can attend to, where its config says."""
        return getattr(self.hf.config.get_text_config(), "max_position_embeddings", None)

    @property
    def dtype(self) -> torch.dtype:
        return self.hf.dtype

    @property
    def quantised(self) -> bool:
        """Whether weights are unpacked as they are used, which rounds otherwise for one row than for many."""
        return getattr(self.hf, "is_quantized", False)

    def activation_bytes(self, tokens: int) -> int:
        """About how much memory a row of `tokens` tokens takes in a forward pass, and its next-token logits after."""
        intermediate = getattr(self.hf.config.get_text_config(), "intermediate_size", None) or 4 * self.hidden_size
        # The logits stand there up to three times: as they come, what is made of them, and those of the pass before.
        logits = 3 * self.hf.config.get_text_config().vocab_size
        return (tokens * (8 * self.hidden_size + 3 * intermediate) + logits) * self.dtype.itemsize

    def cache_bytes(self, tokens: int) -> int:
        """At most how much memory the keys and values of a row of `tokens` tokens take."""
        return 2 * self.n_layers * self.hidden_size * tokens * self.dtype.itemsize

    def own_cache(self) -> Cache:
        """An empty cache of the kind that the model chooses by itself, with windows or recurrent states if it has any.

        It serves whole prompts and what follows them token by token.
        """
        return DynamicCache(config=self.hf.config)

    @cached_property
    def end_tokens(self) -> frozenset[int]:
        """The token ids after which the model has nothing more to say."""
        found: set[int] = set()
        for holder in (self.hf.generation_config, self.hf.config, self.tokenizer):
            ids = getattr(holder, "eos_token_id", None)
            found.update([ids] if isinstance(ids, int) else ids or [])
        return frozenset(found)

    def prompt(self, text: str, at: At = "last") -> Prompt:
        """Tokenise `text` and mark one or several positions in it; see `pscope.prompts.tokenize`.

        Raises PromptError also when the prompt is longer than the model's window.
        """
        prompt = tokenize(self.tokenizer, text, at)
        self.check_window(len(prompt))
        return prompt

    def check_window(self, tokens: int) -> None:
        """Raise PromptError if that many tokens are more than the model can attend to."""
        if self.window is not None and tokens > self.window:
            raise PromptError(
                f"{tokens} tokens are more than the window of {self.name}, which is {self.window}; use fewer"
            )

    @cached_property
    def _forward_parameters(self) -> frozenset[str]:
        return frozenset(signature(self.hf.forward).parameters)

    @property
    def _cache_parameter(self) -> str:
        # transformers 5.24 gave them all one name.
        for name in ("cache", "past_key_values", "cache_params"):
            if name in self._forward_parameters:
                return name
        raise ModelError(f"{type(self.hf).__name__} takes no cache")

    @torch.no_grad()
    def next_token_logits(self, ids: Tensor, cache: Cache | None = None) -> Tensor:
        """One forward pass; the logits after the last token.

        `ids` is (batch, tokens); with a `cache`, they follow what it holds, and it is extended by them.
        Returns (batch, vocab). Raises ModelError if a cache is given to a model that takes none.
        """
        options = {"use_cache": False} if cache is None else {"use_cache": True, self._cache_parameter: cache}
        if "logits_to_keep" in self._forward_parameters:
            # As an index, not as a number: for a number some models drop the other tokens half-way up.
            options["logits_to_keep"] = torch.tensor([ids.shape[1] - 1], device=ids.device)
        if "position_ids" in self._forward_parameters:
            start = 0 if cache is None else cache.get_seq_length()
            positions = torch.arange(start, start + ids.shape[1], device=ids.device)
            options["position_ids"] = positions.expand(ids.shape[0], -1)
        return self.hf(input_ids=ids, **options).logits[:, -1]
