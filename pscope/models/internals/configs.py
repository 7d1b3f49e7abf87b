"""What a config tells by names that are transformers' own."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

HISTORY = {"_name_or_path", "architectures", "distributed_config", "dtype", "transformers_version"}
"""Where a model came from, and how it was saved or loaded, which two copies of one model need not share."""


def lasting(config: PreTrainedConfig) -> dict[str, Any]:
    """What is the model's own in its config, wherever it came from."""
    return {key: value for key, value in config.to_dict().items() if key not in HISTORY}


def attends_eagerly(config: PreTrainedConfig) -> bool:
    """Whether the scores of attention are held whole, (rows, heads, tokens, tokens), as no fused kernel does."""
    return getattr(config, "_attn_implementation", None) == "eager"
