"""The Mistral family (arXiv:2310.06825): transformers' `MistralForCausalLM`.

A Mistral without a sliding window is a Llama, in weights' names too, and is exported as one.
"""

from __future__ import annotations

from maxlm.models.families import llama_like

MISTRAL = llama_like.family(
    "mistral",
    "MistralForCausalLM",
    keys={"sliding_window": "attention_window"},
    defaults={
        "vocab_size": 32000,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
)
