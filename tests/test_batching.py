import torch
from conftest import random_model
from transformers import BloomConfig, BloomForCausalLM, LlamaConfig, LlamaForCausalLM

from pscope.engine.batching import PerRow, find_batch_axes, fitting
from pscope.engine.staircase import Staircase
from pscope.models.residual import calling, editing


def arguments(model, run):
    """The tensors that the last decoder layer is called with, by name."""
    seen = {}

    def look(layer, args, kwargs):
        seen.update({name: value for name, value in kwargs.items() if isinstance(value, torch.Tensor)})
        return args, kwargs

    with calling(model, look):
        run()
    return seen


def test_the_axes_are_found_and_fitted_to_the_rows_that_are_there(tokenizer):
    bloom = random_model(BloomForCausalLM, BloomConfig, tokenizer, n_layer=4, n_head=4)
    ids = torch.tensor([bloom.prompt("one two three").ids])
    axes = find_batch_axes(bloom, lambda rows: bloom.next_token_logits(ids.expand(rows, -1)))
    alibi = {place: axis for place, axis in axes.items() if "alibi" in place}
    # Row after row, each with four heads.
    assert alibi == {(layer, 1, "alibi"): PerRow(0, 4) for layer in range(4)}

    whole = arguments(bloom, lambda: bloom.next_token_logits(ids.expand(3, -1)))["alibi"]
    assert whole.shape[0] == 12
    with editing(bloom, {0: lambda stream: stream[:2]}), fitting(bloom, axes):
        cut = arguments(bloom, lambda: bloom.next_token_logits(ids.expand(3, -1)))["alibi"]
    assert cut.equal(whole[:8])
    with editing(bloom, {2: lambda stream: torch.cat([stream] * 3)}), fitting(bloom, axes):
        grown = arguments(bloom, lambda: bloom.next_token_logits(ids.expand(2, -1)))["alibi"]
    assert grown.equal(torch.cat([whole[:4]] * 6))


def test_what_layers_share_is_fitted_in_place(tiny):
    shared = {"keys": (torch.arange(2.0)[:, None],)}
    ids = torch.tensor([tiny.prompt("one two three").ids]).expand(2, -1)
    axes = find_batch_axes(tiny, lambda rows: tiny.next_token_logits(ids[:1].expand(rows, -1)))
    axes |= {(layer, 1, "shared", "keys", 0): PerRow(0, 1) for layer in range(4)}
    seen = []

    def share(layer, args, kwargs):
        return args, {**kwargs, "shared": shared}

    def look(layer, args, kwargs):
        seen.append(kwargs.pop("shared")["keys"][0].flatten().tolist())
        return args, kwargs

    with (
        editing(tiny, {2: lambda stream: torch.cat([stream, stream[:1]])}),
        calling(tiny, share),
        fitting(tiny, axes),
        calling(tiny, look),
    ):
        tiny.next_token_logits(ids)
    # Rows that come later stand on the first one.
    assert seen == [[0, 1], [0, 1], [0, 1, 0], [0, 1, 0]]
    assert shared["keys"][0].shape == (3, 1)


def test_axes_are_looked_for_once_in_passes_of_one_shape(tokenizer):
    model = random_model(LlamaForCausalLM, LlamaConfig, tokenizer, num_hidden_layers=2)
    passes = 0

    def count(layer, args, kwargs):
        nonlocal passes
        passes += layer == 0
        return args, kwargs

    def of(text):
        nonlocal passes
        passes = 0
        with calling(model, count):
            Staircase(model, model.prompt(text, "x"))
        return passes

    # The prefix and what follows it, by one row and by two.
    assert of("one two x three") == 4
    assert of("four five x six") == 0
    assert of("two x three four") == 4
    model.hf.set_attn_implementation("eager")
    assert of("one two x three") == 4
