"""Tiny models with experts, in the forms of public ones."""

from __future__ import annotations

from typing import Any

from tests import tiny

MIXTRAL: dict[str, Any] = {**tiny.LLAMA, "moe": {"n_experts": 4, "experts_per_token": 2, "d_ff": 48}}
QWEN3_MOE: dict[str, Any] = {
    **tiny.LLAMA, "qk_norm": "head", "head_dim": 24, "n_layers": 4,
    "moe": {
        "n_experts": 8, "experts_per_token": 3, "d_ff": 32, "every": 2, "first_layer": 1, "normalize_weights": False,
        "balance_loss": 0.01,
    },
}  # fmt: skip
DEEPSEEK: dict[str, Any] = {
    **tiny.LLAMA,
    "moe": {
        "n_experts": 8, "experts_per_token": 2, "d_ff": 32, "n_shared_experts": 2, "first_layer": 1,
        "router": "sigmoid", "routed_scale": 2.5, "n_groups": 4, "groups_per_token": 2, "balance_bias_rate": 0.001,
        "balance_loss": 0.01, "balance_loss_over": "sequence", "z_loss": 0.001,
    },
}  # fmt: skip
GPT_OSS: dict[str, Any] = {
    **tiny.LLAMA, "attention_bias": True, "attention_out_bias": True, "attention_sinks": True, "mlp": "swiglu_clamped",
    "attention_window": 6, "attention_pattern": ["local", "global"], "d_ff": 48,
    "rope_scaling": {"kind": "yarn", "factor": 4.0, "original_max_seq_len": 16, "truncate": False},
    "moe": {
        "n_experts": 4, "experts_per_token": 2, "d_ff": 48, "router": "topk_softmax", "router_bias": True,
        "expert_bias": True, "balance_loss": 0.01
    },
}  # fmt: skip
EXPERT_CHOICE: dict[str, Any] = {
    **tiny.LLAMA, "mlp": "gelu", "parallel_residual": True,
    "moe": {"n_experts": 4, "experts_per_token": 2, "d_ff": 48, "router": "expert_choice", "expert_bias": True},
}  # fmt: skip
