"""What tells a model from all others, and texts from others, wherever they came from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable

import torch
from torch.distributed.tensor import DTensor

from pscope.models.internals.configs import lasting
from pscope.models.model import LanguageModel


def fingerprint(model: LanguageModel, most: int = 4096) -> str:
    """A SHA-256 over the config and, of every weight, its name, shape, dtype and up to `most` evenly spaced values.

    Two checkpoints of one architecture differ in it; reading a few values keeps it instant for a model of any size.
    Weights that are offloaded count by name, shape and dtype. Of those that processes share, all must call it.
    """
    digest = hashlib.sha256(json.dumps(lasting(model.hf.config), sort_keys=True, default=str).encode())
    for name, weight in sorted(model.hf.state_dict().items()):
        weight = weight.full_tensor() if isinstance(weight, DTensor) else weight
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        if weight.device.type != "meta":
            values = weight.flatten()[:: max(1, weight.numel() // most)]
            digest.update(values.to("cpu").contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def digest(parts: Iterable[str]) -> str:
    """A SHA-256 of what a run read."""
    return hashlib.sha256("\0".join(parts).encode("utf-8", "backslashreplace")).hexdigest()
