"""Small models with experts, as `public.py` has others."""

from __future__ import annotations

from typing import Any

_SIZES: dict[str, Any] = {
    "vocab_size": 203, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 1,
    "head_dim": 16, "hidden_act": "silu", "max_position_embeddings": 64, "rms_norm_eps": 1e-05, "rope_theta": 5000.0,
    "tie_word_embeddings": False, "torch_dtype": "float32",
}  # fmt: skip
MIXTRAL_CONFIG = {
    **_SIZES, "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "intermediate_size": 40,
    "num_local_experts": 4, "num_experts_per_tok": 2,
}  # fmt: skip
QWEN3_MOE_CONFIG = {
    **_SIZES, "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "intermediate_size": 80,
    "moe_intermediate_size": 24, "num_experts": 6, "num_experts_per_tok": 3, "norm_topk_prob": True,
}  # fmt: skip
CASES = {
    "mixtral": MIXTRAL_CONFIG,
    "mixtral, a window": {**MIXTRAL_CONFIG, "sliding_window": 5, "tie_word_embeddings": True},
    "qwen3_moe": QWEN3_MOE_CONFIG,
    "qwen3_moe, every second layer": {
        **QWEN3_MOE_CONFIG, "num_hidden_layers": 4, "decoder_sparse_step": 2, "norm_topk_prob": False,
        "attention_bias": True,
    },
}  # fmt: skip
