"""The tuned lens (Belrose et al., 2023): affine maps to the last layer, trained to read there what the model will say.

From each layer ℓ, KL(what the model says || what its tail says of the mapped state) is minimised, by gradients. Closed
form, least squares to the last layer's states, is where it starts from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from math import isfinite
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import kl_div, linear

from pscope.errors import PscopeError
from pscope.inputs.positions import Sampled, draw_positions
from pscope.mappings.checkpoint import Checkpoint
from pscope.mappings.mapping import IDENTITY, Affine, Identity, Mapping
from pscope.mappings.mapping_set import End, MappingSet, Origin, fold_of
from pscope.models.fingerprint import digest
from pscope.models.model import LanguageModel
from pscope.models.residual import Pair, capture, editing, length_batches

_PASS = 512
"""So many tokens are read at once: their logits, several times over, are what takes memory. No text is read further."""

_EVERY = 20
"""A checkpoint is written after so many steps."""


@dataclass(frozen=True)
class Recipe:
    """So many `steps`, each on whole texts of about `tokens` tokens together, or on each text once.

    The learning rate falls linearly from step to step, and would be 0 after the last. Gradients of all layers together
    are clipped to the norm `clip`. Weights decay towards the identity.
    """

    optimiser: Literal["adam", "sgd"]
    learning_rate: float
    steps: int = 250
    tokens: int = 512
    momentum: float = 0.9
    weight_decay: float = 0.0
    clip: float = 1.0

    def __post_init__(self) -> None:
        if self.optimiser not in ("adam", "sgd"):
            raise PscopeError(f"the optimiser is adam or sgd, not {self.optimiser!r}")
        if self.steps < 1 or self.tokens < 1 or not 0 < self.learning_rate < float("inf"):
            raise PscopeError(
                f"{self.steps} steps of {self.tokens} tokens at a learning rate of {self.learning_rate} train nothing; "
                "give positive numbers"
            )

    def prepare(self, parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
        """The optimiser for some parameters."""
        if self.optimiser == "adam":
            return torch.optim.Adam(parameters, betas=(self.momentum, 0.999), weight_decay=self.weight_decay)
        return torch.optim.SGD(parameters, momentum=self.momentum, nesterov=True, weight_decay=self.weight_decay)

    def rate(self, step: int) -> float:
        """The learning rate that the optimiser is given in a step, the first of which is 0."""
        rate = self.learning_rate * (1 - step / self.steps)
        # Torch's momentum makes steps 1 / (1 - momentum) times as long, which was published as undone.
        return rate * (1 - self.momentum) if self.optimiser == "sgd" else rate


ADAM = Recipe("adam", 1e-3)
"""Fast from a start in closed form, on few texts."""

PUBLISHED = Recipe("sgd", 1.0, tokens=2**18, weight_decay=1e-3)
"""That of the paper and its code, which start from the identity."""


def fit_tuned(
    model: LanguageModel,
    texts: Sequence[str],
    start: MappingSet,
    recipe: Recipe = ADAM,
    *,
    seed: int = 0,
    checkpoint: Path | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[MappingSet, pd.DataFrame]:
    """Maps to the last layer from every layer that `start` maps there, and how well they read texts held out.

    Those of fold 0 are held out; of a start with folds, the maps that have not seen these are taken. The last layer is
    mapped by the identity, and not trained. The first token of a text counts nowhere: models keep an attention sink
    there. `progress` is told how many steps are done. The table has, for each `layer`, the mean KL in nats over all
    positions of the texts held out, `kl_before` and `kl_after`.

    Raises PscopeError if there are no texts on one side, if `start` does not fit, for a loss that is not finite, and if
    the checkpoint is of another fit.
    """
    start.check(model, model)
    last = model.n_layers
    before = {pair: each for pair, each in (start.folds[0] if start.folds else start.maps).items() if pair[1] == last}
    layers = sorted(source for source, _ in before if source != last)
    if not layers:
        raise PscopeError(f"there is no map to layer {last} to start from; {start.covered}")
    held_out, train = _split(model, texts)
    lens = _Lens(before, layers, model)
    optimiser = recipe.prepare(lens.parameters)
    of = {"kind": "tuned lens", "recipe": asdict(recipe), "seed": seed, "layers": layers, "start": lens.sha256}
    end = End.of(model)
    store = Checkpoint(checkpoint, of | {"model": end.fingerprint, "texts": digest(texts)})
    for step in range(_restore(store.read(), lens, optimiser), recipe.steps):
        batch = _batch(train, recipe.tokens, seed, step)
        positions = sum(len(each.positions) for each in batch)
        for states, targets in _read(model, batch, layers):
            for number, layer in enumerate(layers):
                with torch.enable_grad():
                    loss = _kl(model, lens(states[:, number], number), targets, f"layer {layer} in step {step}")
                    (loss / positions).backward(inputs=lens.at(number))
        torch.nn.utils.clip_grad_norm_(lens.parameters, recipe.clip)
        for group in optimiser.param_groups:
            group["lr"] = recipe.rate(step)
        optimiser.step()
        optimiser.zero_grad()
        if (step + 1) % _EVERY == 0 or step + 1 == recipe.steps:
            store.write(_state(step + 1, lens, optimiser))
        progress(step + 1)

    after: dict[Pair, Mapping] = {(layer, last): lens.mapping(number) for number, layer in enumerate(layers)}
    table = _kl_table(model, held_out, layers, {"kl_before": before, "kl_after": after})
    origin = Origin(
        kind="tuned lens",
        source=end,
        target=end,
        texts=len(train),
        positions=sum(len(each.positions) for each in train),
        data_sha256=digest(texts),
        settings={"recipe": asdict(recipe), "seed": seed, "start": start.origin.kind, "held_out": "texts of fold 0"},
    )
    return MappingSet(after | {(last, last): IDENTITY}, origin), table


class _Lens:
    """What is trained: of each layer the weight less the identity, so that decay leads there, and the bias."""

    def __init__(self, start: dict[Pair, Mapping], layers: Sequence[int], model: LanguageModel) -> None:
        self._eye = torch.eye(model.hidden_size, device=model.device)
        self.parameters: list[Tensor] = []
        for layer in layers:
            weight, bias = _numbers(start[layer, model.n_layers], layer, model.hidden_size)
            change = weight.detach().to(self._eye) - self._eye
            self.parameters += [change.requires_grad_(), bias.detach().to(self._eye, copy=True).requires_grad_()]
        self.sha256 = sha256(b"".join(each.detach().cpu().numpy().tobytes() for each in self.parameters)).hexdigest()

    def at(self, number: int) -> list[Tensor]:
        """Weight and bias of one of the layers."""
        return self.parameters[2 * number : 2 * number + 2]

    def __call__(self, states: Tensor, number: int) -> Tensor:
        states = states.to(self._eye)
        return states + linear(states, *self.at(number))

    def mapping(self, number: int) -> Affine:
        weight, bias = (each.detach() for each in self.at(number))
        return Affine(weight + self._eye, bias.clone())


def _numbers(mapping: Mapping, layer: int, width: int) -> tuple[Tensor, Tensor]:
    """Weight and bias of a map that has them, or is the identity."""
    if isinstance(mapping, Identity):
        mapping = Affine(torch.eye(width))
    if not isinstance(mapping, Affine):
        raise PscopeError(f"a tuned lens starts from affine maps; that of layer {layer} is {type(mapping).__name__}")
    return mapping.weight, torch.zeros(width) if mapping.bias is None else mapping.bias


def _split(model: LanguageModel, texts: Sequence[str]) -> tuple[list[Sampled], list[Sampled]]:
    """The texts held out, and those to train on, with all their positions."""
    sampled = draw_positions(model, texts, None, 0, _PASS) if texts else []
    held_out, train = ([each for each in sampled if (fold_of(texts[each.text]) == 0) is side] for side in (True, False))
    if not held_out or not train:
        raise PscopeError(
            f"of {len(texts)} texts {len(train)} are to be trained on, and {len(held_out)} held out; give more"
        )
    return held_out, train


def _batch(train: Sequence[Sampled], tokens: int, seed: int, step: int) -> list[Sampled]:
    """The texts of one step, which depend on its number and the seed alone."""
    batch: list[Sampled] = []
    for index in np.random.default_rng([seed, step]).permutation(len(train)):
        batch.append(train[index])
        if sum(len(each.prompt) for each in batch) >= tokens:
            break
    return batch


def _read(model: LanguageModel, texts: Sequence[Sampled], layers: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
    """Some positions at a time: their states (positions, layers, width), and what the model says (positions, vocab)."""
    for batch in length_batches([len(each.prompt) for each in texts], _PASS):
        prompts, positions = zip(*((texts[index].prompt, texts[index].positions) for index in batch), strict=True)
        states = capture(model, prompts, positions, [*layers, model.n_layers], _PASS)
        with torch.no_grad():
            targets = _tail(model, states[:, -1])
        yield states[:, :-1], targets


def _tail(model: LanguageModel, states: Tensor) -> Tensor:
    """What the model itself makes of states of its last layer: next-token log-probabilities, (states, vocab).

    All of it is run, soft-caps and the like, on a single token whose state they take the place of.
    """
    token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    with editing(model, {model.n_layers: lambda stream: states.to(stream)[:, None]}):
        logits = model.hf(input_ids=token, use_cache=False).logits
    return logits[:, -1].float().log_softmax(dim=-1)


def _kl(model: LanguageModel, mapped: Tensor, targets: Tensor, where: str) -> Tensor:
    """Summed over positions, in nats. Raises PscopeError if it is not finite."""
    loss = kl_div(_tail(model, mapped), targets, reduction="sum", log_target=True)
    if not isfinite(loss.item()):
        raise PscopeError(f"the loss of {where} is not finite; lower the learning rate, or look at the start")
    return loss


@torch.no_grad()
def _kl_table(
    model: LanguageModel, texts: Sequence[Sampled], layers: Sequence[int], lenses: dict[str, dict[Pair, Mapping]]
) -> pd.DataFrame:
    """The mean KL of each layer by each lens, over all positions of texts."""
    total = {name: [0.0] * len(layers) for name in lenses}
    for states, targets in _read(model, texts, layers):
        for name, maps in lenses.items():
            for number, layer in enumerate(layers):
                mapped = maps[layer, model.n_layers].to(states.device)(states[:, number])
                total[name][number] += _kl(model, mapped, targets, f"layer {layer} on the texts held out").item()
    positions = sum(len(each.positions) for each in texts)
    return pd.DataFrame({"layer": layers} | {name: np.array(of) / positions for name, of in total.items()})


def _state(steps: int, lens: _Lens, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """All that the next step depends on."""
    parameters = {f"parameter.{number}": each for number, each in enumerate(lens.parameters)}
    state = {
        f"optimiser.{number}.{name}": each
        for number, of in optimiser.state_dict()["state"].items()
        for name, each in of.items()
        if isinstance(each, Tensor)
    }
    return {"done": torch.tensor(steps)} | parameters | state


def _restore(tensors: dict[str, Tensor], lens: _Lens, optimiser: torch.optim.Optimizer) -> int:
    """Take up what `_state` told; how many steps were done."""
    if not tensors:
        return 0
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimiser."):
            _, number, key = name.split(".")
            state.setdefault(int(number), {})[key] = tensor
    optimiser.load_state_dict(optimiser.state_dict() | {"state": state})
    with torch.no_grad():
        for place, parameter in enumerate(lens.parameters):
            parameter.copy_(tensors[f"parameter.{place}"])
    return int(tensors["done"])
