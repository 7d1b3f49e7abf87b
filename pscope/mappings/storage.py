"""Mappings on disk: a folder with safetensors and a card, which can go to a hub as it is and come from one."""

from __future__ import annotations

import json
from collections.abc import Mapping as Dict
from collections.abc import Sequence
from dataclasses import asdict, fields
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pscope.errors import DataError, PscopeError
from pscope.files import as_path, written_whole
from pscope.mappings import mapping as kinds
from pscope.mappings.mapping import Mapping
from pscope.mappings.mapping_set import FOLDS, End, MappingSet, Origin, check_mappings
from pscope.mappings.readers import read_foreign
from pscope.models.hub import hub_answers
from pscope.models.model import LanguageModel, check_model
from pscope.models.residual import Pair

WEIGHTS, FOLD_WEIGHTS, CARD = "mappings.safetensors", "folds.safetensors", "README.md"

FORMAT = 1
"""Of the metadata; a folder of another is refused."""

_KINDS: dict[str, type[Mapping]] = {
    kind.__name__: kind
    for kind in (
        kinds.Identity,
        kinds.Affine,
        kinds.Constant,
        kinds.LowRank,
        kinds.Scale,
        kinds.Norm,
        kinds.KeepNorm,
        kinds.Composed,
    )
}


def check_new(folder: Path) -> None:
    """Raise DataError for a place where mappings cannot be written, because something is there."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"{folder} is {'not empty' if folder.is_dir() else 'a file'}; name a new folder")


def save_mappings(mappings: MappingSet, folder: str | Path) -> None:
    """Write mappings into a folder, new or empty: their numbers, those of the folds, and a card for readers.

    Raises DataError where something is there already, or nothing can be written.
    """
    check_mappings(mappings)
    folder = as_path(folder)
    check_new(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if mappings.folds:
            _write(folder / FOLD_WEIGHTS, mappings.folds, mappings.origin)
        with written_whole(folder / CARD) as path:
            path.write_text(_card(mappings), "utf-8")
        # Last, since a folder that has them is one of ours, and whole.
        _write(folder / WEIGHTS, [mappings.maps], mappings.origin, mappings.means)
    except OSError as error:
        raise DataError(f"cannot write {folder}: {error.strerror}; name another folder") from error


def read_mappings(name: str | Path, source: LanguageModel, target: LanguageModel | None = None) -> MappingSet:
    """Mappings from a folder or file, ours or another's lens (see `readers`), or from the hub by their id.

    Raises PscopeError if they do not lead from `source` to `target`, by default the same model, or are damaged.
    """
    check_model(source)
    path = as_path(name)
    if not path.exists():
        path = _fetch(str(name))
    path = path.parent if path.name == WEIGHTS else path
    if (path / WEIGHTS).exists():
        origin, (maps,), means = _read(path / WEIGHTS)
        folds = _read(path / FOLD_WEIGHTS)[1] if (path / FOLD_WEIGHTS).exists() else ()
        mappings: MappingSet | None = MappingSet(maps, origin, tuple(folds), means)
    else:
        mappings = read_foreign(path, source)
    if mappings is None:
        raise DataError(f"{path} holds neither {WEIGHTS} nor a lens of a known kind (tuned, Jacobian, SelfIE)")
    mappings.check(source, source if target is None else target)
    return mappings


def digest_of(mappings: MappingSet) -> str:
    """A SHA-256 of all that the maps do, those of the folds included."""
    digest = sha256()
    for group in (mappings.maps, *mappings.folds):
        tensors: dict[str, Tensor] = {}
        records = [[_arrow(pair), _record_of(group[pair], _arrow(pair), tensors)] for pair in sorted(group)]
        digest.update(json.dumps(records).encode())
        for _, tensor in sorted(tensors.items()):
            digest.update(tensor.cpu().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _write(
    path: Path, groups: Sequence[dict[Pair, Mapping]], origin: Origin, means: Dict[int, Tensor] | None = None
) -> None:
    tensors = {f"mean.{layer}": mean for layer, mean in (means or {}).items()}
    records = [
        {_arrow(pair): _record_of(mapping, f"{number}.{_arrow(pair)}", tensors) for pair, mapping in maps.items()}
        for number, maps in enumerate(groups)
    ]
    plain = {
        **asdict(origin),
        **{name: {_arrow(pair): value for pair, value in getattr(origin, name).items()} for name in ("ridge", "r2")},
    }
    metadata = {"pscope": json.dumps({"format": FORMAT, "origin": plain, "maps": records})}
    with written_whole(path) as unfinished:
        save_file(tensors, unfinished, metadata)


def _read(path: Path) -> tuple[Origin, list[dict[Pair, Mapping]], dict[int, Tensor]]:
    try:
        with safe_open(path, "pt") as file:
            record = json.loads((file.metadata() or {}).get("pscope", "null"))
            if not isinstance(record, dict) or record.get("format") != FORMAT:
                raise DataError(f"{path} was not written by pscope, or by one that wrote another format than {FORMAT}")
            plain = record["origin"]
            for name in ("source", "target"):
                plain[name] = End(**plain[name])
            for name in ("ridge", "r2"):
                plain[name] = {_pair(arrow): value for arrow, value in plain[name].items()}
            groups = [{_pair(arrow): _mapping(each, file) for arrow, each in maps.items()} for maps in record["maps"]]
            if len(groups) != (FOLDS if path.name == FOLD_WEIGHTS else 1):
                raise DataError(f"{path} holds {len(groups)} groups of maps")
            means = {int(name[5:]): file.get_tensor(name) for name in file.keys() if name.startswith("mean.")}  # noqa: SIM118
            return Origin(**plain), groups, means
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    except (SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} is damaged: {' '.join(str(error).split())}") from error


def _record_of(mapping: Mapping, name: str, tensors: dict[str, Tensor]) -> dict[str, object]:
    """What JSON says of a mapping; its tensors go under names that begin with `name`."""
    record: dict[str, object] = {"kind": type(mapping).__name__}
    for field in fields(mapping):
        value, key = getattr(mapping, field.name), f"{name}.{field.name}"
        if isinstance(value, Tensor):
            # Maps may share what safetensors wants to own.
            tensors[key] = value.detach().cpu().clone().contiguous()
            record[field.name] = {"tensor": key}
        elif isinstance(value, Mapping):
            record[field.name] = _record_of(value, key, tensors)
        elif isinstance(value, tuple):
            record[field.name] = [_record_of(each, f"{key}.{number}", tensors) for number, each in enumerate(value)]
        else:
            record[field.name] = value
    return record


def _mapping(record: dict[str, Any], file: safe_open) -> Mapping:
    values: dict[str, Any] = {}
    for field, value in record.items():
        if isinstance(value, dict):
            values[field] = file.get_tensor(value["tensor"]) if "tensor" in value else _mapping(value, file)
        else:
            values[field] = tuple(_mapping(each, file) for each in value) if isinstance(value, list) else value
    return _KINDS[values.pop("kind")](**values)


def _fetch(name: str) -> Path:
    """A folder of the hub, of which no more is taken than what mappings are kept in."""
    patterns = ["*.safetensors", "*.json", "*.pt", CARD]
    try:
        if not (constants.HF_HUB_OFFLINE or hub_answers(name)):
            raise DataError(f"{name} is no folder or file here, and the hub cannot be reached; check name and network")
        return Path(snapshot_download(name, allow_patterns=patterns))
    except PscopeError:
        raise
    except Exception as error:
        # No such id, gated, offline: each is an error of its own, which says what it is.
        raise DataError(f"{name} is no folder or file here, nor on the hub: {' '.join(str(error).split())}") from error


def _arrow(pair: Pair) -> str:
    return f"{pair[0]}->{pair[1]}"


def _pair(arrow: str) -> Pair:
    source, target = arrow.split("->")
    return int(source), int(target)


def _card(mappings: MappingSet) -> str:
    origin = mappings.origin
    base = [end.name for end in (origin.source, origin.target)]
    base_models = "".join(f"- {name}\n" for name in dict.fromkeys(base))
    layers = "\n".join(
        f"| {source} | {target} | {origin.r2.get((source, target), float('nan')):.3f} | "
        f"{origin.ridge.get((source, target), float('nan')):g} |"
        for source, target in sorted(mappings.maps)
    )
    settings = "".join(f"- {name}: {value}\n" for name, value in origin.settings.items() if value not in (None, False))
    return f"""---
library_name: pscope
tags:
- patchscopes
- {origin.kind.replace(" ", "-").lower()}
base_model:
{base_models}---

# {origin.kind.capitalize()} mappings from {origin.source.name} to {origin.target.name}

Read with [pscope](https://arxiv.org/abs/2401.06102): `pscope fig2 --lens FOLDER`, or
`pscope.read_mappings(FOLDER, model)`. Layers are numbered as `hidden_states` are: 0 is the embedding output, k the
residual stream after k decoder layers, and the last what the final norm reads.

- from: {origin.source.name}, layers 0 to {origin.source.layers}, width {origin.source.width}
- to: {origin.target.name}, layers 0 to {origin.target.layers}, width {origin.target.width}
- fitted on {origin.positions} positions of {origin.texts} texts (SHA-256 of the texts: `{origin.data_sha256}`)
{settings}
`{WEIGHTS}` holds the maps fitted on all texts, `{FOLD_WEIGHTS}`, where it is, those that left out one of {FOLDS} folds
of texts each, which read the texts that were fitted on. R² is of texts held out.

| layer | to layer | R² | ridge |
|---|---|---|---|
{layers}
"""
