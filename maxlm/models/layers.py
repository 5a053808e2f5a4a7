"""What every module is made from: parameters with their logical axes, norms, the cast and gather at the line of use.

Shape letters, here and in every module: B batch, T query positions, S key positions, D d_model, F d_ff, H query heads,
G key and value heads, K head width, V padded vocabulary, L layers.
"""

from __future__ import annotations

import zlib
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

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


def project(x: jax.Array, weight: jax.Array, *logical: str | None) -> jax.Array:
    """`x [B, T, *in]` times `weight [*in, *out]`: `[B, T, *out]`, laid out by the logical axes if given.

    Without them the result's sharding follows from the operands', as it does where no contracted axis is sharded.
    """
    return _project(x, weight, axes.activation_spec(*logical) if logical else None)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _project(x: jax.Array, weight: jax.Array, spec: PartitionSpec | None) -> jax.Array:
    n_in = x.ndim - 2
    contracted = tuple(range(2, x.ndim)), tuple(range(n_in))
    return jax.lax.dot_general(x, weight, (contracted, ((), ())), out_sharding=spec)


def _project_forward(x, weight, spec):
    return _project(x, weight, spec), (x, weight)


def _project_backward(spec, saved, dy):
    """The two products of autodiff, but with the rows of the weight gradient's operands flattened first: contracted
    over B and T as two axes, XLA's CPU backend transposes both operands in memory, which takes three times as long."""
    x, weight = saved
    n_in, x_spec, weight_spec = x.ndim - 2, jax.typeof(x).sharding.spec, jax.typeof(weight).sharding.spec
    dy = jax.sharding.reshard(dy, PartitionSpec(*x_spec[:2], *weight_spec[n_in:]))
    contracted = tuple(range(2, dy.ndim)), tuple(range(n_in, weight.ndim))
    dx = jax.lax.dot_general(dy, weight, (contracted, ((), ())), out_sharding=PartitionSpec(*x_spec))
    x_rows, dy_rows = (a.reshape(a.shape[0] * a.shape[1], *a.shape[2:]) for a in (x, dy))
    dw = jax.lax.dot_general(x_rows, dy_rows, (((0,), (0,)), ((), ())), out_sharding=PartitionSpec(*weight_spec))
    return dx, dw


_project.defvjp(_project_forward, _project_backward)


class Norm(nnx.Module):
    """RMSNorm (arXiv:1910.07467) or LayerNorm (arXiv:1607.06450) over the last axis, in float32."""

    def __init__(self, width: int, kind: str, eps: float, init: Initializer):
        self.eps, self.centred = eps, kind == "layer"
        self.scale = init.full((width,), ("norm",), 1.0)
        if self.centred:
            self.bias = init.full((width,), ("norm",), 0.0)

    def __call__(self, x: jax.Array) -> jax.Array:
        """The same shape and dtype as `x`."""
        y = x.astype(jnp.float32)
        if self.centred:
            y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        y = y * use(self.scale, jnp.float32)
        if self.centred:
            y = y + use(self.bias, jnp.float32)
        return y.astype(x.dtype)


def model_norm(config: ModelConfig, init: Initializer) -> Norm:
    """The norm that the config chooses, over the residual stream."""
    return Norm(config.d_model, config.norm, config.norm_eps, init)
