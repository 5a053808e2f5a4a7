"""Small models as Hugging Face folders, made of NumPy and the safetensors package alone."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

LLAMA_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 203,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-05,
    "rope_theta": 5000.0,
    "attention_bias": True,
    "mlp_bias": True,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
_LLAMA_LIKE = {
    name: value
    for name, value in LLAMA_CONFIG.items()
    if name not in ("architectures", "model_type", "attention_bias", "mlp_bias")
}
LLAMA31_CONFIG = LLAMA_CONFIG | {
    "num_key_value_heads": 1,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
}
MISTRAL_CONFIG = _LLAMA_LIKE | {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "num_key_value_heads": 1,
    "sliding_window": 5,
}
QWEN2_CONFIG = _LLAMA_LIKE | {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "head_dim": 12,
    "sliding_window": 5,
    "use_sliding_window": False,
    "max_window_layers": 2,
    "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
}
QWEN3_CONFIG = _LLAMA_LIKE | {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "num_key_value_heads": 1,
    "attention_bias": False,
    "tie_word_embeddings": True,
}
GPT_NEOX_CONFIG = {
    "architectures": ["GPTNeoXForCausalLM"],
    "model_type": "gpt_neox",
    "vocab_size": 203,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "hidden_act": "gelu",
    "max_position_embeddings": 64,
    "layer_norm_eps": 1e-05,
    "rotary_pct": 0.25,
    "rotary_emb_base": 10000,
    "use_parallel_residual": True,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
GPT2_CONFIG = {
    "architectures": ["GPT2LMHeadModel"],
    "model_type": "gpt2",
    "vocab_size": 203,
    "n_positions": 64,
    "n_embd": 48,
    "n_layer": 3,
    "n_head": 4,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-05,
    "attn_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "torch_dtype": "float32",
}


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The tensors of a model of one of these configs, as `transformers` names and shapes them."""
    of_family = {"gpt2": _gpt2_shapes, "gpt_neox": _gpt_neox_shapes}
    return of_family.get(config["model_type"], _llama_shapes)(config)


def _llama_shapes(c: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    d, f, v, k = c["hidden_size"], c["intermediate_size"], c["vocab_size"], c["head_dim"]
    q, kv = c["num_attention_heads"] * k, c["num_key_value_heads"] * k
    found = {"model.embed_tokens.weight": (v, d), "model.norm.weight": (d,)}

    def biased(name: str) -> bool:
        if c["model_type"] == "qwen2":
            return name.endswith(("q_proj", "k_proj", "v_proj"))
        return c.get("attention_bias" if "attn" in name else "mlp_bias", False)

    if not c["tie_word_embeddings"]:
        found["lm_head.weight"] = (v, d)
    for i in range(c["num_hidden_layers"]):
        at = f"model.layers.{i}."
        linear = {
            "self_attn.q_proj": (q, d), "self_attn.k_proj": (kv, d), "self_attn.v_proj": (kv, d),
            "self_attn.o_proj": (d, q), "mlp.gate_proj": (f, d), "mlp.up_proj": (f, d), "mlp.down_proj": (d, f),
        }  # fmt: skip
        for name, shape in linear.items():
            found[f"{at}{name}.weight"] = shape
            if biased(name):
                found[f"{at}{name}.bias"] = shape[:1]
        if c["model_type"] == "qwen3":
            found |= {f"{at}self_attn.q_norm.weight": (k,), f"{at}self_attn.k_norm.weight": (k,)}
        found |= {f"{at}input_layernorm.weight": (d,), f"{at}post_attention_layernorm.weight": (d,)}
    return found


def _gpt2_shapes(c: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    d, f = c["n_embd"], 4 * c["n_embd"]
    found = {"transformer.wte.weight": (c["vocab_size"], d), "transformer.wpe.weight": (c["n_positions"], d)}
    norms = ["transformer.ln_f"]
    for i in range(c["n_layer"]):
        at = f"transformer.h.{i}."
        norms += [f"{at}ln_1", f"{at}ln_2"]
        conv = {"attn.c_attn": (d, 3 * d), "attn.c_proj": (d, d), "mlp.c_fc": (d, f), "mlp.c_proj": (f, d)}
        for name, shape in conv.items():
            found |= {f"{at}{name}.weight": shape, f"{at}{name}.bias": shape[1:]}
    for name in norms:
        found |= {f"{name}.weight": (d,), f"{name}.bias": (d,)}
    return found


def _gpt_neox_shapes(c: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    d, f, v = c["hidden_size"], c["intermediate_size"], c["vocab_size"]
    found = {"gpt_neox.embed_in.weight": (v, d), "embed_out.weight": (v, d)}
    norms = ["gpt_neox.final_layer_norm"]
    for i in range(c["num_hidden_layers"]):
        at = f"gpt_neox.layers.{i}."
        norms += [f"{at}input_layernorm", f"{at}post_attention_layernorm"]
        linear = {
            "attention.query_key_value": (3 * d, d), "attention.dense": (d, d),
            "mlp.dense_h_to_4h": (f, d), "mlp.dense_4h_to_h": (d, f),
        }  # fmt: skip
        for name, shape in linear.items():
            found |= {f"{at}{name}.weight": shape, f"{at}{name}.bias": shape[:1]}
    for name in norms:
        found |= {f"{name}.weight": (d,), f"{name}.bias": (d,)}
    return found


def weights(config: dict[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """Random float32 weights, each from its own name; norms near 1."""

    def one(name: str, shape: tuple[int, ...]) -> np.ndarray:
        noise = np.random.default_rng((seed, zlib.crc32(name.encode()))).standard_normal(shape) * 0.15
        norm = name.endswith("weight") and len(shape) == 1
        return (noise + norm).astype(np.float32)

    return {name: one(name, shape) for name, shape in shapes(config).items()}


def write_folder(folder: Path, config: dict[str, Any], tensors: dict[str, np.ndarray] | None = None) -> Path:
    """A model's folder, without a tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights(config) if tensors is None else tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder by its path in it."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
