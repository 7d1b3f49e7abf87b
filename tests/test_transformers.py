"""What pscope stands on that transformers and others do not promise: where a test fails, its name tells what changed.

It stands in `pscope.models.internals`, and nowhere else.
"""

import ast
from copy import deepcopy
from inspect import signature
from pathlib import Path

import accelerate
import pytest
import torch
from conftest import random_model
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoConfig,
    Cache,
    DynamicCache,
    EosTokenCriteria,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    Phi3Config,
    RobertaConfig,
    RobertaForCausalLM,
    StoppingCriteriaList,
)

from pscope.models.internals.caches import grown, joined, layer_bytes, other_kinds
from pscope.models.internals.calls import first_position, given_cache, parameters, stream_of, unwrapped
from pscope.models.internals.configs import attends_eagerly, lasting, rescaled_beyond
from pscope.models.internals.hooks import is_offloaded
from pscope.models.residual import calling, others_intervene

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
    assert {"position_ids", "logits_to_keep"} <= parameters(tiny.hf)
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


def test_a_model_hands_its_cache_on_by_a_known_name(tiny):
    cache, handed = tiny.own_cache(), []

    def look(module, args, kwargs):
        handed.append(given_cache(kwargs))

    handle = tiny.hf.get_decoder().register_forward_pre_hook(look, with_kwargs=True)
    try:
        tiny.logits(torch.tensor([[1, 2, 3]]), cache)
    finally:
        handle.remove()
    assert handed == [cache]


def test_positions_begin_after_that_of_padding_where_they_are_looked_up(tokenizer, tiny):
    roberta = random_model(RobertaForCausalLM, RobertaConfig, tokenizer, is_decoder=True, pad_token_id=1)
    assert (first_position(tiny.hf), first_position(roberta.hf)) == (0, 2)


def test_a_config_tells_how_attention_is_computed(tiny):
    told = []
    for attention in ("sdpa", "eager"):
        config = deepcopy(tiny.hf.config)
        config._attn_implementation = attention
        told.append(attends_eagerly(LlamaForCausalLM(config).config))
    assert told == [False, True]


def test_a_config_tells_beyond_which_length_positions_change(tiny):
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "max_position_embeddings": 64}
    config = Phi3Config(rope_parameters=rope, original_max_position_embeddings=16, pad_token_id=None, **sizes)
    assert rescaled_beyond(config) == 16
    assert rescaled_beyond(tiny.config) is None


def test_a_config_that_was_saved_and_read_differs_by_its_history_alone(tiny, tmp_path):
    tiny.hf.save_pretrained(tmp_path)
    read = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).config
    assert read.to_dict() != tiny.hf.config.to_dict()
    assert lasting(read) == lasting(tiny.hf.config) == lasting(AutoConfig.from_pretrained(tmp_path))


def test_peft_hands_out_the_model_within(tiny):
    hf = deepcopy(tiny.hf)
    adapted = get_peft_model(hf, LoraConfig(r=2, target_modules=["q_proj"]))
    assert unwrapped(adapted) is hf
    assert unwrapped(hf) is hf
    assert parameters(adapted) == parameters(hf)


def test_accelerate_leaves_word_on_modules_whose_weights_are_elsewhere(tiny):
    hf = deepcopy(tiny.hf)
    assert not is_offloaded(hf)
    accelerate.cpu_offload(hf, execution_device=torch.device("cpu"))
    assert is_offloaded(hf)


def test_nothing_private_of_others_is_touched_elsewhere():
    root = Path(__file__).parents[1]
    paths = [path for folder in ("pscope", "cli") for path in (root / folder).rglob("*.py")]
    files = [path for path in paths if "internals" not in path.parts]
    trees = [ast.parse(path.read_text("utf-8")) for path in files]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    kinds = (ast.FunctionDef, ast.ClassDef)
    own = {node.name for node in nodes if isinstance(node, kinds)} | {"_asdict", "_exit", "_fields", "_replace"}
    own |= {node.id for node in nodes if isinstance(node, ast.Name)}
    own |= {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)}
    used = {node.attr for node in nodes if isinstance(node, ast.Attribute) if node.attr.startswith("_")}
    assert {name for name in used - own if not name.startswith("__")} == set()


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
