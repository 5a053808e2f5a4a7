"""Tiny models with experts of families that can be exported."""

from tests import tiny_moe

MODELS = {
    "mixtral": {
        **tiny_moe.MIXTRAL, "n_layers": 2, "d_ff": 48, "attention_window": 6, "n_kv_heads": 1, "head_dim": 24
    },
    "qwen3_moe": tiny_moe.QWEN3_MOE,
}  # fmt: skip
