"""What rows write over a target prompt: vectors, each in the place of what one layer holds at one position.

Replacing is the one mechanism. What is added to a state, or given its length, is another vector to write, since the
state is known: that of the clean target.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pscope.arguments import as_int, as_vectors, excerpt
from pscope.errors import PscopeError

NOWHERE = -1
"""The layer of a write that a row does not have where others have more."""


class Write(NamedTuple):
    """A `vector` (hidden,) that takes the place of what the residual stream of `layer` holds at `position`, which
    counts the target's tokens from 0."""

    layer: int
    position: int
    vector: Tensor

    def checked(self) -> Write:
        """The same, of Python's own numbers and a tensor. Raises PscopeError for others."""
        layer, position = (
            as_int(self.layer, "the layer of a write", 0),
            as_int(self.position, "its position", 0),
        )
        return Write(layer, position, as_vectors(self.vector, "vectors"))


class LayerWrites(NamedTuple):
    """The writes in one layer: the row and the position of each, (writes,), and its vector, (writes, hidden)."""

    rows: Tensor
    positions: Tensor
    vectors: Tensor


@dataclass(frozen=True, eq=False)
class Writes:
    """What each row of a Patchscope writes: `vectors`, (rows, writes, hidden), at `layers`, (rows, writes), and
    `positions`, (rows, writes).

    Below its lowest layer a row is the clean row. Where it has fewer writes than others, the layer of the rest is -1.
    Raises PscopeError for tensors that do not belong together.
    """

    vectors: Tensor
    layers: Tensor
    positions: Tensor

    def __post_init__(self) -> None:
        places = [each.shape for each in (self.layers, self.positions) if isinstance(each, Tensor) and each.ndim == 2]
        if not isinstance(self.vectors, Tensor) or places != [self.vectors.shape[:-1]] * 2:
            raise PscopeError("writes are vectors (rows, writes, hidden), at layers and positions (rows, writes) each")
        for name in ("layers", "positions"):
            numbers = getattr(self, name)
            if numbers.is_floating_point() or numbers.dtype == torch.bool:
                raise PscopeError(f"{name} of {numbers.dtype} are no numbers of {name}; give whole ones")
            # As an index, numbers of eight bits would be a mask.
            object.__setattr__(self, name, numbers.long())

    @classmethod
    def of(cls, rows: Sequence[Sequence[Write]]) -> Writes:
        """The writes of each row, in any layers and positions. Raises PscopeError for a row without any, or others."""
        are_lists = isinstance(rows, (list, tuple)) and all(type(row) in (list, tuple) for row in rows)
        if not are_lists or not all(isinstance(write, Write) for row in rows for write in row):
            raise PscopeError(
                f"rows are lists of Write(layer, position, vector), as [[Write(…)], …], not {excerpt(rows)}"
            )
        if not all(rows) or not rows:
            raise PscopeError("a row has one write at least")
        rows = [[write.checked() for write in row] for row in rows]
        shapes = {tuple(write.vector.shape) for row in rows for write in row}
        if len(shapes) > 1 or len(next(iter(shapes))) != 1:
            raise PscopeError(f"a write has a vector (hidden,), all of one width; these are of shapes {sorted(shapes)}")
        most = max(map(len, rows))
        layers = torch.full((len(rows), most), NOWHERE)
        positions = torch.zeros(len(rows), most, dtype=torch.long)
        vectors = []
        for number, row in enumerate(rows):
            layers[number, : len(row)] = torch.tensor([write.layer for write in row])
            positions[number, : len(row)] = torch.tensor([write.position for write in row])
            device = rows[0][0].vector.device
            padded = (*row, *[row[-1]] * (most - len(row)))
            vectors.append(torch.stack([write.vector.to(device) for write in padded]))
        return cls(torch.stack(vectors), layers, positions)

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, rows: slice | Tensor) -> Writes:
        on_device = rows if isinstance(rows, slice) else rows.to(self.vectors.device)
        return Writes(self.vectors[on_device], self.layers[rows], self.positions[rows])

    def __repr__(self) -> str:
        return f"Writes({len(self)} rows, {self.layers.shape[1]} each at most, in layers {self.present})"

    @property
    def present(self) -> list[int]:
        """The layers in which anything is written, in ascending order."""
        return [layer for layer in self.layers.unique().tolist() if layer != NOWHERE]

    @property
    def lowest(self) -> Tensor:
        """The lowest layer in which each row writes, (rows,)."""
        return torch.where(self.layers == NOWHERE, torch.iinfo(self.layers.dtype).max, self.layers).amin(dim=1)

    def at(self, layer: int) -> LayerWrites:
        """What is written in one layer."""
        rows, slots = (self.layers == layer).nonzero(as_tuple=True)
        device = self.vectors.device
        return LayerWrites(rows, self.positions[rows, slots], self.vectors[rows.to(device), slots.to(device)])

    def check(self, positions: Sequence[int], n_layers: int, hidden: int) -> None:
        """Raise PscopeError unless all go to `positions` of a target, and fit a model of that size."""
        if not len(self):
            raise PscopeError("there is no row to patch")
        as_vectors(self.vectors, "vectors")
        if self.vectors.shape[-1] != hidden:
            raise PscopeError(f"vectors of width {self.vectors.shape[-1]} do not fit a model of width {hidden}")
        written = self.layers != NOWHERE
        if not written.any(dim=1).all():
            row = int(written.any(dim=1).logical_not().nonzero()[0])
            raise PscopeError(f"row {row} writes in no layer; leave it out: the clean row comes with every pass")
        outside = written & ((self.layers < 0) | (self.layers > n_layers))
        if outside.any():
            layer = int(self.layers[outside][0])
            raise PscopeError(f"layer {layer} is out of range: the model has layers 0 to {n_layers}")
        astray = written & ~torch.isin(self.positions, torch.tensor(list(positions)))
        if astray.any():
            raise PscopeError(
                f"position {int(self.positions[astray][0])} is not marked in the target, where {list(positions)} are; "
                "mark all that are written to"
            )
        # One number for each place, and none twice but for those that are nowhere.
        places = (self.layers * (1 + max(positions)) + self.positions).masked_fill(~written, NOWHERE).sort(dim=1).values
        repeats = ((places.diff(dim=1) == 0) & (places[:, 1:] != NOWHERE)).nonzero()
        if len(repeats):
            row, slot = repeats[0].tolist()
            layer, position = divmod(int(places[row, slot]), 1 + max(positions))
            raise PscopeError(f"row {row} writes twice at layer {layer}, position {position}; give one vector for it")


def spread_over(states: Tensor, layers: Tensor, positions: Sequence[int]) -> Writes:
    """Writes of `states` (rows, positions, hidden), each in the layers (rows, layers) of its row: all positions of the
    first layer come first.
    """
    rows, n_layers = layers.shape
    return Writes(
        states.repeat(1, n_layers, 1) if n_layers > 1 else states,
        layers.repeat_interleave(len(positions), dim=1),
        torch.tensor(list(positions)).repeat(rows, n_layers),
    )


def over_clean(states: Tensor, clean: Tensor, scales: Tensor, *, norm: bool, add: bool) -> Tensor:
    """Vectors to write, made from states (rows, writes, hidden) and from the clean ones in their places.

    With `norm` a state is given the length of the clean one; then it is scaled; with `add` the clean one is added.
    """
    # As precise as the more precise of the two, so that what is added nothing stays what it is.
    states = states.to(torch.promote_types(states.dtype, clean.dtype))
    clean = clean.to(states)
    if norm:
        lengths = states.norm(dim=-1, keepdim=True)
        states = states * (clean.norm(dim=-1, keepdim=True) / torch.where(lengths == 0, 1, lengths))
    states = scales * states
    return clean + states if add else states
