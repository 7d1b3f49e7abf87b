import copy

import pytest
import torch
from conftest import random_model
from torch import nn
from transformers import (
    BertConfig,
    BertLMHeadModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import pscope
from pscope import ModelError

TINY = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


def test_an_encoder_decoder(tokenizer):
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=50, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2))
    with pytest.raises(ModelError, match="T5ForConditionalGeneration is an encoder-decoder"):
        pscope.load(t5.eval(), tokenizer)


def test_a_masked_model(tokenizer):
    with pytest.raises(ModelError, match="BertLMHeadModel lets tokens see later ones, as masked language models do"):
        pscope.load(BertLMHeadModel(BertConfig(**TINY)).eval(), tokenizer)
    causal = BertLMHeadModel(BertConfig(**TINY | {"vocab_size": len(tokenizer)}, is_decoder=True)).eval()
    assert pscope.load(causal, tokenizer).n_layers == 2


def test_a_quantised_model_whose_tokens_are_not_apart(tokenizer):
    # As LLM.int8() does, which looks for outliers among all tokens at once; here it is attention that mixes them.
    model = BertLMHeadModel(BertConfig(**TINY)).eval()
    model.is_quantized = True
    with pytest.raises(ModelError, match=r"quantised .* as LLM.int8\(\) does; load it in 4 bits, or as it is"):
        pscope.load(model, tokenizer)


def test_a_model_without_weights(tokenizer):
    with torch.device("meta"):
        empty = LlamaForCausalLM(LlamaConfig(**TINY)).eval()
    with pytest.raises(ModelError, match="on the meta device, without weights; load it with from_pretrained"):
        pscope.load(empty, tokenizer)


def test_a_model_without_a_list_of_layers(tokenizer):
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_layer=0, n_head=4)).eval()
    with pytest.raises(ModelError, match="keeps no list of decoder layers"):
        pscope.load(model, tokenizer)


def test_shared_layers(tiny, tokenizer):
    hf = copy.deepcopy(tiny.hf)
    hf.model.layers[2] = hf.model.layers[1]
    with pytest.raises(ModelError, match=r"in the order \[1, .*shared or skipped cannot be patched one by one"):
        pscope.load(hf, tokenizer)
    hf.model.layers = nn.ModuleList(list(tiny.hf.model.layers)[:3])
    with pytest.raises(ModelError, match="lists 3 decoder layers where its config says 4"):
        pscope.load(hf, tokenizer)


def test_a_model_that_gives_no_numbers(tokenizer):
    model = random_model(LlamaForCausalLM, LlamaConfig, tokenizer).hf
    model.lm_head.weight.data[3] = float("nan")
    with pytest.raises(
        ModelError, match="logits of LlamaForCausalLM are not finite in float32; its weights may be damaged"
    ):
        pscope.load(model, tokenizer)
