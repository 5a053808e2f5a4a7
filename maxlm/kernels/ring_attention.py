"""Attention over rows that devices share by position: keys and values go round a ring (arXiv:2310.01889), one device's
at a time, and every device brings its own queries' softmax forward by them, as `attention_chunked.py` does by tiles.

Of 2 n chunks of a row, device i of n has those numbered i and 2 n - 1 - i, so that under a causal mask all have equally
much to do in every step of the ring (Llama 3, arXiv:2407.21783, section 3.3.2). In step s a device has the keys of the
one s places before it. What a mask empties is left out three times over: steps that no device needs are not taken, of a
step only the half of the keys travels that some device needs, and each device visits only the tiles that its own
positions leave.

Forward passes keys and values on while it works on those of the step before. So does backward, where their gradients
follow one step behind, in float32: what stays at home are queries, whose heads are as many or more (arXiv:2305.13245).
Shape letters as in `attention_reference.py`; here T and S are a device's share.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from maxlm.kernels import attention_tiles, manual
from maxlm.kernels.attention_bias import Bias
from maxlm.kernels.attention_extras import Extras
from maxlm.kernels.attention_relative import Relative
from maxlm.kernels.attention_tiles import Chunking, Given, Places, Shape
from maxlm.kernels.ring_plan import PIECES, Plan, Ring, Step, Tiling
from maxlm.parallel.axes import mesh_axes


@dataclass(frozen=True)
class _Call:
    """What is static in one call: the devices' axes, and the tiles of each."""

    axes: tuple[str, ...]
    shape: Shape
    how: Chunking
    ring: Ring

    @classmethod
    def of(cls, q_BTHK: jax.Array, k_BSGK: jax.Array, extras: Extras, how: Chunking) -> _Call:
        axes = tuple(axis for axis in mesh_axes("length") if manual.count((axis,)) > 1)
        shape = Shape.of(q_BTHK, k_BSGK, how, PIECES, manual.count(axes))
        queries, keys = Tiling(shape.n_q, shape.tq, shape.T), Tiling(shape.n_kv, shape.tk, shape.S)
        hidden = extras.segments_BT is not None, extras.prefix_BS is not None
        return cls(axes, shape, how, Ring(shape.devices, queries, keys, how.mask, *hidden))

    def tiles(self, step: Step) -> tuple[Places, jax.Array, jax.Array, Any, Any]:
        """Where the tiles of a step lie; their rows and columns, full ones first; how many are full, and how many are
        masked in part."""
        ring, n, device = self.ring, self.ring.devices, manual.index(self.axes)
        kv_starts = ring.keys.starts((device - step.shift) % n, n)[step.first : step.stop]
        places = Places(ring.queries.starts(device, n), kv_starts)
        empty, full = ring.extent(*places)
        kind = jnp.where(full, 0, jnp.where(empty, 2, 1)).reshape(-1)
        rows, columns = jnp.divmod(jnp.argsort(kind, stable=True).astype(jnp.int32), kv_starts.shape[0])
        if step.counts is not None:
            return places, rows, columns, *step.counts
        n_full, n_partial = (jnp.sum(kind == number, dtype=jnp.int32) for number in (0, 1))
        return places, rows, columns, n_full, n_partial


class Keys(NamedTuple):
    """What of a device's keys travels, in tiles."""

    k: jax.Array
    v: jax.Array
    segments: jax.Array | None
    prefix: jax.Array | None


Visit = Callable[[Any, Keys, Step], tuple[Any, Any]]
"""From what is carried, keys and a step to what is carried on and, in backward, gradients of the keys and values."""


def forward(
    q_BTHK: jax.Array, k_BSGK: jax.Array, v_BSGV: jax.Array, extras: Extras, *, how: Chunking
) -> tuple[jax.Array, jax.Array]:
    """Inside: what `attention_chunked.forward` gives, of rows that lie in the order of `ring_plan.zigzag`."""
    call = _Call.of(q_BTHK, k_BSGK, extras, how)
    shape = call.shape
    q, given, keys = _tiled(q_BTHK, k_BSGK, v_BSGV, extras, shape)

    def visit(carry, keys: Keys, step: Step):
        places, *tiles = call.tiles(step)
        here = _with_keys(given, keys, places)
        body = attention_tiles.forward_body(q, keys.k, keys.v, here, shape, how)
        return _over_tiles(body, carry, *tiles), None

    carry = attention_tiles.forward_start(q_BTHK, v_BSGV.shape[-1], extras.sinks_H, shape)
    carry, _ = _around(call, visit, carry, keys)
    return attention_tiles.forward_end(carry, q_BTHK.dtype, shape)


def backward(
    q_BTHK: jax.Array,
    k_BSGK: jax.Array,
    v_BSGV: jax.Array,
    extras: Extras,
    o_BTHV: jax.Array,
    lse_BTH: jax.Array,
    do_BTHV: jax.Array,
    *,
    how: Chunking,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None, Bias | None, Relative | None]:
    """Inside: what `attention_chunked.backward` gives, of rows that lie in the order of `ring_plan.zigzag`."""
    call = _Call.of(q_BTHK, k_BSGK, extras, how)
    shape = call.shape
    q, given, keys = _tiled(q_BTHK, k_BSGK, v_BSGV, extras, shape)
    queries = attention_tiles.Queries.of(q, o_BTHV, lse_BTH, do_BTHV, shape)

    def visit(carry, keys: Keys, step: Step):
        places, *tiles = call.tiles(step)
        here = _with_keys(given, keys, places)
        body = attention_tiles.backward_body(queries, keys.k, keys.v, here, shape, how)
        dq, dbias, dpositions = carry
        nothing = (attention_tiles.filled(q_BTHK, x.shape, 0.0) for x in (keys.k, keys.v))
        dq, dk, dv, dbias, dpositions = _over_tiles(body, (dq, *nothing, dbias, dpositions), *tiles)
        return (dq, dbias, dpositions), (dk, dv)

    carry = attention_tiles.backward_start(q_BTHK, queries, given)
    (dq, dbias, dpositions), (dk, dv) = _around(call, visit, carry, keys)
    return (
        shape.untile_q(dq.swapaxes(-1, -2).astype(q_BTHK.dtype)),
        shape.untile_kv(dk.astype(k_BSGK.dtype)),
        shape.untile_kv(dv.astype(v_BSGV.dtype)),
        *attention_tiles.shared_gradients(extras, lse_BTH, queries.delta_BTH, dbias, dpositions, shape, how),
    )


def _tiled(q_BTHK, k_BSGK, v_BSGV, extras: Extras, shape: Shape) -> tuple[jax.Array, Given, Keys]:
    """A device's own queries, extras and keys, in tiles."""
    given = Given.of(extras, shape)
    own_segments = None if given.segments is None else given.segments[1]
    keys = Keys(shape.tile_kv(k_BSGK), shape.tile_kv(v_BSGV), own_segments, given.prefix)
    return shape.tile_q(q_BTHK), given, keys


def _with_keys(given: Given, keys: Keys, places: Places) -> Given:
    """The extras of a device's own queries with keys that came to it."""
    segments = None
    if given.segments is not None and keys.segments is not None:
        segments = given.segments[0], keys.segments
    return given._replace(segments=segments, prefix=keys.prefix, places=places)


def _over_tiles(body: Callable, carry: Any, rows: jax.Array, columns: jax.Array, n_full: Any, n_partial: Any) -> Any:
    """Runs `body(masked, carry, (row, column))` over the full tiles and then over those masked in part."""
    for masked, first, count in ((False, 0, n_full), (True, n_full, n_partial)):
        if not isinstance(count, int):

            def visit(number, carry, masked=masked, first=first):
                return body(masked, carry, (rows[first + number], columns[first + number]))[0]

            carry = jax.lax.fori_loop(0, count, visit, carry)
        elif count:
            visited = rows[first : first + count], columns[first : first + count]
            carry, _ = jax.lax.scan(partial(body, masked), carry, visited)
    return carry


def _around(call: _Call, visit: Visit, carry: Any, keys: Keys) -> tuple[Any, Any]:
    """Visits the keys of every step, those of the next step already on their way. Returns what was carried, and the sum
    of the gradients of this device's own keys and values."""
    plan, devices, pass_on = call.ring.plan, call.ring.devices, partial(manual.passed_on, axes=call.axes)
    if not plan.whole:
        return _at_once(plan, visit, carry, keys, pass_on)
    own, other = plan.steps
    ahead = pass_on(keys, by=1)
    carry, found = visit(carry, keys, own)

    def step(state, shift):
        carry, keys, found = state
        ahead, behind = pass_on(keys, by=1), pass_on(found, by=1)
        carry, new = visit(carry, keys, other._replace(shift=shift))
        return (carry, ahead, _sum(behind, new)), None

    state = carry, ahead, found
    if devices > 2:
        state, _ = jax.lax.scan(step, state, jnp.arange(1, devices - 1, dtype=jnp.int32))
    carry, keys, found = state
    behind = pass_on(found, by=1)
    carry, new = visit(carry, keys, other._replace(shift=devices - 1))
    return carry, pass_on(_sum(behind, new), by=1)


def _at_once(plan: Plan, visit: Visit, carry: Any, keys: Keys, pass_on: Callable) -> tuple[Any, Any]:
    """The same for few steps: each device sends the keys of a step to the one that needs them, and that one sends their
    gradients back."""

    def received(step: Step) -> Keys:
        return pass_on(jax.tree.map(lambda x: x[step.first : step.stop], keys), by=step.shift)

    home, ahead = None, received(plan.steps[0])
    for step, following in zip(plan.steps, (*plan.steps[1:], None), strict=True):
        here = ahead
        if following is not None:
            ahead = received(following)
        carry, found = visit(carry, here, step)
        found = pass_on(found, by=-step.shift)
        widths = (step.first, keys.k.shape[0] - step.stop), (0, 0), (0, 0), (0, 0)
        home = _sum(home, jax.tree.map(lambda x, widths=widths: jnp.pad(x, widths), found))
    return carry, home


def _sum(a: Any, b: Any) -> Any:
    """The sum of two pytrees, or the second where there is no first."""
    return b if a is None else jax.tree.map(jnp.add, a, b)
