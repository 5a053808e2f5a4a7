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
        first_B1D = _first(constrain(x_BTD, "batch", "length", "embed"))
        pooled_B1D = jnp.tanh(project(first_B1D, self.pooler, self.dtype) + use(self.pooler_bias, self.dtype))
        scores = project(constrain(pooled_B1D, "batch", None, "embed"), self.kernel, self.dtype)
        return (scores + use(self.bias, self.dtype))[:, 0].astype(jnp.float32)


def _first(x_BTD: jax.Array) -> jax.Array:
    """The first token of each row, `[B, 1, D]` on every device: in any order of rows it is the first device's first."""
    shared = mesh_axes("length")
    if manual.count(shared) == 1:
        return x_BTD[:, :1]

    def local(x_BTD: jax.Array) -> jax.Array:
        return manual.total(jnp.where(manual.index(shared) == 0, x_BTD[:, :1], 0), shared)

    spec = activation_spec("batch", "length", "embed")
    return manual.on_each_device(local, (spec,), activation_spec("batch", None, "embed"))(x_BTD)
