"""Caches of keys and values: what their layers hold, and layers of our own in their place.

A cache has a layer for each module that keeps anything: of a `DynamicLayer`, keys and values of every token, each
(rows, heads, tokens, width).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import LongTensor, Tensor
from torch.nn.functional import pad
from transformers import Cache, DynamicLayer


def layer_bytes(cache: Cache) -> list[int]:
    """How many bytes each of its layers holds."""
    return [_bytes_of(vars(layer)) for layer in cache.layers]


def other_kinds(cache: Cache) -> list[str]:
    """The kinds of its layers that keep more than keys and values of each token, recurrent states for example."""
    # By name, since older releases of transformers lack some of them.
    plain_kinds = {"DynamicLayer", "DynamicSlidingWindowLayer", "DummyLayer"}
    return sorted({type(layer).__name__ for layer in cache.layers} - plain_kinds)


def joined(caches: Sequence[Cache]) -> Cache:
    """The first of several caches, which have equally many tokens, with the rows of all. The others are emptied.

    Those that keep a buffer may have room for different numbers of tokens to come.
    """
    first = caches[0]
    for own, *others in zip(*(cache.layers for cache in caches), strict=True):
        # A layer that no module uses has none.
        if own.keys is not None:
            own.keys = _stacked([own.keys, *(layer.keys for layer in others)])
            own.values = _stacked([own.values, *(layer.values for layer in others)])
        for layer in others:
            # So that little is held twice at once.
            layer.keys = layer.values = None
    return first


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    most = max(tensor.shape[2] for tensor in tensors)
    return torch.cat([pad(each, (0, 0, 0, most - each.shape[2])) if each.shape[2] < most else each for each in tensors])


def keep(cache: Cache, rows: Tensor) -> None:
    """Leave only these rows of a cache, by number, (rows,), in the order given."""
    cache.reorder_cache(cast(LongTensor, rows))


def grown(prefix: Cache, rows: int, room: int = 0) -> Cache:
    """A cache for so many rows after a prefix that they share, one row in full-length layers. See `GrowingLayer`."""
    if prefix.layers:
        return Cache(layers=[GrowingLayer(layer, rows, room) for layer in cast(list[DynamicLayer], prefix.layers)])
    # Some models keep more cache layers than they have decoder layers, so they are made as they are asked for.
    layer_factory = partial(GrowingLayer, DynamicLayer(), rows, room)
    return Cache(layer_class_to_replicate=cast(type[DynamicLayer], layer_factory))


class GrowingLayer(DynamicLayer):
    """The keys and values of one decoder layer, (rows, heads, tokens, width): a shared prefix, then each row's own.

    With `room` for the suffix and the tokens to come, they are kept in a buffer for all rows, of which the first to
    arrive are there already; without, they serve the one pass and are forgotten.
    """

    # Once they have come, where there is room for them.
    keys: Tensor
    values: Tensor

    def __init__(self, prefix: DynamicLayer, rows: int, room: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # transformers gives it no types.
        self._prefix, self._rows, self._room = prefix, rows, room
        self._length = prefix.get_seq_length()
        self._started = False
        self.is_initialized = True

    def get_seq_length(self) -> int:
        return self._length

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self._started:
            self._started = True
            if not self._room:
                return self._joined(self._prefix.keys, key_states), self._joined(self._prefix.values, value_states)
            self.keys = self._buffer(self._prefix.keys, key_states)
            self.values = self._buffer(self._prefix.values, value_states)
        else:
            end = self._length + key_states.shape[2]
            self.keys[:, :, self._length : end] = key_states
            self.values[:, :, self._length : end] = value_states
        self._length += key_states.shape[2]
        present = key_states.shape[0]
        return self.keys[:present, :, : self._length], self.values[:present, :, : self._length]

    def _joined(self, prefix: Tensor | None, own: Tensor) -> Tensor:
        return own if prefix is None else torch.cat([prefix.expand(own.shape[0], -1, -1, -1), own], dim=2)

    def _buffer(self, prefix: Tensor | None, own: Tensor) -> Tensor:
        present, heads, suffix, width = own.shape
        start = self._length
        buffer = own.new_empty(self._rows, heads, start + self._room, width)
        if prefix is not None:
            buffer[:, :, :start] = prefix
        buffer[:present, :, start : start + suffix] = own
        # Below its layer a row is the clean row, row 0.
        buffer[present:, :, start : start + suffix] = own[:1]
        return buffer


def _bytes_of(value: object) -> int:
    """Those of all tensors in a value, which may be a container of containers."""
    if isinstance(value, Tensor):
        return value.nbytes
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return 0
    return sum(map(_bytes_of, value))
