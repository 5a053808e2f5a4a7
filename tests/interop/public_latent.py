"""Small models of the DeepSeek families."""

DEEPSEEK_V3_CONFIG = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "vocab_size": 203,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "kv_lora_rank": 20,
    "q_lora_rank": 28,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "v_head_dim": 14,
    "first_k_dense_replace": 3,
    "num_nextn_predict_layers": 0,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-05,
    "rope_theta": 5000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
# As DeepSeek-V2-Lite's: whole queries, and a factor on the scores.
YARN = {
    "type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 32, "beta_slow": 1,
    "mscale": 0.707, "mscale_all_dim": 0.9,
}  # fmt: skip
DEEPSEEK_V2_CONFIG = {
    name: value for name, value in DEEPSEEK_V3_CONFIG.items() if name != "num_nextn_predict_layers"
} | {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "q_lora_rank": None,
    "rope_scaling": YARN,
}

_EXPERTS = {
    "num_hidden_layers": 2,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "n_shared_experts": 2,
    "routed_scaling_factor": 2.5,
    "n_group": 4,
    "topk_group": 2,
}
CASES = {
    "deepseek_v2, dense": DEEPSEEK_V2_CONFIG,
    "deepseek_v2": {**DEEPSEEK_V2_CONFIG, **_EXPERTS, "topk_method": "greedy", "norm_topk_prob": False},
    "deepseek_v2, groups of experts": {
        **DEEPSEEK_V2_CONFIG, **_EXPERTS, "topk_method": "group_limited_greedy", "q_lora_rank": 28
    },
    "deepseek_v3, dense": DEEPSEEK_V3_CONFIG,
    "deepseek_v3": {**DEEPSEEK_V3_CONFIG, **_EXPERTS, "norm_topk_prob": True, "rope_scaling": YARN},
}  # fmt: skip
