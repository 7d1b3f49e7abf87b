"""Readers of lenses that others have trained: tuned lenses, Jacobian lenses, SelfIE adapters.

Each becomes a `MappingSet` whose layers are numbered as everywhere here, and is read as numbers alone: never as code.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from pscope.errors import DataError, PscopeError
from pscope.mappings.mapping import Affine, LowRank, Mapping, Norm, Scale
from pscope.mappings.mapping_set import End, MappingSet, Origin
from pscope.models import packaged
from pscope.models.model import LanguageModel
from pscope.models.residual import Pair

_CONFIG, _PARAMS = "config.json", "params.pt"
_OURS = "mappings.safetensors"

_TRANSLATOR = re.compile(r"(?:(\d+)|(input)_[a-z]+|layer_[a-z]+\.(\d+))\.(weight|bias)")
"""A weight of a tuned lens: `3.weight`, or as older releases had it `input_translator.weight`,
`layer_translators.2.weight`, where "translators" were "adapters" and "probes" before.
"""

_HUB_ID = re.compile(r"(?:\w[\w.-]*/)?(\w[\w.-]*)")


def read_foreign(path: Path, model: LanguageModel) -> MappingSet | None:
    """The lens of others in a folder, or in a file of it, for `model`; None if there is none of a format known here.

    Raises DataError if it is damaged, PscopeError if it belongs to another model, or if the folder holds several.
    """
    folder = path.parent if path.name in (_CONFIG, _PARAMS) else path
    if (folder / _OURS).is_file():
        return None
    if (folder / _CONFIG).is_file() and (folder / _PARAMS).is_file():
        return read_tuned_lens(folder, model)
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    readers = {file: reader for file in files if (reader := _reader(file)) is not None}
    if len(readers) > 1:
        raise PscopeError(f"{path} holds several lenses; give one of {', '.join(file.name for file in readers)}")
    return next((reader(file, model) for file, reader in readers.items()), None)


def read_tuned_lens(folder: Path, model: LanguageModel) -> MappingSet:
    """A lens of the package tuned-lens: f(h) = h + W h + b, from each layer ℓ below L to L.

    The folder holds `config.json` and `params.pt`. Translator i reads `hidden_states[i]`, our layer i, and the final
    norm reads what it makes. In files of releases up to 0.0.5 the translator of layer 0 stands apart from the others,
    which are counted from layer 1.

    Raises DataError if a file is missing or damaged, PscopeError if the lens was trained on another model, or decodes
    what it makes by more than the final norm and the unembedding.
    """
    config_file, file = folder / _CONFIG, folder / _PARAMS
    config, state = _json(config_file), _keyed(_unpickled(file), file)
    width = _count(config, "d_model", config_file)
    layers = _count(config, "num_layers" if "num_layers" in config else "num_hidden_layers", config_file)
    base = _keyed(config.get("model_config") or {}, config_file, "model_config").get("_name_or_path")
    kind = config.get("lens_type", "linear_tuned_lens")
    if kind != "linear_tuned_lens" or config.get("extra_layers") or not config.get("reuse_unembedding", True):
        raise PscopeError(
            f"{folder} is a {kind} that decodes by more than the model's final norm and unembedding; give a "
            "linear_tuned_lens without extra_layers, with reuse_unembedding"
        )
    end = _end(folder, model, width, layers, config.get("base_model_name_or_path", base))

    parts: dict[int, dict[str, Any]] = {}
    for key, numbers in state.items():
        if match := _TRANSLATOR.fullmatch(str(key)):
            number, of_input, after_input, part = match.groups()
            layer = int(number) if number else 0 if of_input else int(after_input) + 1
            parts.setdefault(layer, {})[part] = numbers
    expected = list(range(0 if config.get("include_input", True) else 1, layers))
    if sorted(parts) != expected:
        raise DataError(f"{file} has translators for layers {sorted(parts)}, and its config says {expected}")
    maps: dict[Pair, Mapping] = {}
    for layer in expected:
        weight = _numbers(parts[layer], "weight", (width, width), file)
        weight.diagonal().add_(1)
        bias = _numbers(parts[layer], "bias", (width,), file) if config.get("bias", True) else None
        maps[layer, layers] = Affine(weight, bias)
    settings = {"read_from": file.name, "revision": config.get("base_model_revision")}
    return MappingSet(maps, Origin("tuned lens", end, end, settings=settings))


def read_jacobian_lens(file: Path, model: LanguageModel) -> MappingSet:
    """A Jacobian lens: f(h) = J h, where J is the mean Jacobian of the last layer's states with respect to those of ℓ.

    Such files (`J`, `n_prompts`, `source_layers`, `d_model`) count the decoder layers from 0 and mean what comes out of
    them: their layer l is our l + 1, and their last one, to which the Jacobians lead, our L. TransformerLens adds
    `metadata`, which may name another target in the same count.

    Raises DataError if the file is missing or damaged, PscopeError if the lens was fitted on another model.
    """
    lens = _keyed(_unpickled(file), file)
    width, prompts = _count(lens, "d_model", file), _count(lens, "n_prompts", file)
    jacobians = _keyed(lens.get("J"), file, "J")
    metadata = _keyed(lens.get("metadata") or {}, file, "metadata")
    their_layers = lens.get("source_layers")
    if not jacobians or not all(isinstance(layer, int) for layer in jacobians) or sorted(jacobians) != their_layers:
        raise DataError(f"{file} has J for layers {list(jacobians)}, and its source_layers are {their_layers}")
    end = _end(file, model, width, name=metadata.get("model_name"))
    target = _count({"target_layer": model.n_layers - 1, **metadata}, "target_layer", file) + 1
    first, last = their_layers[0] + 1, their_layers[-1] + 1
    if not 1 <= first <= last < target <= model.n_layers:
        raise PscopeError(
            f"{file} maps from layers {first} to {last}, and to layer {target}, which must come later; {model.name} "
            f"has layers 0 to {model.n_layers}"
        )
    maps: dict[Pair, Mapping] = {
        (layer + 1, target): Affine(_numbers(jacobians, layer, (width, width), file)) for layer in their_layers
    }
    settings = {"read_from": file.name, "n_prompts": prompts}
    return MappingSet(maps, Origin("Jacobian lens", end, end, settings=settings))


def read_selfie_adapter(file: Path, model: LanguageModel) -> MappingSet:
    """A SelfIE adapter: f(h) = s h + V Uᵀ h + b, or some of it, or W h + b, mostly of h scaled to length 1, to layer 0.

    What it makes takes the place of a token's embedding: our layer 0, wherever the model adds nothing to that. It is
    one mapping for states of every layer. What was subtracted from those it was trained on is not in the file. Read
    are `.safetensors` with the settings in their header, and the `.pt` checkpoints of its training.

    Raises DataError if the file is missing or damaged, PscopeError if the adapter was trained on another model.
    """
    state, config, width = _open_adapter(file)
    projection = _keyed(config.get("projection"), file, "projection")
    kind, normalised = projection.get("type"), bool(projection.get("normalize_input", True))
    end = _end(file, model, width, name=_keyed(config.get("model") or {}, file, "model").get("name"))

    def numbers(key: str, *shape: int) -> Tensor:
        return _numbers(state, key, shape, file)

    def scale() -> float:
        return numbers("log_scale", 1).exp().item()

    def low_rank() -> tuple[Tensor, Tensor, Tensor]:
        rank = max(1, state["U"].numel() // width) if isinstance(state.get("U"), Tensor) else 1
        down = numbers("U", width, rank).T.contiguous()
        return numbers("V", width, rank), down, numbers("bias", width)

    match kind:
        case "scale_only":
            mapping: Mapping = Scale(scale())
        case "scalar_affine":
            mapping = Scale(scale(), numbers("bias", width))
        case "full_rank":
            mapping = Affine(numbers("weight", width, width), numbers("bias", width))
        case "low_rank_only":
            mapping = LowRank(*low_rank())
        case "scalar_affine_plus_low_rank":
            mapping = LowRank(*low_rank(), scale())
        case _:
            raise DataError(f"{file} is an adapter of an unknown type, {kind!r}")
    mapping = Norm(1.0).then(mapping) if normalised else mapping
    maps: dict[Pair, Mapping] = {(layer, 0): mapping for layer in range(model.n_layers + 1)}
    settings = {"read_from": file.name, "type": kind, "normalize_input": normalised}
    return MappingSet(maps, Origin("SelfIE adapter", end, end, settings=settings))


def _reader(file: Path) -> Callable[[Path, LanguageModel], MappingSet] | None:
    """What reads a file, as its keys tell."""
    if file.suffix not in (".safetensors", ".pt") or not file.is_file():
        return None
    content = _header(file) if file.suffix == ".safetensors" else _unpickled(file)
    keys = set(content) if isinstance(content, dict) else set()
    if "J" in keys:
        return read_jacobian_lens
    return read_selfie_adapter if {"projection_state", "projection_type", "config_json"} & keys else None


def _open_adapter(file: Path) -> tuple[dict[Any, Any], dict[Any, Any], int]:
    """The tensors of a SelfIE adapter, its settings, and its width."""
    if file.suffix == ".safetensors":
        header, state = _header(file), load_file(file)
        flat = {
            "type": header.get("projection_type"),
            "normalize_input": header.get("normalize_input", "true").lower() == "true",
        }
        try:
            config = json.loads(header["config_json"]) if "config_json" in header else {"projection": flat}
            sizes = {"model_dim": int(header["model_dim"])} if "model_dim" in header else {}
        except ValueError as error:
            raise DataError(f"cannot read the header of {file}: {error}") from error
    else:
        sizes = _keyed(_unpickled(file), file)
        state, config = _keyed(sizes.get("projection_state"), file, "projection_state"), sizes.get("config")
    if "model_dim" not in sizes and isinstance(state.get("bias"), Tensor):
        sizes = {"model_dim": state["bias"].numel()}
    return state, _keyed(config, file, "config"), _count(sizes, "model_dim", file)


def _end(path: Path, model: LanguageModel, width: int, layers: int | None = None, name: object = None) -> End:
    """What a lens leads from and to: `model`, whose sizes are looked at, and its name where both have one on the hub.

    Raises PscopeError unless they fit. The hash of the unembedding in a tuned lens is not compared: its own package
    takes a model of another one too, with a warning.
    """
    for what, size, own in (("layers", layers, model.n_layers), ("dimensions", width, model.hidden_size)):
        if size not in (None, own):
            raise PscopeError(f"{path} is for a model with {size} {what}; {model.name} has {own}")
    local = model.name in packaged.MODELS or Path(model.name).expanduser().exists()
    names = {_name_on_hub(name), None if local or model.name == type(model.hf).__name__ else _name_on_hub(model.name)}
    if len(names - {None}) > 1:
        raise PscopeError(f"{path} is for the model {name}, not for {model.name}")
    return End(name if isinstance(name, str) and name else model.name, model.n_layers, width)


def _name_on_hub(name: object) -> str | None:
    """A hub id without its owner, since copies keep it; None for what is a path, or no name."""
    match = _HUB_ID.fullmatch(name) if isinstance(name, str) else None
    # The hub leads from meta-llama/Meta-Llama-3.1-8B-Instruct, as adapters call it, to the name without the prefix.
    return match and match[1].lower().removeprefix("meta-")


def _unpickled(file: Path) -> object:
    try:
        # Mapped, a large file is not read before its numbers are; the oldest format cannot be.
        return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror}") from error
    except Exception as error:
        # The first line of torch's own words is advice to run what a pickle holds.
        raise DataError(f"{file} is damaged, or a pickle of more than numbers, which could run code") from error


def _header(file: Path) -> dict[str, str]:
    """The metadata of a safetensors file."""
    try:
        with safe_open(file, "pt") as tensors:
            return tensors.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise DataError(f"cannot read {file}: {error}") from error


def _json(file: Path) -> dict[Any, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {file}: {error}") from error
    return _keyed(content, file)


def _keyed(value: object, file: Path, what: str = "keys") -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{file} has no {what} with values")
    return value


def _count(values: dict[Any, Any], key: str, file: Path) -> int:
    value = values.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise DataError(f"{file} says {key} = {value}; it must be a positive integer")
    return value


def _numbers(values: dict[Any, Any], key: object, shape: tuple[int, ...], file: Path) -> Tensor:
    """A finite tensor, as float32: files are mostly half as precise, too coarse to add the identity."""
    value = values.get(key)
    actual = tuple(value.shape) if isinstance(value, Tensor) else None
    if not isinstance(value, Tensor) or actual != shape:
        raise DataError(f"{file} has {actual or 'nothing'} for {key}, which must be a tensor of shape {shape}")
    if not value.isfinite().all():
        raise DataError(f"{file} has numbers for {key} that are not finite")
    return value.to(torch.float32, copy=True)
