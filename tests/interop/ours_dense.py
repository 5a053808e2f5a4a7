"""Tiny models of ours, of dense decoder-only families; `ours.py` has the first ones."""

from tests import tiny

GEMMA = {
    **tiny.LLAMA, "norm_unit_offset": True, "norm_placement": "sandwich", "embedding_scale": True, "mlp": "geglu",
    "tied_embeddings": True, "attention_window": 6
}  # fmt: skip
GEMMA2 = {
    **GEMMA, "attention_pattern": ["local", "global"], "attention_softcap": 5.0, "logit_softcap": 4.0,
    "attention_scale": 24**-0.5
}  # fmt: skip
GEMMA3 = {
    **GEMMA, "n_layers": 4, "attention_pattern": ["local", "local", "global"], "qk_norm": "head",
    "local_rope_theta": 100.0, "rope_scaling": {"kind": "linear", "factor": 4.0}, "n_kv_heads": 1, "head_dim": 24
}  # fmt: skip
OLMO2 = {**tiny.LLAMA, "norm_placement": "branch", "qk_norm": "all"}
PHI3 = {**tiny.LLAMA, "rope_fraction": 0.5, "attention_window": 6}
BLOOM = {
    **tiny.GPT2, "positions": "alibi", "embedding_norm": True, "n_heads": 6, "n_kv_heads": 6, "d_model": 48,
    "d_ff": 192
}  # fmt: skip
OPT = {**tiny.GPT2, "mlp": "relu", "position_offset": 2}

MODELS = {
    "gemma2": GEMMA2,
    "gemma2, all layers slide, wide heads, no soft-caps, biases, untied": {
        **GEMMA, "head_dim": 24, "attention_bias": True, "attention_out_bias": True, "tied_embeddings": False
    },
    "gemma3": GEMMA3,
    "gemma3, all layers global, soft-capped logits": {
        **GEMMA, "attention_window": None, "qk_norm": "head", "logit_softcap": 4.0
    },
    "olmo2": OLMO2,
    "olmo2, biases, tied, one key head": {
        **OLMO2, "attention_bias": True, "attention_out_bias": True, "tied_embeddings": True, "n_kv_heads": 1
    },
    "phi3": PHI3,
    "bloom": BLOOM,
    "opt": OPT,
    "opt, no biases, untied": {
        **OPT, "attention_bias": False, "attention_out_bias": False, "mlp_bias": False, "tied_embeddings": False
    },
}  # fmt: skip
