"""Hidden states that know what they are: a vector for each row, and the prompt, token, position and layer it is of."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pscope.arguments import as_list, as_python, as_vectors, excerpt
from pscope.errors import DataError, PscopeError
from pscope.files import as_path, written_whole
from pscope.models.model import LanguageModel, as_prompts
from pscope.models.prompts import Prompt
from pscope.models.residual import as_layers, as_positions, capture
from pscope.notebook import table_in_frame

if TYPE_CHECKING:
    import pandas as pd

_TENSOR, _LABELS = "states", "labels"


class Label(NamedTuple):
    """What a state is of: the text of a prompt, or a name; and token, position and layer, where it has any."""

    text: str
    token: str | None = None
    position: int | None = None
    layer: int | None = None


@dataclass(frozen=True, eq=False)
class States:
    """Hidden states, or other vectors of the residual stream: `vectors` (rows, hidden), and a label for each row.

    What is taken out of them, added to them and mapped keeps its labels. Others are matched row by row, or, where they
    have one row of each layer, as `mean()` has, layer by layer. A label may be given as the text that it is. Raises
    PscopeError for vectors that are not of real numbers, and for labels that are not as many.
    """

    vectors: Tensor
    labels: tuple[Label, ...]

    # So that numpy's own numbers leave arithmetic to us.
    __array_ufunc__ = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "vectors", as_vectors(self.vectors, "vectors"))
        labels = as_list((str, Label), self.labels, "labels", "give texts") if len(self.vectors) else []
        object.__setattr__(self, "labels", tuple(Label(each) if isinstance(each, str) else each for each in labels))
        if self.vectors.ndim != 2 or len(self.vectors) != len(self.labels):
            shape = tuple(self.vectors.shape)
            raise PscopeError(f"{len(self.labels)} labels do not fit vectors of shape {shape}: (rows, hidden)")

    @classmethod
    def of(
        cls,
        model: LanguageModel,
        prompts: Sequence[Prompt],
        positions: Sequence[Sequence[int]] | None = None,
        layers: Sequence[int] | None = None,
    ) -> States:
        """The states that prompts form, read as `capture` reads them: a row for each layer of each position read."""
        prompts, layers = as_prompts(model, prompts), as_layers(model, layers)
        positions = as_positions(prompts, positions)
        if model.device.type == "meta":
            # Of a model without weights, there is no more than their number.
            vectors = torch.empty(sum(map(len, positions)), len(layers), model.hidden_size, device="meta")
        else:
            vectors = capture(model, prompts, positions, layers)  # (reads, layers, hidden)
        labels = tuple(
            Label(prompt.text, prompt.tokens[position], position, layer)
            for prompt, places in zip(prompts, positions, strict=True)
            for position in places
            for layer in layers
        )
        return cls(vectors.flatten(0, 1), labels)

    @classmethod
    def from_file(cls, path: str | Path, name: str | None = None) -> States:
        """Vectors from a file: of `to_file`, a safetensors file of others, or an array of numpy's (`.npy`).

        Of several tensors one is meant by its `name`. It is (hidden,) or (rows, hidden); rows of others are called by
        the file, the tensor and their number, and have no layer. No pickle is opened. Raises DataError for what is no
        such file, is empty, or holds numbers that are not finite.
        """
        path = as_path(path)
        if path.suffix == ".npy":
            if name is not None:
                raise DataError(f"{path} holds one array; leave the name {name!r} out")
            vectors, labels, name = _from_numpy(path), None, path.stem
        elif path.suffix == ".safetensors":
            vectors, labels, name = _from_safetensors(path, name)
        else:
            raise DataError(f"{path} is neither .safetensors nor .npy; save the vectors as one of these")
        if not vectors.is_floating_point() or vectors.ndim not in (1, 2) or not vectors.numel():
            raise DataError(
                f"{path} holds {str(vectors.dtype).removeprefix('torch.')} of shape {tuple(vectors.shape)}; real "
                "vectors of shape (rows, hidden) are needed"
            )
        vectors = vectors[None] if vectors.ndim == 1 else vectors
        broken = (~vectors.isfinite().all(dim=1)).nonzero()
        if len(broken):
            raise DataError(f"row {int(broken[0])} of {path} is not finite")
        if labels is None:
            labels = tuple(Label(f"{name} {row}" if len(vectors) > 1 else name) for row in range(len(vectors)))
        return cls(vectors, labels)

    def to_file(self, path: str | Path) -> None:
        """Keep the vectors as safetensors, with their labels. Raises DataError where something is there already."""
        path = as_path(path)
        if path.suffix != ".safetensors":
            raise DataError(f"{path}: name a file that ends with .safetensors")
        if path.exists():
            raise DataError(f"{path} is there already; name a new file")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with written_whole(path) as unfinished:
                vectors = self.vectors.detach().cpu().contiguous()
                save_file({_TENSOR: vectors}, unfinished, {_LABELS: json.dumps(self.labels)})
        except OSError as error:
            raise DataError(f"cannot write {path}: {error.strerror}; name another file") from error

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: int | slice | Sequence[int] | Tensor) -> States:
        """Some of the rows: one, a slice, a list of them, or a mask. Raises PscopeError for rows that are not there."""
        try:
            numbers = torch.arange(len(self))[rows if isinstance(rows, slice) else torch.as_tensor(as_python(rows))]
        except (IndexError, TypeError, ValueError, RuntimeError) as error:
            raise PscopeError(f"{excerpt(rows)} are no rows of {self!r}; give numbers below {len(self)}") from error
        numbers = numbers.reshape(-1)
        return States(self.vectors[numbers.to(self.vectors.device)], tuple(self.labels[n] for n in numbers.tolist()))

    def __iter__(self) -> Iterator[States]:
        return (self[row] for row in range(len(self)))

    def at(self, layer: int) -> States:
        """The rows of one layer. Raises PscopeError if there is none."""
        rows = [row for row, label in enumerate(self.labels) if label.layer == layer]
        if not rows:
            raise PscopeError(f"there is no state of layer {layer} among {self!r}")
        return self[rows]

    def _repr_html_(self) -> str:
        return table_in_frame(self)

    def __repr__(self) -> str:
        layers = sorted({label.layer for label in self.labels if label.layer is not None})
        texts = list(dict.fromkeys(label.text for label in self.labels))
        of = ", ".join(repr(text if len(text) <= 40 else f"{text[:39]}…") for text in texts[:3])
        more = f" and {len(texts) - 3} more" if len(texts) > 3 else ""
        where = f", layers {layers[0]} to {layers[-1]}" if layers else ""
        return f"States({len(self)} of width {self.vectors.shape[1]}{where}: {of}{more})"

    def table(self) -> pd.DataFrame:
        """The labels, one row each, and the length of each vector."""
        import pandas as pd

        table = pd.DataFrame(list(self.labels), columns=list(Label._fields))
        types = {"position": "Int64", "layer": "Int64"}
        return table.astype(types).assign(norm=self.vectors.float().norm(dim=1).tolist())

    def map(self, mapping: Callable[[Tensor], Tensor]) -> States:
        """What a mapping of `pscope.mappings`, or any function of (rows, hidden), makes of the vectors."""
        if not callable(mapping):
            raise PscopeError(f"states are mapped by a function of (rows, hidden), not by {excerpt(mapping)}")
        return replace(self, vectors=mapping(self.vectors))

    def mean(self) -> States:
        """The mean state of each layer, one row each; of vectors without a layer, one in all."""
        if not len(self):
            raise PscopeError("there is no state to take the mean of")
        layers = list(dict.fromkeys(label.layer for label in self.labels))
        texts = list(dict.fromkeys(label.text for label in self.labels))
        name = f"mean of {len(texts)}" if len(texts) > 1 else f"mean over {texts[0]}"
        groups = [[row for row, label in enumerate(self.labels) if label.layer == layer] for layer in layers]
        means = torch.stack([_precise(self.vectors[rows]).mean(dim=0) for rows in groups])
        return States(means, tuple(Label(name, layer=layer) for layer in layers))

    def __add__(self, other: States | Tensor) -> States:
        return replace(self, vectors=_precise(self.vectors) + self._beside(other))

    def __sub__(self, other: States | Tensor) -> States:
        return replace(self, vectors=_precise(self.vectors) - self._beside(other))

    def __mul__(self, factor: float | Tensor) -> States:
        return replace(self, vectors=self.vectors * self._factor(factor))

    __rmul__ = __mul__

    def __truediv__(self, divisor: float | Tensor) -> States:
        return replace(self, vectors=self.vectors / self._factor(divisor))

    def __neg__(self) -> States:
        return replace(self, vectors=-self.vectors)

    def _factor(self, other: float | Tensor) -> float | Tensor:
        """A number, or numbers that fit the vectors. Raises PscopeError."""
        try:
            numbers = torch.as_tensor(other, device=self.vectors.device)
            fits = numbers.broadcast_to(self.vectors.shape) is not None
        except (TypeError, ValueError, RuntimeError):
            fits = False
        if not fits:
            shape = tuple(self.vectors.shape)
            raise PscopeError(
                f"states {shape} are combined with states, numbers, or vectors that fit, not {excerpt(other)}"
            )
        return other if isinstance(other, (int, float)) else numbers

    def _beside(self, other: States | Tensor) -> float | Tensor:
        """The vectors of others in the order of these rows, or one for all."""
        if not isinstance(other, States):
            return self._factor(other)
        if other.vectors.shape[1] != self.vectors.shape[1]:
            widths = self.vectors.shape[1], other.vectors.shape[1]
            raise PscopeError(
                "states of width {} and of width {} cannot be added; map one of them first".format(*widths)
            )
        vectors = _precise(other.vectors).to(self.vectors.device)
        mine, theirs = ([label.layer for label in states.labels] for states in (self, other))
        if theirs == [None] or mine == theirs:
            return vectors
        if len(set(theirs)) == len(theirs) and set(mine) <= set(theirs):
            return vectors[[theirs.index(layer) for layer in mine]]
        raise PscopeError(
            f"{other!r} has neither the layers of {self!r}, row by row, nor one row of each of them, as mean() has"
        )


def _precise(vectors: Tensor) -> Tensor:
    """In single precision at least: a small difference of large states is lost in half."""
    return vectors.to(torch.promote_types(vectors.dtype, torch.float32))


def _from_numpy(path: Path) -> Tensor:
    try:
        array = np.load(path, allow_pickle=False)
        return torch.from_numpy(array)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or 'it is damaged'}") from error
    except (ValueError, TypeError, EOFError) as error:
        raise DataError(f"{path} is damaged, or holds no plain array of real numbers") from error


def _from_safetensors(path: Path, name: str | None) -> tuple[Tensor, tuple[Label, ...] | None, str]:
    """A tensor, its labels if the file is ours, and what it is called."""
    try:
        with safe_open(path, "pt") as file:
            names, labels = list(file.keys()), (file.metadata() or {}).get(_LABELS)
            if name is None and len(names) != 1:
                raise DataError(f"{path} holds {', '.join(names) or 'no tensor'}; name one of them")
            name = names[0] if name is None else name
            if name not in names:
                raise DataError(f"{path} has no tensor {name!r}; it holds {', '.join(names)}")
            vectors = file.get_tensor(name)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or 'it is not there'}") from error
    except SafetensorError as error:
        raise DataError(f"{path} is damaged, or no safetensors file") from error
    if labels is None or name != _TENSOR:
        return vectors, None, f"{path.stem}:{name}" if len(names) > 1 else path.stem
    try:
        return vectors, tuple(Label(*label) for label in json.loads(labels)), name
    except (ValueError, TypeError) as error:
        raise DataError(f"the labels of {path} are damaged") from error
