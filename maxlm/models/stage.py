"""What one stage of a pipeline computes: some of a segment's layers, forward and backward as functions of their own.

Forward returns what backward needs beside weights and context, as the remat policy has it: schedules keep it for as
long as they like. Shape letters besides those of `layers.py`: l repeats of the segment's pattern in a stage's turn.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from maxlm.models.attention import Context
from maxlm.models.block import remat_policy
from maxlm.models.config import RematConfig
from maxlm.models.routing import Routing
from maxlm.models.stacks import Segment

Tree = Any


class Weights(NamedTuple):
    """A stage's layers by stack, arrays stacked: as stored, where gradients go, and gathered for all ticks or None."""

    stored: dict[str, Tree]
    gathered: dict[str, Tree] | None


class Shared(NamedTuple):
    """What layers have in common and gradients go to."""

    encoded_BSD: jax.Array | None
    bias: Any


class Made(NamedTuple):
    """What a layer's router did, where it has experts: what gradients go through, and the rest."""

    smooth: dict[str, tuple[jax.Array, jax.Array]]
    """by stack the sums of probabilities and of squared log-partitions"""
    counts: dict[str, Routing]


@dataclass(frozen=True)
class Stage:
    """A segment's layers in turns of `per_turn` repeats of its pattern, `units` in all; those beyond are passed by."""

    segment: Segment
    graphs: dict[str, Any]
    remat: RematConfig
    units: int
    per_turn: int
    _structure: dict[str, Any] = field(default_factory=dict, compare=False)
    """of what forward keeps, known when it has been traced"""

    @classmethod
    def of(cls, segment: Segment, blocks: Any, remat: RematConfig, per_turn: int) -> Stage:
        """The stage of a segment whose layers a module holds."""
        graphs = {stack.name: nnx.split(blocks[stack.name])[0] for stack in segment}
        return cls(segment, graphs, remat, len(segment[0].layers), per_turn)

    def forward(
        self, weights: Weights, first: jax.Array, x_BTD: jax.Array, shared: Shared, context: Context
    ) -> tuple[jax.Array, Made, Tree]:
        """The residual stream after the layers from repeat `first` of the pattern on, what routers did (`[l, B, ...]`),
        and what backward needs besides the arguments, stacked by repeat."""

        def body(x_BTD, inputs):
            number, own = inputs
            (y_BTD, smooth), vjp, counts = self._vjp(own, number, x_BTD, shared, context)
            # Of the arguments that it saved (docs.jax.dev, "First-class VJPs"), backward is given all others again.
            vjp.args_res = [(), vjp.args_res[1], (), (), (), ()]
            kept, self._structure["vjp"] = jax.tree.flatten(vjp)
            return y_BTD, (Made(smooth, counts), kept)

        x_BTD, (made, kept) = jax.lax.scan(body, x_BTD, (self._numbers(first), weights))
        return x_BTD, made, kept

    def backward(
        self, weights: Weights, first: jax.Array, shared: Shared, context: Context, kept: Tree, dx_BTD, dsmooth
    ) -> tuple[dict[str, Tree], jax.Array, Shared]:
        """Gradients by the stored weights, the residual stream and what is shared."""

        def body(carry, inputs):
            dx_BTD, dshared = carry
            number, own, kept, dsmooth = inputs
            vjp = jax.tree.unflatten(self._structure["vjp"], kept)
            vjp.args_res = [own.stored, vjp.args_res[1], shared, own.gathered, context, number]
            dstored, dx_BTD, dmore, *_ = vjp((dx_BTD, dsmooth))
            return (dx_BTD, jax.tree.map(jnp.add, dshared, dmore)), dstored

        inputs = self._numbers(first), weights, kept, dsmooth
        nothing = jax.tree.map(jnp.zeros_like, shared)
        (dx_BTD, dshared), dstored = jax.lax.scan(body, (dx_BTD, nothing), inputs, reverse=True)
        return dstored, dx_BTD, dshared

    def _numbers(self, first: jax.Array) -> jax.Array:
        return first + jnp.arange(self.per_turn, dtype=jnp.int32)

    def _vjp(self, own: Weights, number, x_BTD, shared: Shared, context: Context) -> tuple[Any, Any, Any]:
        """One repeat of the pattern: the residual stream and what of routing is smooth, its vjp, and the rest."""

        def pattern(stored, x_BTD, shared, gathered, context, number):
            made, y_BTD = {}, x_BTD
            for stack in self.segment:
                trained = jax.checkpoint(partial(layer, stack), policy=remat_policy(self.remat), prevent_cse=False)
                ahead = None if gathered is None else gathered[stack.name]
                y_BTD, routing = trained(stored[stack.name], y_BTD, shared, ahead, context, number)
                if routing is not None:
                    made[stack.name] = routing
            smooth = {name: (routing.probability_BE, routing.z_B) for name, routing in made.items()}
            # Repeats beyond the last pass on what they are given.
            return (jnp.where(number < self.units, y_BTD, x_BTD), smooth), jax.lax.stop_gradient(made)

        def layer(stack, stored, x_BTD, shared, ahead, context, number):
            key, layers = context.noise_key, stack.layers
            if key is not None:
                key = jax.random.fold_in(key, layers.start + number * layers.step)
            context = context._replace(noise_key=key, encoded_BSD=shared.encoded_BSD, bias=shared.bias)
            weights = stored if ahead is None else _as_gathered(stored, ahead)
            y_BTD, _, routing = nnx.merge(self.graphs[stack.name], weights)(x_BTD, context, None)
            return y_BTD, routing

        return jax.vjp(pattern, own.stored, x_BTD, shared, own.gathered, context, number, has_aux=True)


def _as_gathered(stored: Tree, gathered: Tree) -> Tree:
    """Weights as they were gathered ahead (None: not), with their gradients going to the stored ones."""
    return jax.tree.map(lambda a, b: a if b is None else _gathered_ahead(a, b), stored, gathered)


def _gathered_ahead(stored: jax.Array, gathered: jax.Array) -> jax.Array:
    kind = jax.typeof(stored)

    @jax.custom_vjp
    def use(stored, gathered):
        return gathered

    def backward(_, dgathered):
        dstored = jax.sharding.reshard(dgathered, kind.sharding.spec).astype(kind.dtype)
        return dstored, jnp.zeros_like(dgathered)

    use.defvjp(lambda stored, gathered: (gathered, None), backward)
    return use(stored, gathered)
