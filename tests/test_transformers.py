"""What pscope stands on that transformers and torch do not promise: where a test fails, its name tells what changed."""

from inspect import signature

import pytest
import torch
from conftest import random_model
from transformers import (
    Cache,
    DynamicCache,
    EosTokenCriteria,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    StoppingCriteriaList,
)

from pscope.models.caches import grown, joined, layer_bytes, other_kinds
from pscope.models.residual import calling, others_intervene, stream_of

ROWS, HEADS, TOKENS, WIDTH = SHAPE = (2, 3, 5, 4)


def cache_of(*keys: torch.Tensor) -> Cache:
    """A cache with a layer for each of some keys, (rows, heads, tokens, width), whose values are their negatives."""
    cache = DynamicCache()
    for layer, own in enumerate(keys):
        cache.update(own, -own, layer)
    return cache


@pytest.fixture
def keys() -> torch.Tensor:
    return torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0))  # (layers, rows, heads, tokens, width)


def test_a_cache_has_layers_that_hold_keys_and_values_and_little_else(keys):
    cache = cache_of(*keys)
    assert cache.get_seq_length() == TOKENS
    for layer, own in zip(cache.layers, keys, strict=True):
        torch.testing.assert_close(layer.keys, own)
        torch.testing.assert_close(layer.values, -own)
    assert layer_bytes(cache) == [2 * own.nbytes for own in keys]


def test_a_cache_takes_layers_of_our_own_and_reorders_them(keys):
    prefix, suffix, new = keys[:, :1, :, :2], keys[..., 2:4, :], keys[..., 4:, :]
    cache = grown(cache_of(*prefix), ROWS, room=3)
    assert cache.get_seq_length() == 2
    # One row is there in the first layer; the other joins it before the second.
    for layer, present in enumerate((1, 2)):
        own = suffix[layer, :present]
        got, values = cache.update(own, -own, layer)
        torch.testing.assert_close(got, torch.cat([prefix[layer].expand(present, -1, -1, -1), own], dim=2))
        torch.testing.assert_close(values, -got)
    cache.reorder_cache(torch.tensor([1, 0]))
    assert cache.get_seq_length() == 4
    for layer, rows in enumerate(([0, 0], [1, 0])):
        own = new[layer]
        got, _ = cache.update(own, -own, layer)
        expected = torch.cat([prefix[layer].expand(2, -1, -1, -1), suffix[layer, rows], own], dim=2)
        torch.testing.assert_close(got, expected)


def test_a_cache_without_a_prefix_makes_layers_as_they_are_asked_for(keys):
    cache = grown(DynamicCache(), ROWS)
    assert cache.get_seq_length() == 0
    torch.testing.assert_close(cache.update(keys[0], -keys[0], 0)[0], keys[0])
    torch.testing.assert_close(cache.update(keys[1], -keys[1], 1)[1], -keys[1])


def test_keys_and_values_of_a_cache_can_be_put_in_place(keys):
    cache = joined([cache_of(*keys), cache_of(*(10 * keys))])
    cache.reorder_cache(torch.tensor([0, 3]))
    for layer, own in zip(cache.layers, keys, strict=True):
        torch.testing.assert_close(layer.keys, torch.stack([own[0], 10 * own[1]]))
        torch.testing.assert_close(layer.values, -layer.keys)


def test_kinds_of_cache_layers_have_the_names_that_are_known(tokenizer):
    windows = random_model(Gemma3ForCausalLM, Gemma3TextConfig, tokenizer, sliding_window=8, head_dim=8)
    assert other_kinds(windows.own_cache()) == []
    assert other_kinds(DynamicCache()) == []
    assert other_kinds(random_model(MambaForCausalLM, MambaConfig, tokenizer, state_size=4).own_cache())


def test_a_model_takes_a_cache_positions_and_the_logits_to_keep_by_known_names(tiny):
    assert tiny._cache_parameter in signature(LlamaForCausalLM.forward).parameters
    assert {"position_ids", "logits_to_keep"} <= tiny._forward_parameters
    ids = torch.tensor([[1, 2, 3]])
    everything = tiny.hf(input_ids=ids, use_cache=False).logits
    assert tiny.hf(input_ids=ids, logits_to_keep=torch.tensor([1, 2])).logits.shape[1] == 2
    torch.testing.assert_close(tiny.logits(ids, last=2), everything[:, 1:])


def test_a_decoder_layer_reads_the_residual_stream_first_or_as_hidden_states(tiny):
    called = []

    def look(layer, args, kwargs):
        called.append(stream_of(args, kwargs).shape)
        return args, kwargs

    with calling(tiny, look):
        tiny.logits(torch.tensor([[1, 2, 3]]))
    assert called == [(1, 3, tiny.hidden_size)] * tiny.n_layers


def test_a_config_tells_how_attention_is_computed(tiny):
    assert tiny.hf.config._attn_implementation in ("sdpa", "eager")


def test_a_class_tells_whether_it_can_be_split_over_processes(tiny):
    assert tiny.hf.supports_tp_plan


def test_loading_tells_of_keys_by_known_names(tiny_folder):
    _, found = LlamaForCausalLM.from_pretrained(tiny_folder, output_loading_info=True)
    assert {"missing_keys", "mismatched_keys", "unexpected_keys"} <= set(found)


def test_stopping_criteria_need_no_scores():
    ended = StoppingCriteriaList([EosTokenCriteria([2])])(torch.tensor([[1, 2], [2, 1]]), None)
    assert ended.tolist() == [True, False]


def test_modules_tell_of_hooks_that_others_have_on_them(tiny):
    assert not others_intervene(tiny)
    for register in (
        tiny.layers[0].register_forward_hook,
        tiny.layers[0].register_forward_pre_hook,
        torch.nn.modules.module.register_module_forward_hook,
    ):
        handle = register(lambda *_: None)
        try:
            assert others_intervene(tiny)
        finally:
            handle.remove()
    assert not others_intervene(tiny)
