"""Tiny models with latent attention, and with modules that predict further ahead."""

from __future__ import annotations

from tests import tiny

LATENT = {
    **tiny.LLAMA,
    "n_kv_heads": None,
    "latent": {"kv_rank": 24, "q_rank": 40, "nope_head_dim": 12, "rope_head_dim": 8, "v_head_dim": 10},
}
YARN = {"kind": "yarn", "factor": 4.0, "original_max_seq_len": 16, "mscale": 0.7, "mscale_all_dim": 0.9}
# Whole queries, as DeepSeek-V2-Lite; a wavelength stretched by YaRN, and its factor on the scores.
LATENT_LITE = {**LATENT, "latent": {**LATENT["latent"], "q_rank": None}, "rope_scaling": YARN}
MTP = {**LATENT, "n_layers": 2, "mtp_layers": 2}
EXPERTS = {"n_experts": 4, "experts_per_token": 2, "d_ff": 32, "n_shared_experts": 1, "first_layer": 1}

MODELS = {
    "latent attention": LATENT,
    "latent attention, whole queries, YaRN on scores, a window": {**LATENT_LITE, "attention_window": 6},
    "latent attention, two tokens further ahead": MTP,
}

# Models of public families, as `interop/ours.py` has them.
FAMILIES = {
    "deepseek_v3, dense": {**LATENT, "norm_eps": 1e-6},
    "deepseek_v2": {
        **LATENT_LITE, "moe": {**EXPERTS, "normalize_weights": False, "n_groups": 2, "routed_scale": 2.5}
    },
}  # fmt: skip
# transformers reads its modules in another way.
DEEPSEEK_V3 = {
    **MTP,
    "moe": {**EXPERTS, "router": "sigmoid", "balance_bias_rate": 0.0, "n_groups": 2, "routed_scale": 2.5},
}

# Sizes that the meshes of the planner's tests divide.
PLANNED = {
    "latent attention, two tokens further ahead": {**MTP, "latent": {**LATENT["latent"], "kv_rank": 32}},
    "latent attention, whole queries": {**LATENT, "latent": {**LATENT["latent"], "q_rank": None}},
}
