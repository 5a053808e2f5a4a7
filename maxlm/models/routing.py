"""From a router's logits to experts and their weights, and what is counted of it. All of it is float32.

Shape letters: B rows, T positions, E experts, A experts of a token, C tokens of an expert, G groups of experts.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from maxlm.kernels import manual
from maxlm.models.moe_config import MoEConfig
from maxlm.parallel.axes import activation_spec, mesh_axes


class Routing(NamedTuple):
    """What a layer's router did with each row's tokens, padding left out: sums over them."""

    load_BE: jax.Array
    """int32: choices of each expert, those that capacity dropped too"""
    probability_BE: jax.Array
    """each expert's probability"""
    z_B: jax.Array
    """the squared log-partition of the logits"""
    entropy_B: jax.Array
    """of the probabilities, in nats"""
    dropped_B: jax.Array
    """int32: choices that found their expert full; with router expert_choice, tokens that no expert took"""
    tokens_B: jax.Array
    """int32: the tokens"""


def choose_experts(
    logits_BTE: jax.Array, balance_bias_E: jax.Array | None, valid_BT: jax.Array, config: MoEConfig
) -> tuple[jax.Array, jax.Array]:
    """The experts of each token `[B, T, A]` int32, best first, and their weights; no expert is number E, weight 0.

    The balancing bias bears on which are chosen and not on their weights (arXiv:2408.15664, equation 3).
    """
    scores_BTE = logits_BTE if config.router == "topk_softmax" else _scores(logits_BTE, config)
    choice_BTE = jax.lax.stop_gradient(scores_BTE)
    if balance_bias_E is not None:
        choice_BTE = choice_BTE + jax.lax.stop_gradient(balance_bias_E)
    if config.n_groups > 1:
        choice_BTE = jnp.where(_in_chosen_groups(choice_BTE, config), choice_BTE, -jnp.inf)
    _, experts_BTA = jax.lax.top_k(choice_BTE, config.experts_per_token)
    # Picked by a sum over experts, whose gradient is no scatter.
    picked_BTAE = experts_BTA[..., None] == jnp.arange(config.n_experts)
    weights_BTA = jnp.sum(jnp.where(picked_BTAE, scores_BTE[:, :, None], 0.0), axis=-1)
    if config.router == "topk_softmax":
        weights_BTA = jax.nn.softmax(weights_BTA, axis=-1)
    elif config.normalize_weights:
        # Sigmoids of very negative logits may all be zero.
        weights_BTA = weights_BTA / (jnp.sum(weights_BTA, axis=-1, keepdims=True) + 1e-20)
    valid_BT1 = valid_BT[..., None]
    experts_BTA = jnp.where(valid_BT1, experts_BTA.astype(jnp.int32), config.n_experts)
    return experts_BTA, jnp.where(valid_BT1, config.routed_scale * weights_BTA, 0.0)


def choose_tokens(logits_BTE: jax.Array, valid_BT: jax.Array, config: MoEConfig) -> tuple[jax.Array, jax.Array]:
    """The tokens of each expert `[B, E, C]` int32, by position in the row, and their weights (arXiv:2202.09368).

    An expert takes `ceil(T A / E)` of a row's T tokens, fewer where there are fewer; weight 0 is no token.
    """
    length, n_experts = logits_BTE.shape[1:]
    capacity = min(-(-length * config.experts_per_token // n_experts), length)
    scores_BTE = jnp.where(valid_BT[..., None], _scores(logits_BTE, config), -1.0)
    scores_BET = manual.bring(jnp.swapaxes(scores_BTE, 1, 2), activation_spec("batch", None, None))
    weights_BEC, tokens_BEC = jax.lax.top_k(scores_BET, capacity)
    return tokens_BEC.astype(jnp.int32), config.routed_scale * jnp.maximum(weights_BEC, 0.0)


def within_capacity(experts_BTA: jax.Array, config: MoEConfig, order_T: np.ndarray | None = None) -> jax.Array:
    """The experts, but number E for choices beyond what the expert takes of a row: earlier tokens come first, and of
    one token the better choice. `order_T`: the position of a row at each place, where that is another."""
    n_experts, capacity = config.n_experts, config.capacity(experts_BTA.shape[1])
    if capacity is None:
        return experts_BTA

    def row(experts_TA: jax.Array) -> jax.Array:
        flat = experts_TA.reshape(-1)
        number = jnp.arange(flat.shape[0], dtype=jnp.int32)
        by_expert, choice = jax.lax.sort((flat, number), num_keys=1, is_stable=True)
        before = number - jnp.searchsorted(by_expert, by_expert, side="left").astype(jnp.int32)
        _, before = jax.lax.sort((choice, before), num_keys=1)
        return jnp.where(before < capacity, flat, n_experts).reshape(experts_TA.shape)

    shared = mesh_axes("length")

    def rows(experts_BTA: jax.Array) -> jax.Array:
        if manual.count(shared) == 1:
            return jax.vmap(row)(experts_BTA)
        # Which choices come first is seen in whole rows alone.
        own, whole = experts_BTA.shape[1], manual.gathered(experts_BTA, shared, 1)
        kept = jax.vmap(row)(whole if order_T is None else whole[:, np.argsort(order_T)])
        kept = kept if order_T is None else kept[:, order_T]
        return jax.lax.dynamic_slice_in_dim(kept, manual.index(shared) * own, own, axis=1)

    spec = activation_spec("batch", "length", None)
    return manual.on_each_device(rows, (spec,), spec)(experts_BTA)


def routing_of(
    logits_BTE: jax.Array, load_BE: jax.Array, dropped_B: jax.Array, valid_BT: jax.Array, config: MoEConfig
) -> Routing:
    """The sums of a layer. Probabilities of router sigmoid are its scores over their sum (arXiv:2412.19437, equation
    19), of the others softmax over all experts."""
    if config.router == "sigmoid":
        scores = _scores(logits_BTE, config)
        probabilities_BTE = scores / (jnp.sum(scores, axis=-1, keepdims=True) + 1e-20)
    else:
        probabilities_BTE = jax.nn.softmax(logits_BTE, axis=-1)
    fixed = jax.lax.stop_gradient(probabilities_BTE)
    entropy_BT = -jnp.sum(fixed * jnp.log(jnp.maximum(fixed, 1e-30)), axis=-1)
    z_BT = jnp.square(jax.nn.logsumexp(logits_BTE, axis=-1))
    return Routing(
        load_BE=load_BE,
        probability_BE=jnp.sum(jnp.where(valid_BT[..., None], probabilities_BTE, 0.0), axis=1),
        z_B=jnp.sum(jnp.where(valid_BT, z_BT, 0.0), axis=1),
        entropy_B=jnp.sum(jnp.where(valid_BT, entropy_BT, 0.0), axis=1),
        dropped_B=dropped_B,
        tokens_B=jnp.sum(valid_BT, axis=1, dtype=jnp.int32),
    )


def load_of(experts_BTA: jax.Array, n_experts: int) -> jax.Array:
    """How many choices each expert has in each row, `[B, E]` int32."""
    chosen_BTAE = experts_BTA[..., None] == jnp.arange(n_experts)
    return jnp.sum(chosen_BTAE, axis=(1, 2), dtype=jnp.int32)


def _scores(logits_BTE: jax.Array, config: MoEConfig) -> jax.Array:
    return jax.nn.sigmoid(logits_BTE) if config.router == "sigmoid" else jax.nn.softmax(logits_BTE, axis=-1)


def _in_chosen_groups(choice_BTE: jax.Array, config: MoEConfig) -> jax.Array:
    """Whether each expert is in a group that the token uses. A group's score is its best expert's, with router sigmoid
    the sum of its two best."""
    n_best = 2 if config.router == "sigmoid" else 1
    choice_BTGE = choice_BTE.reshape(*choice_BTE.shape[:2], config.n_groups, -1)
    score_BTG = jnp.sum(jax.lax.top_k(choice_BTGE, n_best)[0], axis=-1)
    _, groups = jax.lax.top_k(score_BTG, config.groups_per_token)
    chosen_BTG = jnp.any(groups[..., None] == jnp.arange(config.n_groups), axis=2)
    return jnp.repeat(chosen_BTG, config.n_experts // config.n_groups, axis=-1)
