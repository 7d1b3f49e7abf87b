"""What a run was made with: the model, the data, the versions that numbers depend on."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import torch

from pscope.models.fingerprint import fingerprint
from pscope.models.model import LanguageModel

_NOT_THE_NUMBERS = {
    *("python", "threads"),
    *(
        "out",
        "shard",
        "memory",
        "device",
        "target_device",
        "device_map",
        "tensor_parallel",
        "dry_run",
        "rate",
        "as_json",
    ),
}
"""Versions and options that may be others when a run is gone on with."""

DATA = "the data have changed"


def describe(model: LanguageModel) -> dict[str, Any]:
    """What a reader of a run must know of the model, the fingerprint of its weights included."""
    return {
        "name": model.name,
        "class": type(model.hf).__name__,
        "layers": model.n_layers,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "fingerprint": fingerprint(model),
    }


def versions() -> dict[str, str]:
    """The versions that numbers may depend on, and the number of threads."""
    packages = {name: version(name) for name in ("pscope", "torch", "transformers", "tokenizers")}
    return {"python": platform.python_version(), **packages, "threads": str(torch.get_num_threads())}


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """In what that decides over numbers a run would differ from what its settings say, each told in a few words."""
    changes = []
    for name, field in (("model", "fingerprint"), ("versions", None), ("options", None)):
        before, after = then.get(name), now.get(name)
        if after is None:
            continue
        before = before if isinstance(before, dict) else {}
        keys = [field] if field else [key for key in after if key not in _NOT_THE_NUMBERS]
        changes += [f"{key} {before.get(key)} is now {after[key]}" for key in keys if before.get(key) != after[key]]
    if then.get("data_sha256") != now.get("data_sha256"):
        changes.append(DATA)
    return changes
