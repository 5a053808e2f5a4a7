"""In which order the positions of a row lie on a mesh that shares rows by position, and the way there and back.

A batch comes with whole rows. At the top of a loss each of its small arrays is brought into that order and shared out;
from there on everything goes by token, and what does not (attention, an expert's capacity) knows the order.
"""

from __future__ import annotations

import jax
import numpy as np

from maxlm.kernels import manual
from maxlm.kernels.ring_plan import zigzag
from maxlm.models.config import ModelConfig
from maxlm.parallel.axes import activation_spec, constrain, mesh_axes


def order_of(config: ModelConfig, length: int) -> np.ndarray | None:
    """int64[length]: the position of a row that lies at each place; None where that is its own."""
    devices = manual.count(mesh_axes("length"))
    return zigzag(length, devices) if devices > 1 and config.context_attention == "ring" else None


def laid_out(config: ModelConfig, x_BT: jax.Array) -> jax.Array:
    """An array of whole rows in that order, each device with its share; as it is where rows are not shared."""
    if manual.count(mesh_axes("length")) == 1:
        return x_BT
    x_BT = constrain(x_BT, "batch", None)
    return constrain(_taken(x_BT, order_of(config, x_BT.shape[1])), "batch", "length")


def gathered(config: ModelConfig, x_BT: jax.Array) -> jax.Array:
    """The same backwards: whole rows in their own order."""
    if manual.count(mesh_axes("length")) == 1:
        return x_BT
    order = order_of(config, x_BT.shape[1])
    return _taken(constrain(x_BT, "batch", None), None if order is None else np.argsort(order))


def in_order(x_BTD: jax.Array, order: np.ndarray, like: jax.Array) -> jax.Array:
    """What was made for whole rows in their own order, as `like` lies."""
    taken = x_BTD.at[:, order].get(out_sharding=activation_spec("batch", None, None))
    return jax.sharding.reshard(taken, jax.typeof(like).sharding.spec)


def _taken(x_BT: jax.Array, order: np.ndarray | None) -> jax.Array:
    return x_BT if order is None else x_BT.at[:, order].get(out_sharding=activation_spec("batch", None))
