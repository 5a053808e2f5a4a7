"""A run's model for use after training: its config, and its weights on the devices that are here."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import jax

from maxlm.models.config import ModelConfig
from maxlm.models.transformer import Model, Params
from maxlm.parallel.mesh import MeshConfig, make_mesh

if TYPE_CHECKING:
    from maxlm.config import RunConfig


@dataclass(frozen=True)
class LoadedRun:
    """A run's model, its parameters on `mesh`, and the step that they are of."""

    config: RunConfig
    model: Model
    params: Params
    mesh: jax.sharding.Mesh
    step: int


def inference_mesh(config: ModelConfig) -> jax.sharding.Mesh:
    """A mesh of this machine's devices that suits the model, which may have been trained on quite another.

    Tensor parallelism first, since it leaves the weights where they are while tokens come one by one; then fsdp.
    Devices that the sizes of the model cannot use are left out.
    """
    devices = jax.local_devices()
    tensor = math.gcd(len(devices), config.kv_heads, config.n_heads, config.d_ff, config.padded_vocab_size)
    if config.mtp_layers:
        tensor = math.gcd(tensor, config.d_model)
    ranks = () if config.latent is None else (config.latent.kv_rank, config.latent.q_rank or 0)
    fsdp = math.gcd(len(devices) // tensor, config.d_model, *ranks)
    return make_mesh(MeshConfig(tensor=tensor, fsdp=fsdp), devices[: tensor * fsdp])


def load_run(run_dir: str | Path, step: int | None = None) -> LoadedRun:
    """The model of a run's folder at `step`, or at its newest intact checkpoint, restored straight onto the devices.

    Raises ConfigError where the folder has no config, CheckpointError where it has no such checkpoint.
    """
    # Both stand above this room; they are what a run's folder is read with.
    from maxlm.checkpoint import restore_params
    from maxlm.config import load_config

    config = load_config(Path(run_dir) / "config.yaml")
    model = Model(config.model, config.precision)
    mesh = inference_mesh(config.model)
    with jax.set_mesh(mesh):
        params, meta = restore_params(Path(run_dir) / "checkpoints", model.abstract_params(mesh), step)
    return LoadedRun(config, model, params, mesh, meta["step"])
