"""The compiled heart of a run: its step, and the shapes that go in. `train` runs it, `plan` compiles it elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from maxlm.models.transformer import Model
from maxlm.parallel.axes import activation_spec, shards_of
from maxlm.training.optimizer import make_optimizer
from maxlm.training.schedule import make_schedule
from maxlm.training.state import Placement, TrainState, abstract_state, init_state
from maxlm.training.step import make_train_step

if TYPE_CHECKING:
    from maxlm.config import RunConfig

BATCH_ARRAYS = {
    "inputs": jnp.int32,
    "targets": jnp.int32,
    "segments": jnp.int32,
    "positions": jnp.int32,
    "weights": jnp.float32,
}
ENCODER_ARRAYS = {"encoder_inputs": jnp.int32, "encoder_segments": jnp.int32, "encoder_positions": jnp.int32}
"""what batches of encoder-decoders have besides"""
PREFIX_ARRAYS = {"prefix": jnp.bool_}
"""what those of prefix language models have besides"""
PAIR_ARRAYS = {"token_types": jnp.int32, "next_sentence": jnp.int32}
"""what those of pairs of sentences have besides"""


@dataclass(frozen=True)
class Program:
    """What a config runs on a mesh, which must be the current one: `with jax.set_mesh(mesh)`."""

    config: RunConfig
    mesh: jax.sharding.Mesh

    @cached_property
    def model(self) -> Model:
        """The model as pure functions."""
        return Model(self.config.model, self.config.precision, self.config.pipeline)

    @cached_property
    def rows(self) -> int:
        """Rows of the global batch of a step."""
        return self.config.train.global_batch_tokens // self.config.train.seq_len

    @cached_property
    def batch_sharding(self) -> jax.NamedSharding:
        """How every array of a batch comes to the mesh: with whole rows, whose positions the loss then shares out."""
        length = None if shards_of("length", self.mesh) > 1 else "length"
        return jax.NamedSharding(self.mesh, activation_spec("batch", length))

    @cached_property
    def abstract_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """A batch as shapes, formats and shardings."""
        lengths = self.config.row_lengths
        arrays = {name: (lengths.decoder, dtype) for name, dtype in BATCH_ARRAYS.items()}
        if self.config.model.kind == "encoder_decoder":
            arrays |= {name: (lengths.encoder, dtype) for name, dtype in ENCODER_ARRAYS.items()}
        for further, there in ((PREFIX_ARRAYS, lengths.prefix), (PAIR_ARRAYS, self.config.objective.next_sentence)):
            arrays |= {name: (lengths.decoder, dtype) for name, dtype in further.items() if there}
        return {
            name: jax.ShapeDtypeStruct((self.rows, length), dtype, sharding=self.batch_sharding)
            for name, (length, dtype) in arrays.items()
        }

    @cached_property
    def abstract_state(self) -> TrainState:
        """The state as shapes, formats and shardings."""
        window = self.config.train.spike.window
        return abstract_state(self.model, self._optimizer, self._placement, window, self.mesh)

    def init_state(self) -> TrainState:
        """A new state from the run's seed, made on the mesh."""
        window, seed = self.config.train.spike.window, self.config.train.seed
        init = jax.jit(lambda key: init_state(self.model, self._optimizer, self._placement, window, key))
        return init(jax.random.key(seed))

    def train_step(self) -> jax.stages.Wrapped:
        """The step, jitted, with its state donated: the arrays that go in are overwritten by those that come out."""
        config = self.config
        schedule = make_schedule(config.schedule, config.optimizer.learning_rate, config.train.steps)
        step = make_train_step(
            self.model, self._optimizer, schedule, self._placement, config.train, config.optimizer, config.loss
        )
        return jax.jit(step, donate_argnums=0)

    def lower(self) -> jax.stages.Lowered:
        """The step as StableHLO for the mesh's devices, which need not be here: `train` runs it, `plan` compiles it."""
        return self.train_step().lower(self.abstract_state, self.abstract_batch)

    @cached_property
    def _optimizer(self):
        return make_optimizer(self.config.optimizer, self.model)

    @cached_property
    def _placement(self) -> Placement:
        return Placement.of(self.model, self.config.mesh.zero)
