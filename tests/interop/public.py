"""Small models as Hugging Face folders, made of NumPy and the safetensors package alone."""

from __future__ import annotations

import json
import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from tests.interop import public_dense, public_latent, public_moe, public_sides

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


# Models of every family, of which `make_golden.py` keeps what transformers makes; one file a kind of families.
CASES = {
    "llama": LLAMA_CONFIG,
    "llama, plain": {
        **LLAMA_CONFIG, "tie_word_embeddings": True, "attention_bias": False, "mlp_bias": False,
        "num_key_value_heads": 4, "head_dim": 12, "rope_theta": 10000.0
    },
    "llama 3.1": LLAMA31_CONFIG,
    "mistral": MISTRAL_CONFIG,
    "mistral, no window": {**MISTRAL_CONFIG, "sliding_window": None},
    "qwen2": QWEN2_CONFIG,
    "qwen2, the last layer slides": {**QWEN2_CONFIG, "use_sliding_window": True},
    "qwen2, all layers slide": {**QWEN2_CONFIG, "use_sliding_window": True, "max_window_layers": 0},
    "qwen3": QWEN3_CONFIG,
    "qwen3, biases": {**QWEN3_CONFIG, "attention_bias": True, "tie_word_embeddings": False},
    "gpt_neox": GPT_NEOX_CONFIG,
    "gpt_neox, sequential": {**GPT_NEOX_CONFIG, "use_parallel_residual": False, "rotary_pct": 1.0},
    "gpt2": GPT2_CONFIG,
    **public_dense.CASES,
    **public_moe.CASES,
    **public_latent.CASES,
}  # fmt: skip


# With encoders and encoder-decoders.
EVERY = {**CASES, **public_sides.CASES}


GOLDEN = Path(__file__).with_name("golden")


def golden_path(case: str) -> Path:
    """The file of what transformers gave for a case."""
    return GOLDEN / f"{re.sub(r'[^a-z0-9]+', '-', case)}.npz"


def golden(case: str) -> dict[str, np.ndarray]:
    """What transformers gave for a case: logits and greedy tokens, and the shapes of its tensors as JSON."""
    return dict(np.load(golden_path(case)))


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The tensors of a model of one of the cases, as `transformers` names and shapes them in its files."""
    case = next(name for name, one in EVERY.items() if one == config)
    return {name: tuple(shape) for name, shape in json.loads(str(golden(case)["shapes"])).items()}


def weights(config: dict[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """Random float32 weights of a model of one of the cases, each from its own name; norms near 1."""
    return random_tensors(shapes(config), seed)


def random_tensors(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, np.ndarray]:
    """Random float32 arrays, each from its own name; vectors of weights near 1."""

    def one(name: str, shape: tuple[int, ...]) -> np.ndarray:
        noise = np.random.default_rng((seed, zlib.crc32(name.encode()))).standard_normal(shape) * 0.15
        norm = name.endswith("weight") and len(shape) == 1
        return (noise + norm).astype(np.float32)

    return {name: one(name, shape) for name, shape in shapes.items()}


def write_folder(folder: Path, config: dict[str, Any], tensors: dict[str, np.ndarray] | None = None) -> Path:
    """A model's folder, without a tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights(config) if tensors is None else tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder by its path in it."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
