"""Read and write the residual stream of a HuggingFace model. No other file registers hooks.

Layers are numbered as in HuggingFace's `hidden_states`: layer 0 is what the first decoder layer reads (the embedding
output), layer k what decoder layer k writes, and layer L, the last, what the final norm reads. The final norm belongs
to no layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import accumulate

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from pscope.errors import ModelError, PscopeError
from pscope.models import LanguageModel
from pscope.prompts import Prompt

Edit = Callable[[Tensor], Tensor | None]
"""Gets the residual stream (batch, tokens, hidden) of one forward pass; what it returns, unless None, replaces it."""


Rewrite = Callable[[int, tuple, dict], tuple[tuple, dict]]
"""Gets the number of a decoder layer and the arguments it is called with; what it returns replaces them."""


@contextmanager
def editing(model: LanguageModel, edits: Mapping[int, Edit]) -> Iterator[None]:
    """Within the block, every forward pass shows the residual stream of layer k to `edits[k]`.

    Blocks may be nested: the inner one sees what the outer one wrote. However the block is left, its hooks are gone
    and nobody else's are touched. An edit may return a stream with another batch size, which the layers above then
    work on. Raises PscopeError for a layer outside 0..L, before anything is registered.
    """
    for layer in edits:
        check_layer(model, layer)
    with ExitStack() as stack:
        for layer, edit in edits.items():
            stack.callback(_register(model, layer, edit).remove)
        yield


@contextmanager
def calling(model: LanguageModel, rewrite: Rewrite) -> Iterator[None]:
    """Within the block, decoder layer k, from 0 to L - 1, is called with what `rewrite(k, args, kwargs)` returns.

    Within a block of `editing`, it gets the streams that were edited.
    """
    with ExitStack() as stack:
        for number, layer in enumerate(model.layers):

            def before(module, args, kwargs, number=number):
                return rewrite(number, args, kwargs)

            stack.callback(layer.register_forward_pre_hook(before, with_kwargs=True).remove)
        yield


@contextmanager
def recording(model: LanguageModel, layers: Iterable[int]) -> Iterator[dict[int, Tensor]]:
    """Within the block, the residual streams of the last forward pass: layer -> (batch, tokens, hidden)."""
    streams: dict[int, Tensor] = {}

    def record(layer: int) -> Edit:
        def edit(stream: Tensor) -> None:
            streams[layer] = stream.detach()

        return edit

    with editing(model, {layer: record(layer) for layer in layers}):
        yield streams


def overwriting(model: LanguageModel, layer: int, position: int, vectors: Tensor) -> AbstractContextManager[None]:
    """A block within which position `position` of layer `layer` holds `vectors`: (hidden,) or (batch, hidden).

    They are moved to the layer's own device and dtype. Every forward pass in the block is overwritten, so it is meant
    for passes over whole prompts.
    """

    def edit(stream: Tensor) -> Tensor:
        stream = stream.clone()
        stream[:, position] = vectors.to(stream)
        return stream

    return editing(model, {layer: edit})


@torch.no_grad()
def capture(
    model: LanguageModel,
    prompts: Sequence[Prompt],
    positions: Sequence[Sequence[int]] | None = None,
    layers: Sequence[int] | None = None,
    batch_tokens: int = 1024,
) -> Tensor:
    """The hidden states that `prompts` form, (reads, layers, hidden), on the device where token ids go.

    Reads are in the order of the prompts and, within one, of its `positions`; by default each prompt is read where
    it is marked. `layers` defaults to all of 0..L. Prompts of different lengths share a pass of at most
    `batch_tokens` tokens, padding included (a longer prompt has its own): padding stands on the right, where no token
    that is read can see it.
    """
    if not prompts:
        raise PscopeError("there is no prompt to read")
    positions = [prompt.positions for prompt in prompts] if positions is None else positions
    layers = range(model.n_layers + 1) if layers is None else layers
    for prompt, read in zip(prompts, positions, strict=True):
        if not all(0 <= position < len(prompt) for position in read):
            raise PscopeError(f"positions {list(read)} do not lie within a prompt of {len(prompt)} tokens")

    picked: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    read_order: list[int] = []
    batches = length_batches([len(prompt) for prompt in prompts], batch_tokens)
    for batch in batches:
        ids = torch.zeros(len(batch), max(len(prompts[index]) for index in batch), dtype=torch.long)
        for row, index in enumerate(batch):
            ids[row, : len(prompts[index])] = torch.tensor(prompts[index].ids)
        rows = [row for row, index in enumerate(batch) for _ in positions[index]]
        columns = [position for index in batch for position in positions[index]]
        with editing(model, {layer: _pick(picked[layer], rows, columns, model.device) for layer in layers}):
            model.next_token_logits(ids.to(model.device))
        read_order += batch

    states = torch.stack([torch.cat(picked[layer]) for layer in layers], dim=1)  # (reads, layers, hidden), as run
    first_read = list(accumulate((len(read) for read in positions), initial=0))
    slots = [slot for index in read_order for slot in range(first_read[index], first_read[index + 1])]
    return states[torch.tensor(slots).argsort().to(states.device)]


def length_batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Indices in batches of neighbouring lengths, each at most `batch_tokens` tokens once padded (or one index)."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) + 1) * lengths[index] > batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def stream_of(args: tuple, kwargs: dict) -> Tensor:
    """The residual stream among the arguments that a decoder layer is called with."""
    return args[0] if args else kwargs["hidden_states"]


def check_layer(model: LanguageModel, layer: int) -> None:
    """Raises PscopeError unless the model has a residual stream with this number."""
    if not 0 <= layer <= model.n_layers:
        raise PscopeError(f"layer {layer} is out of range: {model.name} has layers 0 to {model.n_layers}")


def _pick(into: list[Tensor], rows: list[int], columns: list[int], device: torch.device) -> Edit:
    """The edit that only looks, and takes along no more of the stream than what was asked for."""

    def edit(stream: Tensor) -> None:
        into.append(stream[rows, columns].to(device))

    return edit


def _register(model: LanguageModel, layer: int, edit: Edit) -> RemovableHandle:
    def checked(stream: Tensor) -> Tensor | None:
        if stream.ndim != 3 or stream.shape[-1] != model.hidden_size:
            raise ModelError(
                f"layer {layer} of {type(model.hf).__name__} holds {tuple(stream.shape)} where a residual stream of "
                f"(batch, tokens, {model.hidden_size}) was expected; this model cannot be patched"
            )
        return edit(stream)

    if layer == 0:

        def before(module, args, kwargs):
            edited = checked(stream_of(args, kwargs))
            if edited is None:
                return None
            return ((edited, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": edited})

        return model.layers[0].register_forward_pre_hook(before, with_kwargs=True)

    def after(module, args, output):
        alone = isinstance(output, Tensor)
        edited = checked(output if alone else output[0])
        if edited is None or alone:
            return edited
        return type(output)((edited, *output[1:]))

    return model.layers[layer - 1].register_forward_hook(after)
