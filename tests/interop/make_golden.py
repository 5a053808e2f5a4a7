"""Makes `golden.npz`: logits and greedy tokens of `transformers` for the models of `public.py`.

    python -m tests.interop.make_golden

Needs torch and transformers (made with torch 2.13.0 and transformers 5.23.0). The weights are not in the file: they are
random numbers from their names.
"""

import tempfile
from pathlib import Path

import numpy as np

from tests.interop import public

CASES = {
    "llama": public.LLAMA_CONFIG,
    "llama-plain": {
        **public.LLAMA_CONFIG, "tie_word_embeddings": True, "attention_bias": False, "mlp_bias": False,
        "num_key_value_heads": 4, "head_dim": 12, "rope_theta": 10000.0
    },
    "llama 3.1": public.LLAMA31_CONFIG,
    "mistral": public.MISTRAL_CONFIG,
    "mistral, no window": {**public.MISTRAL_CONFIG, "sliding_window": None},
    "qwen2": public.QWEN2_CONFIG,
    "qwen2, all layers slide": {**public.QWEN2_CONFIG, "use_sliding_window": True, "max_window_layers": 0},
    "qwen3": public.QWEN3_CONFIG,
    "qwen3, biases": {**public.QWEN3_CONFIG, "attention_bias": True, "tie_word_embeddings": False},
    "gpt_neox": public.GPT_NEOX_CONFIG,
    "gpt_neox, sequential": {**public.GPT_NEOX_CONFIG, "use_parallel_residual": False, "rotary_pct": 1.0},
    "gpt2": public.GPT2_CONFIG,
}  # fmt: skip
NEW_TOKENS = 32
GOLDEN = Path(__file__).with_name("golden.npz")


def tokens(config: dict) -> np.ndarray:
    """Two rows of 16 tokens."""
    return np.random.default_rng(11).integers(0, config["vocab_size"], (2, 16))


def main() -> None:
    """Writes the file."""
    import torch
    from transformers import AutoModelForCausalLM

    arrays = {}
    for name, config in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            public.write_folder(Path(folder), config)
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        ids = torch.from_numpy(tokens(config))
        with torch.no_grad():
            arrays[f"{name}.logits"] = model(ids).logits.numpy()
            greedy = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS,
                do_sample=False, eos_token_id=None, pad_token_id=0,
            )  # fmt: skip
        arrays[f"{name}.greedy"] = greedy[:, ids.shape[1] :].numpy().astype(np.int32)
    np.savez_compressed(GOLDEN, **arrays)


if __name__ == "__main__":
    main()
