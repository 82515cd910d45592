"""Configs of the tiny models, one for each model type and for the forms that a type comes in: data only.

The key is the model type, or a name of its own for another form of one; "model_type" then says which.
Ties are stated as the published models of the type have them. Where a type has windows, groups, multipliers or
layers of several kinds, its entry turns them on: defaults that do nothing would test nothing.
"""

from typing import Any

Configs = dict[str, dict[str, Any]]

VOCAB, CONTEXT = 300, 256
PAD_ID, BOS_ID, EOS_ID = range(3)

_TOKENS: dict[str, Any] = {
    "vocab_size": VOCAB,
    "pad_token_id": PAD_ID,
    "bos_token_id": BOS_ID,
    "eos_token_id": EOS_ID,
}
_TIED, _UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
_SIZES: dict[str, Any] = {
    **_TOKENS,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
}
_GATED = {**_SIZES, **_UNTIED, "intermediate_size": 96, "num_key_value_heads": 2}
_UNGATED = {**_GATED, "intermediate_size": 64}
_GPT = {**_TOKENS, **_TIED, "n_positions": CONTEXT, "n_embd": 32, "n_layer": 3, "n_head": 4}

_SLIDING, _FULL = "sliding_attention", "full_attention"
_WINDOW: dict[str, Any] = {"sliding_window": 16}  # shorter than most prompts, so that the sliding cache really slides
_WINDOWS = {**_WINDOW, "layer_types": [_SLIDING, _FULL, _SLIDING]}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_LATENT: dict[str, Any] = {  # DeepSeek's attention on compressed keys and values
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}

DENSE: Configs = {
    "apertus": {**_UNGATED, "head_dim": 16},
    "arcee": _UNGATED,
    "biogpt": {**_SIZES, **_TIED, "intermediate_size": 64},
    "bloom": {**_TOKENS, **_TIED, "hidden_size": 32, "n_layer": 3, "n_head": 4},
    "codegen": {**_GPT, **_UNTIED, "rotary_dim": 4},
    "cohere": {**_GATED, **_TIED, "logit_scale": 0.5},
    "cohere2": {**_GATED, **_TIED, **_WINDOWS, "logit_scale": 0.5},
    "ctrl": {**_GPT, "n_head": 8, "dff": 64},
    "cwm": {**_GATED, **_WINDOWS, "head_dim": 8},
    "diffllama": _GATED,
    "doge": _GATED,
    "ernie4_5": {**_GATED, **_TIED, "head_dim": 8},
    "exaone4": {**_GATED, **_WINDOWS},
    "falcon": {**_SIZES, **_TIED, "ffn_hidden_size": 64, "bias": True},
    "falcon-alibi": {  # Falcon RW
        **_SIZES,
        **_TIED,
        "model_type": "falcon",
        "alibi": True,
        "multi_query": False,
        "parallel_attn": False,
        "bias": True,
    },
    "falcon-new": {**_SIZES, **_UNTIED, "model_type": "falcon", "new_decoder_architecture": True, "num_kv_heads": 2},
    "gemma": {**_GATED, **_TIED, "head_dim": 8},
    "gemma2": {**_GATED, **_TIED, **_WINDOWS, "head_dim": 8, "query_pre_attn_scalar": 8},
    "gemma3_text": {
        **_GATED,
        **_TIED,
        **_WINDOW,
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "layer_types": [_SLIDING, _SLIDING, _FULL],
    },
    "gemma4_text": {
        **_GATED,
        **_TIED,
        **_WINDOW,
        "layer_types": [_SLIDING, _SLIDING, _FULL],
        "head_dim": 8,
        "global_head_dim": 16,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": VOCAB,
        "final_logit_softcapping": 30.0,
    },
    "gemma4_unified_text": {
        **_GATED,
        **_TIED,
        **_WINDOW,
        "layer_types": [_SLIDING, _SLIDING, _FULL],
        "head_dim": 8,
        "global_head_dim": 16,
    },
    "glm": {**_GATED, "head_dim": 8},
    "glm4": {**_GATED, "head_dim": 8},
    "gpt2": _GPT,
    "gpt_bigcode": {**_GPT, "n_inner": 64},
    "gpt_neo": {
        **_TOKENS,
        **_TIED,
        "hidden_size": 32,
        "num_layers": 3,
        "num_heads": 4,
        "max_position_embeddings": CONTEXT,
        "attention_types": [[["global", "local", "global"], 1]],
        "window_size": 16,
    },
    "gpt_neox": {**_SIZES, **_UNTIED, "intermediate_size": 64},
    "gpt_neox-serial": {
        **_SIZES,
        **_UNTIED,
        "model_type": "gpt_neox",
        "intermediate_size": 64,
        "use_parallel_residual": False,
    },
    "gpt_neox_japanese": {**_SIZES, **_TIED, "intermediate_multiple_size": 2},
    "gptj": {**_GPT, **_UNTIED, "rotary_dim": 4, "n_inner": 64},
    "granite": {**_GATED, **_TIED, "attention_multiplier": 8**-0.5, "residual_multiplier": 0.7},
    "granite_swa": {**_GATED, **_TIED, **_WINDOWS},
    "granitemoehybrid": {  # Granite 4 without mixtures: the shared block is the only one
        **_GATED,
        **_TIED,
        "num_local_experts": 0,
        "shared_intermediate_size": 96,
        "layer_types": ["attention"] * 3,
        "position_embedding_type": "rope",
        "mamba_n_heads": 8,
    },
    "helium": {**_GATED, "head_dim": 8, "num_key_value_heads": 4},
    "hunyuan_v1_dense": {**_GATED, **_TIED, "head_dim": 8},
    "hyperclovax": _GATED,
    "internlm3": {**_GATED, "head_dim": 8},
    "iquestcoder": {**_GATED, "head_dim": 8},
    "jais2": _UNGATED,
    "llama": _GATED,
    "llama-relu": {**_GATED, "model_type": "llama", "hidden_act": "relu", "mlp_bias": True, "attention_bias": True},
    "minicpm3": {**_GATED, **_TIED, **_LATENT, "scale_emb": 2, "dim_model_base": 16},
    "ministral": {**_GATED, **_WINDOWS, "head_dim": 8},
    "ministral3": {**_GATED, "head_dim": 8},
    "mistral": {**_GATED, **_WINDOW},
    "modernbert-decoder": {
        **_SIZES,
        **_TIED,
        "intermediate_size": 96,
        "local_attention": 32,
        "layer_types": [_FULL, _SLIDING, _SLIDING],
    },
    "mpt": {**_TOKENS, **_TIED, "d_model": 32, "n_layers": 3, "n_heads": 4, "max_seq_len": CONTEXT},
    "nanochat": _UNGATED,
    "nemotron": _UNGATED,
    "olmo": {**_GATED, "clip_qkv": 2.0},
    "olmo2": _GATED,
    "olmo3": {**_GATED, **_WINDOWS},
    "opt": {**_SIZES, **_TIED, "ffn_dim": 64, "word_embed_proj_dim": 32},
    "opt-post": {  # OPT 350M: norms behind the blocks, embeddings narrower than the model
        **_SIZES,
        **_TIED,
        "model_type": "opt",
        "ffn_dim": 64,
        "do_layer_norm_before": False,
        "word_embed_proj_dim": 16,
    },
    "persimmon": {**_SIZES, **_UNTIED, "intermediate_size": 64},
    "phi": {**_UNGATED, "partial_rotary_factor": 0.5},
    "phi3": _GATED,
    "qwen2": {**_GATED, **_TIED},
    "qwen3": {**_GATED, **_TIED, "head_dim": 16},
    "seed_oss": {**_GATED, "head_dim": 8},
    "smollm3": {**_GATED, **_TIED, "no_rope_layer_interval": 2},
    "stablelm": {**_GATED, "partial_rotary_factor": 0.5},
    "starcoder2": {**_UNGATED, **_TIED},
    "vaultgemma": {**_GATED, **_TIED, **_WINDOWS, "head_dim": 8, "query_pre_attn_scalar": 8},
    "xglm": {
        **_TOKENS,
        **_TIED,
        "d_model": 32,
        "num_layers": 3,
        "attention_heads": 4,
        "ffn_dim": 96,
        "max_position_embeddings": CONTEXT,
    },
    "youtu": {**_GATED, **_TIED, **_LATENT},
}

# Four experts, two to a token. The number of experts, and an expert's neurons, have a name of their own in many types.
_MIXED = {**_GATED, "intermediate_size": 32, "num_experts_per_tok": 2, "num_local_experts": 4}
_SMALL = {"moe_intermediate_size": 32, "num_experts_per_tok": 2}
_LOCAL = {**_GATED, **_SMALL, "num_local_experts": 4}
_NUMBERED = {**_GATED, **_SMALL, "num_experts": 4}
_ROUTED = {**_GATED, **_SMALL, "n_routed_experts": 4}
_LAYERS = {"mlp_layer_types": ["dense", "sparse", "sparse"]}
_FIRST = {"first_k_dense_replace": 1}
_GROUPS = {"n_group": 2, "topk_group": 1}  # the experts of a token come of one half of them
# As long as no more than index_topk tokens have been seen, the indexer leaves out none and the cache is exact.
_INDEXED = {**_LATENT, "index_n_heads": 2, "index_head_dim": 16, "index_topk": CONTEXT}

MIXTURES: Configs = {
    "afmoe": {**_NUMBERED, **_WINDOWS, "head_dim": 8, "num_dense_layers": 1, "num_shared_experts": 2},
    "aria_text": {**_MIXED, "head_dim": 8, "moe_num_experts": 4, "moe_num_shared_experts": 2},
    "axk1": {**_ROUTED, **_LATENT, **_LAYERS, **_GROUPS},
    "axk2": {**_ROUTED, **_INDEXED, **_LAYERS, "gated_norm_rank": 8},
    "beam": {**_NUMBERED, **_WINDOWS, **_LAYERS, **_GROUPS, "head_dim": 8},
    "cohere2_moe": {
        **_MIXED,
        **_TIED,
        **_WINDOWS,
        **_LAYERS,
        "head_dim": 8,
        "num_experts": 4,
        "num_shared_experts": 1,
        "prefix_dense_intermediate_size": 96,
        "logit_scale": 0.5,
    },
    "deepseek_v2": {**_ROUTED, **_LATENT, **_FIRST},
    "deepseek_v3": {**_ROUTED, **_LATENT, **_FIRST, **_GROUPS},
    "deepseek_v32": {**_ROUTED, **_INDEXED, **_LAYERS, **_GROUPS},
    "dots1": {**_ROUTED, **_FIRST, "n_shared_experts": 1, "routed_scaling_factor": 1.5},
    "ernie4_5_moe": {**_GATED, **_TIED, "moe_intermediate_size": 32, "moe_num_experts": 4, "moe_k": 2},
    "exaone_moe": {**_NUMBERED, **_WINDOWS, **_LAYERS},
    "flex_olmo": {**_MIXED, "num_experts": 4},
    "flint": {
        **_NUMBERED,
        **_WINDOWS,
        "head_dim": 8,
        "shared_expert_intermediate_size": 48,
        "mlp_only_layers": [0],
    },
    "gemma4_text-moe": {  # dense and routed side by side in each layer
        **DENSE["gemma4_text"],
        "model_type": "gemma4_text",
        "hidden_size_per_layer_input": 0,
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 32,
    },
    "glm4_moe": {**_ROUTED, **_FIRST, "head_dim": 8, "use_qk_norm": True},
    "glm4_moe_lite": {**_ROUTED, **_LATENT, **_LAYERS},
    "glm_moe_dsa": {**_ROUTED, **_INDEXED, **_LAYERS},
    "gpt_oss": {**_MIXED, **_WINDOWS, "head_dim": 8},
    "granitemoe": {**_MIXED, **_TIED},
    "granitemoe_swa": {**_MIXED, **_TIED, **_WINDOWS},
    "granitemoeshared": {**_MIXED, **_TIED, "shared_intermediate_size": 48},
    "hunyuan_v1_moe": {**_MIXED, "head_dim": 8, "num_experts": 4, "moe_topk": 2},
    "hy_v3": {**_NUMBERED, **_LAYERS, "head_dim": 8},
    "hy_v4": {**_ROUTED, **_INDEXED, **_LAYERS},
    "kolibri1": {**_LOCAL, **_WINDOWS, "head_dim": 8, "shared_expert_intermediate_size": 48},
    "laguna": {
        **_NUMBERED,
        **_LAYERS,
        "head_dim": 8,
        "shared_expert_intermediate_size": 48,
        "num_attention_heads_per_layer": [4, 4, 4],
    },
    "mellum": {**_LOCAL, **_WINDOWS, "head_dim": 8},
    "mimo_v2_flash": {**_ROUTED, **_WINDOWS, **_LAYERS, "head_dim": 16, "v_head_dim": 8},
    "minimax_m2": {**_MIXED, "head_dim": 8},
    "minimax_m3_vl_text": {
        **_MIXED,
        **_LAYERS,
        "head_dim": 8,
        "rotary_dim": 4,
        "dense_intermediate_size": 96,
        "shared_intermediate_size": 48,
    },
    "mixtral": _MIXED,
    "olmoe": {**_MIXED, "num_experts": 4},
    "phimoe": _MIXED,
    "qwen2_moe": {**_NUMBERED, "shared_expert_intermediate_size": 48, "mlp_only_layers": [0]},
    "qwen3_moe": {**_LOCAL, "head_dim": 8, "mlp_only_layers": [0]},
    "solar_open": {**_ROUTED, "head_dim": 8},
}

# Recurrent or convolution state in some layers, kept in the cache; the feed-forward blocks are ordinary.
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 16}
_LINEAR = {"layer_types": ["linear_attention", "linear_attention", _FULL]}
_DELTA = {
    **_LINEAR,
    "head_dim": 8,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
_KIMI = {**_GATED, **_LATENT, **_SMALL, **_LINEAR, "num_experts": 4, "num_experts_per_token": 2}
_KIMI |= {"linear_head_dim": 8, "linear_num_heads": 4}
_CONV = {**_GATED, **_TIED, "layer_types": ["conv", _FULL, "conv"]}
HYBRIDS: Configs = {
    "bailing_hybrid": {**_KIMI, **_FIRST, "num_expert_group": 2, "topk_group": 1},
    "falcon_h1": {**_GATED, **_MAMBA, "mamba_d_ssm": 64, "mlp_multipliers": [0.7, 1.3]},
    "granitemoehybrid-mamba": {
        **_MIXED,
        **_TIED,
        **_MAMBA,
        "model_type": "granitemoehybrid",
        "shared_intermediate_size": 48,
        "layer_types": ["mamba", "attention", "mamba"],
    },
    "jamba": {**_MIXED, "num_experts": 4, "attn_layer_period": 3, "attn_layer_offset": 1, "mamba_dt_rank": 4},
    "kimi_linear": _KIMI,
    "lfm2": {**_CONV, "block_auto_adjust_ff_dim": False},
    "lfm2_moe": {**_CONV, **_SMALL, "num_experts": 4, "num_dense_layers": 1},
    "lfm3": {**_CONV, **_WINDOW, "head_dim": 8, "layer_types": ["conv", _FULL, _SLIDING]},
    "nemotron_h": {
        **_ROUTED,
        "head_dim": 8,
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "attention", "moe", "mlp"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "ssm_state_size": 16,
        "n_groups": 2,
        "moe_shared_expert_intermediate_size": 48,
    },
    "olmo_hybrid": {**_GATED, **_LINEAR},
    "qwen3_5_moe_text": {**_NUMBERED, **_DELTA, "shared_expert_intermediate_size": 48},
    "qwen3_5_text": {**_GATED, **_DELTA},
    "qwen3_next": {**_NUMBERED, **_DELTA, "shared_expert_intermediate_size": 48},
}

# Each for its own reason: see REFUSED in griffin_offload/architecture.py.
UNSUPPORTED: Configs = {
    "bamba": {**_GATED, **_MAMBA, "attn_layer_indices": [1]},
    "bitnet": _GATED,
    "jetmoe": {**_MIXED, **_TIED, "kv_channels": 8},
    "llama4_text": {
        **_MIXED,
        "head_dim": 8,
        "intermediate_size_mlp": 96,
        "interleave_moe_layer_step": 2,
        "attention_chunk_size": 16,
        "num_experts_per_tok": 1,
    },
}

TINY: Configs = DENSE | MIXTURES | HYBRIDS
# Enough of them for tests of what does not depend on where the neurons lie.
COMMON = """llama mistral gemma gemma2 gemma3_text qwen2 qwen3 opt phi olmo2 granite smollm3 stablelm starcoder2 arcee
phi3 gpt2 falcon""".split()  # noqa: SIM905
