"""Mappings that belong together: one for each pair of layers, with where they come from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256

import torch
from torch import Tensor

from pscope.arguments import excerpt
from pscope.errors import PscopeError
from pscope.mappings.mapping import IDENTITY, Constant, Mapping
from pscope.models.fingerprint import fingerprint
from pscope.models.model import LanguageModel, check_model
from pscope.models.residual import Pair, as_pairs

FOLDS = 5
"""Into so many groups of whole texts a fit is divided, so that each text can be read by a map that never saw it."""


@dataclass(frozen=True)
class End:
    """One end of mappings: a model, as far as it is known. Where the fingerprint is None, any of its kind fits."""

    name: str
    layers: int
    width: int
    fingerprint: str | None = None

    @classmethod
    def of(cls, model: LanguageModel) -> End:
        """That of a model in memory."""
        check_model(model)
        return cls(model.name, model.n_layers, model.hidden_size, fingerprint(model))


@dataclass(frozen=True)
class Origin:
    """Where mappings come from: what they do, between which models, and what they were fitted on.

    `ridge` and `r2`, the share of the variance that is explained on texts held out, are those of each pair of layers.
    `settings` are what else a reader of the mappings should know.
    """

    kind: str
    source: End
    target: End
    texts: int = 0
    positions: int = 0
    data_sha256: str = ""
    ridge: dict[Pair, float] = field(default_factory=dict)
    r2: dict[Pair, float] = field(default_factory=dict)
    settings: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class MappingSet:
    """A mapping for each pair (ℓ, ℓ*) of layers. Those of `folds` have not seen the texts of that fold.

    `means` are the mean states, (width out,), of target layers ℓ* over what was fitted on. Raises PscopeError for what
    is no mapping for each pair.
    """

    maps: dict[Pair, Mapping]
    origin: Origin
    folds: tuple[dict[Pair, Mapping], ...] = ()
    means: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        maps = self.maps.items() if isinstance(self.maps, dict) else []
        if not maps or not all(type(pair) is tuple and isinstance(mapping, Mapping) for pair, mapping in maps):
            raise PscopeError(f"there is a mapping for each pair of layers, as {{(8, 8): f}}, not {excerpt(self.maps)}")

    def at(self, pair: Pair, text: str | None = None) -> Mapping:
        """The mapping between two layers: for a state of `text`, one that was not fitted on that text.

        Raises PscopeError for a pair that there is none for.
        """
        maps = self.folds[fold_of(text)] if text is not None and self.folds else self.maps
        if pair not in maps:
            raise PscopeError(f"there is no map for the layers {excerpt(pair)}; {self.covered}")
        return maps[pair]

    def apply(self, states: Tensor, pairs: Sequence[Pair], texts: Sequence[str | None]) -> Tensor:
        """States (samples, pairs, width), each by a map that has not seen its text: (samples, pairs, width out)."""
        of = [(pair, text) for text in texts for pair in pairs]
        return self.apply_each(states.flatten(0, 1), of).unflatten(0, states.shape[:2])

    def apply_each(self, states: Tensor, of: Sequence[tuple[Pair, str | None]]) -> Tensor:
        """States (rows, width), each of a text by a map of its pair that has not seen it: (rows, width out)."""
        groups: dict[tuple[Pair, int], list[int]] = {}
        for row, (pair, text) in enumerate(of):
            groups.setdefault((pair, fold_of(text) if text is not None and self.folds else -1), []).append(row)
        # One map at a time: all of a large model's take more than a GPU has beside it.
        parts = [self.at(*of[rows[0]]).to(states.device)(states[rows]) for rows in groups.values()]
        order = torch.tensor([row for rows in groups.values() for row in rows]).argsort()
        return torch.cat(parts)[order.to(states.device)]

    @classmethod
    def identity(cls, model: LanguageModel, pairs: Sequence[Pair]) -> MappingSet:
        """No mapping at all, as mappings within a model."""
        end = End.of(model)
        return cls(dict.fromkeys(as_pairs(model, model, pairs), IDENTITY), Origin("identity", end, end))

    @property
    def covered(self) -> str:
        """Which layers there are maps between, in words."""
        sources, targets = (sorted({pair[end] for pair in self.maps}) for end in (0, 1))
        return f"these map {_layers(sources)} to {_layers(targets)}"

    def check(self, source: LanguageModel, target: LanguageModel) -> None:
        """Raise PscopeError unless the mappings lead from one model to the other, naming what does not fit."""
        for role, end, model in (("from", self.origin.source, source), ("to", self.origin.target, target)):
            current = End.of(model)
            for what in ("layers", "width"):
                if getattr(end, what) != getattr(current, what):
                    raise PscopeError(
                        f"these mappings lead {role} {end.name}, with {getattr(end, what)} {what}; {model.name} has "
                        f"{getattr(current, what)}"
                    )
            if end.fingerprint not in (None, current.fingerprint):
                raise PscopeError(
                    f"these mappings lead {role} {end.name} of other weights than {model.name} has now; fit them anew"
                )

    @property
    def constant(self) -> bool:
        """Whether what comes out is the same whatever goes in."""
        return all(isinstance(mapping, Constant) for mapping in self.maps.values())

    def to_means(self) -> MappingSet:
        """Mappings between the same layers that say nothing of the state: all become the mean of the target layer."""
        if missing := {target for _, target in self.maps} - self.means.keys():
            raise PscopeError(
                f"no mean state of {_layers(sorted(missing))} was kept with these mappings; fit them anew"
            )
        maps: dict[Pair, Mapping] = {pair: Constant(self.means[pair[1]]) for pair in self.maps}
        return MappingSet(maps, replace(self.origin, kind="mean state", ridge={}, r2={}))


def check_mappings(mappings: MappingSet) -> None:
    """Raise PscopeError for what are no mappings that belong together, as a single one."""
    if not isinstance(mappings, MappingSet):
        raise PscopeError(f"a MappingSet, as read_mappings gives, is needed, not {excerpt(mappings)}")


def fold_of(text: str) -> int:
    """The fold of a text, which its characters decide: equal texts never stand on both sides of a division."""
    return int.from_bytes(sha256(text.encode("utf-8", "backslashreplace")).digest()[:8], "big") % FOLDS


def _layers(layers: list[int]) -> str:
    if layers == list(range(layers[0], layers[-1] + 1)) and len(layers) > 1:
        return f"layers {layers[0]} to {layers[-1]}"
    return f"layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))}"
