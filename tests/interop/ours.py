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
from tests import tiny

# Scalings of RoPE that bear on rows as short as those of the tests.
LLAMA31 = {
    "kind": "llama3", "factor": 8.0, "original_max_seq_len": 16, "low_freq_factor": 1.0, "high_freq_factor": 4.0
}  # fmt: skip
YARN = {"kind": "yarn", "factor": 4.0, "original_max_seq_len": 16}


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
