"""Makes the files of `golden/`: what `transformers` gives for the models of `public.py`.

    python -m tests.interop.make_golden [CASE ...]

Each holds the names and shapes of the tensors that transformers writes, and the logits and greedy tokens of a model
whose weights are random numbers from their names. Needs torch and transformers (made with torch 2.13.0 and transformers
5.23.0). The weights themselves are not kept.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
from safetensors import safe_open

from tests.interop import make_golden_sides, public

NEW_TOKENS = 32


def tokens(config: dict) -> np.ndarray:
    """Two rows of 16 tokens."""
    return np.random.default_rng(11).integers(0, config["vocab_size"], (2, 16))


def shapes_of(config: dict) -> dict[str, list[int]]:
    """The tensors of the files that transformers writes for a config."""
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        theirs = transformers.AutoConfig.from_pretrained(folder)
        getattr(transformers, config["architectures"][0])(theirs).save_pretrained(folder)
        with safe_open(Path(folder) / "model.safetensors", framework="np") as file:
            found = {name: file.get_slice(name).get_shape() for name in sorted(file.keys())}
    if config["model_type"] in ("t5", "mt5") and config.get("tie_word_embeddings") is False:
        # Their files have a head, which transformers takes where it is there and else ties.
        found["lm_head.weight"] = found["shared.weight"]
    return dict(sorted(found.items()))


def make(config: dict) -> dict[str, np.ndarray]:
    """The arrays of a case's file."""
    import torch
    import transformers

    shapes = shapes_of(config)
    with tempfile.TemporaryDirectory() as folder:
        tensors = public.random_tensors({name: tuple(shape) for name, shape in shapes.items()})
        public.write_folder(Path(folder), config, tensors)
        architecture = getattr(transformers, config["architectures"][0])
        model, found = architecture.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), found
    outputs = make_golden_sides.outputs(model.eval(), config)
    if outputs is not None:
        return {"shapes": np.array(json.dumps(shapes)), **outputs}
    ids = torch.from_numpy(tokens(config))
    with torch.no_grad():
        logits = model.eval()(ids).logits.numpy()
        greedy = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS,
            do_sample=False, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
    return {
        "shapes": np.array(json.dumps(shapes)),
        "logits": logits,
        "greedy": greedy[:, ids.shape[1] :].numpy().astype(np.int32),
    }


def main() -> None:
    """Writes the files of the cases that are named, or of all."""
    public.GOLDEN.mkdir(exist_ok=True)
    for case in sys.argv[1:] or public.EVERY:
        np.savez_compressed(public.golden_path(case), **make(public.EVERY[case]))


if __name__ == "__main__":
    main()
