"""The Jacobian lens: how the last layer answers, on average, to a small change of a state below.

Gurnee et al. (2026), "Verbalizable Representations Form a Global Workspace in Language Models", and the code published
with it: J_ℓ is the mean over texts, and over the positions t of each, of ∂h_L[t'] / ∂h_ℓ[t] summed over all t' ≥ t.
What a state does to later tokens is thus in it, and the more of them a text has, the more of that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from pscope.errors import PscopeError
from pscope.inputs.positions import draw_positions
from pscope.mappings.checkpoint import Checkpoint
from pscope.mappings.mapping import Affine, Mapping
from pscope.mappings.mapping_set import End, MappingSet, Origin
from pscope.models.fingerprint import digest
from pscope.models.model import LanguageModel, not_finite
from pscope.models.residual import Edit, Pair, as_layers, editing

SINKS = 16
"""So many tokens at the start of a text are left out, as published: attention sinks, whose states are unlike others."""

SETTLED = 0.01
"""The mean has settled when no further text moves it by more than this share of it."""


def fit_jacobian(
    model: LanguageModel,
    texts: Sequence[str],
    layers: Sequence[int],
    *,
    most_tokens: int = 64,
    sinks: int = SINKS,
    rows: int = 8,
    checkpoint: Path | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[MappingSet, pd.DataFrame]:
    """J of each of `layers`, over the first `most_tokens` tokens of each text (published: 128, of 1000 texts).

    The first `sinks` tokens of a text do not count, nor does its last, after which none is known; a text that leaves
    none is passed over. A backward pass finds `rows` rows of all Js. After every text the `checkpoint` is written, and
    `progress` told how many are done. The table says how far a text moved the running mean: `texts`, `layer`, `change`,
    which is the Frobenius norm of the difference over that of the mean before, infinite for the first text.

    Raises PscopeError if no text is long enough, if a J is not finite, or if the checkpoint is of another fit.
    """
    layers = sorted(set(as_layers(model, layers, least=0)))
    if not layers or rows < 1 or sinks < 0:
        raise PscopeError(
            f"{len(layers)} layers, {rows} rows at once and {sinks} sinks cannot be meant; give at least 1, 1 and 0"
        )
    sampled = draw_positions(model, texts, None, 0, most_tokens) if texts else []
    samples = [each for each in sampled if len(each.prompt) > sinks + 1]
    if not samples:
        raise PscopeError(f"no text has more than {sinks + 1} of at most {most_tokens} tokens; give longer ones")

    of = {"kind": "Jacobian lens", "layers": layers, "most_tokens": most_tokens, "sinks": sinks}
    end = End.of(model)
    store = Checkpoint(checkpoint, of | {"model": end.fingerprint, "texts": digest(texts)})
    tensors = store.read()
    total = tensors.get("total", torch.zeros(len(layers), model.hidden_size, model.hidden_size))
    changes = tensors.get("changes", torch.zeros(0, len(layers)))
    for number in range(len(changes), len(samples)):
        # No state before the last token can see it, so that it need not be run.
        jacobians = _jacobians(model, samples[number].prompt.ids[:-1], layers, sinks, rows)
        for layer, jacobian in zip(layers, jacobians, strict=True):
            if not jacobian.isfinite().all():
                raise PscopeError(
                    f"the Jacobian of layer {layer} at text {samples[number].text} is {not_finite(model.dtype)}"
                )
        # (T + J) / (n + 1) - T / n, over T / n.
        difference = (jacobians - total / max(number, 1)).flatten(1).norm(dim=1) / (number + 1)
        norm = total.flatten(1).norm(dim=1) / max(number, 1)
        changes = torch.cat([changes, (difference / norm if number else torch.full_like(difference, torch.inf))[None]])
        total += jacobians
        store.write({"total": total, "changes": changes})
        progress(number + 1)

    origin = Origin(
        kind="Jacobian lens",
        source=end,
        target=end,
        texts=len(samples),
        positions=sum(len(each.prompt) - 1 - sinks for each in samples),
        data_sha256=digest(texts),
        settings={
            "n_prompts": len(samples),
            "settled_at": _settled_at(changes),
            "most_tokens": most_tokens,
            "sinks": sinks,
            "positions": "summed over later ones",
        },
    )
    maps: dict[Pair, Mapping] = {
        (layer, model.n_layers): Affine(mean) for layer, mean in zip(layers, total / len(samples), strict=True)
    }
    return MappingSet(maps, origin), _table(changes, layers)


def _jacobians(model: LanguageModel, ids: Sequence[int], layers: Sequence[int], sinks: int, rows: int) -> Tensor:
    """One text's, (layers, width, width), on the CPU: a row of the batch is a copy of the text, and finds a row of J.

    Copies rather than batched gradients: these need a rule for every operation of a model, and are hardly faster.
    """
    width, last = model.hidden_size, model.n_layers
    rows = ceil(width / ceil(width / rows))
    streams: dict[int, Tensor] = {}

    def keep(layer: int) -> Edit:
        def edit(stream: Tensor) -> Tensor:
            # Gradients start at the lowest layer: none of the model's parameters gets one.
            streams[layer] = stream.detach().requires_grad_() if layer == min(layers) else stream
            # What comes after the last layer is not wanted: one row of it will do.
            return streams[layer][:1].detach() if layer == last else streams[layer]

        return edit

    batch = torch.tensor(ids, device=model.device).expand(rows, -1)
    with torch.enable_grad(), editing(model, {layer: keep(layer) for layer in {*layers, last}}):
        model.hf(input_ids=batch, use_cache=False)
    jacobians = torch.zeros(len(layers), width, width)
    each = torch.arange(rows)
    for first in range(0, width, rows):
        number = min(rows, width - first)
        # At all positions at once: what reaches position t is the sum of what comes from t and those after it.
        cotangent = torch.zeros_like(streams[last])
        cotangent[each[:number], sinks:, first + each[:number]] = 1
        gradients = torch.autograd.grad(
            streams[last], [streams[layer] for layer in layers], cotangent, retain_graph=first + rows < width
        )
        for jacobian, gradient in zip(jacobians, gradients, strict=True):
            jacobian[first : first + number] = gradient[:number, sinks:].float().mean(dim=1).cpu()
    return jacobians


def _settled_at(changes: Tensor) -> int | None:
    """After how many texts no further one moved any layer's mean by more than `SETTLED`; None if the last one did."""
    last = int((changes > SETTLED).any(dim=1).nonzero()[-1]) + 1
    return last if last < len(changes) else None


def _table(changes: Tensor, layers: Sequence[int]) -> pd.DataFrame:
    rows = [
        {"texts": number, "layer": layer, "change": change}
        for number, of_text in enumerate(changes.tolist(), start=1)
        for layer, change in zip(layers, of_text, strict=True)
    ]
    return pd.DataFrame(rows)
