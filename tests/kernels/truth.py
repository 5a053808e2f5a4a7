"""What the kernels compute, in NumPy and float64, and the meshes that the tests put them on."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec

from maxlm.parallel.mesh import MeshConfig, make_mesh

# float32 rounds at 6e-8, and the sums here have up to some hundreds of terms of like size, in another order than the
# truth's.
FLOAT32_TOLERANCE = 5e-6
# bfloat16 rounds at 2^-9 = 2e-3: inputs are rounded before both sides see them; probabilities, score gradients and
# results are rounded inside, about four times in a row.
BFLOAT16_TOLERANCE = 1.6e-2

SHARDED = MeshConfig(data=2, fsdp=2, tensor=2)


def mesh_of(config: MeshConfig | None = None) -> jax.sharding.Mesh:
    """A mesh of all simulated devices, or of one device."""
    return make_mesh(MeshConfig(), jax.devices()[:1]) if config is None else make_mesh(config)


def put(x: Any, spec: PartitionSpec) -> jax.Array:
    return jax.device_put(x, jax.sharding.NamedSharding(jax.sharding.get_mesh(), spec))


def tolerance(dtype: Any) -> float:
    return FLOAT32_TOLERANCE if dtype == np.float32 else BFLOAT16_TOLERANCE


def assert_close(got: Any, truth: np.ndarray, within: float, what: str = "", least_scale: float = 1e-3) -> None:
    """The greatest difference, relative to the greatest value of the truth, or to `least_scale` if that is more."""
    got = np.asarray(got, np.float64)
    assert got.shape == truth.shape, what
    assert np.isfinite(got).all(), what
    error = np.abs(got - truth).max(initial=0.0)
    scale = max(np.abs(truth).max(initial=0.0), least_scale)
    assert error <= within * scale, f"{what}: off by {error / scale:.2e}, more than {within:.1e}"


def softmax_masked(scores: np.ndarray, allowed: np.ndarray, sinks: np.ndarray | None = None) -> np.ndarray:
    """Softmax over the allowed scores and, where given, one score more that has no place in the result."""
    scores = np.where(allowed, scores, -np.inf)
    top = scores.max(axis=-1, keepdims=True)
    top = np.where(np.isfinite(top), top, 0.0) if sinks is None else np.maximum(top, sinks[..., None])
    e = np.where(allowed, np.exp(scores - top), 0.0)
    total = e.sum(axis=-1, keepdims=True)
    if sinks is not None:
        total = total + np.exp(sinks[..., None] - top)
    return e / np.where(total == 0.0, 1.0, total)


def attention(q, k, v, do, allowed_BTS, scale: float, softcap: float | None) -> tuple[np.ndarray, ...]:
    """The output and the gradients of q, k and v, by the textbook formulas."""
    return attention_with(q, k, v, do, allowed_BTS, scale, softcap)[:4]


def attention_with(
    q, k, v, do, allowed_BTS, scale: float, softcap: float | None, sinks_H=None, bias_HTS=None, products_BHTS=None
) -> tuple[np.ndarray, ...]:
    """The output and the gradients of q, k, v, the sinks, the bias (`[H, T, S]`, over all rows), and of what is added
    to the products of q and k."""
    q, k, v, do = (np.asarray(x, np.float64) for x in (q, k, v, do))
    B, T, H, K = q.shape
    S, G = k.shape[1:3]
    q, do = q.reshape(B, T, G, H // G, K), do.reshape(B, T, G, H // G, -1)
    s = np.einsum("btgrk,bsgk->bgrts", q, k)
    if products_BHTS is not None:
        s = s + np.asarray(products_BHTS, np.float64).reshape(s.shape)
    s = scale * s
    slope = 1.0
    if softcap is not None:
        s = softcap * np.tanh(s / softcap)
        slope = 1.0 - (s / softcap) ** 2
    if bias_HTS is not None:
        s = s + np.asarray(bias_HTS, np.float64).reshape(G, H // G, T, S)
    sinks = None if sinks_H is None else np.asarray(sinks_H, np.float64).reshape(G, H // G, 1)
    p = softmax_masked(s, allowed_BTS[:, None, None], sinks)
    o = np.einsum("bgrts,bsgv->btgrv", p, v)
    dp = np.einsum("btgrv,bsgv->bgrts", do, v)
    delta = (p * dp).sum(axis=-1, keepdims=True)
    ds = p * (dp - delta)
    # The sink's share is what the keys leave, and its value 0 leaves only -delta of its gradient.
    dsinks = (-(1.0 - p.sum(axis=-1)) * delta[..., 0]).sum(axis=(0, 3)).reshape(H)
    dbias = ds.sum(axis=0).reshape(H, T, S)
    ds = scale * slope * ds
    dq, dk = np.einsum("bgrts,bsgk->btgrk", ds, k), np.einsum("bgrts,btgrk->bsgk", ds, q)
    dv = np.einsum("bgrts,btgrv->bsgv", p, do)
    return o.reshape(B, T, H, -1), dq.reshape(B, T, H, K), dk, dv, dsinks, dbias, ds.reshape(B, H, T, S)


def bucket(distance: int, n_buckets: int, max_distance: int, bidirectional: bool) -> int:
    """T5's bucket, in whole numbers: bucket `exact + i` starts where `(d / exact)^(n - exact)` reaches
    `(max_distance / exact)^i`."""
    n = n_buckets // 2 if bidirectional else n_buckets
    first = n if bidirectional and distance > 0 else 0
    away = abs(distance) if bidirectional else max(-distance, 0)
    exact = n // 2
    if away < exact:
        return first + away
    i = 0
    while i < n - exact - 1 and away ** (n - exact) * exact ** (i + 1) >= max_distance ** (i + 1) * exact ** (
        n - exact
    ):
        i += 1
    return first + exact + i


def cross_entropy(
    x,
    w,
    targets,
    weights,
    vocab_size: int,
    softcap: float | None,
    z_loss: float,
    bias=0.0,
    label_smoothing: float = 0.0,
) -> dict[str, np.ndarray]:
    """The sums, the losses of tokens, and the gradients of x, w, bias and weights."""
    x, w, weights, bias = (np.asarray(a, np.float64) for a in (x, w, weights, bias))
    logits = np.einsum("btd,vd->btv", x, w[:vocab_size]) + (bias[:vocab_size] if bias.ndim else 0.0)
    slope = 1.0
    if softcap is not None:
        logits = softcap * np.tanh(logits / softcap)
        slope = 1.0 - (logits / softcap) ** 2
    top = logits.max(axis=-1, keepdims=True)
    lse = (top + np.log(np.exp(logits - top).sum(axis=-1, keepdims=True)))[..., 0]
    nll = lse - np.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    p = np.exp(logits - lse[..., None])
    one_hot = targets[..., None] == np.arange(vocab_size)
    wanted = (1.0 - label_smoothing) * one_hot + label_smoothing / vocab_size
    smoothing = label_smoothing * (lse - nll - logits.mean(axis=-1))
    dlogits = slope * weights[..., None] * (p * (1.0 + 2.0 * z_loss * lse[..., None]) - wanted)
    dw, dbias = np.zeros_like(w), np.zeros(len(w))
    dbias[:vocab_size] = dlogits.sum(axis=(0, 1))
    dw[:vocab_size] = np.einsum("btv,btd->vd", dlogits, x)
    return {
        "nll_sum": (weights * nll).sum(),
        "z_sum": (weights * z_loss * lse**2).sum(),
        "smoothing_sum": (weights * smoothing).sum(),
        "nll": nll,
        "logits": logits,
        "dx": np.einsum("btv,vd->btd", dlogits, w[:vocab_size]),
        "dw": dw,
        "dbias": dbias,
        "dweights": nll + z_loss * lse**2 + smoothing,
    }
