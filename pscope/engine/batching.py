"""What a model makes for its whole batch, fitted to the rows that reach a decoder layer.

Masks, position embeddings, attention biases, keys that layers share: a model makes them for all the rows of its input
and hands them to its decoder layers beside the residual stream. Where a layer gets fewer rows they are cut. Where one
was kept from a layer below that had fewer, the first row, the clean one, stands in for those that came since.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, MutableMapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from pscope.models.internals.calls import Args, Kwargs, stream_of
from pscope.models.internals.configs import attention
from pscope.models.model import LanguageModel
from pscope.models.residual import calling

Place = tuple[object, ...]
"""Where a tensor stands: the number of the decoder layer, and the way to it among the arguments of its call."""


class PerRow(NamedTuple):
    """An axis of a tensor along which each row of the batch has `size` entries, one row after the other."""

    axis: int
    size: int


BatchAxes = Mapping[Place, PerRow]
"""The batch axes of all the tensors that have one."""

_FOUND: WeakKeyDictionary[nn.ModuleList, dict[Hashable, BatchAxes]] = WeakKeyDictionary()


def known_batch_axes(model: LanguageModel, shape: Hashable, run: Callable[[int], object]) -> BatchAxes:
    """Those of `find_batch_axes`, which are looked for once in passes of one `shape`: whatever the tokens are."""
    found = _FOUND.setdefault(model.layers, {})
    key = (attention(model.hf.config), shape)
    if key not in found:
        found[key] = find_batch_axes(model, run)
    return found[key]


def find_batch_axes(model: LanguageModel, run: Callable[[int], object]) -> dict[Place, PerRow]:
    """Which tensors that decoder layers are called with have a batch axis, and which it is.

    `run(rows)` passes so many equal rows through the model: the axis is the one that two rows make twice as long.
    """
    one, two = (_shapes(model, run, rows) for rows in (1, 2))
    batch_axes = {}
    for place in one.keys() & two.keys():
        doubled = [axis for axis, sizes in enumerate(zip(one[place], two[place], strict=True)) if sizes[0] != sizes[1]]
        if len(doubled) == 1:
            (axis,) = doubled
            batch_axes[place] = PerRow(axis, one[place][axis])
    return batch_axes


def fitting(model: LanguageModel, batch_axes: BatchAxes) -> AbstractContextManager[None]:
    """A block within which each decoder layer is called with as many rows of everything as of its residual stream."""

    def fit(layer: int, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        rows = stream_of(args, kwargs).shape[0]

        def fitted(place: Place, tensor: Tensor) -> Tensor:
            return _with_rows(tensor, rows, *batch_axes[place]) if place in batch_axes else tensor

        args, kwargs = _map_tensors((layer,), (args, kwargs), fitted)
        return args, kwargs

    return calling(model, fit)


def _shapes(model: LanguageModel, run: Callable[[int], object], rows: int) -> dict[Place, tuple[int, ...]]:
    shapes: dict[Place, tuple[int, ...]] = {}

    def look(layer: int, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        def note(place: Place, tensor: Tensor) -> Tensor:
            shapes[place] = tuple(tensor.shape)
            return tensor

        args, kwargs = _map_tensors((layer,), (args, kwargs), note)
        return args, kwargs

    with calling(model, look):
        run(rows)
    return shapes


def _map_tensors(place: Place, value: Any, function: Callable[[Place, Tensor], Tensor]) -> Any:
    """`value` with the function applied to every tensor in it. Mappings are changed in place: layers may share them."""
    if isinstance(value, Tensor):
        return function(place, value)
    if isinstance(value, MutableMapping):
        for key in value:
            value[key] = _map_tensors((*place, key), value[key], function)
    elif isinstance(value, (tuple, list)):
        return type(value)(_map_tensors((*place, index), item, function) for index, item in enumerate(value))
    return value


def _with_rows(tensor: Tensor, rows: int, axis: int, size: int) -> Tensor:
    missing = rows * size - tensor.shape[axis]
    if missing <= 0:
        return tensor.narrow(axis, 0, rows * size)
    first_row = tensor.narrow(axis, 0, size)
    return torch.cat([tensor, *[first_row] * (missing // size)], dim=axis)
