"""Rows of a table by token, the table shared over devices by vocabulary and, where FSDP stores it so, by width.

A stored table is not gathered: the tokens of all devices that share its width are, each device looks them up in its own
columns, and an all-to-all brings every token's columns to the device that has the token. So activations travel, not the
table, and the table's gradient is made where it is stored.

Shape letters: B batch, T positions, V padded vocabulary, D d_model.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from maxlm.kernels import manual
from maxlm.parallel.axes import activation_spec, inside_stage, mesh_axes, sequence_axes, token_axes

# Tokens whose gradients are added to the table's at once. They are those of all devices that share its width, which is
# then narrow, and a TPU fills its 128 lanes up: eight times the bytes where 256 devices share 4,096 columns.
PIECE_TOKENS = 1 << 20


def embed(
    table_VD: jax.Array, tokens_BT: jax.Array, *, dtype: Any = None, length_axis: str = "residual_length"
) -> jax.Array:
    """The row of each token, `[B, T, D]` in `dtype` (the table's unless given); zeros for one that is not in the table.

    Rows and their gradients travel in `dtype`. The result is sharded over the batch and, by `length_axis`, over
    positions: `residual_length` as the residual stream of training, `length` (positions whole) for decoding. The
    table's gradient is added up in float32, and lies as the table does: over the vocabulary, and over D by any of the
    batch's mesh axes. Raises ValueError on a table that is not two-dimensional or tokens that are not integers.
    """
    if table_VD.ndim != 2 or not jnp.issubdtype(tokens_BT.dtype, jnp.integer):
        raise ValueError(f"embed: a table {table_VD.shape} by tokens of {tokens_BT.dtype}; need [V, D] by integers")
    stored = tuple(axis for axis in manual.axes_of(table_VD, 1) if axis in token_axes())
    table_VD = manual.bring(table_VD, PartitionSpec(*activation_spec("vocab"), stored or None))
    tokens_BT = manual.bring(tokens_BT, activation_spec("batch", "length"))
    return _embed(table_VD, tokens_BT, jnp.dtype(dtype or table_VD.dtype), length_axis)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _embed(table_VD: jax.Array, tokens_BT: jax.Array, dtype: jnp.dtype, length_axis: str) -> jax.Array:
    table_spec, tokens_spec, x_spec, stored = _specs(table_VD, length_axis)
    local = partial(_local_lookup, dtype=dtype, stored=stored, length_axes=sequence_axes(length_axis))
    run = manual.on_each_device(local, (table_spec, tokens_spec), x_spec, checked=not inside_stage())
    return run(table_VD, tokens_BT)


def _forward(table_VD: jax.Array, tokens_BT: jax.Array, dtype: jnp.dtype, length_axis: str):
    return _embed(table_VD, tokens_BT, dtype, length_axis), (table_VD, tokens_BT)


def _backward(dtype: jnp.dtype, length_axis: str, residuals, dx_BTD: jax.Array):
    table_VD, tokens_BT = residuals
    table_spec, tokens_spec, x_spec, stored = _specs(table_VD, length_axis)
    local = partial(_local_gradient, stored=stored, length_axes=sequence_axes(length_axis))
    run = manual.on_each_device(local, (table_spec, tokens_spec, x_spec), table_spec, checked=not inside_stage())
    return run(table_VD, tokens_BT, manual.bring(dx_BTD, x_spec)), None


_embed.defvjp(_forward, _backward)


def _local_lookup(table_VD, tokens_BT, *, dtype, stored: manual.Axes, length_axes: manual.Axes):
    rows_N, here_N = _rows(table_VD, tokens_BT, stored)
    x_ND = jnp.where(here_N[:, None], table_VD.at[rows_N].get(mode="promise_in_bounds").astype(dtype), 0)
    x_BTD = x_ND.reshape(-1, tokens_BT.shape[1], x_ND.shape[1])
    # Each token is in one part of the vocabulary, so this sum only adds zeros.
    x_BTD = manual.scattered_total(x_BTD, length_axes, 1)
    x_BTD = manual.total(x_BTD, tuple(axis for axis in mesh_axes("vocab") if axis not in length_axes))
    return manual.exchanged(x_BTD, stored, split=0, join=2)


def _local_gradient(table_VD, tokens_BT, dx_BTD, *, stored: manual.Axes, length_axes: manual.Axes):
    rows_N, here_N = _rows(table_VD, tokens_BT, stored)
    dx_DBT = manual.exchanged(dx_BTD.transpose(2, 0, 1), stored, split=0, join=1)
    dx_DBT = manual.gathered(dx_DBT, length_axes, 2)
    pieces = _pieces(rows_N.shape[0])
    dx_DPN = dx_DBT.reshape(dx_DBT.shape[0], pieces, -1)

    def add(dtable_VD, piece):
        rows_N, here_N, dx_DN = piece
        dx_ND = jnp.where(here_N[:, None], dx_DN.T.astype(jnp.float32), 0.0)
        return dtable_VD.at[rows_N].add(dx_ND, mode="promise_in_bounds"), None

    dtable_VD = manual.zeros(table_VD.shape, jnp.float32, table_VD, dx_BTD)
    tokens = rows_N.reshape(pieces, -1), here_N.reshape(pieces, -1), dx_DPN.swapaxes(0, 1)
    dtable_VD, _ = jax.lax.scan(add, dtable_VD, tokens)
    dtable_VD = manual.total(dtable_VD, tuple(axis for axis in token_axes() if axis not in stored))
    return dtable_VD.astype(table_VD.dtype)


def _rows(table_VD: jax.Array, tokens_BT: jax.Array, stored: manual.Axes) -> tuple[jax.Array, jax.Array]:
    """The tokens of all devices that share the table's width as rows of this device's part, and which are in it.

    In one row: compiling the same for a TPU on `[B, T]` of few rows takes ten times as long.
    """
    v_local = table_VD.shape[0]
    rows_N = manual.gathered(tokens_BT.reshape(-1), stored, 0) - manual.index(mesh_axes("vocab")) * v_local
    return jnp.clip(rows_N, 0, v_local - 1), (rows_N >= 0) & (rows_N < v_local)


def _pieces(n_tokens: int) -> int:
    """Into how many equal pieces tokens are cut, none of more than `PIECE_TOKENS` where their number allows it."""
    least = -(-n_tokens // PIECE_TOKENS)
    return next(n for n in range(least, n_tokens + 1) if n_tokens % n == 0)


def _specs(table_VD: jax.Array, length_axis: str):
    stored = manual.axes_of(table_VD, 1)
    table_spec = PartitionSpec(*activation_spec("vocab"), stored or None)
    return table_spec, activation_spec("batch", "length"), activation_spec("batch", length_axis, None), stored
