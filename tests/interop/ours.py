"""Small runs of ours, with a tokenizer."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import jax
import numpy as np

from maxlm.checkpoint import CheckpointConfig, Checkpoints
from maxlm.config import RunConfig, to_yaml
from maxlm.data.tokenizer import TokenizerConfig, train_tokenizer
from maxlm.models.transformer import Model
from maxlm.parallel.mesh import MeshConfig, make_mesh
from tests import latents, tiny
from tests.interop import ours_moe

# Scalings of RoPE that bear on rows as short as those of the tests.
LLAMA31 = {
    "kind": "llama3", "factor": 8.0, "original_max_seq_len": 16, "low_freq_factor": 1.0, "high_freq_factor": 4.0
}  # fmt: skip
YARN = {"kind": "yarn", "factor": 4.0, "original_max_seq_len": 16}

# A tiny model of every family in each of its forms; more of Llama and GPT-2 stand in the tests.
MODELS = {
    "llama 3.1": {**tiny.LLAMA, "rope_theta": 5e5, "rope_scaling": LLAMA31},
    "llama, positions interpolated": {**tiny.LLAMA, "rope_scaling": {"kind": "linear", "factor": 4.0}},
    "mistral": {**tiny.LLAMA, "attention_window": 6, "n_kv_heads": 1, "head_dim": 24, "tied_embeddings": True},
    "qwen2": {**tiny.LLAMA, "attention_bias": True, "rope_scaling": YARN},
    "qwen2, all layers slide": {**tiny.LLAMA, "attention_bias": True, "attention_window": 6, "head_dim": 24},
    "qwen2, every second layer slides": {
        **tiny.LLAMA, "attention_bias": True, "attention_window": 6, "attention_pattern": ["global", "local"]
    },
    "qwen3": {**tiny.LLAMA, "qk_norm": True, "head_dim": 24, "n_kv_heads": 1, "tied_embeddings": True},
    "qwen3, biases, all layers slide": {
        **tiny.LLAMA, "qk_norm": True, "attention_bias": True, "attention_out_bias": True, "attention_window": 6
    },
    "gpt_neox": tiny.GPT_NEOX,
    "gpt_neox, sequential, no biases of attention, tied": {
        **tiny.GPT_NEOX, "parallel_residual": False, "attention_bias": False, "attention_out_bias": False,
        "tied_embeddings": True, "rope_fraction": 1.0, "rope_scaling": YARN
    },
    "gpt2": tiny.GPT2,
    **latents.FAMILIES,
    **ours_moe.MODELS,
}  # fmt: skip


def tokenizer(folder: Path) -> Path:
    """A byte-level BPE tokenizer of 300 tokens, trained by ours."""
    text = [Path(__file__).read_text(), Path(tiny.__file__).read_text()]
    train_tokenizer(text, TokenizerConfig(vocab_size=300), folder, progress=False)
    return folder


def make_run(run_dir: Path, model: dict[str, Any], tokenizer_folder: Path | None, *, n_devices: int = 1) -> RunConfig:
    """A run's folder with one checkpoint, of step 7, whose every parameter is random."""
    path = None if tokenizer_folder is None else str(tokenizer_folder)
    run = tiny.config(model=model, tokenizer={"path": path}, run_dir=str(run_dir))
    mesh = make_mesh(MeshConfig(), jax.devices()[:n_devices])
    with jax.set_mesh(mesh):
        params = random_params(Model(run.model, run.precision), mesh)
        with Checkpoints(run_dir / "checkpoints", CheckpointConfig(asynchronous=False)) as checkpoints:
            checkpoints.save(7, {"params": params}, meta={"step": 7}, config_yaml=to_yaml(run))
    (run_dir / "config.yaml").write_text(to_yaml(run))
    return run


def random_params(model: Model, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """Random parameters on the mesh; the rows that fill the vocabulary up are random too."""

    def one(path: Any, x: jax.ShapeDtypeStruct) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        noise = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(x.shape) * 0.15
        return jax.device_put((noise + name.endswith("scale")).astype(x.dtype), x.sharding)

    return jax.tree_util.tree_map_with_path(one, model.abstract_params(mesh))
