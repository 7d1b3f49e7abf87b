"""Read and write the residual stream of a HuggingFace model. No other file registers hooks.

Layers are numbered as in HuggingFace's `hidden_states`: layer 0 is what the first decoder layer reads (the embedding
output), layer k what decoder layer k writes, and layer L, the last, what the final norm reads. The final norm belongs
to no layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from inspect import Parameter, signature
from itertools import accumulate
from typing import Any, TypeGuard, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pscope.arguments import as_int, as_python, as_vectors, check_numbers, excerpt, is_int
from pscope.errors import ModelError, PscopeError
from pscope.models.internals.calls import (
    Args,
    Kwargs,
    given_cache,
    stream_in,
    stream_of,
    unwrapped,
    with_stream,
    with_stream_in,
)
from pscope.models.internals.hooks import hands_in
from pscope.models.model import LanguageModel, as_prompts, check_model
from pscope.models.prompts import Prompt

Pair = tuple[int, int]
"""A source layer ℓ and a target layer ℓ*."""

StreamEdit = Callable[[Tensor], Tensor | None]

PlacedEdit = Callable[[Tensor, range], Tensor | None]

Edit = StreamEdit | PlacedEdit
"""Gets the residual stream (batch, tokens, hidden) of one forward pass and, if it needs a second argument, where
its tokens stand in the text, a range; what it returns, unless None, replaces the stream."""

Rewrite = Callable[[int, Args, Kwargs], tuple[Args, Kwargs]]
"""Gets the number of a decoder layer and the arguments it is called with; what it returns replaces them."""

WORTH_A_PASS = 128
"""Tokens of a pass that keep a CPU's matrix products about as busy as more would."""

MOST_PADDING = 1 / 16

_OWN = "_pscope_edit_knows_positions"


@contextmanager
def editing(model: LanguageModel, edits: Mapping[int, Edit]) -> Iterator[None]:
    """Within the block, every forward pass shows the residual stream of layer k to `edits[k]`.

    A pass may be over a whole text or, where the model goes on from its cache, over what is new; an edit that depends
    on where a token stands takes a second argument, the positions. Around a Patchscope, edits that take them let it use
    any path; for others it runs whole prompts.

    Blocks may be nested: the inner one sees what the outer one wrote. However the block is left, its hooks are gone
    and nobody else's are touched. An edit that returns None changes nothing; it may return a stream with another batch
    size, which the layers above then work on. Other threads that use the model wait until the block is left, which the
    thread does that entered it.
    Raises PscopeError for a layer outside 0..L and for what is no function, before anything is registered, and in the
    pass for what is no stream.
    """
    if not isinstance(edits, Mapping) or not all(map(callable, edits.values())):
        raise PscopeError(f"edits are functions by layer, as {{8: double}}, not {excerpt(edits)}")
    edits = {as_layer(model, layer): edit for layer, edit in edits.items()}
    with ExitStack() as stack:
        stack.enter_context(model.lock)
        positioned = {layer: edit for layer, edit in edits.items() if _takes_positions(edit)}
        if positioned:
            began = _PassStart()
            for handle in began.watch(model):
                stack.callback(handle.remove)
        for layer, edit in edits.items():
            if layer in positioned:
                stack.callback(_register(model, layer, began.placed(positioned[layer]), knows_positions=True).remove)
            else:
                stack.callback(_register(model, layer, cast(StreamEdit, edit), knows_positions=False).remove)
        yield


@contextmanager
def calling(model: LanguageModel, rewrite: Rewrite) -> Iterator[None]:
    """Within the block, decoder layer k, from 0 to L - 1, is called with what `rewrite(k, args, kwargs)` returns.

    Within a block of `editing`, it gets the streams that were edited.
    """
    with ExitStack() as stack:
        stack.enter_context(model.lock)
        for number, layer in enumerate(model.layers):

            def before(module: nn.Module, args: Args, kwargs: Kwargs, number: int = number) -> tuple[Args, Kwargs]:
                return rewrite(number, args, kwargs)

            stack.callback(layer.register_forward_pre_hook(before, with_kwargs=True).remove)
        yield


@contextmanager
def looking_on(model: LanguageModel, look: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Within the block, `look(k, stream)` is shown what decoder layer k, from 0 to L - 1, has read, all edits made."""
    with ExitStack() as stack:
        stack.enter_context(model.lock)
        for number, layer in enumerate(model.layers):

            def after(module: nn.Module, args: Args, kwargs: Kwargs, output: object, number: int = number) -> None:
                look(number, stream_of(args, kwargs))

            stack.callback(layer.register_forward_hook(after, with_kwargs=True).remove)
        yield


@contextmanager
def recording(model: LanguageModel, layers: Iterable[int]) -> Iterator[dict[int, Tensor]]:
    """Within the block, the residual streams of the last forward pass: layer -> (batch, tokens, hidden)."""
    streams: dict[int, Tensor] = {}

    def record(layer: int) -> Edit:
        # It only looks: where the tokens stand does not matter to it.
        def edit(stream: Tensor, positions: range) -> None:
            streams[layer] = stream.detach()

        return edit

    with editing(model, {layer: record(layer) for layer in as_layers(model, layers)}):
        yield streams


def overwriting(model: LanguageModel, layer: int, position: int, vectors: Tensor) -> AbstractContextManager[None]:
    """A block within which position `position` of layer `layer` holds `vectors`: (hidden,) or (batch, hidden).

    They are moved to the layer's own device and dtype. The position is counted from the start of the text, in every
    pass of the block that runs its token; a negative one from the end of each pass, whatever that is the end of. Raises
    PscopeError for vectors that do not fit the model and, in the pass, for a batch of another size than theirs, and for
    a negative position before its first token.
    """
    layer = as_layer(model, layer)
    position, vectors = as_int(position, "the position", -(2**63)), as_vectors(vectors, "vectors")
    if vectors.ndim not in (1, 2) or vectors.shape[-1] != model.hidden_size:
        raise PscopeError(f"vectors of shape {tuple(vectors.shape)} do not fit {model.name}: ({model.hidden_size},)")
    check_numbers(vectors.reshape(-1, model.hidden_size), "numbers")

    def write(stream: Tensor, column: int) -> Tensor:
        if vectors.ndim == 2 and len(vectors) not in (1, len(stream)):
            raise PscopeError(f"vectors for {len(vectors)} rows do not fit a pass of {len(stream)}; give one for all")
        if column < -stream.shape[1]:
            raise PscopeError(f"position {column} does not lie within a pass of {stream.shape[1]} tokens")
        stream = stream.clone()
        stream[:, column] = vectors.to(stream)
        return stream

    def placed(stream: Tensor, positions: range) -> Tensor | None:
        return write(stream, positions.index(position)) if position in positions else None

    return editing(model, {layer: placed if position >= 0 else partial(write, column=position)})


def others_intervene(model: LanguageModel) -> bool:
    """Whether somebody has a hand in passes who may depend on seeing whole prompts: by hooks, forward passes put in the
    place of a module's own, or hooks on all modules; ours that are told where tokens stand, and those by which
    libraries run a model, do not count.
    """
    with model.lock:
        return any(not getattr(hand, _OWN, False) for hand in hands_in(model.hf))


@torch.no_grad()
def capture(
    model: LanguageModel,
    prompts: Sequence[Prompt],
    positions: Sequence[Sequence[int]] | None = None,
    layers: Sequence[int] | None = None,
    batch_tokens: int = 1024,
) -> Tensor:
    """The hidden states that `prompts` form, (reads, layers, hidden), on the device where token ids go.

    Reads are in the order of the prompts and, within one, of its `positions`, of which negative ones count from the
    end; by default each prompt is read where it is marked. `layers` defaults to all of 0..L. Prompts of different
    lengths share a pass of at most `batch_tokens` tokens, padding included (a longer prompt has its own): padding
    stands on the right, where no token that is read can see it.
    """
    prompts, layers = as_prompts(model, prompts), as_layers(model, layers)
    positions = as_positions(prompts, positions)
    batch_tokens = as_int(batch_tokens, "batch_tokens")

    reads: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    read_order: list[int] = []
    # A GPU is not busy with as few tokens as a CPU is.
    most_padding = MOST_PADDING if model.device.type == "cpu" else 1.0
    batches = length_batches([len(prompt) for prompt in prompts], batch_tokens, most_padding)
    for batch in batches:
        ids = padded([prompts[index].ids for index in batch])
        rows = [row for row, index in enumerate(batch) for _ in positions[index]]
        columns = [position for index in batch for position in positions[index]]
        with editing(model, {layer: _pick(reads[layer], rows, columns, model.device) for layer in layers}):
            model.next_token_logits(ids.to(model.device))
        read_order += batch

    states = torch.stack([torch.cat(reads[layer]) for layer in layers], dim=1)  # (reads, layers, hidden), as run
    first_read = list(accumulate((len(places) for places in positions), initial=0))
    slots = [slot for index in read_order for slot in range(first_read[index], first_read[index + 1])]
    return states[torch.tensor(slots).argsort().to(states.device)]


def padded(rows: Sequence[Sequence[int]]) -> Tensor:
    """Token ids of different lengths as one tensor, (rows, tokens): the last of a shorter row is there again and again.

    The state of any other token, if it is not finite, would be none of the row's own, and make its weight of 0 count.
    """
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[row[-1]] * (longest - len(row))] for row in rows])


def length_batches(lengths: Sequence[int], batch_tokens: int, most_padding: float = 1.0) -> Iterator[list[int]]:
    """Indices in batches of neighbouring lengths, each at most `batch_tokens` tokens once padded (or one index).

    Nor does a text join those of a batch worth its pass if more than `most_padding` of it would be padding then.
    """
    batch: list[int] = []
    tokens = 0
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        padded = (len(batch) + 1) * lengths[index]
        wasted = padded - tokens - lengths[index]
        if batch and (padded > batch_tokens or (tokens >= WORTH_A_PASS and wasted > most_padding * padded)):
            yield batch
            batch, tokens = [], 0
        batch.append(index)
        tokens += lengths[index]
    if batch:
        yield batch


def as_layers(model: LanguageModel, layers: Iterable[int] | None, *, least: int = 1) -> list[int]:
    """Numbers of the model's residual streams, from a list, an array, a range; None is all of 0..L.

    Raises PscopeError for others, and for fewer than `least`.
    """
    check_model(model)
    if layers is None:
        return list(range(model.n_layers + 1))
    numbers = as_python(layers)
    numbers = list(map(as_python, numbers)) if isinstance(numbers, Iterable) and not isinstance(numbers, str) else None
    if numbers is None or not all(map(is_int, numbers)):
        raise PscopeError(f"layers are given as a list of numbers, as [0, 4, 8] or range(16), not as {excerpt(layers)}")
    if len(numbers) < least:
        raise PscopeError("no layer is asked for")
    last = model.n_layers
    for layer in numbers:
        if not 0 <= layer <= last:
            raise PscopeError(f"layer {layer} is out of range: {model.name} has layers 0 to {last}")
    return list(map(int, numbers))


def as_layer(model: LanguageModel, layer: int) -> int:
    """The number of one residual stream. Raises PscopeError as `as_layers` does."""
    return as_layers(model, [layer])[0]


def as_pairs(source: LanguageModel, target: LanguageModel, pairs: Iterable[Pair]) -> list[Pair]:
    """Source layers, each with a target layer. Raises PscopeError for others, and for none."""
    items = [as_python(pair) for pair in as_python(pairs) or ()]
    if not items or not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in items):
        raise PscopeError(f"pairs are a source and a target layer each, as [(8, 8), (8, 4)], not {excerpt(pairs)}")
    sources, targets = zip(*items, strict=True)
    return list(zip(as_layers(source, sources), as_layers(target, targets), strict=True))


def as_positions(prompts: Sequence[Prompt], positions: Iterable[Iterable[int]] | None) -> list[list[int]]:
    """Where each of some prompts is read, counted from its start; by default where it is marked.

    Raises PscopeError unless they are a list for each prompt, of positions in it.
    """
    if positions is None:
        return [list(prompt.positions) for prompt in prompts]
    lists = [as_python(each) for each in positions] if isinstance(positions, Iterable) else []
    if len(lists) != len(prompts) or any(isinstance(each, str) or not isinstance(each, Iterable) for each in lists):
        raise PscopeError(
            f"positions are a list for each of the {len(prompts)} prompts, as [[-1]]; not {excerpt(positions)}"
        )
    numbers = []
    for prompt, each in zip(prompts, lists, strict=True):
        each = [as_python(position) for position in each]
        if not all(is_int(position) and -len(prompt) <= position < len(prompt) for position in each):
            raise PscopeError(f"positions {excerpt(each)} do not lie within a prompt of {len(prompt)} tokens")
        numbers.append([int(position) % len(prompt) for position in each])
    return numbers


def _pick(into: list[Tensor], rows: list[int], columns: list[int], device: torch.device) -> Edit:
    """The edit that only looks, and takes along no more of the stream than what was asked for."""

    def edit(stream: Tensor) -> None:
        into.append(stream[rows, columns].to(device))

    return edit


def _takes_positions(edit: Edit) -> TypeGuard[PlacedEdit]:
    try:
        parameters = signature(edit).parameters.values()
    except ValueError:
        # Some functions that are not written in Python do not tell.
        return False
    # One with a default is its author's own.
    needed = [each for each in parameters if each.default is Parameter.empty]
    return sum(each.kind in (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD) for each in needed) > 1


class _PassStart:
    """Where in its text a pass begins: after what its cache holds."""

    def __init__(self) -> None:
        self._start = 0

    def watch(self, model: LanguageModel) -> Iterator[RemovableHandle]:
        """Look at each module that may be called with a cache: the model, one that it wraps, and the decoder within."""

        def before(module: nn.Module, args: Args, kwargs: Kwargs) -> None:
            if (cache := given_cache(kwargs)) is not None:
                try:
                    self._start = cache.get_seq_length()
                except (AttributeError, ValueError) as error:
                    raise ModelError(
                        f"the cache of {type(model.hf).__name__} does not count its tokens, so that an edit cannot be "
                        "told where they stand; run whole prompts"
                    ) from error

        def after(module: nn.Module, args: Args, output: object) -> None:
            self._start = 0

        for hook in (before, after):
            setattr(hook, _OWN, True)
        inside = unwrapped(model.hf)
        for module in {model.hf, inside, inside.get_decoder()}:
            yield module.register_forward_pre_hook(before, with_kwargs=True)
            yield module.register_forward_hook(after, always_call=True)

    def placed(self, edit: PlacedEdit) -> StreamEdit:
        return lambda stream: edit(stream, range(self._start, self._start + stream.shape[1]))


def _register(model: LanguageModel, layer: int, edit: StreamEdit, *, knows_positions: bool) -> RemovableHandle:
    def checked(stream: Tensor) -> Tensor | None:
        if stream.ndim != 3 or stream.shape[-1] != model.hidden_size:
            raise ModelError(
                f"layer {layer} of {type(model.hf).__name__} holds {tuple(stream.shape)} where a residual stream of "
                f"(batch, tokens, {model.hidden_size}) was expected; this model cannot be patched"
            )
        edited = edit(stream)
        if edited is not None and not (isinstance(edited, Tensor) and edited.shape[1:] == stream.shape[1:]):
            result = f"a tensor {tuple(edited.shape)}" if isinstance(edited, Tensor) else excerpt(edited)
            raise PscopeError(f"the edit of layer {layer} gave {result} for a stream {tuple(stream.shape)}")
        return edited

    if layer == 0:

        def before(module: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs] | None:
            edited = checked(stream_of(args, kwargs))
            return None if edited is None else with_stream(args, kwargs, edited)

        setattr(before, _OWN, knows_positions)
        return model.layers[0].register_forward_pre_hook(before, with_kwargs=True)

    def after(module: nn.Module, args: Args, output: Any) -> Any:
        edited = checked(stream_in(output))
        return None if edited is None else with_stream_in(output, edited)

    setattr(after, _OWN, knows_positions)
    return model.layers[layer - 1].register_forward_hook(after)
