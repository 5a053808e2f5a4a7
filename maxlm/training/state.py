"""What a run carries from step to step, made on the mesh."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from maxlm.models.transformer import Model, Params
from maxlm.parallel.axes import weight_spec


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Guard:
    """Recent losses and gradient norms, as rings of `window` float32 that `recorded` steps entered; steps skipped."""

    losses: jax.Array
    grad_norms: jax.Array
    recorded: jax.Array
    skipped: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Parameters, optimizer state, the number of steps done, and the guard against spikes."""

    params: Params
    opt_state: Any
    step: jax.Array
    guard: Guard


@dataclass(frozen=True)
class Placement:
    """How parameters and optimizer state rest on the mesh: trees of PartitionSpec, after `mesh.zero`."""

    params: Params
    optimizer: Params

    @classmethod
    def of(cls, model: Model, zero: int) -> Placement:
        """The placement under `zero`: 3 shards the weights over `data` as over `fsdp`, 1 and 3 the optimizer state."""

        def specs(shard_over_data: bool) -> Params:
            return jax.tree.map(
                lambda logical: weight_spec(logical, shard_over_data=shard_over_data),
                model.logical_axes(),
                is_leaf=lambda node: isinstance(node, tuple),
            )

        return cls(params=specs(zero == 3), optimizer=specs(zero >= 1))


def reshard_tree(tree: Params, specs: Params) -> Params:
    """Each array of `tree` moved to the spec in the same place."""
    return jax.tree.map(
        lambda spec, x: jax.sharding.reshard(x, spec), specs, tree, is_leaf=lambda node: isinstance(node, PartitionSpec)
    )


def init_state(
    model: Model, optimizer: optax.GradientTransformation, placement: Placement, window: int, key: jax.Array
) -> TrainState:
    """A new state, to be jitted or `eval_shape`d under the mesh; no weight is ever whole on one device or on the host.

    The optimizer's arrays are made from the parameters as `placement.optimizer` lays them, and so carry its sharding.
    """
    params = reshard_tree(model.init(key), placement.params)
    zero = jnp.zeros((), jnp.int32)
    ring = jnp.zeros((window,), jnp.float32)
    return TrainState(
        params=params,
        opt_state=optimizer.init(reshard_tree(params, placement.optimizer)),
        step=zero,
        guard=Guard(losses=ring, grad_norms=ring, recorded=zero, skipped=zero),
    )


def abstract_state(
    model: Model, optimizer: optax.GradientTransformation, placement: Placement, window: int, mesh: jax.sharding.Mesh
) -> TrainState:
    """The state as shapes, formats and shardings: what a checkpoint is restored into, and a plan compiled for."""
    shapes = jax.eval_shape(lambda: init_state(model, optimizer, placement, window, jax.random.key(0)))

    def place(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        # A constant made under no trace, such as a counter's zero, has no sharding of its own: it is replicated.
        spec = x.sharding.spec if x.sharding is not None else PartitionSpec()
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.NamedSharding(mesh, spec))

    return jax.tree.map(place, shapes)
