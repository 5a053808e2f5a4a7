"""One optimizer step as a pure function of state and batch. `train` runs it, `plan` compiles it, tests compare it."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from maxlm.models.config import LossConfig, ModelConfig
from maxlm.models.losses import Batch, next_token_loss
from maxlm.models.moe_losses import rebalanced, routing_metrics
from maxlm.models.one_forward_one_backward import loss_and_gradients
from maxlm.models.transformer import Model, Params
from maxlm.parallel.axes import activation_spec, n_stages
from maxlm.training.config import OptimizerConfig, SpikeConfig, TrainConfig
from maxlm.training.schedule import Schedule
from maxlm.training.state import Guard, Placement, TrainState, reshard_tree

Metrics = dict[str, jax.Array]
TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def make_train_step(
    model: Model,
    optimizer: optax.GradientTransformation,
    schedule: Schedule,
    placement: Placement,
    train: TrainConfig,
    optimizer_config: OptimizerConfig,
    loss_config: LossConfig,
) -> TrainStep:
    """Builds `train_step(state, batch) -> (state, metrics)`, pure, to be jitted with the state donated.

    The loss is the mean over the batch's weighted targets, whatever the number of microbatches. A step whose loss or
    gradient norm is not finite or leaps (`SpikeConfig`) leaves parameters and optimizer as they were, is
    counted, and costs no host round trip. Metrics: loss (with z-loss), nll (without), grad_norm, learning_rate,
    skipped_steps; next_sentence_loss where that is asked for; and of a mixture of experts balance_loss, router_z_loss
    and those of `routing_metrics`.
    """

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        noise_key = step_noise_key(model.config, train.seed, state.step)
        (loss, parts), grads = accumulated_gradients(
            model, state.params, batch, loss_config, train.accumulation, noise_key
        )
        grads = reshard_tree(grads, placement.optimizer)
        grad_norm = global_norm(grads)
        accept, guard = watch(state.guard, loss, grad_norm, train.spike)
        if optimizer_config.clip_norm is not None:
            scale = jnp.minimum(1.0, optimizer_config.clip_norm / (grad_norm + 1e-6))
            grads = jax.tree.map(lambda g: g * scale.astype(g.dtype), grads)
        learning_rate = schedule(state.step)
        params = reshard_tree(state.params, placement.optimizer)
        updates, opt_state = optimizer.update(grads, state.opt_state, params)
        params = jax.tree.map(lambda p, u: (p - learning_rate * u).astype(p.dtype), params, updates)
        params = reshard_tree(params, placement.params)
        if (routing := parts.pop("routing", None)) is not None:
            params = rebalanced(model.config, params, routing)
            parts |= routing_metrics(model.config, routing)
        params, opt_state = select(accept, (params, opt_state), (state.params, state.opt_state))
        metrics = {
            "loss": loss,
            **parts,
            "grad_norm": grad_norm,
            "learning_rate": learning_rate,
            "skipped_steps": guard.skipped,
        }
        return TrainState(params=params, opt_state=opt_state, step=state.step + 1, guard=guard), metrics

    return train_step


def step_noise_key(config: ModelConfig, seed: int, step: jax.Array) -> jax.Array | None:
    """What the noise of a step is made from, by the run's seed and the steps done alone; None for models without."""
    if config.moe is None or config.moe.router_noise == "none":
        return None
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), zlib.crc32(b"router noise")), step)


def accumulated_gradients(
    model: Model,
    params: Params,
    batch: Batch,
    loss_config: LossConfig,
    accumulation: int,
    noise_key: jax.Array | None = None,
) -> tuple[tuple[jax.Array, dict[str, Any]], Params]:
    """((loss, parts), gradients): means over the batch's weighted targets, one microbatch at a time in float32 sums.

    Parts are nll, and of a mixture of experts balance_loss and router_z_loss, and routing: sums (`moe_losses.Counts`).

    Microbatch i takes every accumulation-th row, so that each device cuts its own rows and none travel. Each has its
    own key for noise.
    """
    targets = jnp.maximum(jnp.sum(batch["weights"]), 1.0)

    def mean_loss(params: Params, micro: Batch, noise_key: jax.Array | None):
        return means(*next_token_loss(model, params, micro, loss_config, noise_key))

    def by_turns(params: Params, micro: Batch, noise_key: jax.Array | None):
        summed, grads = loss_and_gradients(model, params, micro, loss_config, 1.0 / targets, noise_key)
        return means(*summed), grads

    def means(total: jax.Array, parts: dict[str, Any]):
        mean = total / targets
        found = {"nll": parts["nll_sum"] / targets}
        if "next_sentence_sum" in parts:
            found["next_sentence_loss"] = parts["next_sentence_sum"] / targets
        if "routing" in parts:
            found["balance_loss"] = parts["balance_sum"] / targets
            found["router_z_loss"] = parts["router_z_sum"] / targets
            found["routing"] = parts["routing"]
        return mean, found

    value_and_grad = jax.value_and_grad(mean_loss, has_aux=True)
    if n_stages() > 1 and model.pipeline.schedule == "1f1b":
        value_and_grad = by_turns
    if accumulation == 1:
        return value_and_grad(params, batch, noise_key)

    def split(x):
        rows = (x.shape[0] // accumulation, accumulation, *x.shape[1:])
        x = x.reshape(rows, out_sharding=activation_spec("batch", None, *(None,) * (x.ndim - 1)))
        return jnp.swapaxes(x, 0, 1)

    def add(total, micro):
        return jax.tree.map(jnp.add, total, value_and_grad(params, *micro)), None

    keys = None if noise_key is None else jax.random.split(noise_key, accumulation)
    micros = jax.tree.map(split, batch), keys
    sums = jax.eval_shape(mean_loss, params, *jax.tree.map(lambda x: x[0], micros))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), sums)
    zeros = zeros, jax.tree.map(lambda p: jnp.zeros_like(p, jnp.float32), params)
    return jax.lax.scan(add, zeros, micros)[0]


def global_norm(tree: Params) -> jax.Array:
    """The 2-norm over all arrays of a tree together, float32."""
    return jnp.sqrt(sum(jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(tree)))


def limits(guard: Guard, spike: SpikeConfig) -> tuple[jax.Array, jax.Array]:
    """The largest loss and gradient norm that are no leap: `sigmas` above the recent mean, once the rings are full."""
    sigmas = spike.sigmas
    if sigmas is None:
        return jnp.float32(jnp.inf), jnp.float32(jnp.inf)

    def limit(ring: jax.Array) -> jax.Array:
        full = guard.recorded >= ring.shape[0]
        return jnp.where(full, jnp.mean(ring) + sigmas * jnp.std(ring), jnp.inf)

    return limit(guard.losses), limit(guard.grad_norms)


def watch(guard: Guard, loss: jax.Array, grad_norm: jax.Array, spike: SpikeConfig) -> tuple[jax.Array, Guard]:
    """Whether a step is finite and no leap, and the guard after it.

    A finite step enters the rings in place of the oldest, at most as high as its limit: one spike hardly moves the
    mean, and a lasting rise becomes normal after some steps instead of ending all learning.
    """
    loss_limit, norm_limit = limits(guard, spike)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    accept = finite & (loss <= loss_limit) & (grad_norm <= norm_limit)
    here = (jnp.arange(guard.losses.shape[0]) == guard.recorded % guard.losses.shape[0]) & finite
    return accept, Guard(
        losses=jnp.where(here, jnp.minimum(loss, loss_limit), guard.losses),
        grad_norms=jnp.where(here, jnp.minimum(grad_norm, norm_limit), guard.grad_norms),
        recorded=guard.recorded + finite.astype(jnp.int32),
        skipped=guard.skipped + (~accept).astype(jnp.int32),
    )


def select(condition: jax.Array, new, old):
    """`new` where the condition holds, else `old`, array by array."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)
