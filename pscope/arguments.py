"""Arguments as they are meant: what others hold as Python's own, and one sentence for what fits nowhere."""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any, TypeGuard, TypeVar

import torch
from torch import Tensor, nn

from pscope.errors import ModelError, PscopeError, RowError, first_line
from pscope.memory import out_of_memory

T = TypeVar("T")


def as_python(value: Any) -> Any:
    """What numpy, pandas and torch hold, as numbers and lists of Python's own; anything else as it is."""
    return value.tolist() if hasattr(value, "tolist") else value


def excerpt(value: object) -> str:
    """What a message shows of an argument: one line of it."""
    if isinstance(value, nn.Module):
        return type(value).__name__
    if getattr(value, "ndim", 0) and hasattr(value, "shape"):
        return f"a {type(value).__name__} of shape {tuple(value.shape)}"
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:60]} …"


def is_int(value: object) -> bool:
    """Whether a value that `as_python` has made is a whole number. True and False are none."""
    # Of most values this is all there is to ask.
    return type(value) is int or (isinstance(value, Integral) and not isinstance(value, bool))


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value that `as_python` has made is a real number. True and False are none."""
    return isinstance(value, Real) and not isinstance(value, bool)


def as_int(value: object, name: str, least: int = 1, most: int | None = None) -> int:
    """A whole number, numpy's and torch's too. Raises PscopeError for others, and outside the range."""
    number = as_python(value)
    if not is_int(number) or number < least or (most is not None and number > most):
        fits = f"from {least} on" if most is None else f"from {least} to {most}"
        raise PscopeError(f"{name} is {excerpt(value)}; a whole number {fits} is needed")
    return int(number)


def as_seed(value: object) -> int:
    """A seed: equal numbers of any kind draw the same. Raises PscopeError."""
    return as_int(value, "the seed", 0, 2**64 - 1)


def as_device(device: str | torch.device) -> torch.device:
    """A device on which numbers can be held. Raises ModelError."""
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ModelError(f"the device {str(device)!r} cannot be used: {first_line(error)}") from error


def check_name(name: object, names: Iterable[str], what: str) -> None:
    """Raise PscopeError for a name that there is none of."""
    if name not in (listed := list(names)):
        raise PscopeError(f"there is no {what} {name!r}; one of {', '.join(listed)}")


def as_list(kind: type[T] | tuple[type[T], ...], values: Iterable[T] | T, what: str, how: str) -> list[T]:
    """Some values of a kind as a list; one alone is a list of one. Raises PscopeError for none, and for others.

    The message calls them `what`, "prompts", and tells `how` they come about.
    """
    if isinstance(values, kind):
        return [values]
    items = as_python(values)
    items = [values] if isinstance(items, str) or not isinstance(items, Iterable) else list(items)
    for each in items:
        if not isinstance(each, kind):
            raise PscopeError(f"a list of {what} is needed, and {excerpt(each)} is none of them; {how}")
    if not items:
        raise PscopeError(f"there are no {what}; {how}")
    return items


def as_vectors(value: Any, what: str = "states") -> Tensor:
    """Hidden states as the tensor that they are, or that arrays and lists of them make.

    Raises PscopeError for what holds no real floating-point numbers, or holds them sparsely.
    """
    if not isinstance(value, Tensor):
        try:
            stacks = isinstance(value, (list, tuple)) and all(isinstance(each, Tensor) for each in value)
            value = torch.stack(list(value)) if stacks else torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError) as error:
            if out_of_memory(error):
                raise
            raise PscopeError(f"{what} are a tensor (rows, hidden), not {excerpt(value)}") from error
    if not value.is_floating_point():
        raise PscopeError(f"{what} of {value.dtype} are no hidden states; give real floating-point numbers")
    if value.layout != torch.strided:
        raise PscopeError(f"{what} are held as {value.layout}; give them as to_dense() has them")
    return value


def check_numbers(vectors: Tensor, what: str = "states") -> None:
    """Raise PscopeError for vectors (rows, …) without numbers, RowError for a row of which some are not finite."""
    if vectors.is_meta:
        raise PscopeError(f"{what} on the meta device have no numbers; take them from a model with weights")
    finite = vectors.isfinite().flatten(1).all(dim=1)
    if not finite.all():
        name = str(vectors.dtype).removeprefix("torch.")
        way_out = "leave it out, or mend it" if vectors.dtype in (torch.float32, torch.float64) else "try float32"
        raise RowError(int(finite.logical_not().nonzero()[0]), f"its {what} are not finite in {name}; {way_out}")
