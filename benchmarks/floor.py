"""The floor: the matrix products that cannot be avoided, done bare, with the shapes that they have in the sweep."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import pandas as pd
import torch
from torch import Tensor, nn

import pscope
from benchmarks.sweep import Sweep
from benchmarks.timing import Contestant, against, in_turn

Products = list[tuple[Tensor, int]]
"""Weights, (out, in), and how many vectors each is multiplied with."""


def source_products(model: pscope.LanguageModel, sources: Sequence[pscope.Prompt]) -> Products:
    """All tokens of the source prompts through all decoder layers."""
    tokens = sum(map(len, sources))
    return [(weight, tokens) for layer in model.layers for weight in _weights(layer)]


def row_products(model: pscope.LanguageModel, target: pscope.Prompt, layers: Sequence[int]) -> Products:
    """The target's tokens from i* on, in the clean row everywhere and in each row above its layer; one unembedding."""
    suffix = len(target) - target.position
    passes = [
        (weight, suffix * (1 + sum(entered <= number for entered in layers)))
        for number, layer in enumerate(model.layers)
        for weight in _weights(layer)
    ]
    return [*passes, (_unembedding(model), len(layers) + 1)]


def decode_products(model: pscope.LanguageModel, spoken: Sequence[Sequence[int]]) -> Products:
    """A token of each row that goes on, through all decoder layers and the unembedding, per step."""
    longest = max(map(len, spoken))
    going_on = [sum(len(row) > step for row in spoken) for step in range(1, longest)]
    weights = [weight for layer in model.layers for weight in _weights(layer)] + [_unembedding(model)]
    return [(weight, rows) for rows in going_on for weight in weights]


def floors_compared(sweep: Sweep, new_tokens: int, seconds: float) -> pd.DataFrame:
    """Sixteen source prompts, the sweep, and the continuations of one sample, each against its bare products.

    Beside them stand the model's own passes over the same prompts, one by one, of which nothing is pscope's. One row
    per kind of work: `seconds`, `floor` (seconds), `ratio` with its band, and `gmacs`, the multiply-adds of the floor
    in billions. Attention is not in the floor, so that it is a little too low.
    """
    model, target = sweep.model, sweep.target
    scope = pscope.Patchscope(model, target, path="staircase")
    sources = sweep.sources[:16]
    states, layers = sweep.first(sweep.model.n_layers + 1)
    decoding = pscope.Decoding(new_tokens)
    spoken = scope.generate(states, layers, decoding)
    work = {
        "the model's own passes": (
            lambda: _run_alone(model, sources),
            [*source_products(model, sources), (_unembedding(model), len(sources))],
        ),
        "source passes": (lambda: pscope.capture(model, sources), source_products(model, sources)),
        "sweep": (lambda: list(scope.logits(sweep.states, sweep.layers)), row_products(model, target, sweep.layers)),
        "continuations": (
            lambda: scope.generate(states, layers, decoding),
            row_products(model, target, layers) + decode_products(model, [*spoken.patched, spoken.clean]),
        ),
    }
    found = []
    for name, (run, products) in work.items():
        bare = bare_products(products)
        bare()
        run()
        contestants = {"floor": Contestant(bare), name: Contestant(run)}
        times = against(in_turn(contestants, seconds), "floor").set_index("contestant")
        gmacs = sum(weight.numel() * rows for weight, rows in products) / 1e9
        found.append({"work": name, "floor": times.loc["floor", "seconds"], "gmacs": gmacs, **times.loc[name]})
    return pd.DataFrame(found)


@torch.no_grad()
def _run_alone(model: pscope.LanguageModel, prompts: Sequence[pscope.Prompt]) -> None:
    for prompt in prompts:
        ids = torch.tensor([prompt.ids], device=model.device)
        model.hf(input_ids=ids, use_cache=False, logits_to_keep=1)


@torch.no_grad()
def _multiply(inputs: Iterable[Tensor], weights: Iterable[Tensor]) -> None:
    for vectors, weight in zip(inputs, weights, strict=True):
        nn.functional.linear(vectors, weight)


def bare_products(products: Products) -> Callable[[], None]:
    """A function that does them all, on random vectors."""
    widest = {weight.shape[1]: 0 for weight, _ in products}
    for weight, rows in products:
        widest[weight.shape[1]] = max(widest[weight.shape[1]], rows)
    like = products[0][0]
    random = {width: torch.randn(rows, width, dtype=like.dtype, device=like.device) for width, rows in widest.items()}
    inputs = [random[weight.shape[1]][:rows] for weight, rows in products]
    return lambda: _multiply(inputs, [weight for weight, _ in products])


def _weights(layer: nn.Module) -> list[Tensor]:
    return [module.weight for module in layer.modules() if isinstance(module, nn.Linear)]


def _unembedding(model: pscope.LanguageModel) -> Tensor:
    return model.hf.get_output_embeddings().weight
