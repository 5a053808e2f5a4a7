"""What stands between the last layer and the logits: the output projection and BERT's heads."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from maxlm.kernels import manual
from maxlm.models.config import ModelConfig
from maxlm.models.layers import Initializer, Norm, model_norm, project, use
from maxlm.parallel.axes import activation_spec, constrain, mesh_axes


class Head(nnx.Module):
    """The output projection, where embeddings are not tied; what is done before it, and a bias on its logits."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype, init: Initializer):
        shape = (config.padded_vocab_size, config.d_model)
        if not config.tied_embeddings:
            self.kernel = init.normal("kernel", shape, ("vocab", "embed"), config.init_std)
        if config.head_bias:
            self.bias = init.full(shape[:1], ("vocab",), 0.0)
        if config.head_transform:
            self.transform = HeadTransform(config, dtype, init.at("transform"))


class HeadTransform(nnx.Module):
    """A dense layer, GELU and a norm (BERT's code, `get_masked_lm_output`)."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype, init: Initializer):
        self.dtype = dtype
        d = config.d_model
        self.kernel = init.normal("kernel", (d, d), ("embed", "mlp"), config.hidden_init_std)
        self.bias = init.full((d,), ("mlp",), 0.0)
        self.norm: Norm = model_norm(config, init.at("norm"))

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """The same shape and sharding as the residual stream."""
        y_BTD = project(constrain(x_BTD, "batch", "length", "embed"), self.kernel, self.dtype)
        y_BTD = jax.nn.gelu(y_BTD + use(self.bias, self.dtype), approximate=False)
        return self.norm(constrain(y_BTD, "batch", "residual_length", "embed"))


class NextSentence(nnx.Module):
    """Whether the second part of a row follows the first (arXiv:1810.04805, section 3.1): a dense layer and tanh on the
    first token (the pooler), and two logits."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype, init: Initializer):
        self.dtype = dtype
        d = config.d_model
        self.pooler = init.normal("pooler", (d, d), ("embed", "mlp"), config.init_std)
        self.pooler_bias = init.full((d,), ("mlp",), 0.0)
        self.kernel = init.normal("kernel", (d, 2), ("embed", "classes"), config.init_std)
        self.bias = init.full((2,), ("classes",), 0.0)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """The two logits `[B, 2]`, float32, of the last layer's result: the parts follow each other, or do not."""
        # Where rows are shared by position every device takes its first token, and the first device's is the row's.
        first_BCD = _first_of_each_device(constrain(x_BTD, "batch", "length", "embed"))
        pooled_BCD = jnp.tanh(project(first_BCD, self.pooler, self.dtype) + use(self.pooler_bias, self.dtype))
        length = "length" if pooled_BCD.shape[1] > 1 else None
        scores = project(constrain(pooled_BCD, "batch", length, "embed"), self.kernel, self.dtype)
        scores = scores + use(self.bias, self.dtype)
        if scores.shape[1] == 1:
            return scores[:, 0].astype(jnp.float32)
        return jnp.sum(jnp.where(jnp.arange(scores.shape[1])[:, None] == 0, scores.astype(jnp.float32), 0.0), axis=1)


def _first_of_each_device(x_BTD: jax.Array) -> jax.Array:
    """`[B, C, D]`: of C devices that share rows by position, the first token of each."""
    if manual.count(mesh_axes("length")) == 1:
        return x_BTD[:, :1]
    spec = activation_spec("batch", "length", "embed")
    return manual.on_each_device(lambda x_BTD: x_BTD[:, :1], (spec,), spec)(x_BTD)
