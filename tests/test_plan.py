import pytest
import torch
from conftest import random_model
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

import pscope
from pscope.experiments.entity_resolution import EntityDescriptions
from pscope.experiments.known import PlainWords
from pscope.inputs.entities import Entity
from pscope.runs.plan import layer_flops, measured_rate, plan


def test_the_floor_of_two_entities_by_hand(tokenizer):
    model = random_model(LlamaForCausalLM, LlamaConfig, tokenizer)
    target = model.prompt("one two x three", "x")
    entities = [Entity("Paris", "City"), Entity("Japan", "Country")]
    planned = plan(EntityDescriptions(model, target, entities, [(1, 0), (1, 3)], pscope.Decoding(5)))
    # Width 32, 4 heads of 8, 2 for keys and values, 64 between the projections of the MLP, 4 layers.
    layer = 2 * (32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 64)
    unembedding = 2 * 32 * len(tokenizer)
    assert layer_flops(model.layers[0], model) == layer
    # Each is read after a line break, 2 tokens, and written out, 4; states and random vectors are patched at layers
    # 0 and 3 of 4, two tokens before the end; and these 4 rows and the one written out go on for 4 tokens more.
    read, decoded = 2 + 4, 5
    assert planned.reading == 2 * read * 4 * layer
    assert planned.patching == 2 * (2 * 2 * (4 + 1) * layer + decoded * unembedding)
    assert planned.speaking == 2 * decoded * 4 * (4 * layer + unembedding)
    assert planned.flops == planned.reading + planned.patching + planned.speaking
    assert (planned.units, planned.parts, planned.rows) == (4, 2, 2 * 5)
    assert planned.tokens == 2 * (read + 4 * 2 + decoded * 4)
    assert planned.weight_bytes == 4 * sum(weight.numel() for weight in model.hf.parameters())


def test_of_experts_those_count_that_a_token_meets(tokenizer):
    experts = {"num_local_experts": 8, "num_experts_per_tok": 2}
    model = random_model(MixtralForCausalLM, MixtralConfig, tokenizer, **experts)
    attention = 2 * (32 * 32 + 2 * 32 * 16 + 32 * 32)
    assert layer_flops(model.layers[0], model) == attention + 2 * 32 * 8 + 2 * 2 * 3 * 32 * 64


def test_a_model_without_its_weights_has_the_same_plan(tiny_folder):
    def planned(model):
        asked = [("one two", ("a",)), ("one two three", ("b",))]
        return plan(PlainWords(model, asked, pscope.Decoding(5)))

    outline = pscope.models.loading.outline(tiny_folder)
    assert all(weight.is_meta for weight in outline.hf.parameters())
    assert planned(outline) == planned(pscope.load(tiny_folder, device="cpu"))


def test_the_rate_is_that_of_matrix_products(tiny, monkeypatch):
    calls = []
    linear = torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda *args: calls.append(args) or linear(*args))
    monkeypatch.setattr("pscope.runs.plan.SECONDS", 0.05)
    rate = measured_rate(tiny, "cpu")
    inputs, weight = calls[0]
    assert weight.numel() == 32 * 64
    assert rate == pytest.approx(len(calls) * 2 * len(inputs) * weight.numel() / 0.05, rel=0.5)
