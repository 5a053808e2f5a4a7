"""Configs of public models of dense decoder-only families; `public.py` has the first ones."""

_SIZES = {
    "vocab_size": 203,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-05,
    "rope_theta": 5000.0,
    "torch_dtype": "float32",
}
GEMMA2_CONFIG = _SIZES | {
    "architectures": ["Gemma2ForCausalLM"],
    "model_type": "gemma2",
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 12,
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 3.0,
    "sliding_window": 5,
    "sliding_window_size": 5,
    "cache_implementation": "hybrid",
}
GEMMA3_CONFIG = _SIZES | {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "num_key_value_heads": 1,
    "num_hidden_layers": 5,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 12,
    "sliding_window": 5,
    "sliding_window_pattern": 3,
    "rope_local_base_freq": 100.0,
    "rope_scaling": {"rope_type": "linear", "factor": 4.0},
}
OLMO2_CONFIG = _SIZES | {
    "architectures": ["Olmo2ForCausalLM"],
    "model_type": "olmo2",
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
}
PHI3_CONFIG = _SIZES | {
    "architectures": ["Phi3ForCausalLM"],
    "model_type": "phi3",
    "hidden_act": "silu",
    "original_max_position_embeddings": 64,
    "partial_rotary_factor": 0.5,
    "sliding_window": 5,
    "tie_word_embeddings": False,
    "pad_token_id": None,
    "auto_map": {"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"},
}
OPT_CONFIG = {
    "architectures": ["OPTForCausalLM"],
    "model_type": "opt",
    "vocab_size": 203,
    "hidden_size": 48,
    "word_embed_proj_dim": 48,
    "ffn_dim": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "max_position_embeddings": 64,
    "activation_function": "relu",
    "do_layer_norm_before": True,
    "dropout": 0.1,
    "prefix": "</s>",
    "torch_dtype": "float32",
}
BLOOM_CONFIG = {
    "architectures": ["BloomForCausalLM"],
    "model_type": "bloom",
    "vocab_size": 203,
    "n_embed": 48,
    "n_layer": 3,
    "num_attention_heads": 6,
    "seq_length": 64,
    "pretraining_tp": 4,
    "offset_alibi": 100,
    "n_inner": None,
    "torch_dtype": "float32",
}

CASES = {
    "gemma2": GEMMA2_CONFIG,
    "gemma3": GEMMA3_CONFIG,
    "olmo2": OLMO2_CONFIG,
    "olmo2, one key head, biases, tied": OLMO2_CONFIG
    | {"num_key_value_heads": 1, "attention_bias": True, "tie_word_embeddings": True},
    "phi3": PHI3_CONFIG,
    "opt": OPT_CONFIG,
    "bloom": BLOOM_CONFIG,
}
