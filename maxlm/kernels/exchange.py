"""Rows sent to the devices that hold their experts, and what those made of them sent back. Inside `shard_map`.

A device can be sent any number of rows, from none to all of them, and buffers have one size. So rows travel in rounds:
in each a device takes so many, and there are as many rounds as the fullest device needs, one where load is even enough.
No row is dropped and none is moved twice. The first round's products are there for the backward pass as the layer's
remat policy says; further rounds, which are rare, run in a loop and are done again there.

A transport moves rows: what it takes in a round are rows by local expert, with their shares, and what it puts is added
to where they came from. Both are permutations and each the other's transpose, so gradients travel by the same two
functions and no row is ever added by a scatter. Three of them:

- `RaggedExchange`, by `ragged_all_to_all`: each expert's rows are a slice that lands at its place, by expert, at once.
- `PaddedExchange`, by `all_to_all` of equal buffers, one for each pair of devices.
- `GatheredTokens`: every device has all tokens of the group, and takes those of its own experts.

Shape letters: S sending devices, P receiving ones, L experts of a device, R rows sorted by expert on the device where
they start, M rows that a device takes in a round, A choices of a token, D d_model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from maxlm.kernels import manual
from maxlm.kernels.dispatch import Order
from maxlm.kernels.manual import Axes

Products = Callable[[jax.Array, jax.Array, jax.Array, Any], jax.Array]
"""`(x_MD, share_M, sizes_L, weights) -> y_MD`: rows by expert, of which the first `sum(sizes_L)` are any."""

FURTHER_ROUNDS = "further_rounds"
"""The name, in the program, of the loops that even load never enters."""


class Transport(Protocol):
    """Moves rows, a round at a time."""

    @property
    def most_rounds(self) -> int:
        """Rounds that the worst load needs."""
        ...

    @property
    def share_shape(self) -> tuple[int, ...]:
        """The shape of the shares that `take` takes."""
        ...

    def rounds(self) -> jax.Array:
        """Rounds that this load needs on some device of the mesh."""
        ...

    def sizes(self, turn: Any) -> jax.Array:
        """Rows of each local expert `[L]` in a round."""
        ...

    def take(self, x: jax.Array, share: jax.Array | None, turn: Any, /) -> tuple[jax.Array, Any]:
        """The rows of a round by local expert `[M, D]` and their shares `[M]`; None where none are given."""
        ...

    def put(self, y_MD: jax.Array, into: jax.Array, turn: Any, /) -> jax.Array:
        """What was made of a round's rows, added to where `take` had them from."""
        ...

    def put_share(self, share_M: jax.Array, into: jax.Array, turn: Any, /) -> jax.Array:
        """As `put`, of a number a row."""
        ...


def in_rounds(products: Products, x: jax.Array, share: jax.Array, weights: Any, transport: Transport) -> jax.Array:
    """`products` of all rows, by the devices that hold their experts, put where the rows came from: like `x`.

    `x` and `share` are as the transport takes them. Differentiable by x, share and weights.
    """
    leaves, tree = jax.tree.flatten(weights)
    # Their gradients are added up over the axes that copy them once, and not in each round.
    x, share, *leaves = manual.alike(x, share, *leaves)
    return _in_rounds(products, x, share, jax.tree.unflatten(tree, leaves), transport)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _in_rounds(products: Products, x: jax.Array, share: jax.Array, weights: Any, transport: Any) -> jax.Array:
    return _forward(products, x, share, weights, transport)[0]


def _forward(products, x, share, weights, transport):
    def further(turn, y):
        x_MD, share_M = transport.take(x, share, turn)
        return transport.put(products(x_MD, share_M, transport.sizes(turn), weights), y, turn)

    x_MD, share_M = transport.take(x, share, 0)
    y_MD, pull_back = jax.vjp(_with_sizes(products, transport, 0), x_MD, share_M, weights)
    y = transport.put(y_MD, manual.zeros(x.shape, y_MD.dtype, y_MD, x), 0)
    again = (x, share, weights) if transport.most_rounds > 1 else None
    return _further(transport, further, y), (pull_back, again, transport)


def _backward(products, saved, dy):
    pull_back, again, transport = saved
    dy_MD, _ = transport.take(dy, None, 0)
    dx_MD, dshare_M, dweights = pull_back(dy_MD)
    dx = manual.zeros(dy.shape, dx_MD.dtype, dy)
    dshare = manual.zeros(transport.share_shape, dshare_M.dtype, dy)
    gradients = transport.put(dx_MD, dx, 0), transport.put_share(dshare_M, dshare, 0), dweights

    def further(turn, gradients):
        dx, dshare, dweights = gradients
        x, share, weights = again
        x_MD, share_M = transport.take(x, share, turn)
        _, pull_back = jax.vjp(_with_sizes(products, transport, turn), x_MD, share_M, weights)
        dx_MD, dshare_M, more = pull_back(transport.take(dy, None, turn)[0])
        return (
            transport.put(dx_MD, dx, turn),
            transport.put_share(dshare_M, dshare, turn),
            jax.tree.map(jnp.add, dweights, more),
        )

    return *_further(transport, further, gradients), None


_in_rounds.defvjp(_forward, _backward)


def _with_sizes(
    products: Products, transport: Transport, turn: Any
) -> Callable[[jax.Array, jax.Array, Any], jax.Array]:
    """`products` of a round's rows, as a function of what has gradients."""
    sizes_L = transport.sizes(turn)
    return lambda x_MD, share_M, weights: products(x_MD, share_M, sizes_L, weights)


def _further(transport: Transport, run: Callable[[jax.Array, Any], Any], first: Any) -> Any:
    """The rounds behind the first, as many as there are rows for."""
    if transport.most_rounds == 1:
        return first
    n_rounds = transport.rounds()
    with jax.named_scope(FURTHER_ROUNDS):
        carry = jnp.ones((), jnp.int32), first
        return jax.lax.while_loop(lambda c: c[0] < n_rounds, lambda c: (c[0] + 1, run(*c)), carry)[1]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Exchange:
    """What both exchanges have in common: every device knows how many rows go from which to which expert.

    On a device, rows lie sorted by expert `[R]`, so those for one device are together.
    """

    sizes_SPL: jax.Array
    """int32: rows of each device for each expert of each"""
    start_SPL: jax.Array
    """int32: of each slice, the place of its first row in the order in which rounds take rows"""
    order: Order
    """this device's rows"""
    axes: Axes = field(metadata={"static": True})
    rows: int = field(metadata={"static": True})
    """how many places a round has"""
    most_rounds: int = field(metadata={"static": True})

    @property
    def share_shape(self) -> tuple[int, ...]:
        """`[R]`."""
        return self.order.choice_R.shape

    def cut(self, turn: Any) -> tuple[jax.Array, jax.Array]:
        """Of every slice, how many of its rows are of earlier rounds, and how many of this one: `[S, P, L]`."""
        begin, end = (jnp.clip(k * self.rows - self.start_SPL, 0, self.sizes_SPL) for k in (turn, turn + 1))
        return begin, end - begin

    def sizes(self, turn: Any) -> jax.Array:
        """Rows of each local expert `[L]` in a round."""
        return jnp.sum(self._mine(self.cut(turn)[1], 1), axis=0)

    def _mine(self, x: jax.Array, axis: int) -> jax.Array:
        """What is of this device."""
        return jax.lax.dynamic_index_in_dim(x, manual.index(self.axes), axis, keepdims=False)

    def _needed(self, rows: jax.Array) -> jax.Array:
        """The rounds that take the most rows, on any device: all take part in the same."""
        return manual.largest(-(-jnp.max(rows) // self.rows), manual.axes_varied(rows))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RaggedExchange(_Exchange):
    """By `jax.lax.ragged_all_to_all`, a slice an expert and pair of devices. Rounds take a receiver's rows in order of
    the senders."""

    @classmethod
    def of(cls, order: Order, n_devices: int, axes: Axes, rows: int, most: int) -> RaggedExchange:
        """`rows` that a device takes in a round, and the `most` that it can be sent in all."""
        sizes_SPL = everyones(order.sizes_E, n_devices, axes)
        sizes_PSL = jnp.swapaxes(sizes_SPL, 0, 1)
        start_PSL = before(sizes_PSL.reshape(n_devices, -1)).reshape(sizes_PSL.shape)
        return cls(sizes_SPL, jnp.swapaxes(start_PSL, 0, 1), order, axes, rows, -(-most // rows))

    def rounds(self) -> jax.Array:
        """Rounds that this load needs on some device of the mesh."""
        return self._needed(jnp.sum(self.sizes_SPL, axis=(0, 2)))

    def slices(self, turn: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Of every slice `[S, P, L]`: its rows in a round, and where they begin with the sender and the receiver."""
        skipped, sizes = self.cut(turn)
        sent_from = before(self.sizes_SPL.reshape(self.sizes_SPL.shape[0], -1)).reshape(skipped.shape) + skipped
        by_expert_PLS = jnp.transpose(sizes, (1, 2, 0))
        lands_PLS = before(by_expert_PLS.reshape(by_expert_PLS.shape[0], -1)).reshape(by_expert_PLS.shape)
        return sizes, sent_from, jnp.transpose(lands_PLS, (2, 0, 1))

    def take(self, x_RD: jax.Array, share_R: jax.Array | None, turn: Any) -> tuple[jax.Array, Any]:
        """The rows of a round by local expert `[M, D]` and their shares `[M]`."""
        sizes, sent_from, lands = self.slices(turn)
        begin, send, land = (self._mine(a, 0).ravel() for a in (sent_from, sizes, lands))
        receive = self._mine(sizes, 1).ravel()

        def move(rows: jax.Array) -> jax.Array:
            into = manual.zeros((self.rows, rows.shape[1]), rows.dtype, rows)
            return jax.lax.ragged_all_to_all(rows, into, begin, send, land, receive, axis_name=self.axes)

        return move(x_RD), None if share_R is None else move(share_R[:, None])[:, 0]

    def put(self, y_MD: jax.Array, into: jax.Array, turn: Any) -> jax.Array:
        """The rows of a round, back in their places of `into` `[R, D]`, whose other rows stay."""
        sizes, sent_from, lands = self.slices(turn)
        begin, send, land = (self._mine(a, 1).ravel() for a in (lands, sizes, sent_from))
        receive, rows = self._mine(sizes, 0).ravel(), y_MD.astype(into.dtype)
        return jax.lax.ragged_all_to_all(rows, into, begin, send, land, receive, axis_name=self.axes)

    def put_share(self, share_M: jax.Array, into: jax.Array, turn: Any) -> jax.Array:
        """As `put`, of a number a row."""
        return self.put(share_M[:, None], into[:, None], turn)[:, 0]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PaddedExchange(_Exchange):
    """By `all_to_all`: each pair of devices has a buffer of so many rows, which a round fills as far as it can."""

    @classmethod
    def of(cls, order: Order, n_devices: int, axes: Axes, rows: int, most: int) -> PaddedExchange:
        """`rows` that a device takes of each in a round, and the `most` that one can send another in all."""
        sizes_SPL = everyones(order.sizes_E, n_devices, axes)
        return cls(sizes_SPL, before(sizes_SPL), order, axes, rows, -(-most // rows))

    def rounds(self) -> jax.Array:
        """Rounds that this load needs on some device of the mesh."""
        return self._needed(jnp.sum(self.sizes_SPL, axis=2))

    def take(self, x_RD: jax.Array, share_R: jax.Array | None, turn: Any) -> tuple[jax.Array, Any]:
        """The rows of a round by local expert `[M, D]` and their shares `[M]`."""
        first_P = self._first_of_each_device()
        place_PK = (first_P + turn * self.rows)[:, None] + jnp.arange(self.rows)
        sent = jnp.minimum(place_PK.ravel(), x_RD.shape[0] - 1)
        by_expert = self._by_expert(turn)

        def move(rows: jax.Array) -> jax.Array:
            return manual.exchanged(rows[sent], self.axes, split=0, join=0)[by_expert]

        return move(x_RD), None if share_R is None else move(share_R)

    def put(self, y_MD: jax.Array, into: jax.Array, turn: Any) -> jax.Array:
        """The rows of a round, back in their places of `into` `[R, D]`, whose other rows stay."""
        returned = manual.exchanged(y_MD[self._by_sender(turn)], self.axes, split=0, join=0)
        first_P, row_R = self._first_of_each_device(), jnp.arange(into.shape[0])
        rows_P = jnp.sum(self._mine(self.sizes_SPL, 0), axis=1)
        device_R = jnp.sum(row_R[:, None] >= (first_P + rows_P)[None], axis=1)
        here_R = jnp.minimum(device_R, first_P.shape[0] - 1)
        place_R = row_R - first_P[here_R] - turn * self.rows
        is_of_this = (device_R < first_P.shape[0]) & (place_R >= 0) & (place_R < self.rows)
        found = returned[here_R * self.rows + jnp.clip(place_R, 0, self.rows - 1)].astype(into.dtype)
        return jnp.where(is_of_this.reshape(-1, *(1,) * (into.ndim - 1)), found, into)

    def put_share(self, share_M: jax.Array, into: jax.Array, turn: Any) -> jax.Array:
        """As `put`, of a number a row."""
        return self.put(share_M, into, turn)

    def _first_of_each_device(self) -> jax.Array:
        """The first of this device's sorted rows for each device."""
        return before(jnp.sum(self._mine(self.sizes_SPL, 0), axis=1))

    def _received(self, turn: Any) -> tuple[jax.Array, jax.Array]:
        """Of each slice that comes here `[S, L]`: its rows in a round, and the first's place in the sender's buffer."""
        skipped, sizes = (self._mine(a, 1) for a in self.cut(turn))
        return sizes, self._mine(self.start_SPL, 1) + skipped - turn * self.rows

    def _by_expert(self, turn: Any) -> jax.Array:
        """Of each row by expert, its place among those received `[S K]`; any, behind the last."""
        sizes_SL, place_SL = self._received(turn)
        ends_LS = jnp.cumsum(sizes_SL.T.ravel())
        number_M = jnp.arange(sizes_SL.shape[0] * self.rows, dtype=jnp.int32)
        slice_M = jnp.searchsorted(ends_LS, number_M, side="right", method="scan_unrolled")
        slice_M = jnp.minimum(slice_M, ends_LS.shape[0] - 1).astype(jnp.int32)
        place_LS = (place_SL + self.rows * jnp.arange(sizes_SL.shape[0])[:, None]).T.ravel()
        found_M = place_LS[slice_M] + number_M - (ends_LS - sizes_SL.T.ravel())[slice_M]
        return jnp.clip(found_M, 0, number_M.shape[0] - 1)

    def _by_sender(self, turn: Any) -> jax.Array:
        """Of each place among those received `[S K]`, the row by expert that it became; any, where none came."""
        sizes_SL, place_SL = self._received(turn)
        first_SL = before(sizes_SL.T.ravel()).reshape(sizes_SL.T.shape).T
        place_K = jnp.arange(self.rows, dtype=jnp.int32)
        expert_SK = jnp.sum(place_K[:, None] >= (place_SL + sizes_SL)[:, None], axis=2)
        expert_SK = jnp.minimum(expert_SK, sizes_SL.shape[1] - 1)
        row_SK = place_K + jnp.take_along_axis(first_SL - place_SL, expert_SK, axis=1)
        return jnp.clip(row_SK.ravel(), 0, row_SK.size - 1)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class GatheredTokens:
    """No row is moved: tokens `[G, D]` and shares `[G, A]` of all the group's devices are here, and their choices of
    this device's experts are in order."""

    order: Order
    rows: int = field(metadata={"static": True})
    """choices that a round takes"""
    most_rounds: int = field(metadata={"static": True})

    @classmethod
    def of(cls, order: Order, rows: int, most: int) -> GatheredTokens:
        """`rows` that a device takes in a round, and the `most` that can be its experts' in all."""
        return cls(order, rows, -(-most // rows))

    @property
    def share_shape(self) -> tuple[int, ...]:
        """`[G, A]`."""
        return self.order.place_NA.shape

    def rounds(self) -> jax.Array:
        """Rounds that this load needs on some device of the mesh."""
        n_rows = jnp.sum(self.order.sizes_E)
        return manual.largest(-(-n_rows // self.rows), manual.axes_varied(n_rows))

    def sizes(self, turn: Any) -> jax.Array:
        """Rows of each local expert `[L]` in a round."""
        first_L = before(self.order.sizes_E)
        begin, end = (jnp.clip(k * self.rows - first_L, 0, self.order.sizes_E) for k in (turn, turn + 1))
        return end - begin

    def take(self, x_GD: jax.Array, share_GA: jax.Array | None, turn: Any) -> tuple[jax.Array, Any]:
        """The rows of a round by local expert `[M, D]` and their shares `[M]`."""
        row_M = jnp.minimum(turn * self.rows + jnp.arange(self.rows), self.order.choice_R.shape[0] - 1)
        choice_M = self.order.choice_R[row_M]
        x_MD = x_GD[choice_M // self.order.place_NA.shape[1]]
        return x_MD, None if share_GA is None else share_GA.reshape(-1)[choice_M]

    def put(self, y_MD: jax.Array, into: jax.Array, turn: Any) -> jax.Array:
        """The rows of a round, added to the tokens of `into` `[G, D]`."""
        here_GA, place_GA = self._places(turn)
        found_GAD = jnp.where(here_GA[..., None], y_MD[place_GA].astype(jnp.float32), 0)
        return into + jnp.sum(found_GAD, axis=1).astype(into.dtype)

    def put_share(self, share_M: jax.Array, into: jax.Array, turn: Any) -> jax.Array:
        """As `put`, of a number a choice, into `[G, A]`."""
        here_GA, place_GA = self._places(turn)
        return jnp.where(here_GA, share_M[place_GA].astype(into.dtype), into)

    def _places(self, turn: Any) -> tuple[jax.Array, jax.Array]:
        """Whether each choice is of this round, and its row there."""
        place_GA = self.order.place_NA - turn * self.rows
        here_GA = (place_GA >= 0) & (place_GA < self.rows) & (self.order.place_NA < jnp.sum(self.order.sizes_E))
        return here_GA, jnp.clip(place_GA, 0, self.rows - 1)


def everyones(sizes_E: jax.Array, n_devices: int, axes: Axes) -> jax.Array:
    """The sizes of all devices of the group, `[S, P, L]`."""
    return manual.gathered(sizes_E, axes, 0).reshape(n_devices, n_devices, -1)


def before(sizes: jax.Array) -> jax.Array:
    """The sum of what stands before each, along the last axis."""
    return jnp.cumsum(sizes, axis=-1) - sizes
