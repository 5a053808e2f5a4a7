"""What every module is made from: parameters with their logical axes, norms, the cast and gather at the line of use.

Shape letters, here and in every module: B batch, T query positions, S key positions, D d_model, F d_ff, H query heads,
G key and value heads, K head width, V padded vocabulary, L layers.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from maxlm.kernels import manual
from maxlm.models.config import ModelConfig
from maxlm.parallel import axes


class Initializer:
    """Makes parameters, each from the seed and its own name alone, so that adding one does not change another.

    With partitionable threefry the values do not depend on the mesh either. `layers` stacks every parameter on a
    leading axis, for `jax.lax.scan`.
    """

    def __init__(self, key: jax.Array, dtype: jnp.dtype, path: str = "", layers: int | None = None):
        self.key, self.dtype, self.path, self.layers = key, dtype, path, layers

    def at(self, name: str, layers: int | None = None) -> Initializer:
        """The initializer of the part `name`; `layers` stacks what is made in it."""
        return Initializer(self.key, self.dtype, f"{self.path}/{name}", layers or self.layers)

    def normal(self, name: str, shape: tuple[int, ...], logical: axes.LogicalAxes, std: float) -> nnx.Param:
        """Independent normal values of standard deviation `std`."""
        shape, spec = self._stacked(shape, logical)
        key = jax.random.fold_in(self.key, zlib.crc32(f"{self.path}/{name}".encode()))
        value = std * jax.random.normal(key, shape, jnp.float32, out_sharding=spec)
        return self._param(value, logical)

    def full(self, shape: tuple[int, ...], logical: axes.LogicalAxes, value: float) -> nnx.Param:
        """One value everywhere."""
        shape, spec = self._stacked(shape, logical)
        return self._param(jnp.full(shape, value, jnp.float32, out_sharding=spec), logical)

    def _stacked(self, shape: tuple[int, ...], logical: axes.LogicalAxes):
        if self.layers is None:
            return shape, axes.weight_spec(logical)
        return (self.layers, *shape), axes.weight_spec(("layers", *logical))

    def _param(self, value: jax.Array, logical: axes.LogicalAxes) -> nnx.Param:
        return nnx.Param(value.astype(self.dtype), axes=tuple(logical), stacked=self.layers is not None)


def use(param: nnx.Param, dtype: jnp.dtype) -> jax.Array:
    """A weight where it is used: cast to the compute format, then gathered, so that fewer bytes travel."""
    return axes.gather(param[...].astype(dtype), param.get_metadata("axes"))


def project(x: jax.Array, param: nnx.Param, dtype: jnp.dtype, *logical: str | None) -> jax.Array:
    """`x [B, T, *in]` times a weight `[*in, *out]`: `[B, T, *out]`, laid out by the logical axes if given.

    The weight is cast and gathered here, as by `use`. Without logical axes the result's sharding follows from the
    operands', as it does where no contracted axis is sharded.
    """
    spec = axes.activation_spec(*logical) if logical else None
    return _project(x, param[...].astype(dtype), spec, axes.gathered_spec(param.get_metadata("axes")))


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _project(x: jax.Array, weight: jax.Array, spec: PartitionSpec | None, gathered: PartitionSpec) -> jax.Array:
    return _project_forward(x, weight, spec, gathered)[0]


def _project_forward(x, weight, spec, gathered):
    stored = jax.typeof(weight)
    weight = jax.sharding.reshard(weight, gathered)
    n_in = x.ndim - 2
    contracted = tuple(range(2, x.ndim)), tuple(range(n_in))
    return jax.lax.dot_general(x, weight, (contracted, ((), ())), out_sharding=spec), (x, weight, _Stored(stored))


@jax.tree_util.register_static
@dataclass(frozen=True)
class _Stored:
    """How a weight rests: its type, with its sharding."""

    type: Any

    @property
    def spec(self) -> PartitionSpec:
        """One entry a dimension."""
        spec = self.type.sharding.spec
        return PartitionSpec(*spec, *(None,) * (self.type.ndim - len(spec)))


def _project_backward(spec, gathered, saved, dy):
    """The two products of autodiff, but with the rows of the weight gradient's operands flattened first: contracted
    over B and T as two axes, XLA's CPU backend transposes both operands in memory, which takes three times as long."""
    x, weight, stored = saved
    n_in, x_spec = x.ndim - 2, jax.typeof(x).sharding.spec
    dy = jax.sharding.reshard(dy, PartitionSpec(*x_spec[:2], *gathered[n_in:]))
    contracted = tuple(range(2, dy.ndim)), tuple(range(n_in, weight.ndim))
    dx = jax.lax.dot_general(dy, weight, (contracted, ((), ())), out_sharding=PartitionSpec(*x_spec))
    return dx, _weight_gradient(x, dy, gathered, stored.spec)


_project.defvjp(_project_forward, _project_backward)


def _weight_gradient(x: jax.Array, dy: jax.Array, gathered: PartitionSpec, stored: PartitionSpec) -> jax.Array:
    """`x [B, T, *in]` and `dy [B, T, *out]` contracted over tokens: `[*in, *out]`, summed over all devices, as stored.

    Where positions are spread over devices, or some mesh axes only copy the weight and others shard it, the sum is
    scattered over those that shard it and the shards alone are added over the others, by hand: XLA sums the whole
    gradient over all devices there and cuts it afterwards.
    """
    tokens = tuple(axis for axis in axes.token_axes() if manual.count((axis,)) > 1)
    shards = tuple(tuple(axis for axis in axes.names_in(entry) if axis in tokens) for entry in stored)
    scattered = {axis for entry in shards for axis in entry}
    named = {axis for entry in stored for axis in axes.names_in(entry)}
    copied = tuple(axis for axis in tokens if axis not in scattered)
    if not (scattered and copied) and manual.count(axes.mesh_axes("length")) == 1:
        x, dy = _rows(x), _rows(dy)
        dw = jax.lax.dot_general(x, dy, (((0,), (0,)), ((), ())), out_sharding=gathered)
        return jax.sharding.reshard(dw, stored)

    def local(x: jax.Array, dy: jax.Array) -> jax.Array:
        dw = jax.lax.dot_general(_rows(x), _rows(dy), (((0,), (0,)), ((), ())))
        for dimension, entry in enumerate(shards):
            dw = manual.scattered_total(dw, entry, dimension)
        # Along axes of one device too, over which it counts as varying.
        return manual.total(dw, tuple(axis for axis in axes.token_axes() if axis not in named))

    in_specs = jax.typeof(x).sharding.spec, jax.typeof(dy).sharding.spec
    return manual.on_each_device(local, in_specs, stored)(x, dy)


def _rows(x: jax.Array) -> jax.Array:
    """`[B, T, ...]` as `[B T, ...]`."""
    return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])


class Norm(nnx.Module):
    """RMSNorm (arXiv:1910.07467) or LayerNorm (arXiv:1607.06450) over the last axis, in float32."""

    def __init__(self, width: int, kind: str, eps: float, init: Initializer, *, unit_offset: bool = False):
        self.eps, self.centred, self.unit_offset = eps, kind == "layer", unit_offset
        self.scale = init.full((width,), ("norm",), 0.0 if unit_offset else 1.0)
        if self.centred:
            self.bias = init.full((width,), ("norm",), 0.0)

    def __call__(self, x: jax.Array) -> jax.Array:
        """The same shape and dtype as `x`."""
        y = x.astype(jnp.float32)
        if self.centred:
            y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        scale = use(self.scale, jnp.float32)
        y = y * (1 + scale if self.unit_offset else scale)
        if self.centred:
            y = y + use(self.bias, jnp.float32)
        return y.astype(x.dtype)


class HeadsNorm(nnx.Module):
    """RMSNorm over all heads of queries or keys together, the last two axes, in float32."""

    def __init__(self, heads: int, logical: str, config: ModelConfig, init: Initializer):
        self.eps, self.unit_offset = config.norm_eps, config.norm_unit_offset
        start = 0.0 if self.unit_offset else 1.0
        self.scale = init.full((heads, config.head_width), (logical, "head_dim"), start)

    def __call__(self, x_BTHK: jax.Array) -> jax.Array:
        """The same shape and dtype as `x_BTHK`, whose heads may be shared out."""
        y = x_BTHK.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=(-2, -1), keepdims=True) + self.eps)
        scale = use(self.scale, jnp.float32)
        return (y * (1 + scale if self.unit_offset else scale)).astype(x_BTHK.dtype)


def model_norm(config: ModelConfig, init: Initializer) -> Norm:
    """The norm that the config chooses, over the residual stream."""
    return Norm(config.d_model, config.norm, config.norm_eps, init, unit_offset=config.norm_unit_offset)
