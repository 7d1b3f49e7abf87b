"""Sums over pairs of states, from which affine maps follow in closed form: however many pairs there were.

The sums are kept apart for each fold, so that the maps which have not seen a fold follow by leaving its sums out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from pscope.errors import PscopeError
from pscope.mappings.mapping import Affine
from pscope.mappings.mapping_set import FOLDS
from pscope.models.residual import Pair

RIDGES = tuple(10.0**power for power in range(-7, 2))
"""What is tried where the ridge is to be chosen."""

PER_DIMENSION = 2
"""Fewer positions than so many for each dimension of the source are refused, as too few for its map."""

_ACCURACY = 1e-13
"""Below such a share of the largest, an eigenvalue of sums in double precision is nothing but rounding."""


@dataclass(frozen=True)
class Fitted:
    """The map of all positions, those that left out each fold, the ridge, and R² on what was left out.

    The maps are in double precision.
    """

    whole: Affine
    folds: tuple[Affine, ...]
    ridge: float
    r2: float


class Moments:
    """Sums of states x of source layers, of their products with each other, and with states y of target layers.

    All is in double precision on one device; of the pairs of a source layer ℓ and a target layer ℓ* there are, for
    each fold, (width + 1)² numbers for ℓ, and (width + 1) · width* for (ℓ, ℓ*).
    """

    def __init__(self, pairs: Sequence[Pair], width: int, target_width: int, device: torch.device | str) -> None:
        self.pairs = list(pairs)
        self.sources = sorted({source for source, _ in pairs})
        self.targets = sorted({target for _, target in pairs})
        # float64 is not to be had on every accelerator.
        device = torch.device("cpu") if torch.device(device).type == "mps" else torch.device(device)
        zeros = partial(torch.zeros, dtype=torch.float64, device=device)
        self._width, self._device = width, device
        self._counts = zeros(FOLDS)
        # A 1 beside the states makes sums of products into plain sums too.
        self._xx = {source: zeros(FOLDS, width + 1, width + 1) for source in self.sources}
        self._xy = {pair: zeros(FOLDS, width + 1, target_width) for pair in self.pairs}
        self._yy = {target: zeros(FOLDS) for target in self.targets}

    @property
    def positions(self) -> int:
        """How many pairs of states have been added."""
        return int(self._counts.sum())

    def add(self, x: Tensor, y: Tensor, folds: Tensor) -> None:
        """Add states x (positions, source layers, width) and y (positions, target layers, width*), each of a fold.

        Raises PscopeError, naming the layer, for states that are not finite.
        """
        for fold in folds.unique().tolist():
            rows = (folds == fold).to(x.device)
            ones = torch.ones(int(rows.sum()), 1, dtype=torch.float64, device=self._device)
            own = {layer: torch.cat([part, ones], dim=1) for layer, part in self._parts(x[rows], self.sources)}
            theirs = dict(self._parts(y[rows.to(y.device)], self.targets))
            self._counts[fold] += len(ones)
            for source, states in own.items():
                self._xx[source][fold] += states.T @ states
            for source, target in self.pairs:
                self._xy[source, target][fold] += own[source].T @ theirs[target]
            for target, states in theirs.items():
                self._yy[target][fold] += states.square().sum()

    def mean(self, target: int) -> Tensor:
        """The mean state of a target layer."""
        pair = next(pair for pair in self.pairs if pair[1] == target)
        return self._xy[pair].sum(0)[-1] / self._counts.sum()

    def fit(self, pair: Pair, ridge: float | None = None) -> Fitted:
        """The affine map of least squares between two layers, with so much ridge, or, of several, the best held out.

        The ridge is beside the variance of a feature, all of which are brought to 1; the constant is not held back.
        Raises PscopeError for too few positions, for a feature that is the same everywhere, and for a singular matrix.
        """
        source, target = pair
        check_enough(self.positions, self._width)
        xx, xy, yy = self._xx[source], self._xy[pair], self._yy[target]
        present = [fold for fold in range(FOLDS) if self._counts[fold]]
        if len(present) == 1:
            raise PscopeError("all texts fall into one fold, so that none can be held out; give more texts")
        whole = _Solver(xx.sum(0), xy.sum(0), source)
        solvers = {fold: _Solver(xx.sum(0) - xx[fold], xy.sum(0) - xy[fold], source) for fold in present}
        ridges = RIDGES if ridge is None else (ridge,)
        each = [solver.losses(xx[fold], xy[fold], yy[fold], ridges) for fold, solver in solvers.items()]
        losses = sum(each, torch.zeros_like(each[0]))
        best = int(losses.argmin())
        around_mean = yy.sum() - xy.sum(0)[-1].square().sum() / self._counts.sum()
        folds = tuple(solvers.get(fold, whole).solve(ridges[best]) for fold in range(FOLDS))
        return Fitted(whole.solve(ridges[best]), folds, ridges[best], float(1 - losses[best] / around_mean))

    def _parts(self, states: Tensor, layers: Sequence[int]) -> list[tuple[int, Tensor]]:
        for number, layer in enumerate(layers):
            if not states[:, number].isfinite().all():
                raise PscopeError(f"states of layer {layer} are not finite; the model may need float32")
        return [(layer, states[:, number].to(self._device, torch.float64)) for number, layer in enumerate(layers)]


def sums_bytes(width: int, target_width: int) -> tuple[int, int]:
    """What `Moments` holds for a source layer, and for each pair of it with a target layer."""
    return 8 * FOLDS * (width + 1) ** 2, 8 * FOLDS * (width + 1) * target_width


def check_enough(positions: int, width: int) -> None:
    """Raise PscopeError if so many positions are too few for a map from states of that width."""
    if positions < PER_DIMENSION * width:
        raise PscopeError(
            f"{positions} positions are too few for a map from width {width}: {PER_DIMENSION * width} are needed; give "
            "more texts"
        )


class _Solver:
    """Ridge regression from sums alone, for any ridge, through the eigenvectors of the features' correlations."""

    def __init__(self, xx: Tensor, xy: Tensor, layer: int) -> None:
        count = xx[-1, -1]
        self._mean, self._target_mean = xx[-1, :-1] / count, xy[-1] / count
        centred = xx[:-1, :-1] - count * self._mean.outer(self._mean)
        variance = centred.diagonal() / count
        constant = (variance <= _ACCURACY * xx.diagonal()[:-1] / count).nonzero().flatten().tolist()
        if constant:
            raise PscopeError(
                f"dimension {constant[0]} of layer {layer} is the same at all {int(count)} positions, so that no map "
                "can be fitted from it"
            )
        self._scale = variance.sqrt()
        self._spread, self._basis = torch.linalg.eigh(centred / self._scale[:, None] / self._scale / count)
        crossed = (xy[:-1] - count * self._mean[:, None] * self._target_mean) / self._scale[:, None] / count
        self._crossed, self._layer = self._basis.T @ crossed, layer

    def solve(self, ridge: float) -> Affine:
        """The map."""
        weight = ((self._basis / self._scale[:, None]) @ (self._shrunk(ridge)[:, None] * self._crossed)).T
        bias = self._target_mean - weight @ self._mean
        return Affine(weight, bias)

    def losses(self, xx: Tensor, xy: Tensor, yy: Tensor, ridges: Sequence[float]) -> Tensor:
        """The squared error of each ridge's map on other positions, from the sums over these."""
        count, mean, target_mean = xx[-1, -1], self._mean, self._target_mean
        # The sums over what differs from the means of the fit.
        sums = xx[-1, :-1] - count * mean
        products = xx[:-1, :-1] - mean.outer(xx[-1, :-1]) - sums.outer(mean)
        crossed = xy[:-1] - mean[:, None] * xy[-1] - sums[:, None] * target_mean
        squares = yy - 2 * target_mean @ xy[-1] + count * target_mean.square().sum()
        basis = self._basis / self._scale[:, None]
        products, crossed = basis.T @ products @ basis, basis.T @ crossed
        overlap = self._crossed @ self._crossed.T
        losses = []
        for ridge in ridges:
            shrunk = self._shrunk(ridge)
            explained = (shrunk[:, None] * self._crossed * crossed).sum()
            losses.append(squares - 2 * explained + shrunk @ (products * overlap) @ shrunk)
        return torch.stack(losses)

    def _shrunk(self, ridge: float) -> Tensor:
        if ridge == 0 and self._spread[0] <= _ACCURACY * self._spread[-1]:
            rank = int((self._spread > _ACCURACY * self._spread[-1]).sum())
            raise PscopeError(
                f"the states of layer {self._layer} span {rank} of {len(self._spread)} dimensions, so that their "
                "matrix is singular; give a ridge above 0"
            )
        return 1 / (self._spread.clamp_min(0) + ridge)
