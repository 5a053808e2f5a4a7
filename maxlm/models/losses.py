"""The training loss, from a batch to a sum over its weighted targets."""

from __future__ import annotations

from typing import Any

import jax

from maxlm.kernels.cross_entropy import cross_entropy, token_losses
from maxlm.models.config import LossConfig
from maxlm.models.moe_losses import counts_of, router_losses
from maxlm.models.transformer import Model, Params

Batch = dict[str, jax.Array]


def next_token_loss(model: Model, params: Params, batch: Batch, loss: LossConfig) -> tuple[jax.Array, dict[str, Any]]:
    """The summed loss of a batch (see `docs/architecture.md` for its arrays), and its parts, not normalised.

    Returns the scalar float32 sum over tokens of weight * (cross-entropy + z_loss * log-partition squared), and
    {"nll_sum": the cross-entropy part, "z_sum": the other}. A mixture of experts adds its routers' losses, each times
    its weight, and the parts "balance_sum", "router_z_sum" and "routing" (see `moe_losses.py`).
    """
    module = model.bind(params)
    x_BTD, routings = module.with_routing(batch["inputs"], batch["positions"], batch["segments"])
    total, parts = cross_entropy(
        x_BTD,
        module.head_weight(),
        batch["targets"],
        batch["weights"],
        vocab_size=model.config.vocab_size,
        softcap=model.config.logit_softcap,
        z_loss=loss.z_loss,
        chunk_tokens=loss.chunk_tokens,
    )
    if (moe := model.config.moe) is None:
        return total, parts
    added = router_losses(moe, routings, batch["weights"])
    if moe.balance_loss:
        total = total + moe.balance_loss * added["balance_sum"]
    if moe.z_loss:
        total = total + moe.z_loss * added["router_z_sum"]
    return total, {**parts, **jax.lax.stop_gradient(added), "routing": counts_of(routings)}


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
