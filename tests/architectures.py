"""Tiny random models of the architectures of transformers: a few layers, width 32, windows shorter than the prompt.

The name of a configuration is its model type, and after a comma what is special about it. Where transformers reads an
option that an architecture does not have, it ignores it: the sizes are given under all their usual names.
"""

from __future__ import annotations

from operator import attrgetter

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCABULARY = 128
WINDOW = 8

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    # Wide enough for logits that tell tokens apart.
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}

EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "moe_topk": 2,
    "moe_k": 2,
    "top_k": 2,
}
SLIDING = {"sliding_window": WINDOW}
ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"] * 2, **SLIDING}
GPT2 = {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_inner": 64, "n_positions": 64}
MLA = {
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "head_dim": 8,
    "num_key_value_heads": 4,
}
CAUSAL_ROBERTA = {"is_decoder": True, "pad_token_id": 1}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"] * 2,
}
HYBRID_LAYERS = ["linear_attention", "full_attention"] * 2

ARCHITECTURES = {
    "llama": {},
    "mistral": SLIDING,
    "mistral, no window": {"sliding_window": None},
    "ministral": SLIDING | {"head_dim": 8},
    "ministral3": SLIDING | {"head_dim": 8},
    "qwen2": {},
    "qwen2, windows": {"use_sliding_window": True, "max_window_layers": 2, **SLIDING},
    "qwen3": {"head_dim": 8},
    "qwen2_moe": EXPERTS | {"shared_expert_intermediate_size": 16},
    "qwen3_moe": EXPERTS | {"head_dim": 8},
    "qwen3_next": EXPERTS | LINEAR | {"head_dim": 8, "shared_expert_intermediate_size": 16},
    "qwen3_5_text": LINEAR | {"head_dim": 8},
    "qwen3_5_moe_text": EXPERTS | LINEAR | {"head_dim": 8, "shared_expert_intermediate_size": 16},
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8} | ALTERNATING,
    "gemma3_text": {"head_dim": 8} | ALTERNATING,
    "gemma3n_text": {
        "head_dim": 8,
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": VOCABULARY,
        "intermediate_size": 64,
        "activation_sparsity_pattern": None,
        "laurel_rank": 4,
    }
    | ALTERNATING,
    "gemma4_text": {
        "head_dim": 8,
        "global_head_dim": 8,
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": VOCABULARY,
        "num_hidden_layers": 6,
        "layer_types": ["sliding_attention", "full_attention"] * 3,
        **SLIDING,
    },
    "vaultgemma": {"head_dim": 8} | ALTERNATING,
    "recurrent_gemma": {
        "lru_width": 32,
        "attention_window_size": WINDOW,
        "num_hidden_layers": 6,
        "block_types": ["recurrent", "recurrent", "attention"],
    },
    "phi": {},
    "phi3": {"sliding_window": None},
    "phi3, windows": SLIDING,
    "phimoe": EXPERTS,
    "olmo": {},
    "olmo2": {},
    "olmo3": ALTERNATING,
    "olmoe": EXPERTS,
    "flex_olmo": EXPERTS,
    "olmo_hybrid": LINEAR,
    "gpt2": GPT2,
    "gpt_neo": {"num_layers": 4, "num_heads": 4, "attention_types": [[["global", "local"], 2]], "window_size": WINDOW},
    "gpt_neox": {},
    "gpt_neox, sequential": {"use_parallel_residual": False},
    "gpt_neox_japanese": {},
    "gptj": GPT2 | {"rotary_dim": 8},
    "codegen": GPT2 | {"rotary_dim": 8},
    "gpt_bigcode": GPT2 | {"multi_query": True},
    "gpt_bigcode, many heads": GPT2 | {"multi_query": False},
    "openai-gpt": GPT2,
    "ctrl": {"n_embd": 32, "n_layer": 4, "n_head": 4, "dff": 64, "n_positions": 64},
    "xlm": {"emb_dim": 32, "n_layers": 4, "n_heads": 4, "causal": True, "n_words": VOCABULARY, "pad_index": 0},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "opt, projected": {"ffn_dim": 64, "word_embed_proj_dim": 16, "do_layer_norm_before": False},
    "biogpt": {},
    "xglm": {"d_model": 32, "num_layers": 4, "attention_heads": 4, "ffn_dim": 64},
    "bloom": {"n_layer": 4, "n_head": 4},
    "falcon": {"alibi": True},
    "falcon, rotary": {"alibi": False, "multi_query": True},
    "falcon, grouped": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "mpt": {"d_model": 32, "n_layers": 4, "n_heads": 4, "max_seq_len": 64},
    "stablelm": {},
    "stablelm, parallel": {"use_parallel_residual": True, "qk_layernorm": True},
    "starcoder2": SLIDING,
    "cohere": {"use_qk_norm": True, "logit_scale": 0.5},
    "cohere2": {"head_dim": 8, "logit_scale": 0.5} | ALTERNATING,
    "granite": {"logits_scaling": 3.0, "residual_multiplier": 0.5, "embedding_multiplier": 2.0},
    "granitemoe": EXPERTS,
    "granitemoeshared": EXPERTS | {"shared_intermediate_size": 16},
    "granitemoehybrid": EXPERTS
    | {
        "shared_intermediate_size": 16,
        "layer_types": ["mamba", "attention"] * 2,
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_d_state": 8,
        "mamba_n_groups": 1,
        "mamba_expand": 2,
        "mamba_chunk_size": 4,
    },
    "granite_swa": ALTERNATING,
    "mixtral": EXPERTS,
    "mixtral, windows": EXPERTS | SLIDING,
    "deepseek_v2": EXPERTS | MLA,
    "deepseek_v3": EXPERTS | MLA,
    "deepseek_v32": EXPERTS | MLA | {"index_topk": 12, "index_head_dim": 16, "index_n_heads": 16},
    "gpt_oss": EXPERTS | {"head_dim": 8} | ALTERNATING,
    "persimmon": {},
    "nemotron": {},
    "smollm3": {"no_rope_layers": [1, 0, 1, 0]},
    "smollm3, windows": {"use_sliding_window": True, "no_rope_layers": [1, 0, 1, 0]} | ALTERNATING,
    "llama4_text": EXPERTS
    | {
        "head_dim": 8,
        "intermediate_size_mlp": 64,
        "attention_chunk_size": WINDOW,
        "no_rope_layers": [1, 0, 1, 0],
        "interleave_moe_layer_step": 2,
    },
    "mamba": {"state_size": 4},
    "mamba2": {"state_size": 8, "num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 4},
    "falcon_mamba": {"state_size": 4},
    "jamba": EXPERTS
    | {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "mamba_d_state": 4,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "zamba": {
        "layers_block_type": ["mamba", "hybrid"] * 2,
        "n_mamba_heads": 2,
        "mamba_d_state": 4,
        "mamba_dt_rank": 4,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "use_mamba_kernels": False,
        "num_key_value_heads": 4,
    },
    "zamba2": {
        "layers_block_type": ["mamba", "hybrid"] * 2,
        "layer_types": ["mamba", "hybrid"] * 2,
        "mamba_d_state": 8,
        "n_mamba_heads": 4,
        "mamba_headdim": 16,
        "mamba_ngroups": 1,
        "chunk_size": 4,
        "adapter_rank": 4,
        "num_mem_blocks": 1,
        "num_key_value_heads": 4,
        "use_mem_rope": True,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
    },
    "bamba": {
        "attn_layer_indices": [1, 3],
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_d_state": 8,
        "mamba_n_groups": 1,
        "mamba_chunk_size": 4,
    },
    "falcon_h1": {
        "mamba_d_ssm": 64,
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_d_state": 8,
        "mamba_n_groups": 1,
        "mamba_chunk_size": 4,
        "head_dim": 8,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2, "block_multiple_of": 8},
    "lfm2_moe": EXPERTS | {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "nemotron_h": EXPERTS
    | {
        "layers_block_type": ["mamba", "attention", "mamba", "mlp"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "ssm_state_size": 8,
        "n_groups": 1,
        "chunk_size": 4,
        "head_dim": 8,
    },
    "minimax": EXPERTS | {"layer_types": HYBRID_LAYERS, "block_size": 4, "head_dim": 8},
    "rwkv": {"attention_hidden_size": 32, "context_length": 64},
    "xlstm": {
        "hidden_size": 64,
        "num_blocks": 4,
        "num_heads": 4,
        "chunk_size": 16,
        "qk_dim_factor": 1.0,
        "v_dim_factor": 1.0,
        "mode": "inference",
    },
    "glm": {"head_dim": 8},
    "glm4": {"head_dim": 8},
    "glm4_moe": EXPERTS
    | {"head_dim": 8, "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "glm4_moe_lite": EXPERTS | MLA,
    "exaone4": ALTERNATING,
    "exaone_moe": EXPERTS | {"head_dim": 8} | ALTERNATING,
    "ernie4_5": {"head_dim": 8},
    "ernie4_5_moe": EXPERTS,
    "helium": {"head_dim": 8},
    "seed_oss": {"head_dim": 8},
    "arcee": {},
    "dots1": EXPERTS
    | {"n_group": 1, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1, "head_dim": 8},
    "dots1, windows": EXPERTS
    | {
        "n_group": 1,
        "topk_group": 1,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "head_dim": 8,
        "max_window_layers": 2,
    }
    | ALTERNATING,
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": EXPERTS | {"head_dim": 8},
    "apertus": {},
    "bitnet": {},
    "diffllama": {},
    "doge": {"keep_window_size": WINDOW, "sliding_window": WINDOW},
    "jetmoe": EXPERTS | {"kv_channels": 8},
    "nanochat": {},
    "cwm": {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "head_dim": 8} | ALTERNATING,
    "afmoe": EXPERTS | {"head_dim": 8, "num_dense_layers": 1, "global_attn_every_n_layers": 2} | ALTERNATING,
    "minimax_m2": EXPERTS | {"head_dim": 8, "rotary_dim": 8},
    "longcat_flash": EXPERTS
    | MLA
    | {
        "num_layers": 2,
        "ffn_hidden_size": 64,
        "expert_ffn_hidden_size": 16,
        "zero_expert_num": 1,
        "num_hidden_layers": 4,
    },
    "modernbert-decoder": {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "cls_token_id": 1,
        "sep_token_id": 2,
        "global_attn_every_n_layers": 2,
        "local_attention": WINDOW,
        "reference_compile": False,
    },
    "dbrx": {
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 4,
        "max_seq_len": 64,
        "attn_config": {"clip_qkv": 8.0, "kv_n_heads": 2, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
    },
    "mimo_v2_flash": EXPERTS | {"head_dim": 8, "v_head_dim": 8, "swa_head_dim": 8, "swa_v_head_dim": 8} | ALTERNATING,
    "youtu": EXPERTS | MLA,
    "solar_open": EXPERTS
    | {"head_dim": 8, "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "jais2": {},
    "laguna": EXPERTS | {"head_dim": 8},
    "kimi_linear": EXPERTS | MLA | {"linear_head_dim": 8, "linear_num_heads": 4, "layer_types": HYBRID_LAYERS},
    "trocr": {"d_model": 32, "decoder_layers": 4, "decoder_attention_heads": 4, "decoder_ffn_dim": 64},
    # All but the last count positions from behind that of padding.
    "roberta": CAUSAL_ROBERTA,
    "roberta-prelayernorm": CAUSAL_ROBERTA,
    "xlm-roberta": CAUSAL_ROBERTA,
    "xlm-roberta-xl": CAUSAL_ROBERTA,
    "camembert": CAUSAL_ROBERTA,
    "data2vec-text": CAUSAL_ROBERTA,
    "bert": {"is_decoder": True},
    "internlm3": {},
    "hyperclovax": {},
    "mellum": {},
    "minicpm3": MLA,
    "iquestcoder": {},
    "granitemoe_swa": EXPERTS | ALTERNATING,
    "cohere2_moe": EXPERTS | ALTERNATING | {"head_dim": 8},
    "zaya": EXPERTS | {"num_experts_per_tok": 1},
    "hy_v3": EXPERTS | {"head_dim": 8},
    "cpmant": {"dim_model": 32},
    "gemma3": {
        "text_config": SIZES | {"head_dim": 8} | ALTERNATING,
        # Its vision tower holds more parameters than the language model.
        "vision_config": {
            "hidden_size": 64,
            "intermediate_size": 256,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "image_size": 28,
            "patch_size": 14,
        },
    },
}
"""The options of every configuration beside the sizes."""

LAYERS = {
    "gpt2": "transformer.h",
    "gpt_neo": "transformer.h",
    "gptj": "transformer.h",
    "codegen": "transformer.h",
    "gpt_bigcode": "transformer.h",
    "gpt_bigcode, many heads": "transformer.h",
    "openai-gpt": "transformer.h",
    "ctrl": "transformer.h",
    "xlm": "transformer.attentions",
    "gpt_neox": "gpt_neox.layers",
    "gpt_neox, sequential": "gpt_neox.layers",
    "gpt_neox_japanese": "gpt_neox_japanese.layers",
    "opt": "model.decoder.layers",
    "opt, projected": "model.decoder.layers",
    "biogpt": "biogpt.layers",
    "bloom": "transformer.h",
    "falcon": "transformer.h",
    "falcon, rotary": "transformer.h",
    "falcon, grouped": "transformer.h",
    "mpt": "transformer.blocks",
    "mamba": "backbone.layers",
    "mamba2": "backbone.layers",
    "falcon_mamba": "backbone.layers",
    "rwkv": "rwkv.blocks",
    "xlstm": "backbone.blocks",
    "dbrx": "transformer.blocks",
    "trocr": "model.decoder.layers",
    "cpmant": "cpmant.encoder.layers",
    "roberta": "roberta.encoder.layer",
    "roberta-prelayernorm": "roberta_prelayernorm.encoder.layer",
    "xlm-roberta": "roberta.encoder.layer",
    "xlm-roberta-xl": "roberta.encoder.layer",
    "camembert": "roberta.encoder.layer",
    "data2vec-text": "data2vec_text.encoder.layer",
    "bert": "bert.encoder.layer",
    "gemma3": "model.language_model.layers",
}
"""Where the decoder layers stand, if not in `model.layers`."""

KNOWN = [name for name in ARCHITECTURES if name.split(",")[0] in CONFIG_MAPPING]
"""Those that the installed transformers has."""


def build(name: str, **how: object) -> tuple[PreTrainedModel, nn.ModuleList]:
    """The model with random weights, always the same, and its decoder layers."""
    options = ARCHITECTURES[name]
    torch.manual_seed(0)
    # A wrapper has its sizes in the configs it wraps.
    config = AutoConfig.for_model(name.split(",")[0], **(options if "text_config" in options else SIZES | options))
    hf = AutoModelForCausalLM.from_config(config, **how).eval()
    return hf, attrgetter(LAYERS.get(name, "model.layers"))(hf)
