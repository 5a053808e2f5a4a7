"""Multi-token prediction (DeepSeek-V3, arXiv:2412.19437, section 2.2): modules that in training predict further ahead.

Module k takes, at position i, the representation that the module before it (the model itself, for the first) gives the
head there, and the vector of token i + k; the head makes of its result the prediction of token i + k + 1. As in the
code that runs DeepSeek-V3's weights, representations are normed before the head and before the next module, by a norm
of each module's own.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from maxlm.models.attention import Context
from maxlm.models.block import Block, remat_policy
from maxlm.models.config import ModelConfig
from maxlm.models.layers import Initializer, model_norm, project
from maxlm.models.routing import Routing
from maxlm.parallel.axes import constrain


class MTPModule(nnx.Module):
    """Both inputs normed and projected to one (equation 21; the matrix over both as two), a layer, a norm."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype, init: Initializer):
        self.dtype = dtype
        d, std = config.d_model, config.hidden_init_std
        self.embedding_norm = model_norm(config, init.at("embedding_norm"))
        self.hidden_norm = model_norm(config, init.at("hidden_norm"))
        self.embedding_proj = init.normal("embedding_proj", (d, d), ("mlp", "embed"), std)
        self.hidden_proj = init.normal("hidden_proj", (d, d), ("mlp", "embed"), std)
        self.block = Block(config, config.layer_kinds[-1], dtype, init.at("block"))
        self.norm = model_norm(config, init.at("norm"))

    def __call__(
        self, hidden_BTD: jax.Array, embedded_BTD: jax.Array, context: Context
    ) -> tuple[jax.Array, Routing | None]:
        """The residual stream after the layer, before `norm`, and what its router did if it has experts."""
        x_BTD = self._project(self.embedding_norm(embedded_BTD), self.embedding_proj, context)
        x_BTD = x_BTD + self._project(self.hidden_norm(hidden_BTD), self.hidden_proj, context)
        x_BTD, _, routing = self.block(x_BTD, context, None)
        return x_BTD, routing

    def _project(self, x_BTD: jax.Array, weight: nnx.Param, context: Context) -> jax.Array:
        return project(constrain(x_BTD, "batch", "length", "mlp"), weight, self.dtype, *context.residual)


def run_module(
    module: MTPModule, hidden_BTD: jax.Array, embedded_BTD: jax.Array, context: Context, config: ModelConfig
) -> tuple[jax.Array, Routing | None]:
    """The representation for the head and the next module, and what the layer's router did if it has experts.

    The layer is under the layers' remat policy; the norm is not, so that the layer's last product is not made again.
    """
    graph, params = nnx.split(module)

    def run(params, hidden_BTD, embedded_BTD):
        return nnx.merge(graph, params)(hidden_BTD, embedded_BTD, context)

    x_BTD, routing = jax.checkpoint(run, policy=remat_policy(config.remat))(params, hidden_BTD, embedded_BTD)
    return module.norm(x_BTD), routing
