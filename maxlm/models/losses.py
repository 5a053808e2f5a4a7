"""The training loss, from a batch to a sum over its weighted targets."""

from __future__ import annotations

import jax

from maxlm.kernels.cross_entropy import cross_entropy, token_losses
from maxlm.models.config import LossConfig
from maxlm.models.transformer import Model, Params

Batch = dict[str, jax.Array]


def next_token_loss(
    model: Model, params: Params, batch: Batch, loss: LossConfig
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The summed loss of a batch (see `docs/architecture.md` for its arrays), and its parts, not normalised.

    Returns the scalar float32 sum over tokens of weight * (cross-entropy + z_loss * log-partition squared), and
    {"nll_sum": the cross-entropy part, "z_sum": the other}.
    """
    module = model.bind(params)
    x_BTD = module(batch["inputs"], batch["positions"], batch["segments"])
    return cross_entropy(
        x_BTD,
        module.head_weight(),
        batch["targets"],
        batch["weights"],
        vocab_size=model.config.vocab_size,
        softcap=model.config.logit_softcap,
        z_loss=loss.z_loss,
        chunk_tokens=loss.chunk_tokens,
    )


def token_negative_log_likelihoods(model: Model, params: Params, batch: Batch, loss: LossConfig) -> jax.Array:
    """The cross-entropy of every target, in nats, `[B, T]` float32, without gradients."""
    module = model.bind(params)
    x_BTD = module(batch["inputs"], batch["positions"], batch["segments"])
    return token_losses(
        x_BTD,
        module.head_weight(),
        batch["targets"],
        vocab_size=model.config.vocab_size,
        softcap=model.config.logit_softcap,
        chunk_tokens=loss.chunk_tokens,
    )
