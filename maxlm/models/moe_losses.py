"""What a mixture of experts adds to the loss, what is logged of it, and how its balancing bias moves."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from maxlm.models.config import ModelConfig
from maxlm.models.moe import moe_config
from maxlm.models.moe_config import MoEConfig
from maxlm.models.routing import Routing

Routings = dict[str, Routing]
"""What the routers of each stack did, by its name; every array with a leading axis of layers."""

Counts = dict[str, dict[str, jax.Array]]
"""Of each stack and layer, sums over a batch: `load` [L, E], `dropped`, `entropy` and `tokens` [L]."""


def router_losses(
    config: MoEConfig, routings: Routings, weights_BT: jax.Array, n_layers: int | None = None
) -> dict[str, jax.Array]:
    """{"balance_sum", "router_z_sum"}: both losses, unweighted, times the batch's target weights, float32.

    Divided by the target weights of a whole step, they are means over its rows, each counted by its targets, whatever
    the microbatches and the mesh. Both are means over the layers that have experts: these, or `n_layers` where these
    are some of them. The balancing loss over a batch is not of single rows: it takes a step in one batch.
    """
    weight_B = jnp.sum(weights_BT, axis=1)
    layers = [jax.tree.map(lambda x: x.astype(jnp.float32), routing) for routing in routings.values()]
    n_layers = n_layers or sum(routing.tokens_B.shape[0] for routing in layers)
    nothing = jnp.zeros(())
    z = sum((jnp.sum(weight_B * routing.z_B / jnp.maximum(routing.tokens_B, 1.0)) for routing in layers), nothing)
    if config.balance_loss_over == "sequence":
        rows = (balance_loss(routing.load_BE, routing.probability_BE, routing.tokens_B) for routing in layers)
        balance = sum((jnp.sum(weight_B * row_LB) for row_LB in rows), nothing)
    else:
        whole = [
            (jnp.sum(r.load_BE, axis=1), jnp.sum(r.probability_BE, axis=1), jnp.sum(r.tokens_B, axis=1)) for r in layers
        ]
        balance = jnp.sum(weight_B) * sum((jnp.sum(balance_loss(*sums)) for sums in whole), nothing)
    return {"balance_sum": balance / n_layers, "router_z_sum": z / n_layers}


def n_routers(config: ModelConfig) -> int:
    """Layers with experts, those of modules that predict further ahead among them."""
    stacks = sum(len(stack.layers) for segment in config.segments for stack in segment if stack.kind.experts)
    return stacks + config.mtp_layers * config.layer_kinds[-1].experts


def weighed(config: MoEConfig, losses: dict[str, jax.Array]) -> jax.Array:
    """What both losses add to the loss."""
    total = jnp.zeros(())
    if config.balance_loss:
        total = total + config.balance_loss * losses["balance_sum"]
    if config.z_loss:
        total = total + config.z_loss * losses["router_z_sum"]
    return total


def balance_loss(load_E: jax.Array, probability_E: jax.Array, n_tokens: jax.Array) -> jax.Array:
    """Switch Transformer's (arXiv:2101.03961, equation 4) for any number of choices: `E sum_e f_e P_e`, where f_e is
    how often a token chose the expert and P_e its mean probability. Even load gives the number of experts of a token.

    From sums over tokens, with any leading axes.
    """
    n_tokens = jnp.maximum(n_tokens, 1.0)[..., None]
    return load_E.shape[-1] * jnp.sum((load_E / n_tokens) * (probability_E / n_tokens), axis=-1)


def counts_of(routings: Routings) -> Counts:
    """The sums over a batch that metrics and the balancing bias need; no gradient goes through them."""
    found = {
        name: {
            "load": jnp.sum(routing.load_BE, axis=1),
            "dropped": jnp.sum(routing.dropped_B, axis=1),
            "entropy": jnp.sum(routing.entropy_B, axis=1),
            "tokens": jnp.sum(routing.tokens_B, axis=1),
        }
        for name, routing in routings.items()
    }
    return jax.lax.stop_gradient(found)


def routing_metrics(config: ModelConfig, counts: Counts) -> dict[str, jax.Array]:
    """Scalars by name and layer: `expert_load_ratio`, the largest load over the mean; `router_entropy` in nats; and
    `dropped_share`, of choices beyond capacity, or of tokens that no expert took."""
    moe, found = moe_config(config), {}
    drops = moe.capacity_factor is not None or moe.router == "expert_choice"
    for stack in (stack for segment in config.segments for stack in segment if stack.kind.experts):
        count = counts[stack.name]
        load, tokens = count["load"].astype(jnp.float32), jnp.maximum(count["tokens"], 1).astype(jnp.float32)
        could_drop = tokens * (1 if moe.router == "expert_choice" else moe.experts_per_token)
        ratios = {
            "expert_load_ratio": jnp.max(load, axis=1) / jnp.maximum(jnp.mean(load, axis=1), 1e-6),
            "router_entropy": count["entropy"] / tokens,
            **({"dropped_share": count["dropped"] / could_drop} if drops else {}),
        }
        for name, values in ratios.items():
            found |= {f"{name}/layer_{layer}": values[i] for i, layer in enumerate(stack.layers)}
    return found


def rebalanced(config: ModelConfig, params: dict[str, Any], counts: Counts) -> dict[str, Any]:
    """The parameters with each balancing bias moved by `balance_bias_rate` towards even load, by the sign of the mean
    load less the expert's (arXiv:2408.15664, algorithm 1)."""
    rate = moe_config(config).balance_bias_rate
    if not rate:
        return params
    for name, count in counts.items():
        load = count["load"].astype(jnp.float32)
        move = rate * jnp.sign(jnp.mean(load, axis=1, keepdims=True) - load)
        # A module that predicts further ahead has one layer, whose arrays are not stacked.
        place, move = (("decoder", name), move) if "." not in name else ((*name.split("."), "block"), move[0])
        params = _moved(params, (*place, "moe", "router", "balance_bias"), move)
    return params


def _moved(tree: Any, path: tuple[str, ...], move: jax.Array) -> Any:
    """The tree with an array moved."""
    if not path:
        return tree + move
    return {**tree, path[0]: _moved(tree[path[0]], path[1:], move)}
