"""Cross-entropy of the output projection, over chunks of tokens and a vocabulary shared by devices.

Logits of all tokens never exist: a scan makes those of one chunk, on each device for its own part of the vocabulary,
and softmax's maximum and sum are put together over the devices (Megatron-LM, arXiv:1909.08053, section 3). When
gradients are asked for, the same pass over the chunks makes them (as in Liger, arXiv:2410.10989): three products
instead of four, and backward only scales them by the gradient of the sum.

Shape letters: B batch, T positions, D d_model, V padded vocabulary, N tokens of a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from maxlm.kernels import manual
from maxlm.parallel.axes import activation_spec, inside_stage, mesh_axes, n_stages, sequence_axes, token_axes

# Bytes of one chunk's float32 logits, and the fewest tokens whose products are still efficient. On a CPU the devices of
# a mesh are simulated and share one memory, so the bytes are for all of them. On an accelerator every chunk reads and
# writes the head's whole float32 gradient, which a chunk of 191 tokens did for a seventh of the step of Llama-3 8B
# (docs/performance-log.md).
CPU_CHUNK_BYTES, CPU_LEAST_TOKENS = 64 << 20, 128
ACCELERATOR_CHUNK_BYTES, ACCELERATOR_LEAST_TOKENS = 512 << 20, 1024


@dataclass(frozen=True)
class _How:
    """What is static in one call."""

    vocab_size: int
    softcap: float | None
    z_loss: float
    chunk_tokens: int | None
    label_smoothing: float = 0.0


def cross_entropy(
    x_BTD: jax.Array,
    w_VD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    *,
    vocab_size: int,
    bias_V: jax.Array | None = None,
    softcap: float | None = None,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    chunk_tokens: int | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The sum over tokens of `weight * (nll + z_loss * lse^2)` with `nll = lse - logit of the target`.

    Logits are `x w`, plus `bias_V` if given, through `softcap * tanh(. / softcap)` if given; `lse` is the log of the
    sum of their exponentials over the first `vocab_size` rows of `w_VD`, the rest being padding. The term with `lse^2`
    is the z-loss (PaLM, arXiv:2204.02311, section 5). With `label_smoothing` e, targets are a mixture of 1 - e of the
    target and e of all tokens alike (arXiv:1512.00567, section 7), which adds `e * (logit of the target - mean logit)`.
    Products run in x's dtype with float32 sums; everything else is float32. Tokens of weight 0 count nothing, whatever
    their target; a target outside the vocabulary has an infinite loss.

    `x_BTD` lies as the residual stream does; `w_VD` is shared over the vocabulary, and may rest in pieces along D as
    FSDP stores it: then it is gathered inside, and its gradient leaves reduce-scattered. `chunk_tokens` (a device) is
    chosen by the size of the logits unless given.

    Returns the scalar float32 sum, differentiable by x, w, bias and weights, and its parts without gradients:
    {"nll_sum", "z_sum"}, and "smoothing_sum" where labels are smoothed. Raises ValueError on shapes that do not fit.
    """
    _check(x_BTD, w_VD, targets_BT, vocab_size, chunk_tokens)
    if weights_BT.shape != targets_BT.shape:
        raise ValueError(f"cross_entropy: weights {weights_BT.shape} do not fit targets {targets_BT.shape}")
    how = _How(vocab_size, softcap, z_loss, chunk_tokens, label_smoothing)
    x_BTD, w_VD, bias_V, targets_BT = _bring(x_BTD, w_VD, bias_V, targets_BT)
    weights_BT = manual.bring(weights_BT.astype(jnp.float32), _token_spec())
    # `custom_vjp` does not say what it returns.
    summed: Any = _summed(x_BTD, w_VD, bias_V, targets_BT, weights_BT, how)
    loss, parts = summed
    return loss, jax.lax.stop_gradient(parts)


def token_losses(
    x_BTD: jax.Array,
    w_VD: jax.Array,
    targets_BT: jax.Array,
    *,
    vocab_size: int,
    bias_V: jax.Array | None = None,
    softcap: float | None = None,
    chunk_tokens: int | None = None,
) -> jax.Array:
    """The cross-entropy of every token in nats, `[B, T]` float32, for evaluation: no gradients. Arguments as above."""
    _check(x_BTD, w_VD, targets_BT, vocab_size, chunk_tokens)
    how = _How(vocab_size, softcap, 0.0, chunk_tokens)
    arrays = jax.lax.stop_gradient(_bring(x_BTD, w_VD, bias_V, targets_BT))
    in_specs = _in_specs(arrays[1])
    run = manual.on_each_device(
        partial(_local_token_losses, how=how, w_axes=manual.axes_of(arrays[1], 1)), in_specs[:4], _token_spec()
    )
    return run(*arrays)


def logits(
    x_BTD: jax.Array,
    w_VD: jax.Array,
    *,
    vocab_size: int,
    bias_V: jax.Array | None = None,
    softcap: float | None = None,
) -> jax.Array:
    """The float32 logits `[B, T, vocab_size]` of a few positions, with the whole vocabulary on every device."""
    x_BTD = manual.bring(x_BTD, activation_spec("batch", "length", None))
    w_VD = manual.bring(w_VD, activation_spec("vocab", None)).astype(x_BTD.dtype)
    out = activation_spec("batch", "length", "vocab") if manual.has_mesh() else None
    logits_BTV = jnp.einsum("btd,vd->btv", x_BTD, w_VD, preferred_element_type=jnp.float32, out_sharding=out)
    logits_BTV = manual.bring(logits_BTV, activation_spec("batch", "length", None))[..., :vocab_size]
    if bias_V is not None:
        logits_BTV = logits_BTV + manual.bring(bias_V, activation_spec(None)).astype(jnp.float32)[:vocab_size]
    return logits_BTV if softcap is None else softcap * jnp.tanh(logits_BTV / softcap)


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _summed(x, w, bias, targets, weights, how: _How):
    local = partial(_local_sums, how=how, w_axes=manual.axes_of(w, 1))
    run = manual.on_each_device(local, _in_specs(w), PartitionSpec(), checked=not inside_stage())
    return _with_total(run(x, w, bias, targets, weights))


def _summed_forward(x, w, bias, targets, weights, how: _How):
    in_specs = _in_specs(w)
    out_specs = (PartitionSpec(), *in_specs[:3], in_specs[4])
    local = partial(_local_gradients, how=how, w_axes=manual.axes_of(w, 1))
    run = manual.on_each_device(local, in_specs, out_specs, checked=not inside_stage())
    sums, dx, dw, dbias, dweights = run(x, w, bias, targets, weights)
    # Nothing needs the head's gradient before the optimizer, and compilers put it off until then, with logits or a
    # whole float32 gradient alive during all of the layers' backward pass. It is to be there, and scattered, before.
    dx, dw = jax.lax.optimization_barrier((dx, dw))
    return _with_total(sums), (dx, dw, dbias, dweights)


def _summed_backward(how: _How, residuals, cotangents):
    scale, _ = cotangents  # the parts are returned without gradients
    dx, dw, dbias, dweights = jax.tree.map(lambda d: (scale * d.astype(jnp.float32)).astype(d.dtype), residuals)
    return dx, dw, dbias, None, dweights


_summed.defvjp(_summed_forward, _summed_backward)


def _with_total(sums: tuple[jax.Array, ...]) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The sums added up, and each by its name."""
    total = sums[0]
    for part in sums[1:]:
        total = total + part
    return total, dict(zip(("nll_sum", "z_sum", "smoothing_sum"), sums, strict=False))


def _no_sums(weights_BT: jax.Array, how: _How) -> tuple[jax.Array, ...]:
    return (manual.zeros((), jnp.float32, weights_BT),) * (3 if how.label_smoothing else 2)


def _local_sums(x_BTD, w_VD, bias_V, targets_BT, weights_BT, *, how: _How, w_axes: manual.Axes):
    """The sums over all tokens of all devices."""
    w_DV = _whole(w_VD, x_BTD.dtype, w_axes)
    losses_of, chunks, _ = _prepare(x_BTD, w_DV, bias_V, targets_BT, weights_BT, how)

    def body(sums, chunk):
        x_ND, y_N, weight_N = chunk
        part = losses_of(x_ND, y_N)
        return _add_sums(sums, part, weight_N, how), None

    sums, _ = jax.lax.scan(body, _no_sums(weights_BT, how), chunks)
    return manual.total(sums, token_axes())


def _local_token_losses(x_BTD, w_VD, bias_V, targets_BT, *, how: _How, w_axes: manual.Axes):
    w_DV = _whole(w_VD, x_BTD.dtype, w_axes)
    losses_of, chunks, n_tokens = _prepare(x_BTD, w_DV, bias_V, targets_BT, targets_BT, how)
    _, nll_CN = jax.lax.scan(lambda _, chunk: (None, losses_of(*chunk[:2]).nll_N), None, chunks)
    return nll_CN.reshape(-1)[:n_tokens].reshape(targets_BT.shape)


def _local_gradients(x_BTD, w_VD, bias_V, targets_BT, weights_BT, *, how: _How, w_axes: manual.Axes):
    """The sums, and their gradients by x, w, bias and weights, in their dtypes; w's is added up in float32 on each
    device.

    With `e` the exponentials of a row but its target's, and `a = 1 + 2 z_loss lse`, the row of logit gradients is
    `weight a / s * E`, where `E = e` except `e_y - s / a` at the target. Multiplying by `E` and scaling the products
    saves a pass over the logits, and loses nothing to cancellation at a target whose probability is near 1. Label
    smoothing takes a share of `s / a` from the target and spreads it over the vocabulary.
    """
    w_DV = _whole(w_VD, x_BTD.dtype, w_axes)
    losses_of, chunks, n_tokens = _prepare(x_BTD, w_DV, bias_V, targets_BT, weights_BT, how)

    def body(carry, chunk):
        sums, dw_VD, dbias_V = carry
        x_ND, y_N, weight_N = chunk
        part = losses_of(x_ND, y_N)
        a_N = 1.0 + 2.0 * how.z_loss * part.lse_N
        a_N = jnp.where(jnp.abs(a_N) < 1e-6, 1e-6, a_N)
        at_target_N = ((a_N - 1.0) * part.target_N - part.others_N) / a_N
        e_NV = jnp.where(part.is_target_NV, at_target_N[:, None], part.e_NV)
        if how.label_smoothing:
            moved_N = how.label_smoothing * (part.others_N + part.target_N) / a_N
            share_NV = jnp.where(part.is_target_NV, 1.0 - 1.0 / how.vocab_size, -1.0 / how.vocab_size)
            e_NV = jnp.where(part.logits_NV == -jnp.inf, 0.0, e_NV + moved_N[:, None] * share_NV)
        if how.softcap is not None:
            # Padding is at -inf, where tanh is flat too.
            e_NV = e_NV * (1.0 - jnp.square(jnp.maximum(part.logits_NV, -how.softcap) / how.softcap))
        e_NV = e_NV.astype(x_BTD.dtype)
        row_N = weight_N * a_N / (part.others_N + part.target_N)
        dx_ND = row_N[:, None] * _dot(e_NV, w_DV, "nv,dv->nd")
        dw_VD = dw_VD + _dot(e_NV, (row_N[:, None] * x_ND).astype(x_BTD.dtype), "nv,nd->vd")
        if dbias_V is not None:
            dbias_V = dbias_V + jnp.sum(row_N[:, None] * e_NV.astype(jnp.float32), axis=0)
        dweight_N = part.nll_N + how.z_loss * jnp.square(part.lse_N)
        if part.smoothing_N is not None:
            dweight_N = dweight_N + how.label_smoothing * part.smoothing_N
        return (_add_sums(sums, part, weight_N, how), dw_VD, dbias_V), (dx_ND.astype(x_BTD.dtype), dweight_N)

    sums = _no_sums(weights_BT, how)
    dw = manual.zeros(w_DV.shape[::-1], jnp.float32, w_DV, x_BTD)
    dbias = None if bias_V is None else manual.zeros(bias_V.shape, jnp.float32, w_DV, x_BTD)
    (sums, dw, dbias), (dx_CND, dweight_CN) = jax.lax.scan(body, (sums, dw, dbias), chunks)
    dx_BTD = dx_CND.reshape(-1, x_BTD.shape[-1])[:n_tokens].reshape(*weights_BT.shape, -1)
    dx_BTD = manual.scattered_total(dx_BTD, sequence_axes(), 1)
    dx_BTD = manual.total(dx_BTD, tuple(axis for axis in mesh_axes("vocab") if axis not in sequence_axes()))
    # Between devices it travels in the format of the products, as the gradients of all gathered weights do.
    dw = manual.scattered_total(dw.astype(x_BTD.dtype), w_axes, 1)
    dw = manual.total(dw, tuple(axis for axis in token_axes() if axis not in w_axes))
    if bias_V is not None:
        dbias = manual.total(dbias, token_axes()).astype(bias_V.dtype)
    dweight_BT = dweight_CN.reshape(-1)[:n_tokens].reshape(weights_BT.shape)
    return manual.total(sums, token_axes()), dx_BTD, dw.astype(w_VD.dtype), dbias, dweight_BT


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Losses:
    """Softmax of one chunk. Exponentials are of logits less the row's maximum; `e_NV` is 0 at the target."""

    logits_NV: jax.Array
    is_target_NV: jax.Array
    e_NV: jax.Array
    others_N: jax.Array
    target_N: jax.Array
    lse_N: jax.Array
    nll_N: jax.Array
    smoothing_N: jax.Array | None
    """the target's logit less the mean one, where labels are smoothed"""


def _prepare(x_BTD, w_DV, bias_V, targets_BT, weights_BT, how: _How):
    """The function that makes a chunk's losses, the chunks to scan over, and how many of their tokens are real."""
    axes = mesh_axes("vocab")
    x_BTD = manual.gathered(x_BTD, sequence_axes(), 1)
    v_local = w_DV.shape[1]
    first_column = manual.index(axes) * v_local
    padded = v_local * manual.count(axes) != how.vocab_size

    def losses_of(x_ND: jax.Array, y_N: jax.Array) -> _Losses:
        logits_NV = _dot(x_ND, w_DV, "nd,dv->nv")
        if bias_V is not None:
            logits_NV = logits_NV + bias_V.astype(jnp.float32)
        column_V = jnp.arange(v_local, dtype=jnp.int32) + first_column
        if how.softcap is not None:
            logits_NV = how.softcap * jnp.tanh(logits_NV / how.softcap)
        if padded:
            logits_NV = jnp.where(column_V[None] < how.vocab_size, logits_NV, -jnp.inf)
        top_N = manual.largest(jnp.max(logits_NV, axis=1), axes)
        is_target_NV = column_V[None] == y_N[:, None]
        e_NV = jnp.where(is_target_NV, 0.0, jnp.exp(logits_NV - top_N[:, None]))
        row_N = y_N - first_column
        here_N = (row_N >= 0) & (row_N < v_local)
        picked_N = jnp.take_along_axis(logits_NV, jnp.clip(row_N, 0, v_local - 1)[:, None], axis=1)[:, 0]
        others_N, logit_N = manual.total((jnp.sum(e_NV, axis=1), jnp.where(here_N, picked_N, 0.0)), axes)
        target_N = jnp.exp(logit_N - top_N)
        lse_N = top_N + jnp.log(others_N + target_N)
        known_N = (y_N >= 0) & (y_N < how.vocab_size)
        nll_N = jnp.where(known_N, lse_N - logit_N, jnp.inf)
        smoothing_N = None
        if how.label_smoothing:
            real_NV = jnp.where(logits_NV == -jnp.inf, 0.0, logits_NV)
            smoothing_N = logit_N - manual.total(jnp.sum(real_NV, axis=1), axes) / how.vocab_size
        return _Losses(logits_NV, is_target_NV, e_NV, others_N, target_N, lse_N, nll_N, smoothing_N)

    n_tokens = targets_BT.size
    n_chunks = -(-n_tokens // (how.chunk_tokens or _default_chunk(v_local)))
    chunk = -(-n_tokens // n_chunks)
    chunks = tuple(
        _in_chunks(x.reshape(n_tokens, *x.shape[2:]), n_chunks, chunk) for x in (x_BTD, targets_BT, weights_BT)
    )
    return losses_of, chunks, n_tokens


def _whole(w_VD: jax.Array, dtype: jnp.dtype, w_axes: manual.Axes) -> jax.Array:
    """The output projection gathered along D, which comes first so that a TPU's pieces lie one after the other."""
    return manual.gathered(w_VD.astype(dtype).T, w_axes, 0)


def _add_sums(sums, part: _Losses, weight_N: jax.Array, how: _How):
    """Adds a chunk to the sums. A token of weight 0 adds 0 even if its loss is infinite."""
    used_N = weight_N != 0.0
    nll = jnp.sum(jnp.where(used_N, weight_N * part.nll_N, 0.0))
    z = how.z_loss * jnp.sum(jnp.where(used_N, weight_N * jnp.square(part.lse_N), 0.0))
    if part.smoothing_N is None:
        return sums[0] + nll, sums[1] + z
    smoothing = how.label_smoothing * jnp.sum(jnp.where(used_N, weight_N * part.smoothing_N, 0.0))
    return sums[0] + nll, sums[1] + z, sums[2] + smoothing


def _default_chunk(v_local: int) -> int:
    """Tokens whose float32 logits over this device's part of the vocabulary fit the bytes above, a multiple of 64."""
    if manual.platform() == "cpu":
        budget, least = CPU_CHUNK_BYTES // manual.n_devices(), CPU_LEAST_TOKENS
    else:
        budget, least = ACCELERATOR_CHUNK_BYTES, ACCELERATOR_LEAST_TOKENS
    return max(least, budget // (4 * v_local) // 64 * 64)


def _in_chunks(x: jax.Array, n_chunks: int, chunk: int) -> jax.Array:
    widths = [(0, n_chunks * chunk - x.shape[0])] + [(0, 0)] * (x.ndim - 1)
    return (x if widths[0] == (0, 0) else jnp.pad(x, widths)).reshape(n_chunks, chunk, *x.shape[1:])


def _dot(a: jax.Array, b: jax.Array, subscripts: str) -> jax.Array:
    return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32)


def _token_spec() -> PartitionSpec:
    return activation_spec("batch", "length")


def _bring(x_BTD: jax.Array, w_VD: jax.Array, bias_V: jax.Array | None, targets_BT: jax.Array) -> tuple[Any, ...]:
    x_BTD = manual.bring(x_BTD, activation_spec("batch", "residual_length", None))
    stored = tuple(axis for axis in manual.axes_of(w_VD, 1) if axis in token_axes())
    w_VD = manual.bring(w_VD, PartitionSpec(*activation_spec("vocab"), stored or None))
    if bias_V is not None:
        bias_V = manual.bring(bias_V, activation_spec("vocab"))
    return x_BTD, w_VD, bias_V, manual.bring(targets_BT, _token_spec())


def _in_specs(w_VD: jax.Array) -> tuple[PartitionSpec, ...]:
    w_spec = PartitionSpec(*activation_spec("vocab"), manual.axes_of(w_VD, 1) or None)
    x_spec = activation_spec("batch", "residual_length", None)
    return x_spec, w_spec, activation_spec("vocab"), _token_spec(), _token_spec()


def _check(x: jax.Array, w: jax.Array, targets: jax.Array, vocab_size: int, chunk_tokens: int | None) -> None:
    problems = []
    if targets.shape != x.shape[:2]:
        problems.append(f"targets {targets.shape} do not fit x {x.shape}")
    if w.ndim != 2 or w.shape[1] != x.shape[2]:
        problems.append(f"the output projection {w.shape} does not fit x {x.shape}")
    rows = w.shape[0] * (n_stages() if inside_stage() else 1)
    if not 0 < vocab_size <= rows:
        problems.append(f"vocab_size {vocab_size} is not between 1 and the {rows} rows of the output projection")
    if chunk_tokens is not None and chunk_tokens < 1:
        problems.append(f"chunk_tokens is {chunk_tokens}; give at least 1, or None")
    if problems:
        raise ValueError("cross_entropy: " + "; ".join(problems))
