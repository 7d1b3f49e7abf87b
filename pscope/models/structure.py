"""Refuse a model whose hidden states cannot be read and patched, before any number is made of it."""

from __future__ import annotations

import torch
from torch import Tensor

from pscope.errors import ModelError
from pscope.models.internals.calls import Args, Kwargs, stream_of
from pscope.models.model import LanguageModel, not_finite
from pscope.models.residual import Edit, calling, editing

COUNTS = ("num_hidden_layers", "num_layers")
"""Where a config says how many decoder layers there are."""

CAUSAL = {torch.float64: 1e-3, torch.float32: 1e-3}
"""How far a later token may move a state, in standard deviations: by rounding only, where experts share batches."""


OWN = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 0.05}
"""How far logits may be from those of the model's own forward pass, in their standard deviations."""


@torch.no_grad()
def check_structure(model: LanguageModel) -> LanguageModel:
    """The model, if two short passes show that it is one to patch.

    Raises ModelError if it is an encoder-decoder, has no weights, runs its decoder layers otherwise than once each and
    in order, each on what the last one wrote, passes on anything but one stream of the width that its config says, lets
    tokens see later ones, gives logits that are not finite, or gives others when its own forward pass is asked.
    """
    what = type(model.hf).__name__
    if model.hf.config.is_encoder_decoder:
        raise ModelError(f"{what} is an encoder-decoder; pscope patches decoder-only models")
    _check_weights(model)
    counts = {count for name in COUNTS if (count := getattr(model.config, name, None)) is not None}
    if counts and model.n_layers not in counts:
        raise ModelError(
            f"{what} lists {model.n_layers} decoder layers where its config says {max(counts)}: layers that are shared "
            "or kept elsewhere cannot be told apart; give a model with one list of all its layers"
        )
    token = model.config.vocab_size // 2
    if not hasattr(model.hf(input_ids=torch.tensor([[token]], device=model.device)), "logits"):
        raise ModelError(f"{what} has no head that gives logits; give the causal LM that it is part of")
    tops = [_top(model, [token, token + 1, token + 1 + more]) for more in (0, 1)]
    shift = ((tops[0] - tops[1]).abs().amax(dim=-1) / tops[0].std(dim=-1))[:-1].max()
    if shift > CAUSAL.get(model.dtype, 0.05):
        if model.quantised:
            raise ModelError(
                f"{what} is quantised so that the states of tokens depend on later ones, as LLM.int8() does; load it "
                "in 4 bits, or as it is"
            )
        raise ModelError(f"{what} lets tokens see later ones, as masked language models do; pscope patches causal ones")
    _ask_the_model(model, torch.tensor([[token, token + 1, token + 2], [token + 3, token, token + 1]]))
    return model


def _check_weights(model: LanguageModel) -> None:
    # Offloaded weights stand on meta too.
    if not model.offloaded and any(weight.is_meta for weight in model.hf.parameters()):
        raise ModelError(
            f"{type(model.hf).__name__} is on the meta device, without weights; load it with from_pretrained"
        )


def _ask_the_model(model: LanguageModel, ids: Tensor) -> None:
    """Raise ModelError unless our passes give the logits of the model's own forward pass, for one row and for two."""
    for rows in (ids[:1], ids):
        rows = rows.to(model.device)
        logits = model.hf(input_ids=rows).logits[:, -1].float()
        difference = ((model.next_token_logits(rows).float() - logits).abs().amax(dim=-1) / logits.std(dim=-1)).max()
        if difference > OWN.get(model.dtype, 0.2):
            raise ModelError(
                f"{type(model.hf).__name__}, called as it is, gives other logits than in pscope's passes, by "
                f"{difference:.1g} sd: it counts positions, or makes masks, in a way of its own; it cannot be patched"
            )


def _top(model: LanguageModel, ids: list[int]) -> Tensor:
    """The states of layer L, (tokens, hidden), of a pass in which each layer ran once and read what the last wrote."""
    what = type(model.hf).__name__
    order: list[int] = []
    streams: list[Tensor] = []

    def follow(layer: int, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        stream = stream_of(args, kwargs)
        if streams and not (
            stream.shape == streams[-1].shape
            and torch.allclose(stream.to(streams[-1]), streams[-1], 0, 0, equal_nan=True)
        ):
            raise ModelError(
                f"layer {layer} of {what}, {type(model.layers[layer]).__name__}, does not read what the one before it "
                "wrote, so the list that was found does not carry the residual stream; this model cannot be patched"
            )
        return args, kwargs

    def look(layer: int) -> Edit:
        def edit(stream: Tensor) -> None:
            order.append(layer)
            streams[:] = [stream]

        return edit

    with (
        editing(model, {layer: look(layer) for layer in range(1, model.n_layers + 1)}),
        calling(model, follow),
    ):
        logits = model.next_token_logits(torch.tensor([ids], device=model.device))
    if order != list(range(1, model.n_layers + 1)):
        raise ModelError(
            f"{what} runs its {model.n_layers} decoder layers in the order {order}: layers that are shared or skipped "
            "cannot be patched one by one; give a model that runs each once"
        )
    if not logits.isfinite().all():
        raise ModelError(f"the logits of {model.name} are {not_finite(model.dtype)}")
    return streams[0][0].float()
