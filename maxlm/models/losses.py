"""The training loss, from a batch to a sum over its weighted targets."""

from __future__ import annotations

import jax

from maxlm.kernels.cross_entropy import cross_entropy, token_losses
from maxlm.models.config import LossConfig
from maxlm.models.transformer import Model, Params, Transformer

Batch = dict[str, jax.Array]


def next_token_loss(
    model: Model, params: Params, batch: Batch, loss: LossConfig
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The summed loss of a batch's targets, whatever the objective (see `docs/architecture.md` for its arrays), and
    its parts, not normalised.

    Returns the scalar float32 sum over tokens of weight * (cross-entropy + z_loss * log-partition squared), and
    {"nll_sum": the cross-entropy part, "z_sum": the other}; where labels are smoothed, what that adds too.
    """
    module = model.bind(params)
    return cross_entropy(
        module.head_input(last_hidden(module, batch)),
        module.head_weight(),
        batch["targets"],
        batch["weights"],
        vocab_size=model.config.vocab_size,
        bias_V=module.head_bias(),
        softcap=model.config.logit_softcap,
        z_loss=loss.z_loss,
        label_smoothing=loss.label_smoothing,
        chunk_tokens=loss.chunk_tokens,
    )


def token_negative_log_likelihoods(model: Model, params: Params, batch: Batch, loss: LossConfig) -> jax.Array:
    """The cross-entropy of every target, in nats, `[B, T]` float32, without gradients."""
    module = model.bind(params)
    return token_losses(
        module.head_input(last_hidden(module, batch)),
        module.head_weight(),
        batch["targets"],
        vocab_size=model.config.vocab_size,
        bias_V=module.head_bias(),
        softcap=model.config.logit_softcap,
        chunk_tokens=loss.chunk_tokens,
    )


def last_hidden(module: Transformer, batch: Batch) -> jax.Array:
    """The model's result `[B, T, D]` at the positions of a batch's targets."""
    encoded = None
    if module.config.kind == "encoder_decoder":
        encoded = module.encode(batch["encoder_inputs"], batch["encoder_positions"], batch["encoder_segments"])
    types_BT = batch.get("token_types") if module.config.token_types else None
    return module(batch["inputs"], batch["positions"], batch["segments"], types_BT=types_BT, encoded=encoded)
