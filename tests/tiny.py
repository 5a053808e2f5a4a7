"""Small configs, batches and programs with true shapes, for tests."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from maxlm.config import RunConfig
from maxlm.data.denoising import Draws, prefix_batch
from maxlm.parallel.mesh import make_mesh
from maxlm.training.program import Program

LLAMA = {"vocab_size": 300, "n_layers": 3, "d_model": 64, "n_heads": 4, "n_kv_heads": 2, "d_ff": 96, "max_seq_len": 64}
GPT2 = {
    **LLAMA,
    "n_kv_heads": 4,
    "norm": "layer",
    "positions": "learned",
    "mlp": "gelu",
    "attention_bias": True,
    "attention_out_bias": True,
    "mlp_bias": True,
    "tied_embeddings": True,
}

GPT_NEOX = {
    **GPT2,
    "positions": "rope",
    "rope_fraction": 0.25,
    "mlp": "gelu_exact",
    "parallel_residual": True,
    "tied_embeddings": False,
}

GOPHER = {
    **LLAMA, "n_kv_heads": 4, "positions": "transformer_xl", "mlp": "gelu", "tied_embeddings": True,
}  # fmt: skip

BERT = {
    **GPT2, "kind": "encoder", "norm_placement": "post", "embedding_norm": True, "token_types": 2, "mlp": "gelu_exact",
    "head_transform": True, "head_bias": True,
}  # fmt: skip
T5 = {
    **LLAMA, "kind": "encoder_decoder", "n_encoder_layers": 2, "n_kv_heads": 4, "head_dim": 20,
    "positions": "relative", "relative_buckets": 8, "relative_max_distance": 12, "attention_scale": 1.0, "mlp": "relu",
    "tied_embeddings": True, "logit_scale": 64**-0.5, "norm_eps": 1e-6,
}  # fmt: skip
BART = {
    **GPT2, "kind": "encoder_decoder", "n_encoder_layers": 2, "norm_placement": "post", "embedding_norm": True,
    "position_offset": 2, "mlp": "gelu_exact", "head_bias": True, "decoder_start_id": 2,
}  # fmt: skip
TRANSFORMER = {
    **LLAMA, "kind": "encoder_decoder", "n_kv_heads": 4, "norm": "layer", "norm_placement": "post",
    "positions": "sinusoidal", "embedding_scale": True, "mlp": "relu", "mlp_bias": True, "tied_embeddings": True,
}  # fmt: skip


def config(**sections: Any) -> RunConfig:
    """A tiny float32 run; keyword arguments replace keys section by section."""
    tree: dict[str, Any] = {
        "name": "tiny",
        "model": dict(LLAMA),
        "train": {"steps": 20, "seq_len": 32, "global_batch_tokens": 512, "spike": {"window": 16}},
        "optimizer": {"learning_rate": 1e-2},
        "schedule": {"warmup_steps": 4},
        "precision": {"compute": "float32"},
        "metrics": {"log_every": 1, "tensorboard": False, "progress": "none"},
    }
    for section, keys in sections.items():
        tree[section] = {**tree.get(section, {}), **keys} if isinstance(keys, dict) else keys
    return RunConfig.model_validate(tree)


def program(run: RunConfig, n_devices: int = 1) -> Program:
    """The run's program on the first simulated devices. Use under `jax.set_mesh(program.mesh)`."""
    return Program(run, make_mesh(run.mesh, jax.devices()[:n_devices]))


def host_batch(run: RunConfig, step: int, *, packed: bool = True) -> dict[str, np.ndarray]:
    """A batch of random tokens, cut into documents of random lengths where `packed`."""
    rng = np.random.default_rng((step, 7))
    rows, length = run.train.global_batch_tokens // run.train.seq_len, run.train.seq_len
    tokens = rng.integers(0, run.model.vocab_size, (rows, length + 1))
    starts = rng.random((rows, length + 1)) < (0.1 if packed else 0.0)
    starts[:, 0] = True
    segments = np.cumsum(starts, axis=1)
    index = np.arange(length + 1)
    positions = index - np.maximum.accumulate(np.where(starts, index, 0), axis=1)
    batch = {
        "inputs": tokens[:, :-1].astype(np.int32),
        "targets": tokens[:, 1:].astype(np.int32),
        "segments": segments[:, :-1].astype(np.int32),
        "positions": positions[:, :-1].astype(np.int32),
        "weights": (segments[:, 1:] == segments[:, :-1]).astype(np.float32),
    }
    if run.objective.kind == "prefix_lm":
        batch = prefix_batch(batch, Draws(step, 0, np.arange(rows)))
    if run.model.kind == "encoder_decoder":
        # Documents of the encoder's are a position longer or shorter than the decoder's.
        batch |= {f"encoder_{name}": np.roll(batch[name], 1, axis=1) for name in ("inputs", "segments", "positions")}
        for name, first in (("inputs", 5), ("segments", 1), ("positions", 0)):
            batch[f"encoder_{name}"][:, 0] = first
    return batch


def to_mesh(program: Program, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """A batch on the program's mesh."""
    return {name: jax.device_put(batch[name], program.batch_sharding) for name in program.abstract_batch}


def train_losses(run: RunConfig, n_devices: int, steps: int) -> tuple[list[float], Any]:
    """The losses of `steps` steps over four batches in turn, from the run's seed, and the final parameters."""
    here = program(run, n_devices)
    losses = []
    with jax.set_mesh(here.mesh):
        state, step = here.init_state(), here.train_step()
        for i in range(steps):
            state, metrics = step(state, to_mesh(here, host_batch(run, i % 4)))
            losses.append(float(metrics["loss"]))
        return losses, jax.device_get(state.params)


def assert_close(found: Any, expected: Any, rtol: float) -> None:
    """Each array within `rtol` of the largest magnitude in it: float32 sums in another order differ by that much.

    A gradient that is zero but for rounding (of a key's bias, which softmax cannot see) is held to the others' scale.
    """
    scale = max(np.abs(b).max() for b in jax.tree.leaves(expected))
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(
            a, b, rtol=0, atol=rtol * max(np.abs(b).max(), 1e-3 * scale), err_msg=jax.tree_util.keystr(path)
        )
