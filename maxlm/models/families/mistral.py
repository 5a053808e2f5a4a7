"""The Mistral family (arXiv:2310.06825): transformers' `MistralForCausalLM`.

A Mistral without a sliding window is a Llama, in weights' names too, and is exported as one.
"""

from __future__ import annotations

from maxlm.models.families import llama_like
from maxlm.models.families.rope import rope_misfits, write_rope
from maxlm.models.families.table import Family

MISTRAL = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    keys={**llama_like.KEYS, "sliding_window": "attention_window"},
    defaults={
        **llama_like.DEFAULTS,
        "vocab_size": 32000,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    bricks={
        **llama_like.BRICKS,
        "attention_bias": False,
        "attention_out_bias": False,
        "mlp_bias": False,
        "qk_norm": False,
    },
    constants=llama_like.CONSTANTS,
    synonyms=llama_like.SYNONYMS,
    harmless=llama_like.HARMLESS,
    buffers=llama_like.BUFFERS,
    read_config=llama_like.read_config,
    write_config=write_rope,
    misfits=rope_misfits,
    prefix=llama_like.PREFIX,
    embedding=llama_like.EMBEDDING,
    weights=llama_like.WEIGHTS,
)
