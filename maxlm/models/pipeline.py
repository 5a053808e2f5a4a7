"""A segment's layers as stages of a pipeline whose backward pass is autodiff's: schedules `gpipe` and `interleaved`.

It takes the place of `run_segment`: rows go in and come out as there. Inside, a scan over ticks; in each, every stage
runs its layers on another microbatch and hands the result to the next.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from maxlm.models.attention import Context
from maxlm.models.config import RematConfig
from maxlm.models.routing import Routing
from maxlm.models.stacks import Segment
from maxlm.models.stage import Made, Shared, Stage, Weights
from maxlm.parallel import pipeline
from maxlm.parallel.axes import gathered_spec, n_stages
from maxlm.parallel.axes_table import STORAGE_NAMES
from maxlm.parallel.pipeline_schedule import PipelineConfig, Turns

Tree = Any


def run_pipelined(
    segment: Segment,
    blocks: Mapping[str, Any],
    x_BTD: jax.Array,
    context: Context,
    remat: RematConfig,
    config: PipelineConfig,
) -> tuple[jax.Array, dict[str, Routing]]:
    """What `run_segment` gives without caches, by stages."""
    turns = Turns.of(config, n_stages(), len(segment[0].layers))
    stage = Stage.of(segment, blocks, remat, turns.per_turn)
    weights = stage_weights(segment, blocks, turns, config, x_BTD.dtype)
    contexts, shared = _by_microbatch(context, turns.microbatches)
    inputs = pipeline.split_rows(x_BTD, turns.microbatches)
    whole, cut = pipeline.by_stage(), pipeline.by_stage(1)

    def ticks(weights, inputs, shared, contexts):
        local = jax.tree.map(lambda w: w[:, 0], weights)
        return _ticks(stage, turns, local, inputs, shared, contexts)

    outputs, made = pipeline.on_each_stage(ticks, (cut, whole, whole, whole), (whole, cut))(
        weights, inputs, shared, contexts
    )
    return pipeline.join_rows(outputs), _routings(made, turns.units)


def stage_weights(
    segment: Segment, blocks: Mapping[str, Any], turns: Turns, config: PipelineConfig, dtype: jnp.dtype
) -> Weights:
    """A segment's weights as stages take turns with them, arrays `[V, P, l, ...]`."""
    states = {stack.name: nnx.split(blocks[stack.name])[1] for stack in segment}
    shape = turns.repeats, turns.stages, turns.per_turn
    stored = jax.tree.map(lambda w: pipeline.in_turns(w, *shape), nnx.to_pure_dict(nnx.State(states)))
    if config.gather_weights == "layer":
        return Weights(stored, None)
    is_param = lambda node: isinstance(node, nnx.Variable)  # noqa: E731
    logical = {
        name: nnx.to_pure_dict(jax.tree.map(lambda p: p.get_metadata("axes"), state, is_leaf=is_param))
        for name, state in states.items()
    }

    def gathered(axes: tuple[str, ...], weight: jax.Array) -> jax.Array | None:
        # Routers are used in float32, and so are norms, which nothing stores in pieces.
        if "router" in axes or not set(axes) & set(STORAGE_NAMES):
            return None
        spec = pipeline.by_stage(1)
        spec = jax.sharding.PartitionSpec(*spec, None, *gathered_spec(axes))
        return jax.sharding.reshard(jax.lax.stop_gradient(weight).astype(dtype), spec)

    return Weights(stored, jax.tree.map(gathered, logical, stored, is_leaf=lambda node: isinstance(node, tuple)))


def _by_microbatch(context: Context, n: int) -> tuple[Context, Shared]:
    """What layers share with arrays of rows cut into microbatches, `[M, B, ...]`; and, so too, what gradients go to."""

    def split(tree: Any) -> Any:
        return jax.tree.map(lambda x: pipeline.split_rows(x, n), tree)

    contexts = context._replace(
        rope=split(context.rope),
        local_rope=split(context.local_rope),
        segments_BT=split(context.segments_BT),
        prefix_BS=split(context.prefix_BS),
        encoded_BSD=None,
        encoded_segments_BS=split(context.encoded_segments_BS),
        bias=None,
        noise_key=None if context.noise_key is None else jax.random.split(context.noise_key, n),
    )
    return contexts, Shared(split(context.encoded_BSD), context.bias)


def _of_microbatch(contexts: Context, m: jax.Array) -> Context:
    """One microbatch's; distances are the same in all."""
    picked = _picked(contexts._replace(distances_LD=None), m)
    return picked._replace(distances_LD=contexts.distances_LD)


def _ticks(stage: Stage, turns: Turns, weights: Weights, inputs: jax.Array, shared: Shared, contexts: Context):
    """Inside a stage: the results of all microbatches, and what routers did, `[V, 1, l, M, B, ...]`."""
    n, stages, repeats = turns.microbatches, turns.stages, turns.repeats
    number = pipeline.stage_number()
    run = _turn(stage, turns)

    def tick(carry, t):
        y_BTD, waiting = carry
        received = pipeline.to_next(y_BTD)
        entering = _picked(inputs, t % n)
        if waiting is not None:
            # What has come around waits at the first stage until all microbatches are in.
            waiting = jax.lax.dynamic_update_index_in_dim(waiting, received, (t - stages) % n, 0)
            entering = jnp.where(t < n, entering, _picked(waiting, t % n))
        x_BTD = jnp.where(number == 0, entering, received)
        turn = jnp.clip((t - number) // n, 0, repeats - 1)
        y_BTD, made = run(weights, shared, x_BTD, contexts, turn, (t - number) % n)
        return (y_BTD, waiting), (y_BTD, made)

    nothing = jnp.zeros_like(inputs[0]), jnp.zeros_like(inputs) if repeats > 1 else None
    _, (outputs, made) = jax.lax.scan(tick, nothing, jnp.arange(turns.forward_ticks, dtype=jnp.int32))

    def own(x: jax.Array) -> jax.Array:
        """Of all ticks those in which this stage had a microbatch."""
        x = jax.lax.dynamic_slice_in_dim(x, number, repeats * n, axis=0)
        return jnp.moveaxis(x.reshape(repeats, n, *x.shape[1:]), 1, 2)[:, None]

    return pipeline.from_stage(outputs[-n:], stages - 1), jax.tree.map(own, made)


def _turn(stage: Stage, turns: Turns):
    """One turn of a stage as a function whose backward keeps what the remat policy says, and no weights."""

    def arguments(weights, shared, contexts, turn, m):
        first = (turn * turns.stages + pipeline.stage_number()) * turns.per_turn
        own = jax.tree.map(lambda w: w[0], weights) if turns.repeats == 1 else _picked(weights, turn)
        return own, first, Shared(_picked(shared.encoded_BSD, m), shared.bias), _of_microbatch(contexts, m)

    @jax.custom_vjp
    def run(weights, shared, x_BTD, contexts, turn, m):
        return forward(weights, shared, x_BTD, contexts, turn, m)[0]

    def forward(weights, shared, x_BTD, contexts, turn, m):
        own, first, mine, context = arguments(weights, shared, contexts, turn, m)
        y_BTD, made, kept = stage.forward(own, first, x_BTD, mine, context)
        return (y_BTD, made), (weights, shared, contexts, turn, m, kept)

    def backward(saved, cotangents):
        weights, shared, contexts, turn, m, kept = saved
        dy_BTD, dmade = cotangents
        own, first, mine, context = arguments(weights, shared, contexts, turn, m)
        dstored, dx_BTD, dmine = stage.backward(own, first, mine, context, kept, dy_BTD, dmade.smooth)
        dstored = jax.tree.map(lambda d, w: _put(d, w, turn), dstored, weights.stored)
        dencoded = jax.tree.map(lambda d, x: _put(d, x, m), dmine.encoded_BSD, shared.encoded_BSD)
        return Weights(dstored, None), Shared(dencoded, dmine.bias), dx_BTD, None, None, None

    run.defvjp(forward, backward)
    return run


def _picked(tree: Any, index: jax.Array) -> Any:
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), tree)


def _put(x: jax.Array, like: jax.Array, index: jax.Array) -> jax.Array:
    return x[None] if like.shape[0] == 1 else jax.lax.dynamic_update_index_in_dim(jnp.zeros_like(like), x, index, 0)


def _routings(made: Made, units: int) -> dict[str, Routing]:
    """What routers did, by layer and row, of arrays `[V, P, l, M, B, ...]`."""

    def by_row(x: jax.Array) -> jax.Array:
        x = pipeline.whole_on_stages(x)
        rows = jax.typeof(x).sharding.spec[3:]
        x = x.reshape(-1, *x.shape[3:], out_sharding=jax.sharding.PartitionSpec(None, *rows))[:units]
        return jax.vmap(pipeline.join_rows)(x)

    return {
        name: jax.tree.map(by_row, counts._replace(probability_BE=made.smooth[name][0], z_B=made.smooth[name][1]))
        for name, counts in made.counts.items()
    }
