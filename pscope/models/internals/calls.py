"""How models and their decoder layers are called, and what they hand on."""

from __future__ import annotations

from inspect import signature
from typing import Any

from torch import Tensor
from transformers import Cache, PreTrainedModel

Args = tuple[Any, ...]
Kwargs = dict[str, Any]

CACHE_NAMES = ("cache", "past_key_values", "cache_params")
"""What a forward pass may call its cache: transformers 5.24 gave those of all models the first name."""


def parameters(hf: PreTrainedModel) -> frozenset[str]:
    """The names of what a model's forward pass takes."""
    # That of a wrapper such as peft's takes anything, and hands it to that of the model inside.
    return frozenset(signature(unwrapped(hf).forward).parameters)


def given_cache(kwargs: Kwargs) -> Cache | None:
    """The cache that a model, or the decoder in it, is called with."""
    return next((kwargs[name] for name in CACHE_NAMES if kwargs.get(name) is not None), None)


def first_position(hf: PreTrainedModel) -> int:
    """The number that a model gives the position of a text's first token.

    It is 0, but for models that look positions up in a table of embeddings whose first entries are those of padding, as
    RoBERTa and its kin do.
    """
    numbers = (
        module.padding_idx + 1
        for name, module in hf.named_modules()
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None
    )
    return next(numbers, 0)


def unwrapped(hf: PreTrainedModel) -> PreTrainedModel:
    """The model of transformers, within what peft or the like may have wrapped around it."""
    wrapped = getattr(hf, "get_base_model", None)
    return wrapped() if wrapped else hf


def stream_of(args: Args, kwargs: Kwargs) -> Tensor:
    """The residual stream among the arguments that a decoder layer is called with."""
    return args[0] if args else kwargs["hidden_states"]


def with_stream(args: Args, kwargs: Kwargs, stream: Tensor) -> tuple[Args, Kwargs]:
    """The arguments of a decoder layer with another residual stream among them."""
    return ((stream, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": stream})


def stream_in(output: Any) -> Any:
    """The residual stream in what a decoder layer returns: a tensor, or the first of several things."""
    return output if isinstance(output, Tensor) else output[0]


def with_stream_in(output: Any, stream: Tensor) -> Any:
    """What a decoder layer returns, with another residual stream in it."""
    return stream if isinstance(output, Tensor) else type(output)((stream, *output[1:]))
