"""What a run was made with: the model, the data, the versions that numbers depend on."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterable, Mapping
from importlib.metadata import version

import torch
from torch.distributed.tensor import DTensor

from pscope.models.model import LanguageModel

_NOT_THE_MODEL = {"_name_or_path", "architectures", "distributed_config", "dtype", "transformers_version"}
"""What a config says of where the model came from, and how it was saved or loaded; the weights' dtype is looked at."""

_NOT_THE_NUMBERS = {
    *("python", "threads"),
    *("out", "shard", "memory", "device", "device_map", "tensor_parallel", "dry_run", "rate", "as_json"),
}
"""Versions and options that may be others when a run is gone on with."""

DATA = "the data have changed"


def describe(model: LanguageModel) -> dict:
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


def fingerprint(model: LanguageModel, most: int = 4096) -> str:
    """A SHA-256 over the config and, of every weight, its name, shape, dtype and up to `most` evenly spaced values.

    Two checkpoints of one architecture differ in it; reading a few values keeps it instant for a model of any size.
    Weights that are offloaded count by name, shape and dtype. Of those that processes share, all must call it.
    """
    config = {key: value for key, value in model.hf.config.to_dict().items() if key not in _NOT_THE_MODEL}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, weight in sorted(model.hf.state_dict().items()):
        weight = weight.full_tensor() if isinstance(weight, DTensor) else weight
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        if weight.device.type != "meta":
            values = weight.flatten()[:: max(1, weight.numel() // most)]
            digest.update(values.to("cpu").contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def differences(then: Mapping[str, object], now: Mapping[str, object]) -> list[str]:
    """In what that decides over numbers a run would differ from what its settings say, each told in a few words."""
    found = []
    for name, told in (("model", "fingerprint"), ("versions", None), ("options", None)):
        before, after = then.get(name), now.get(name)
        if after is None:
            continue
        before = before if isinstance(before, dict) else {}
        keys = [told] if told else [key for key in after if key not in _NOT_THE_NUMBERS]
        found += [f"{key} {before.get(key)} is now {after[key]}" for key in keys if before.get(key) != after[key]]
    if then.get("data_sha256") != now.get("data_sha256"):
        found.append(DATA)
    return found


def digest(parts: Iterable[str]) -> str:
    """A SHA-256 of what a run read."""
    return hashlib.sha256("\0".join(parts).encode("utf-8", "backslashreplace")).hexdigest()
