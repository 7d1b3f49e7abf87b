"""What a config tells by names that are transformers' own."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

HISTORY = {"_name_or_path", "architectures", "distributed_config", "dtype", "transformers_version"}
"""Where a model came from, and how it was saved or loaded, which two copies of one model need not share."""


def lasting(config: PreTrainedConfig) -> dict[str, Any]:
    """What is the model's own in its config, wherever it came from."""
    return {key: value for key, value in config.to_dict().items() if key not in HISTORY}


def attention(config: PreTrainedConfig) -> str | None:
    """The name of the way in which attention is computed, as "sdpa"."""
    return getattr(config, "_attn_implementation", None)


def rescaled_beyond(config: PreTrainedConfig) -> int | None:
    """How many tokens of a text are placed as they are: in a longer one all are placed otherwise, the first ones too.

    So does longrope, of Phi-3 and its kin: keys of a shorter text are of no use to a longer one.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "longrope":
        return None
    return rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)


def attends_eagerly(config: PreTrainedConfig) -> bool:
    """Whether the scores of attention are held whole, (rows, heads, tokens, tokens), as no fused kernel does."""
    return attention(config) == "eager"
