"""A mapping f: states of one layer in, states for another layer out, perhaps of another model and another width.

A Patchscope knows nothing of it: states are mapped before they are patched.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from numbers import Real
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import linear

from pscope.arguments import as_device, as_vectors, excerpt
from pscope.errors import PscopeError

_HOLDS: dict[str, Any] = {
    "Tensor": Tensor,
    "float": Real,
    "None": type(None),
    "Mapping": Callable,
    "tuple[Mapping, ...]": tuple,
}
"""By its annotation, what a field of a mapping may hold; one with another annotation is its author's own."""

Axes = dict[str, tuple[str, ...]]
"""By the name of a field, those of its tensor: axes of one name are equally long in all of a mapping's tensors."""


@dataclass(frozen=True, eq=False)
class Mapping(ABC):
    """States (…, width) in, states (…, width of the target) out, computed as precisely as the mapping's own numbers.

    Raises PscopeError for states of a width that it was not made for, and where it is made of what it cannot be.
    """

    axes: ClassVar[Axes] = {}

    def __post_init__(self) -> None:
        kind = type(self).__name__
        for field in fields(self):
            value, types = getattr(self, field.name), str(field.type).split(" | ")
            fits = isinstance(value, tuple(_HOLDS.get(name, object) for name in types))
            if not fits or (types == ["tuple[Mapping, ...]"] and not all(map(callable, value))):
                raise PscopeError(f"the {field.name} of {kind} is a {field.type}, not {excerpt(value)}")
        lengths: dict[str, int] = {}
        for field in fields(self):
            name, value, axes = field.name, getattr(self, field.name), self.axes.get(field.name)
            # Where a number fits, a tensor of one stands for all.
            if axes is None or not isinstance(value, Tensor) or (value.ndim == 0 and "float" in str(field.type)):
                continue
            pairs = zip(axes, value.shape, strict=False)
            if value.ndim != len(axes) or any(lengths.setdefault(axis, size) != size for axis, size in pairs):
                shape = f"({', '.join(axes)}), and a tensor of shape {tuple(value.shape)}"
                raise PscopeError(f"the {name} of {kind} is {shape} does not fit that, or not the rest")

    @abstractmethod
    def __call__(self, states: Tensor) -> Tensor: ...

    def then(self, after: Mapping) -> Mapping:
        """This mapping, and what comes out of it mapped by another."""
        return Composed((self, after))

    def to(self, device: torch.device | str) -> Mapping:
        """The same mapping with its numbers on a device. Raises ModelError for one that cannot be used."""
        device = as_device(device)
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        parts = {name: value.to(device) for name, value in values.items() if isinstance(value, (Tensor, Mapping))}
        steps = {name: tuple(each.to(device) for each in value) for name, value in values.items() if _is_steps(value)}
        return replace(self, **parts, **steps)


@dataclass(frozen=True, eq=False)
class Identity(Mapping):
    """f(h) = h."""

    def __call__(self, states: Tensor) -> Tensor:
        return states


IDENTITY = Identity()


@dataclass(frozen=True, eq=False)
class Affine(Mapping):
    """f(h) = W h + b, with `weight` (width out, width in) and `bias` (width out,), if there is one."""

    axes: ClassVar[Axes] = {"weight": ("width out", "width in"), "bias": ("width out",)}

    weight: Tensor
    bias: Tensor | None = None

    def __call__(self, states: Tensor) -> Tensor:
        states = _of_width(states, self.weight.shape[-1])
        return linear(states.to(self.weight), self.weight, self.bias)


@dataclass(frozen=True, eq=False)
class LowRank(Mapping):
    """f(h) = s h + U D h + b, with `up` (width out, rank), `down` (rank, width in), `bias` (width out,) if any.

    The `scale` s of what is kept of h itself is a number, or one for each dimension; with 0 nothing is.
    """

    axes: ClassVar[Axes] = {
        "up": ("width out", "rank"),
        "down": ("rank", "width in"),
        "bias": ("width out",),
        "scale": ("width out",),
    }

    up: Tensor
    down: Tensor
    bias: Tensor | None = None
    scale: float | Tensor = 0.0

    def __call__(self, states: Tensor) -> Tensor:
        states = _of_width(states, self.down.shape[-1]).to(self.up)
        mapped = linear(linear(states, self.down), self.up, self.bias)
        return mapped if isinstance(self.scale, float) and self.scale == 0 else self.scale * states + mapped


@dataclass(frozen=True, eq=False)
class Scale(Mapping):
    """f(h) = s h + b: `factor` is a number, or one for each dimension, as is `bias`."""

    axes: ClassVar[Axes] = {"factor": ("width",), "bias": ("width",)}

    factor: float | Tensor
    bias: float | Tensor = 0.0

    def __call__(self, states: Tensor) -> Tensor:
        for numbers in (self.factor, self.bias):
            if isinstance(numbers, Tensor):
                states = states.to(numbers)
                if numbers.ndim:
                    states = _of_width(states, numbers.shape[0])
        return self.factor * states + self.bias


@dataclass(frozen=True, eq=False)
class Constant(Mapping):
    """f(h) = c: the same `state` (width out,) whatever goes in. A control."""

    axes: ClassVar[Axes] = {"state": ("width out",)}

    state: Tensor

    def __call__(self, states: Tensor) -> Tensor:
        return self.state.expand(*states.shape[:-1], -1)


@dataclass(frozen=True, eq=False)
class Norm(Mapping):
    """The same direction, of the Euclidean `length`; a state of no length has no direction, and stays."""

    length: float

    def __call__(self, states: Tensor) -> Tensor:
        return _of_length(states, self.length)


@dataclass(frozen=True, eq=False)
class KeepNorm(Mapping):
    """What comes out of a mapping, made as long as what went in."""

    mapping: Mapping

    def __call__(self, states: Tensor) -> Tensor:
        return _of_length(self.mapping(states), states.norm(dim=-1, keepdim=True))


@dataclass(frozen=True, eq=False)
class Composed(Mapping):
    """One mapping after another, the first one first."""

    steps: tuple[Mapping, ...]

    def __call__(self, states: Tensor) -> Tensor:
        for step in self.steps:
            states = step(states)
        return states


def _of_length(states: Tensor, length: float | Tensor) -> Tensor:
    norms = states.norm(dim=-1, keepdim=True)
    return states * (length / torch.where(norms == 0, 1, norms))


def _of_width(states: Tensor, width: int) -> Tensor:
    states = as_vectors(states)
    if states.shape[-1:] != (width,):
        raise PscopeError(f"states of shape {tuple(states.shape)} were given to a mapping from width {width}")
    return states


def _is_steps(value: object) -> bool:
    return isinstance(value, tuple) and all(isinstance(each, Mapping) for each in value)
