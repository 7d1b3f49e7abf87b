"""Fitted mappings that are kept in the user's cache folder, by what they were fitted on and between what."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from tempfile import mkdtemp

from pscope.errors import DataError, PscopeError
from pscope.inputs.positions import Paired
from pscope.mappings.fit import Fit
from pscope.mappings.mapping_set import MappingSet
from pscope.mappings.storage import read_mappings, save_mappings
from pscope.models.fingerprint import digest, fingerprint
from pscope.models.packaged import cache_folder


def place(fit: Fit, texts: Sequence[str], paired: Sequence[Paired]) -> Path:
    """Where the maps of a fit are kept: another model, other texts, positions, layers or settings, another place."""
    positions = [(each.source.text, each.source.positions, each.target.positions) for each in paired]
    prompt = fit.into and (fit.into.ids, fit.into.positions)
    models = (fingerprint(fit.source), fingerprint(fit.target))
    settings = (version("pscope"), fit.pairs, prompt, fit.ridge, fit.shuffled)
    key = (*models, digest(texts), repr(positions), repr(settings))
    return cache_folder() / "mappings" / digest(key)


def fitted(
    fit: Fit,
    texts: Sequence[str],
    paired: Sequence[Paired],
    progress: Callable[[int], None] = lambda done: None,
    *,
    keep: bool = True,
) -> MappingSet:
    """The maps of a fit, from the cache if they are there whole; else fitted now and, if they are to be, kept."""
    folder = place(fit, texts, paired)
    try:
        return read_mappings(folder, fit.source, fit.target)
    except PscopeError:
        mappings = fit.run(texts, paired, progress)
    if keep:
        _keep(mappings, folder)
    return mappings


def _keep(mappings: MappingSet, folder: Path) -> None:
    """Keep maps where they can be kept: they serve the run that fitted them also where the cache is full or closed."""
    with suppress(OSError, DataError):
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(mkdtemp(dir=folder.parent, prefix="."))
        try:
            save_mappings(mappings, unfinished)
            shutil.rmtree(folder, ignore_errors=True)
            # Another process may have kept the same just now.
            unfinished.replace(folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
