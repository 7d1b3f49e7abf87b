"""Models that accelerate spreads: hooks of ours beside its own, weights that are elsewhere until they are needed."""

import copy

import accelerate
import pytest
import torch
from conftest import random_model, rows_for_every_layer
from transformers import LlamaConfig, LlamaForCausalLM

import pscope
from pscope import Decoding, Patchscope, capture

TARGET = "cat -> cat\n1135 -> 1135\nhello -> hello\n?"
SOURCE = "Amazon's former CEO attended the Oscars"


def assert_same_numbers(placed, tiny):
    """A model placed otherwise than `tiny`, of the same weights, gives its states, logits and continuations."""
    sources = [placed.prompt(SOURCE), placed.prompt("hello there")]
    torch.testing.assert_close(capture(placed, sources), capture(tiny, sources), rtol=1e-4, atol=1e-4)
    states, layers = rows_for_every_layer(tiny)
    ours, theirs = (Patchscope(model, model.prompt(TARGET, 7)) for model in (placed, tiny))
    assert ours.check.path == "staircase"
    (got,), (expected,) = ours.logits(states, layers), theirs.logits(states, layers)
    torch.testing.assert_close(got.patched, expected.patched, rtol=1e-4, atol=1e-4)
    assert ours.generate(states, layers, Decoding(5)) == theirs.generate(states, layers, Decoding(5))


@pytest.mark.parametrize("offload", [accelerate.cpu_offload, accelerate.disk_offload])
def test_offloaded_by_the_user(tiny, tmp_path, offload):
    hf = copy.deepcopy(tiny.hf)
    where = {"offload_dir": tmp_path / "weights"} if offload is accelerate.disk_offload else {}
    offload(hf, execution_device=torch.device("cpu"), **where)
    assert all(weight.is_meta for weight in hf.parameters())
    assert_same_numbers(pscope.load(hf, tiny.tokenizer), tiny)
    assert all(weight.is_meta for weight in hf.parameters())


def test_spread_at_load(tiny, tmp_path):
    tiny.hf.save_pretrained(tmp_path)
    tiny.tokenizer.save_pretrained(tmp_path)
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "disk"}
    places |= {f"model.layers.{layer}": "cpu" if layer % 2 else "disk" for layer in range(4)}
    placed = pscope.load(tmp_path, device_map=places)
    assert [next(layer.parameters()).is_meta for layer in placed.layers] == [True, False, True, False]
    assert_same_numbers(placed, tiny)


def test_spread_by_what_there_is_room_for(tokenizer, tmp_path, monkeypatch):
    # With layers as large as its embeddings: accelerate keeps room for the largest of all that may come back from disk.
    model = random_model(LlamaForCausalLM, LlamaConfig, tokenizer, intermediate_size=2**14)
    model.hf.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    room = sum(weight.nbytes for weight in model.hf.parameters()) * 3 // 4
    monkeypatch.setattr("transformers.integrations.accelerate.accelerate_max_memory", lambda _: {"cpu": room})
    placed = pscope.load(tmp_path, device_map="auto")
    assert len({next(layer.parameters()).is_meta for layer in placed.layers}) == 2
    assert_same_numbers(placed, model)
