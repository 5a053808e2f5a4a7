"""A mixture of experts in place of the feed-forward block: a router, experts, and shared experts beside them.

Every device sorts its own tokens by expert, inside `shard_map`, and multiplies them with the experts' weights, which
are gathered over `fsdp` as a dense block's are, and cut along their inner width by tensor parallelism. Where experts
are spread over devices, tokens travel to them and back (`kernels/exchange.py`).

Shape letters besides those of `layers.py`: E experts, F width of one, A experts of a token, C tokens of an expert, R
rows sorted by expert.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from maxlm.kernels import manual
from maxlm.kernels.dispatch import collect, order_by_expert, spread, spread_choices
from maxlm.kernels.exchange import GatheredTokens, PaddedExchange, RaggedExchange, in_rounds
from maxlm.kernels.grouped_matmul import grouped_matmul
from maxlm.models.attention import Context
from maxlm.models.config import ModelConfig
from maxlm.models.layers import Initializer, project, use
from maxlm.models.mlp import ACTIVATIONS, MLP, gated
from maxlm.models.moe_config import MoEConfig
from maxlm.models.moe_exchange import chosen, most_rows, round_rows
from maxlm.models.routing import Routing, choose_experts, choose_tokens, load_of, routing_of, within_capacity
from maxlm.models.row_order import in_order, order_of
from maxlm.parallel.axes import (
    activation_spec,
    constrain,
    expert_axes,
    mesh_axes,
    names_in,
    sequence_axes,
    token_axes,
)


def moe_config(config: ModelConfig) -> MoEConfig:
    """The section of a model that has experts."""
    if config.moe is None:
        raise ValueError("model.moe is null, and a layer with experts was asked for")
    return config.moe


class Router(nnx.Module):
    """Logits of all experts for each token, in float32, with noise where there is a key for it; and the balancing bias,
    which is no part of them."""

    def __init__(self, config: ModelConfig, init: Initializer):
        moe, self.factor, self.model = moe_config(config), config.scales.router, config
        self.noise, self.noise_scale = moe.router_noise, moe.router_noise_scale or 0.0
        self.kernel = init.normal("kernel", (config.d_model, moe.n_experts), ("embed", "router"), config.init_std)
        if moe.router_bias:
            self.bias = init.full((moe.n_experts,), ("router",), 0.0)
        if moe.balance_bias_rate is not None:
            # In float32 whatever the weights' format: in bfloat16 a step of 0.001 would be lost.
            exact = Initializer(init.key, jnp.dtype(jnp.float32), init.path, init.layers)
            self.balance_bias = exact.full((moe.n_experts,), ("router",), 0.0)

    def __call__(self, x_BTD: jax.Array, noise_key: jax.Array | None = None) -> jax.Array:
        """Logits `[B, T, E]`."""
        x_BTD = x_BTD.astype(jnp.float32)
        if noise_key is not None and self.noise == "jitter":
            low, high = 1 - self.noise_scale, 1 + self.noise_scale
            x_BTD = x_BTD * self._drawn(partial(jax.random.uniform, noise_key, minval=low, maxval=high), x_BTD)
        logits_BTE = project(x_BTD, self.kernel, jnp.float32)
        if self.factor != 1:
            logits_BTE = logits_BTE * self.factor
        if hasattr(self, "bias"):
            logits_BTE = logits_BTE + use(self.bias, jnp.float32)
        if noise_key is not None and self.noise == "gaussian":
            noise = self._drawn(partial(jax.random.normal, noise_key), logits_BTE)
            logits_BTE = logits_BTE + self.noise_scale * noise
        return logits_BTE

    def _drawn(self, draw: Callable[..., jax.Array], like: jax.Array) -> jax.Array:
        """Noise of the shape and sharding of `like`: that of a token follows from its place in its row, wherever it
        lies."""
        if (order := order_of(self.model, like.shape[1])) is None:
            return draw(shape=like.shape, out_sharding=jax.typeof(like).sharding)
        return in_order(draw(shape=like.shape, out_sharding=activation_spec("batch", None, None)), order, like)

    @property
    def balance(self) -> jax.Array | None:
        """The balancing bias `[E]`, if there is one."""
        return use(self.balance_bias, jnp.float32) if hasattr(self, "balance_bias") else None


class Experts(nnx.Module):
    """The routed experts' weights, and how tokens go through them."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype, init: Initializer):
        moe = moe_config(config)
        self.config = moe
        self.activation, self.gated, self.biased, self.dtype = config.mlp, config.gated, moe.expert_bias, dtype
        e, d, f = moe.n_experts, config.d_model, moe.d_ff
        out_std = config.residual_init_std
        self.up = init.normal("up", (e, d, f), ("experts", "expert_embed", "mlp"), config.hidden_init_std)
        self.down = init.normal("down", (e, f, d), ("experts", "mlp", "expert_embed"), out_std)
        if self.gated:
            self.gate = init.normal("gate", (e, d, f), ("experts", "expert_embed", "mlp"), config.hidden_init_std)
        if self.biased:
            self.up_bias = init.full((e, f), ("experts", "mlp"), 0.0)
            self.down_bias = init.full((e, d), ("experts", "expert_embed"), 0.0)
            if self.gated:
                self.gate_bias = init.full((e, f), ("experts", "mlp"), 0.0)

    def __call__(self, x_BTD: jax.Array, index: jax.Array, weights: jax.Array, *, by_token: bool, context: Context):
        """Of each token the weighted sum of its experts, `[B, T, D]` as the residual stream lies.

        `index` and `weights` are `[B, T, A]` with each token's experts, or `[B, E, C]` with each expert's tokens.
        """
        params = nnx.to_pure_dict(nnx.state(self))
        stored = {name: _over_known_axes(param[...].astype(self.dtype)) for name, param in params.items()}
        specs = {name: jax.typeof(weight).sharding.spec for name, weight in stored.items()}
        choices = activation_spec("batch", "length" if by_token else None, None)
        out = activation_spec(*context.residual)
        capacity = self.config.capacity(x_BTD.shape[1]) if context.lengths_B is None else None
        through = partial(self._by_token, capacity=capacity) if by_token else self._by_expert
        local = partial(self._local, through=through, specs=specs, length_axes=sequence_axes(context.residual[1]))
        run = manual.on_each_device(local, (activation_spec("batch", "length", "embed"), choices, choices, specs), out)
        return run(x_BTD, index, weights, stored)

    def _local(self, x_BTD, index, weights, stored, *, through, specs, length_axes):
        weight_of = {name: _gathered(weight, specs[name]) for name, weight in stored.items()}
        # Here and not at the products, so that gradients are added up over tensor parallelism once a token.
        x_BTD = manual.varying(x_BTD, mesh_axes("mlp"))
        y_BTD = through(x_BTD, index, weights, weight_of).reshape(x_BTD.shape)
        if length_axes:
            return manual.scattered_total(y_BTD, length_axes, 1)
        return manual.total(y_BTD, mesh_axes("mlp"))

    def _by_token(self, x_BTD, experts_BTA, weights_BTA, weight_of, *, capacity) -> jax.Array:
        """Each token through the experts that it chose: `[N, D]`, this device's part of sums over the inner width."""
        axes, n_experts = expert_axes(), self.config.n_experts
        x_ND, experts_NA, share_NA = (a.reshape(-1, a.shape[-1]) for a in (x_BTD, experts_BTA, weights_BTA))
        n_devices, (n_tokens, n_choices) = manual.count(axes), experts_NA.shape
        if n_devices == 1:
            order = order_by_expert(experts_NA, n_experts)
            y_RD = self._products(spread(x_ND, order), spread_choices(share_NA, order), order.sizes_E, weight_of)
            return collect(y_RD, order)
        here, even, factor = n_experts // n_devices, n_tokens * n_choices, self.config.exchange_factor
        most = most_rows(n_tokens, x_BTD.shape[0], here, n_choices, capacity)
        ragged = manual.platform() == "tpu"
        if chosen(self.config, n_devices, ragged=ragged) == "all_gather":
            x_GD, experts_GA, share_GA = (manual.gathered(a, axes, 0) for a in (x_ND, experts_NA, share_NA))
            order = order_by_expert(_own(experts_GA, here), here)
            transport = GatheredTokens.of(order, round_rows(even, n_devices * most, factor), n_devices * most)
            y_GD = in_rounds(self._products, x_GD, share_GA, weight_of, transport)
            return manual.scattered_total(y_GD, axes, 0)
        order = order_by_expert(experts_NA, n_experts)
        if ragged:
            rows = round_rows(even, n_devices * most, factor)
            transport = RaggedExchange.of(order, n_devices, axes, rows, n_devices * most)
        else:
            transport = PaddedExchange.of(order, n_devices, axes, round_rows(even / n_devices, most, factor), most)
        share_R = spread_choices(share_NA, order)
        return collect(in_rounds(self._products, spread(x_ND, order), share_R, weight_of, transport), order)

    def _by_expert(self, x_BTD, tokens_BEC, share_BEC, weight_of) -> jax.Array:
        """Each expert on the tokens that it chose: as `_by_token`. Every expert has equally many: no row is padding."""
        axes, n_devices = expert_axes(), manual.count(expert_axes())
        if n_devices == 1 or chosen(self.config, n_devices, ragged=True) == "all_to_all":
            return self._chosen_tokens(x_BTD, tokens_BEC, share_BEC, weight_of, axes if n_devices > 1 else ())
        x_BTD, tokens_BEC, share_BEC = (manual.gathered(a, axes, 0) for a in (x_BTD, tokens_BEC, share_BEC))
        here = self.config.n_experts // n_devices
        own = partial(jax.lax.dynamic_slice_in_dim, start_index=manual.index(axes) * here, slice_size=here, axis=1)
        y_GD = self._chosen_tokens(x_BTD, own(tokens_BEC), own(share_BEC), weight_of, ())
        return manual.scattered_total(y_GD, axes, 0)

    def _chosen_tokens(self, x_BTD, tokens_BEC, share_BEC, weight_of, axes: manual.Axes) -> jax.Array:
        """Experts on tokens that are here; over `axes` their rows are sent to the devices that hold the experts."""
        x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
        n_rows, n_experts = tokens_BEC.shape[:2]
        first_B11 = jnp.arange(n_rows, dtype=tokens_BEC.dtype)[:, None, None] * x_BTD.shape[1]
        source_R, share_R = (jnp.swapaxes(a, 0, 1).reshape(-1) for a in (tokens_BEC + first_B11, share_BEC))

        def send(x_R: jax.Array) -> jax.Array:
            return manual.exchanged(x_R.reshape(n_experts, -1, *x_R.shape[1:]), axes, split=0, join=1)

        x_LMD, share_LM = send(x_ND[source_R]), send(share_R)
        n_here, n_each = share_LM.shape
        sizes_L = jnp.full((n_here,), n_each, jnp.int32)
        y_RD = self._products(x_LMD.reshape(-1, x_LMD.shape[2]), share_LM.reshape(-1), sizes_L, weight_of)
        y_ERD = manual.exchanged(y_RD.reshape(n_here, n_each, -1), axes, split=1, join=0)
        y_RD = y_ERD.reshape(-1, y_ERD.shape[2]).astype(jnp.float32)
        return manual.zeros(x_ND.shape, jnp.float32, y_RD).at[source_R].add(y_RD).astype(self.dtype)

    def _products(
        self, x_RD: jax.Array, share_R: jax.Array, sizes_E: jax.Array, weight_of: dict[str, jax.Array]
    ) -> jax.Array:
        """Each row through its expert, times its share; this device's part of the sum over the inner width.

        Shares are multiplied in before the last product, so that no gradient depends on its result.
        """
        share_R1 = share_R[:, None].astype(self.dtype)
        one_R1 = jnp.ones_like(share_R1)

        def product(x, name, factor_R1=one_R1):
            y = grouped_matmul(x, weight_of[name], sizes_E)
            if not self.biased:
                return y
            bias_EF = weight_of[f"{name}_bias"]
            if name == "down":
                bias_EF = jnp.where(manual.index(mesh_axes("mlp")) == 0, bias_EF, 0)
            # As a product with a column its gradient is summed by groups too.
            return y + grouped_matmul(factor_R1, bias_EF[:, None], sizes_E)

        up_RF = checkpoint_name(product(x_RD, "up"), "expert_up")
        if self.gated:
            hidden_RF = gated(self.activation, checkpoint_name(product(x_RD, "gate"), "expert_gate"), up_RF)
        else:
            hidden_RF = ACTIVATIONS[self.activation](up_RF)
        hidden_RF = (hidden_RF.astype(jnp.float32) * share_R[:, None]).astype(self.dtype)
        return product(hidden_RF, "down", share_R1)


def _gathered(weight: jax.Array, spec: jax.sharding.PartitionSpec) -> jax.Array:
    """Inside: a weight with the pieces that FSDP stores; its gradient is scattered first and then added up over the
    devices that have the same piece. Those of other experts have none of it."""
    storage = tuple(axis for axis in token_axes() if axis not in expert_axes())
    weight = manual.varying(weight, storage)
    for dimension, entry in enumerate(spec):
        weight = manual.gathered(weight, tuple(axis for axis in names_in(entry) if axis in storage), dimension)
    return weight


def _over_known_axes(weight: jax.Array) -> jax.Array:
    """A weight with the pieces that are stored by devices that have the same tokens, which no axis below gathers."""
    known = (*token_axes(), *mesh_axes("mlp"))
    entries = (tuple(a for a in manual.axes_of(weight, d) if a in known) or None for d in range(weight.ndim))
    return manual.bring(weight, jax.sharding.PartitionSpec(*entries))


def _own(experts: jax.Array, here: int) -> jax.Array:
    """Inside: choices by the number of an expert among this device's, and number `here` for those of others."""
    number = experts - manual.index(expert_axes()) * here
    return jnp.where((number >= 0) & (number < here), number, here)


class MoE(nnx.Module):
    """The router chooses, the experts do the work, and shared experts take every token."""

    def __init__(self, config: ModelConfig, dtype: jnp.dtype, init: Initializer):
        self.config, self.model = moe_config(config), config
        self.router = Router(config, init.at("router"))
        self.experts = Experts(config, dtype, init.at("experts"))
        if self.config.n_shared_experts:
            self.shared = MLP(config, dtype, init.at("shared"), d_ff=self.config.shared_width)

    def __call__(self, x_BTD: jax.Array, context: Context) -> tuple[jax.Array, Routing]:
        """The block's addition to the residual stream, and what the router did."""
        x_BTD = constrain(x_BTD, "batch", "length", "embed")
        logits_BTE = self.router(x_BTD, context.noise_key)
        segments_BT = context.segments_BT
        valid_BT = jnp.ones_like(logits_BTE[..., 0], bool) if segments_BT is None else segments_BT > 0
        y_BTD, load_BE, dropped_B = self._routed(x_BTD, logits_BTE, valid_BT, context)
        if hasattr(self, "shared"):
            y_BTD = y_BTD + self.shared(x_BTD, context)
        routing = routing_of(logits_BTE, load_BE, dropped_B, valid_BT, self.config)
        return checkpoint_name(y_BTD, "mlp_out"), routing

    def _routed(self, x_BTD, logits_BTE, valid_BT, context: Context) -> tuple[jax.Array, jax.Array, jax.Array]:
        """What the routed experts add, the load of each, and how many choices (or tokens) were left out."""
        n_experts = self.config.n_experts
        if self.config.router == "expert_choice":
            tokens_BEC, weights_BEC = choose_tokens(logits_BTE, valid_BT, self.config)
            y_BTD = self.experts(x_BTD, tokens_BEC, weights_BEC, by_token=False, context=context)
            taken_BEC = weights_BEC > 0
            load_BE = jnp.sum(taken_BEC, axis=2, dtype=jnp.int32)
            position_T = jnp.arange(x_BTD.shape[1])
            taken_BTE = jnp.any((tokens_BEC[:, None] == position_T[:, None, None]) & taken_BEC[:, None], axis=3)
            left_out_BT = valid_BT & ~jnp.any(taken_BTE, axis=2)
            return y_BTD, load_BE, jnp.sum(left_out_BT, axis=1, dtype=jnp.int32)
        experts_BTA, weights_BTA = choose_experts(logits_BTE, self.router.balance, valid_BT, self.config)
        load_BE = load_of(experts_BTA, n_experts)
        if context.lengths_B is None:
            experts_BTA = within_capacity(experts_BTA, self.config, order_of(self.model, x_BTD.shape[1]))
        kept_BTA = experts_BTA < n_experts
        weights_BTA = jnp.where(kept_BTA, weights_BTA, 0.0)
        y_BTD = self.experts(x_BTD, experts_BTA, weights_BTA, by_token=True, context=context)
        dropped_B = jnp.sum(load_BE, axis=1) - jnp.sum(kept_BTA, axis=(1, 2), dtype=jnp.int32)
        return y_BTD, load_BE, dropped_B
