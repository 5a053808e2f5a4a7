"""The feed-forward block, gated (arXiv:2002.05202) or plain."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from maxlm.models.attention import Context
from maxlm.models.config import ModelConfig
from maxlm.models.layers import Initializer, project, use
from maxlm.parallel.axes import constrain

# GELU by tanh is GPT-2's code's; the exact one, by the error function, is GPT-NeoX's.
ACTIVATIONS = {
    "swiglu": jax.nn.silu,
    "geglu": partial(jax.nn.gelu, approximate=True),
    "gelu": partial(jax.nn.gelu, approximate=True),
    "gelu_exact": partial(jax.nn.gelu, approximate=False),
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
}

# GPT-OSS's clamps and gain (arXiv:2508.10925, section 2.2).
CLAMP, CLAMPED_GAIN = 7.0, 1.702


def gated(kind: str, gate: jax.Array, up: jax.Array) -> jax.Array:
    """The inside of a gated block from its two products."""
    if kind == "swiglu_clamped":
        gate, up = jnp.minimum(gate, CLAMP), jnp.clip(up, -CLAMP, CLAMP)
        return gate * jax.nn.sigmoid(CLAMPED_GAIN * gate) * (up + 1)
    return ACTIVATIONS[kind](gate) * up


class MLP(nnx.Module):
    """Two matmuls around an activation, or three with a gate; `d_ff` wide inside, or as the config says."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype, init: Initializer, d_ff: int | None = None):
        self.config, self.dtype = config, dtype
        d, f = config.d_model, d_ff or config.d_ff
        out_std = config.residual_init_std
        self.up = init.normal("up", (d, f), ("embed", "mlp"), config.hidden_init_std)
        self.down = init.normal("down", (f, d), ("mlp", "embed"), out_std)
        if config.gated:
            self.gate = init.normal("gate", (d, f), ("embed", "mlp"), config.hidden_init_std)
        if config.mlp_bias:
            self.up_bias = init.full((f,), ("mlp",), 0.0)
            self.down_bias = init.full((d,), ("norm",), 0.0)
            if config.gated:
                self.gate_bias = init.full((f,), ("mlp",), 0.0)

    def __call__(self, x_BTD: jax.Array, context: Context) -> jax.Array:
        """The block's addition to the residual stream."""
        x_BTD = constrain(x_BTD, "batch", "length", "embed")
        up_BTF = project(x_BTD, self.up, self.dtype)
        if self.config.mlp_bias:
            up_BTF = up_BTF + use(self.up_bias, self.dtype)
        up_BTF = checkpoint_name(up_BTF, "mlp_up")
        if self.config.gated:
            gate_BTF = project(x_BTD, self.gate, self.dtype)
            if self.config.mlp_bias:
                gate_BTF = gate_BTF + use(self.gate_bias, self.dtype)
            hidden_BTF = gated(self.config.mlp, checkpoint_name(gate_BTF, "mlp_gate"), up_BTF)
        else:
            hidden_BTF = ACTIVATIONS[self.config.mlp](up_BTF)
        y_BTD = project(hidden_BTF, self.down, self.dtype, *context.residual)
        if self.config.mlp_bias:
            y_BTD = y_BTD + use(self.down_bias, self.dtype)
        return checkpoint_name(y_BTD, "mlp_out")
