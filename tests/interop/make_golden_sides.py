"""What `transformers` gives for encoders and encoder-decoders; a part of `make_golden.py`."""

from __future__ import annotations

from typing import Any

import numpy as np

NEW_TOKENS = 32
LENGTHS = (16, 11)
"""tokens of the two rows; what is behind them is padding"""


def rows(config: dict[str, Any]) -> dict[str, np.ndarray]:
    """Two rows of tokens, of which no special ones of RoBERTa, their segments and types, and a decoder's tokens."""
    rng = np.random.default_rng(11)
    segments = (np.arange(16) < np.array(LENGTHS)[:, None]).astype(np.int32)
    drawn = rng.integers(3, config["vocab_size"], (2, 16)).astype(np.int32)
    return {
        "inputs": np.where(segments == 1, drawn, 1).astype(np.int32),
        "segments": segments,
        "types": ((np.arange(16) > 5) & (segments == 1)).astype(np.int32),
        "decoder_inputs": rng.integers(3, config["vocab_size"], (2, 9)).astype(np.int32),
    }


def outputs(model: Any, config: dict[str, Any]) -> dict[str, np.ndarray] | None:
    """Of a model of `transformers`: last hidden states and logits, zeros at padding, and a decoder's greedy tokens;
    None for one that is only a decoder."""
    import torch

    made = {name: torch.from_numpy(array.astype(np.int64)) for name, array in rows(config).items()}
    here = made["segments"].numpy()[..., None]
    if config.get("is_encoder_decoder"):
        with torch.no_grad():
            given = {"input_ids": made["inputs"], "attention_mask": made["segments"]}
            out = model(**given, decoder_input_ids=made["decoder_inputs"])
            greedy = model.generate(
                **given, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False, num_beams=1,
                use_cache=False, eos_token_id=None, pad_token_id=0, forced_eos_token_id=None, forced_bos_token_id=None,
            )  # fmt: skip
        return {
            "hidden": out.encoder_last_hidden_state.numpy() * here,
            "logits": out.logits.numpy(),
            "greedy": greedy[:, 1:].numpy().astype(np.int32),
        }
    if "MaskedLM" not in config["architectures"][0] and "PreTraining" not in config["architectures"][0]:
        return None
    types = {"token_type_ids": made["types"]} if config.get("type_vocab_size", 1) > 1 else {}
    with torch.no_grad():
        out = model(made["inputs"], attention_mask=made["segments"], output_hidden_states=True, **types)
    found = {"hidden": out.hidden_states[-1].numpy() * here}
    if hasattr(out, "seq_relationship_logits"):
        found["next_sentence"] = out.seq_relationship_logits.numpy()
    return found | {"logits": (out.logits if "logits" in out else out.prediction_logits).numpy() * here}
