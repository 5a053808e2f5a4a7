"""The training loss, from a batch to a sum over its weighted targets."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from maxlm.data.sentence_pairs import FOLLOWS
from maxlm.kernels.cross_entropy import cross_entropy, token_losses
from maxlm.models.config import LossConfig, ModelConfig
from maxlm.models.moe_losses import Routings, counts_of, n_routers, router_losses, weighed
from maxlm.models.row_order import gathered, laid_out
from maxlm.models.transformer import Model, Params, Transformer

Batch = dict[str, jax.Array]


def next_token_loss(
    model: Model, params: Params, batch: Batch, loss: LossConfig, noise_key: jax.Array | None = None
) -> tuple[jax.Array, dict[str, Any]]:
    """The summed loss of a batch's targets, whatever the objective (see `docs/architecture.md` for its arrays), and
    its parts, not normalised.

    Returns the scalar float32 sum over tokens of weight * (cross-entropy + z_loss * log-partition squared), and
    {"nll_sum": the cross-entropy part, "z_sum": the other}; where labels are smoothed, what that adds too. With
    `model.mtp_layers` the sum has besides, as "mtp_sum", mtp_weight times the modules' mean (arXiv:2412.19437, equation
    25). Where a batch asks for next sentences there is "next_sentence_sum": each row's cross-entropy of that times the
    weights of its targets, so that divided by all weights it is a mean. A mixture of experts adds its routers' losses,
    each times its weight, and the parts "balance_sum", "router_z_sum" and "routing" (see `moe_losses.py`). `noise_key`
    is for training: the noise of its routers.
    """
    module = model.bind(params)
    x_BTD, routings = last_hidden(module, batch_laid_out(model.config, batch), noise_key)
    return loss_of_hidden(module, x_BTD, routings, batch, loss, noise_key)


def loss_of_hidden(
    module: Transformer,
    x_BTD: jax.Array,
    routings: Routings,
    whole: Batch,
    loss: LossConfig,
    noise_key: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, Any]]:
    """The same from what `last_hidden` gives, and the batch with its rows in their own order; of `routings` it may be a
    part, whose layers' share is added then."""
    batch = batch_laid_out(module.config, whole)
    total, parts = _head_loss(module, x_BTD, batch["targets"], batch["weights"], loss, z_loss=loss.z_loss)
    if module.config.mtp_layers:
        mtp_sum, ahead = _mtp_loss(module, x_BTD, batch, whole, loss, noise_key)
        total, parts, routings = total + mtp_sum, parts | {"mtp_sum": jax.lax.stop_gradient(mtp_sum)}, routings | ahead
    if "next_sentence" in batch:
        next_sum = _next_sentence_loss(module, x_BTD, whole)
        total, parts = total + next_sum, parts | {"next_sentence_sum": jax.lax.stop_gradient(next_sum)}
    if (moe := module.config.moe) is None:
        return total, parts
    added = router_losses(moe, routings, batch["weights"], n_routers(module.config))
    total = total + weighed(moe, added)
    return total, {**parts, **jax.lax.stop_gradient(added), "routing": counts_of(routings)}


def batch_laid_out(config: ModelConfig, batch: Batch) -> Batch:
    """The arrays that the model takes, as their rows lie on the mesh."""
    return {name: laid_out(config, x_BT) for name, x_BT in batch.items()}


def _mtp_loss(
    module: Transformer, x_BTD: jax.Array, batch: Batch, whole: Batch, loss: LossConfig, noise_key: jax.Array | None
) -> tuple[jax.Array, Routings]:
    """The weighed loss of the modules that predict further ahead, summed over tokens, and what their routers did.
    `whole` is the batch with its rows in their own order, of which what lies further ahead is taken."""
    n_ahead, targets_BT, lay_out = module.config.mtp_layers, whole["targets"], partial(laid_out, module.config)
    tokens = [lay_out(shifted(targets_BT, k)) for k in range(n_ahead)]
    streams, routings = module.ahead(x_BTD, tokens, batch["positions"], batch["segments"], noise_key)
    sums = [
        _head_loss(module, stream, lay_out(shifted(targets_BT, k)), lay_out(weights_ahead(whole, k)), loss, z_loss=0.0)[
            0
        ]
        for k, stream in enumerate(streams, start=1)
    ]
    return loss.mtp_weight / n_ahead * jnp.sum(jnp.stack(sums)), routings


def _next_sentence_loss(module: Transformer, x_BTD: jax.Array, batch: Batch) -> jax.Array:
    """The summed cross-entropy of whether a row's parts follow each other, of rows that ask, by their targets."""
    asked_B = batch["next_sentence"][:, 0]
    log_p_B2 = jax.nn.log_softmax(module.next_sentence(x_BTD), axis=-1)
    nll_B = -jnp.where(asked_B == FOLLOWS, log_p_B2[:, 0], log_p_B2[:, 1])
    return jnp.sum(jnp.where(asked_B > 0, nll_B * jnp.sum(batch["weights"], axis=1), 0.0))


def weights_ahead(batch: Batch, k: int) -> jax.Array:
    """The weights of targets k further ahead: those of the targets themselves, and 0 where another document is."""
    segments_BT, weights_BT = batch["segments"], shifted(batch["weights"], k)
    return jnp.where(shifted(segments_BT, k) == segments_BT, weights_BT, 0.0)


def shifted(x_BT: jax.Array, k: int) -> jax.Array:
    """What lies k further ahead in the row, and 0 behind its end."""
    return jnp.pad(x_BT[:, k:], ((0, 0), (0, min(k, x_BT.shape[1]))))


def _head_loss(
    module: Transformer, x_BTD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array, loss: LossConfig, z_loss: float
) -> tuple[jax.Array, dict[str, jax.Array]]:
    return cross_entropy(
        module.head_input(x_BTD),
        module.head_weight(),
        targets_BT,
        weights_BT,
        vocab_size=module.config.vocab_size,
        bias_V=module.head_bias(),
        softcap=module.config.logit_softcap,
        z_loss=z_loss,
        label_smoothing=loss.label_smoothing,
        chunk_tokens=loss.chunk_tokens,
    )


def token_negative_log_likelihoods(model: Model, params: Params, batch: Batch, loss: LossConfig) -> jax.Array:
    """The cross-entropy of every target, in nats, `[B, T]` float32, without gradients."""
    module, batch = model.bind(params), batch_laid_out(model.config, batch)
    losses_BT = token_losses(
        module.head_input(last_hidden(module, batch)[0]),
        module.head_weight(),
        batch["targets"],
        vocab_size=model.config.vocab_size,
        bias_V=module.head_bias(),
        softcap=model.config.logit_softcap,
        chunk_tokens=loss.chunk_tokens,
    )
    return gathered(model.config, losses_BT)


def last_hidden(module: Transformer, batch: Batch, noise_key: jax.Array | None = None) -> tuple[jax.Array, Routings]:
    """The model's result `[B, T, D]` at the positions of a batch's targets, and what its routers did. Of a batch whose
    rows lie as `row_order.laid_out` lays them."""
    encoded = None
    if module.config.kind == "encoder_decoder":
        encoded = module.encode(batch["encoder_inputs"], batch["encoder_positions"], batch["encoder_segments"])
    types_BT = batch.get("token_types") if module.config.token_types else None
    return module.with_routing(
        batch["inputs"],
        batch["positions"],
        batch["segments"],
        types_BT=types_BT,
        encoded=encoded,
        prefix_BT=batch.get("prefix"),
        noise_key=noise_key,
    )
