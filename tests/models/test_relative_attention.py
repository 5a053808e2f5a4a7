"""Transformer-XL's relative positions against the paper's equation, pair by pair, and against plain attention."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from pydantic import ValidationError

from maxlm.kernels import attention as kernel
from maxlm.models.attention import Context
from maxlm.models.block import remat_policy
from maxlm.models.config import ModelConfig, RematConfig
from maxlm.models.families import FAMILIES
from maxlm.models.layers import Initializer
from maxlm.models.positions import distance_sinusoids
from maxlm.models.relative_attention import RelativeAttention
from maxlm.models.stacks import LayerKind
from tests import tiny, tiny_moe
from tests.kernels import truth

POLICIES = (
    RematConfig(policy="full"),
    RematConfig(policy="names", names=("r", "flash_out", "flash_lse")),
    RematConfig(policy="dots"),
    RematConfig(policy="none"),
)


class Case(NamedTuple):
    B: int
    T: int
    D: int
    heads: tuple[int, int]
    K: int
    causal: bool
    window: int | None
    segments: bool
    implementation: str
    remat: RematConfig

    def __str__(self) -> str:
        return "-".join(map(str, (*self[:-1], self.remat.policy)))


def generated_cases(n: int) -> list[Case]:
    """A fixed sample; lengths are one, and some off the multiples of the tile (16 in these tests)."""
    rng = np.random.default_rng(190102860)

    def one(options):
        return options[rng.integers(len(options))]

    return [
        Case(
            B=one((1, 2)), T=(33, 17, 40, 1, 20)[i], D=one((6, 16)), heads=one(((2, 2), (4, 2), (3, 1))), K=one((4, 5)),
            causal=i % 3 != 1, window=(None, 9)[i % 2], segments=i > 1,
            implementation="reference" if i % 5 == 4 else "chunked", remat=POLICIES[i % 4],
        )
        for i in range(n)
    ]  # fmt: skip


def allowed_by(case: Case, segments: np.ndarray) -> np.ndarray:
    ahead = np.arange(case.T)[None, :] - np.arange(case.T)[:, None]
    allowed = np.ones_like(ahead, bool) if case.window is None else abs(ahead) < case.window
    allowed &= ahead <= 0 if case.causal else True
    return allowed & (segments[:, :, None] == segments[:, None, :]) & (segments[:, None, :] != 0)


def scores_by_pair(case: Case, x: np.ndarray, p: dict[str, np.ndarray]) -> np.ndarray:
    """Terms (a) to (d) of section 3.3, one number at a time, `[B, H, T, T]`."""
    H, G = case.heads
    found = np.zeros((case.B, H, case.T, case.T))
    for i in range(case.T):
        for j in range(case.T):
            angles = [(i - j) / 10_000 ** (2 * m / case.D) for m in range(case.D // 2)]
            r = np.array([math.sin(a) for a in angles] + [math.cos(a) for a in angles])
            for b in range(case.B):
                for h in range(H):
                    q, k = x[b, i] @ p["q"][:, h], x[b, j] @ p["k"][:, h // (H // G)]
                    far = r @ p["r"][:, h]
                    found[b, h, i, j] = q @ k + q @ far + p["content_bias"][h] @ k + p["position_bias"][h] @ far
    return found


def as_plain_attention(case: Case, x, p, dy, allowed) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The result and the gradients by the addition theorem: sin(i - j) and cos(i - j) are products of a vector of i and
    one of j, and so the scores are those of attention with heads wider by d_model."""
    half = case.D // 2
    angle = np.arange(case.T)[:, None] * 10_000.0 ** (-np.arange(half) / half)
    sin, cos = np.sin(angle)[:, None], np.cos(angle)[:, None]
    q, k, v = (np.einsum("btd,dhk->bthk", x, p[name]) for name in "qkv")
    seen = np.einsum("bthk,dhk->bthd", q + p["position_bias"], p["r"])
    s, c = seen[..., :half], seen[..., half:]
    wide_q = np.concatenate([q + p["content_bias"], s * sin + c * cos, c * sin - s * cos], axis=-1)
    of_key = np.broadcast_to(np.concatenate([cos, sin], axis=-1), (*k.shape[:-1], case.D))
    wide_k = np.concatenate([k, of_key], axis=-1)
    do = np.einsum("btd,hkd->bthk", dy, p["o"])
    o, dwide_q, dwide_k, dv = truth.attention(wide_q, wide_k, v, do, allowed, case.K**-0.5, None)
    dq, da, db = np.split(dwide_q, (case.K, case.K + half), axis=-1)
    dseen = np.concatenate([da * sin - db * cos, da * cos + db * sin], axis=-1)
    dpositions = np.einsum("bthd,dhk->bthk", dseen, p["r"])
    gradients = {
        "q": np.einsum("btd,bthk->dhk", x, dq + dpositions),
        "k": np.einsum("btd,bthk->dhk", x, dwide_k[..., : case.K]),
        "v": np.einsum("btd,bthk->dhk", x, dv),
        "o": np.einsum("bthk,btd->hkd", o, dy),
        "r": np.einsum("bthd,bthk->dhk", dseen, q + p["position_bias"]),
        "content_bias": dq.sum((0, 1)),
        "position_bias": dpositions.sum((0, 1)),
    }
    return np.einsum("bthk,hkd->btd", o, p["o"]), gradients


@pytest.mark.parametrize("case", generated_cases(5), ids=str)
def test_result_and_gradients_are_those_of_the_papers_equation_under_each_remat_policy(
    case: Case, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(kernel, "CPU_TILE", 16)
    config = ModelConfig(
        vocab_size=8, n_layers=1, d_model=case.D, n_heads=case.heads[0], n_kv_heads=case.heads[1], head_dim=case.K,
        d_ff=8, positions="transformer_xl", kind="decoder" if case.causal else "encoder", attention_window=case.window,
        attention_implementation=case.implementation,
    )  # fmt: skip
    rng = np.random.default_rng(case.T)
    x, dy = rng.normal(size=(2, case.B, case.T, case.D)).astype(np.float32)
    segments = np.ones((case.B, case.T), np.int32)
    if case.segments:
        segments[:] = 1 + np.arange(case.T) // 12
        segments[:, case.T - case.T // 5 :] = 0
    with jax.set_mesh(truth.mesh_of()):
        kind = LayerKind(local=case.window is not None, causal=case.causal)
        layer = RelativeAttention(
            config, kind, jnp.dtype("float32"), Initializer(jax.random.key(0), jnp.dtype("float32"))
        )
        graph, state = nnx.split(layer)
        shapes = nnx.to_pure_dict(state)
        params = {name: rng.normal(0, 0.4, one.shape).astype(np.float32) for name, one in shapes.items()}
        sines = distance_sinusoids(case.T, case.D, jnp.dtype("float32"), causal=case.causal)
        context = Context(None, None, jnp.asarray(segments), distances_LD=sines)

        @jax.jit
        def run(params, x, dy):
            def forward(params):
                return nnx.merge(graph, params)(x, context, None)[0]

            y, pull_back = jax.vjp(jax.checkpoint(forward, policy=remat_policy(case.remat)), params)
            return y, pull_back(dy)[0]

        y, found = run(params, x, dy)
    p = {name: value.astype(np.float64) for name, value in params.items()}
    x, dy, allowed = x.astype(np.float64), dy.astype(np.float64), allowed_by(case, segments)
    expected, gradients = as_plain_attention(case, x, p, dy, allowed)
    weights = truth.softmax_masked(case.K**-0.5 * scores_by_pair(case, x, p), allowed[:, None])
    values = np.repeat(np.einsum("btd,dgk->btgk", x, p["v"]), case.heads[0] // case.heads[1], axis=2)
    by_pair = np.einsum("bhts,bshk,hkd->btd", weights, values, p["o"])
    np.testing.assert_allclose(by_pair, expected, rtol=0, atol=1e-12 * np.abs(expected).max())
    truth.assert_close(y, expected, truth.FLOAT32_TOLERANCE)
    assert set(found) == set(gradients)
    for name, gradient in gradients.items():
        truth.assert_close(found[name], gradient, truth.FLOAT32_TOLERANCE, name, least_scale=1.0)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
def test_no_public_family_has_these_positions_and_each_says_so(family):
    config = ModelConfig(**(tiny_moe.MIXTRAL if family.has_experts else tiny.LLAMA), positions="transformer_xl")
    assert any("model.positions = 'transformer_xl'" in wrong for wrong in family.misfits_of(config))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "encoder_decoder"}, "positions = 'transformer_xl' does not go with kind = 'encoder_decoder'"),
        ({"d_model": 63, "head_dim": 16}, "d_model = 63 is odd"),
        ({"rope_fraction": 0.5}, "rope_fraction is given"),
    ],
)
def test_settings_that_do_not_go_with_these_positions_are_refused_by_name(change, message):
    with pytest.raises(ValidationError, match=message):
        ModelConfig(**{**tiny.GOPHER, **change})
