"""What a run would take, from its units and the shapes of a model's weights alone."""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import nn

from pscope.engine.staircase import staircase_row_bytes
from pscope.experiments.experiment import Experiment
from pscope.models.model import LanguageModel

SECONDS = 2.0
"""How long matrix products are timed."""

_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
"""Where configs say how many experts a layer has, of which a token takes `num_experts_per_tok`."""


@dataclass(frozen=True)
class Plan:
    """What an experiment takes.

    `tokens` pass through some or all decoder layers. The floor, in FLOPs, are the matrix products that cannot be
    avoided, a multiplication and an addition each, attention aside: those of `reading` prompts, of `patching` rows into
    a target up to their first new token, and of `speaking` the other ones; what ends before its last token takes less.
    `pass_bytes` are for the rows of one pass, beside `weight_bytes`.
    """

    units: int
    parts: int
    rows: int
    tokens: int
    reading: float
    patching: float
    speaking: float
    pass_bytes: int
    weight_bytes: int

    @property
    def flops(self) -> float:
        """The whole floor."""
        return self.reading + self.patching + self.speaking


def plan(experiment: Experiment[Any]) -> Plan:
    """What an experiment takes, on the staircase; the model may be on the meta device."""
    model = experiment.model
    # What a token costs in the layers from k on, for k = 0 … L.
    above = [*accumulate(map(layer_flops, reversed(model.layers), [model] * model.n_layers), initial=0)][::-1]
    unembedding = 2 * model.embeddings * model.hidden_size
    tokens, reading, patching, speaking = 0, 0.0, 0.0, 0.0
    works = [experiment.work(unit) for unit in experiment.units]
    for work in works:
        rows = len(work.target_layers) + work.spoken
        later = rows * max(0, work.new_tokens - 1)
        tokens += work.read + len(work.target_layers) * work.suffix + later
        reading += work.read * above[0]
        patching += work.suffix * sum(above[layer] for layer in work.target_layers) + rows * unembedding
        speaking += later * (above[0] + unembedding)
    new_tokens = max(work.new_tokens for work in works)
    row_bytes = staircase_row_bytes(model, experiment.target, new_tokens)
    rows_per_pass = max(1, experiment.memory // row_bytes)
    per_part = experiment.rows_per_part(rows_per_pass)
    return Plan(
        units=len(experiment.units),
        parts=len(experiment.parts(per_part)),
        rows=sum(unit.rows for unit in experiment.units),
        tokens=tokens,
        reading=reading,
        patching=patching,
        speaking=speaking,
        pass_bytes=min(rows_per_pass, max(per_part, max(unit.rows for unit in experiment.units))) * row_bytes,
        weight_bytes=sum(weight.nbytes for weight in model.hf.parameters()),
    )


def layer_flops(layer: nn.Module, model: LanguageModel) -> float:
    """What one token costs in a decoder layer: two for every weight that it meets, of experts its share."""
    config = model.config
    experts = next((getattr(config, name) for name in _EXPERTS if getattr(config, name, None)), 1)
    share = (getattr(config, "num_experts_per_tok", None) or experts) / experts
    weights = ((name, weight.numel()) for name, weight in layer.named_parameters() if weight.ndim > 1)
    return 2 * sum(size * (share if ".experts." in f".{name}" else 1) for name, size in weights)


@torch.no_grad()
def measured_rate(model: LanguageModel, device: str | None = None, vectors: int = 512) -> float:
    """How many FLOPs a second bare products with the largest matrix of a decoder layer reach, in the model's dtype."""
    on = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    rows, columns = max(
        (weight.shape[-2:] for weight in model.layers[0].parameters() if weight.ndim > 1),
        key=lambda shape: shape.numel(),
    )
    weight = torch.randn(rows, columns, dtype=model.dtype, device=on)
    inputs = torch.randn(vectors, columns, dtype=model.dtype, device=on)
    products, began = 0, time.perf_counter()
    while (seconds := time.perf_counter() - began) < SECONDS:
        nn.functional.linear(inputs, weight)
        if on.type == "cuda":
            torch.cuda.synchronize(on)
        products += 1
    return products * 2 * vectors * rows * columns / seconds
