"""Pipeline schedule 1F1B: loss and gradients in one pass, with activations of 2 P - 1 microbatches however many run.

All P stages do the same at the same time. Stage s runs microbatch m forward in tick m + s and backward in tick
m + 2 P - 2 - s, which is the same tick at the last stage. So there are P - 1 ticks of forward alone, M of both, and
P - 1 of backward alone: M + P - 1 forward and as many backward, the least that P stages can do M microbatches in. What
backward needs of forward is kept in a ring of 2 P - 1 places. There are no branches: what a stage computes while it has
no microbatch is thrown away.

Embedding and head are outside of the stages: every stage has a share of the vocabulary (arXiv:2411.05288), looks up the
microbatch that enters and makes its share of the logits of the one that leaves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from maxlm.models.attention import Context
from maxlm.models.block import run_segment
from maxlm.models.config import LossConfig
from maxlm.models.losses import Batch, batch_laid_out, loss_of_hidden
from maxlm.models.moe_losses import Routings, counts_of, n_routers, router_losses, weighed
from maxlm.models.pipeline import stage_weights
from maxlm.models.routing import Routing
from maxlm.models.stacks import Segment, longest
from maxlm.models.stage import Made, Shared, Stage, Weights
from maxlm.models.transformer import Model, Params, Transformer
from maxlm.parallel import pipeline
from maxlm.parallel.axes import n_stages
from maxlm.parallel.pipeline_schedule import Turns

Tree = Any


def loss_and_gradients(
    model: Model, params: Params, batch: Batch, loss: LossConfig, scale: jax.Array, noise_key: jax.Array | None = None
) -> tuple[tuple[jax.Array, dict[str, Any]], Params]:
    """What `next_token_loss` gives, and gradients of `scale` times the loss by all parameters, in their formats.

    Each microbatch of `model.pipeline` has its own key for noise. Needs a mesh with stages, and rows that the
    microbatches divide.
    """
    side, segment = _segment(model)
    turns = Turns.of(model.pipeline, n_stages(), len(segment[0].layers))
    names = [stack.name for stack in segment]
    module = model.bind(params)
    stage = Stage.of(segment, getattr(module, side), model.config.remat, turns.per_turn)
    weights = stage_weights(segment, getattr(module, side), turns, model.pipeline, module.dtype)
    rest, cuts = _rest(model, params, side, names)
    n = turns.microbatches
    micros = jax.tree.map(lambda x: pipeline.split_rows(x, n), batch)
    keys = None if noise_key is None else jax.random.split(noise_key, n)

    def on_stage(weights, rest, micros, keys, scale):
        local = jax.tree.map(lambda w: w[0, 0], weights)
        run = _OnStage(model, side, segment, stage, turns, local, rest, micros, keys, scale, loss)
        return _ticks(run)

    whole, cut = pipeline.by_stage(), pipeline.by_stage(1)
    rest_specs = jax.tree.map(pipeline.by_stage, cuts, is_leaf=lambda node: node is None)
    out_specs = whole, cut, cut, rest_specs
    run = pipeline.on_each_stage(on_stage, (cut, rest_specs, whole, whole, whole), out_specs)
    (total, parts), counts, dstored, drest = run(weights, rest, micros, keys, scale)
    if counts:
        parts["routing"] = parts["routing"] | {name: _by_layer(count, turns.units) for name, count in counts.items()}
    stacks = params[side]
    drest[side] |= {
        name: jax.tree.map(lambda d, w: pipeline.in_a_row(d, w).astype(w.dtype), dstored[name], stacks[name])
        for name in names
    }
    return (total, parts), jax.tree.map(lambda d, w: pipeline.laid_as(d, w).astype(w.dtype), drest, params)


def _segment(model: Model) -> tuple[str, Segment]:
    return ("encoder" if model.config.kind == "encoder" else "decoder"), longest(model.config.segments)


def _rest(model: Model, params: Params, side: str, names: list[str]) -> tuple[Params, Tree]:
    """What is not in the stages, whole over stages but for the vocabulary, of which each has a piece; and along which
    dimension that is, or None."""

    def without(tree: Params) -> Params:
        return {**tree, side: {name: stack for name, stack in tree[side].items() if name not in names}}

    is_logical = lambda node: isinstance(node, tuple)  # noqa: E731
    cuts = jax.tree.map(
        lambda logical: logical.index("vocab") if "vocab" in logical else None,
        without(model.logical_axes()),
        is_leaf=is_logical,
    )

    def bring(cut: int | None, x: jax.Array) -> jax.Array:
        return pipeline.whole_on_stages(x) if cut is None else pipeline.cut_by_stage(x, cut)

    return jax.tree.map(bring, cuts, without(params), is_leaf=lambda node: node is None), cuts


def _by_layer(count: dict[str, jax.Array], units: int) -> dict[str, jax.Array]:
    """Sums `[1, P, l, ...]` by layer."""

    def flat(x: jax.Array) -> jax.Array:
        return pipeline.whole_on_stages(x).reshape(-1, *x.shape[3:])[:units]

    return jax.tree.map(flat, count)


class _Sums(NamedTuple):
    """What is added up over ticks."""

    finished: Any
    """total and parts of microbatches at their end"""
    entered: Any
    """the same of what is before the stages"""
    passed: Any
    """what routers of the stage add to the loss, and their counts"""
    dstored: Tree
    drest: Tree


@dataclass(frozen=True)
class _OnStage:
    """One stage's view of a step."""

    model: Model
    side: str
    segment: Segment
    stage: Stage
    turns: Turns
    weights: Weights
    rest: Params
    micros: Batch
    keys: jax.Array | None
    scale: jax.Array
    loss: LossConfig

    def whole_micro(self, m: jax.Array) -> tuple[Batch, jax.Array | None]:
        """A microbatch and its key for noise; some other where there is none of that number."""
        m = jnp.clip(m, 0, self.turns.microbatches - 1)
        return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, m, keepdims=False), (self.micros, self.keys))

    def micro(self, m: jax.Array) -> tuple[Batch, jax.Array | None]:
        """The same with its rows as they lie on the mesh."""
        batch, noise_key = self.whole_micro(m)
        return batch_laid_out(self.model.config, batch), noise_key

    @property
    def first(self) -> jax.Array:
        """The number of the stage's first repeat of the segment's pattern."""
        return pipeline.stage_number() * self.turns.per_turn

    def module(self, rest: Params) -> Transformer:
        """The model with this stage's layers in the place of all."""
        return self.model.bind({**rest, self.side: {**rest[self.side], **self.weights.stored}})

    def context(self, rest: Params, batch: Batch, noise_key: jax.Array | None) -> Context:
        """What the layers of a microbatch share."""
        return self.module(rest)._context(
            self.side, batch["positions"], batch["segments"], prefix_BS=batch.get("prefix"), noise_key=noise_key
        )

    def layers_context(self, m: jax.Array) -> tuple[Context, Shared]:
        """The same as a stage takes it; without gradients."""
        context = self.context(self.rest, *self.micro(m))
        return context._replace(bias=None), Shared(None, context.bias)

    def enter(self, rest: Params, m: jax.Array) -> tuple[tuple[jax.Array, jax.Array], Any]:
        """The residual stream of a microbatch as the first stage takes it, routers' losses up to there, and parts."""
        module, (batch, noise_key) = self.module(rest), self.micro(m)
        context, blocks, config = self.context(rest, batch, noise_key), getattr(module, self.side), self.model.config
        types_BT = batch.get("token_types") if config.token_types else None
        x_BTD = module.embedding(batch["inputs"], batch["positions"], context, types_BT)
        routings: Routings = {}
        for segment in config.segments[: config.segments.index(self.segment)]:
            x_BTD, _, routed = run_segment(segment, blocks, x_BTD, context, None, config.remat)
            routings |= routed
        added, parts = self._routed(routings, batch)
        return (x_BTD, added), parts

    def finish(self, rest: Params, x_BTD: jax.Array, m: jax.Array) -> tuple[jax.Array, Any]:
        """The summed loss of a microbatch from what the last stage made, and its parts."""
        module, (batch, noise_key) = self.module(rest), self.micro(m)
        context, blocks, config = self.context(rest, batch, noise_key), getattr(module, self.side), self.model.config
        routings: Routings = {}
        whole, _ = self.whole_micro(m)
        for segment in config.segments[config.segments.index(self.segment) + 1 :]:
            x_BTD, _, routed = run_segment(segment, blocks, x_BTD, context, None, config.remat)
            routings |= routed
        if config.norm_placement != "post":
            x_BTD = module.final_norm(x_BTD)
        return loss_of_hidden(module, x_BTD, routings, whole, self.loss, noise_key)

    def passed(self, made: Made, m: jax.Array) -> tuple[tuple[jax.Array, Any], Any]:
        """What the routers of the stage's layers add to a microbatch's loss, parts, and the gradients from there."""
        batch, _ = self.micro(m)
        real_l = self.first + jnp.arange(self.turns.per_turn) < self.turns.units
        counts = jax.tree.map(lambda x: jnp.where(_like(real_l, x), x, 0), made.counts)

        def added(smooth):
            def routing(name: str) -> Routing:
                probability, z = (jnp.where(_like(real_l, x), x, 0) for x in smooth[name])
                return counts[name]._replace(probability_BE=probability, z_B=z)

            return self._routed({name: routing(name) for name in counts}, batch)

        (total, parts), dsmooth = jax.value_and_grad(added, has_aux=True)(made.smooth)
        return (total, parts), jax.tree.map(lambda d: self.scale * d, dsmooth)

    def _routed(self, routings: Routings, batch: Batch) -> tuple[jax.Array, Any]:
        if (moe := self.model.config.moe) is None:
            return jnp.zeros(()), {}
        losses = router_losses(moe, routings, batch["weights"], n_routers(self.model.config))
        return weighed(moe, losses), {**jax.lax.stop_gradient(losses), "routing": counts_of(routings)}


def _like(mask_l: jax.Array, x: jax.Array) -> jax.Array:
    return mask_l.reshape(-1, *(1,) * (x.ndim - 1))


def _where(condition: jax.Array, tree: Tree) -> Tree:
    """The arrays of a tree, or zeros."""
    return jax.tree.map(lambda x: jnp.where(condition, x, jnp.zeros_like(x)), tree)


def _add(total: Tree, more: Tree) -> Tree:
    return jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, more)


def _ticks(run: _OnStage):
    """Inside a stage: the sums over all ticks, as `loss_and_gradients` brings them out."""
    turns, number = run.turns, pipeline.stage_number()
    n, last, places = turns.microbatches, turns.stages - 1, turns.kept

    def forward(x_in, ring, entered, passed, t):
        """All stages' layers on the microbatches that they have in tick t."""
        (x_BTD, added), parts = run.enter(run.rest, t)
        entered = _add(entered, _where(t < n, (added, parts)))
        x_BTD = jnp.where(number == 0, x_BTD, x_in)
        m = t - number
        context, shared = run.layers_context(m)
        y_BTD, made, kept = run.stage.forward(run.weights, run.first, x_BTD, shared, context)
        here = (m >= 0) & (m < n)
        found, dsmooth = run.passed(made, m)
        passed = _add(passed, _where(here, found))
        ring = jax.tree.map(
            lambda r, x: jax.lax.dynamic_update_index_in_dim(r, x, m % places, 0), ring, (kept, _where(here, dsmooth))
        )
        return y_BTD, ring, entered, passed

    def backward(dy_BTD, ring, dstored, drest, t):
        """Gradients of all stages' layers, each of the microbatch that it has in tick t, and of what is before them."""
        m = t - 2 * last + number
        kept, dsmooth = jax.tree.map(lambda r: jax.lax.dynamic_index_in_dim(r, m % places, keepdims=False), ring)
        context, shared = run.layers_context(m)
        more, dx_BTD, _ = run.stage.backward(run.weights, run.first, shared, context, kept, dy_BTD, dsmooth)
        here = (m >= 0) & (m < n)
        dstored = _add(dstored, _where(here, more))
        dx_BTD = _where(here, dx_BTD)
        leaving = t - 2 * last
        _, enter, _ = jax.vjp(lambda rest: run.enter(rest, leaving), run.rest, has_aux=True)
        real = (leaving >= 0) & (leaving < n)
        drest = _add(drest, _where(real, enter((pipeline.from_stage(dx_BTD, 0), run.scale))[0]))
        return dx_BTD, dstored, drest

    def warm_up(carry, t):
        y_BTD, ring, entered, passed = carry
        return forward(pipeline.to_next(y_BTD), ring, entered, passed, t), None

    def both(carry, t):
        y_BTD, dx_BTD, ring, sums = carry
        y_BTD, ring, entered, passed = forward(pipeline.to_next(y_BTD), ring, sums.entered, sums.passed, t)
        finish = jax.value_and_grad(run.finish, argnums=(0, 1), has_aux=True)
        finished, grads = finish(run.rest, pipeline.from_stage(y_BTD, last), t - last)
        more, dy_BTD = jax.tree.map(lambda d: (run.scale * d.astype(jnp.float32)).astype(d.dtype), grads)
        dy_BTD = jnp.where(number == last, dy_BTD, pipeline.to_previous(dx_BTD))
        drest = _add(sums.drest, more)
        dx_BTD, dstored, drest = backward(dy_BTD, ring, sums.dstored, drest, t)
        return (y_BTD, dx_BTD, ring, _Sums(_add(sums.finished, finished), entered, passed, dstored, drest)), None

    def cool_down(carry, t):
        dx_BTD, dstored, drest = carry
        return backward(pipeline.to_previous(dx_BTD), ring, dstored, drest, t), None

    x_BTD, ring, sums = _nothing(run)
    warm, main, cool = turns.scans
    carry = x_BTD, ring, sums.entered, sums.passed
    (y_BTD, ring, entered, passed), _ = jax.lax.scan(warm_up, carry, jnp.arange(warm))
    carry = y_BTD, jnp.zeros_like(x_BTD), ring, sums._replace(entered=entered, passed=passed)
    (_, dx_BTD, ring, sums), _ = jax.lax.scan(both, carry, jnp.arange(warm, warm + main))
    carry = dx_BTD, sums.dstored, sums.drest
    (_, dstored, drest), _ = jax.lax.scan(cool_down, carry, jnp.arange(warm + main, warm + main + cool))
    loss_and_parts, counts = _loss_and_parts(sums)
    first = lambda x: x[None, None]  # noqa: E731
    return loss_and_parts, jax.tree.map(first, counts), jax.tree.map(first, dstored), drest


def _nothing(run: _OnStage):
    """Zeros: a residual stream, the ring, and the sums."""
    zero = jnp.zeros((), jnp.int32)

    def once():
        (x_BTD, added), parts = run.enter(run.rest, zero)
        context, shared = run.layers_context(zero)
        y_BTD, made, kept = run.stage.forward(run.weights, run.first, x_BTD, shared, context)
        passed, dsmooth = run.passed(made, zero)
        return x_BTD, (kept, dsmooth), run.finish(run.rest, y_BTD, zero), (added, parts), passed

    x_BTD, ring, *sums = jax.tree.map(_zeros, jax.eval_shape(once))
    ring = jax.tree.map(lambda x: jnp.stack([x] * run.turns.kept), ring)
    gradients = jax.tree.map(lambda w: jnp.zeros_like(w, jnp.float32), (run.weights.stored, run.rest))
    return x_BTD, ring, _Sums(*sums, *gradients)


def _zeros(x: jax.ShapeDtypeStruct) -> jax.Array:
    return jnp.zeros(x.shape, x.dtype, out_sharding=None if x.sharding is None else x.sharding.spec)


def _loss_and_parts(sums: _Sums) -> tuple[tuple[jax.Array, dict[str, Any]], Any]:
    """The loss and its parts, the same on all stages; and the counts of this stage's routers by stack and layer."""
    (total, parts), (entered, entered_parts), (passed, passed_parts) = sums[:3]
    total = total + entered + pipeline.total_over_stages(passed)
    if not passed_parts:
        return (total, parts), {}
    counts = passed_parts.pop("routing")
    before = entered_parts.pop("routing")
    losses = _add(entered_parts, pipeline.total_over_stages(passed_parts))
    routing = parts.pop("routing") | before
    return (total, {**parts, **_add({name: parts[name] for name in losses}, losses), "routing": routing}), counts
