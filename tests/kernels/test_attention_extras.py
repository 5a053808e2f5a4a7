"""Sinks, biases, scores of distances, prefixes, chunks, global tokens, and keys of other rows than the queries'."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from maxlm.kernels import attention as module
from maxlm.kernels import attention_tpu
from maxlm.kernels.attention import attention
from maxlm.kernels.attention_bias import Alibi, Bias, RelativeBias, bucket
from maxlm.kernels.attention_extras import Extras
from maxlm.kernels.attention_relative import Relative
from maxlm.kernels.masks import Mask
from maxlm.parallel.axes import activation_spec
from tests.kernels import truth

N_BUCKETS, MAX_DISTANCE = 8, 20
LEARNED = ("sinks_H", "bias", "relative")


@dataclass(frozen=True)
class Case:
    shape: tuple[int, int, int, int, int]  # B, T, S, K, V
    heads: tuple[int, int]
    mask: Mask
    segments: bool
    prefix: bool
    sinks: bool
    bias: str | None  # alibi, past, both
    relative: str | None  # past, both, near
    softcap: float | None
    dtype: str
    implementation: str
    seed: int

    def __str__(self) -> str:
        sizes = "x".join(map(str, self.shape)) + f"-heads{self.heads[0]}:{self.heads[1]}"
        mask = (
            f"{'causal' if self.mask.causal else 'both'}-{self.mask.window}-{self.mask.chunk}-{self.mask.global_tokens}"
        )
        extras = (
            "segments-" * self.segments
            + "prefix-" * self.prefix
            + "sinks-" * self.sinks
            + f"{self.bias}-{self.relative}"
        )
        return f"{self.implementation}-{sizes}-{mask}-{extras}-cap{self.softcap}-{self.dtype}"


MASKS = (
    *(Mask(causal) for causal in (True, False)),
    *(Mask(causal, window=20, global_tokens=n) for causal in (True, False) for n in (0, 3, 40)),
    *(Mask(causal, chunk=chunk) for causal in (True, False) for chunk in (7, 32, 50)),
    Mask(window=10, chunk=24, global_tokens=2),
)


def generated_cases(n: int) -> list[Case]:
    """A fixed sample. Lengths are on, one off, and far off the multiples of the tile (32 in these tests)."""
    rng = np.random.default_rng(20260902)

    def one(options):
        return options[rng.integers(len(options))]

    cases = []
    for seed in range(n):
        T = one((7, 32, 33, 95))
        cases.append(
            Case(
                shape=(one((1, 2)), T, one((T, T, 5, 70)), one((4, 16)), one((4, 8))),
                heads=one(((2, 2), (4, 2), (3, 1))),
                mask=one(MASKS),
                segments=bool(rng.random() < 0.5),
                prefix=bool(rng.random() < 0.5),
                sinks=bool(rng.random() < 0.6),
                bias=one((None, "alibi", "past", "both")),
                relative=(None, "past", "both", "near")[seed // 2 % 4],
                softcap=one((None, None, 3.0)),
                dtype=one(("float32", "float32", "bfloat16")),
                implementation="reference" if seed % 4 == 3 else "chunked",
                seed=seed,
            )
        )
    return cases


def inputs(case: Case) -> tuple[list[jax.Array], dict[str, Any]]:
    """q, k, v and the gradient of the output; and the keyword arguments that are arrays."""
    (B, T, S, K, V), (H, G) = case.shape, case.heads
    rng = np.random.default_rng(case.seed)
    arrays = [
        jnp.asarray(rng.normal(size=shape), case.dtype)
        for shape in ((B, T, H, K), (B, S, G, K), (B, S, G, V), (B, T, H, V))
    ]
    extras: dict[str, Any] = {}
    if case.segments:
        # Segments of 12 positions and then padding; of the keys other ones than of the queries where S is not T.
        for name, length in (("segments_BT", T), ("kv_segments_BS", S)):
            rows = np.broadcast_to(1 + np.arange(length) // 12, (B, length)).copy()
            rows[:, length - length // 5 :] = 0
            extras[name] = jnp.asarray(rows, jnp.int32)
    if case.prefix:
        extras["prefix_BS"] = jnp.asarray(rng.random((B, S)) < 0.2)
    if case.sinks:
        extras["sinks_H"] = jnp.asarray(rng.normal(size=H), case.dtype)
    if case.bias is not None:
        extras["bias"] = bias_of(case.bias, H, case.dtype)
    if case.relative is not None:
        extras["relative"] = relative_of(case.relative, (B, T, H, K), S, case.dtype)
    return arrays, extras


def relative_of(kind: str, shape: tuple[int, int, int, int], S: int, dtype: str = "float32") -> Relative:
    """Vectors of every distance, of those of a causal mask, or of a few near ones."""
    rng, T = np.random.default_rng(11), shape[1]
    behind, ahead = {"past": (T - 1, 0), "both": (T - 1, S - 1), "near": (4, 2)}[kind]
    r_LHK = rng.normal(size=(behind + ahead + 1, *shape[2:]))
    return Relative(jnp.asarray(rng.normal(size=shape), dtype), jnp.asarray(r_LHK, dtype), behind=behind)


def vectors_by_pair(relative: Relative, T: int, S: int) -> tuple[np.ndarray, np.ndarray]:
    """The row of each query's and key's distance `[T, S]`, and its vectors `[T, S, H, K]`."""
    r_LHK = np.asarray(relative.r_LHK, np.float64)
    row = np.clip(np.arange(S)[None, :] - np.arange(T)[:, None] + relative.behind, 0, len(r_LHK) - 1)
    return row, r_LHK[row]


def bias_of(kind: str, H: int, dtype: str = "float32") -> Bias:
    rng = np.random.default_rng(7)
    if kind == "alibi":
        return Alibi(jnp.asarray(2.0 ** -np.arange(3, H + 3), dtype))
    table_NH = jnp.asarray(rng.normal(size=(N_BUCKETS, H)), dtype)
    return RelativeBias(table_NH, bidirectional=kind == "both", max_distance=MAX_DISTANCE)


def features_of(kind: str, T: int, S: int) -> np.ndarray:
    """What the bias's array is multiplied by at each query and key: `[1, T, S]` distances or `[N, T, S]` one-hots."""
    distance = np.arange(S)[None, :] - np.arange(T)[:, None]
    if kind == "alibi":
        return distance[None].astype(np.float64)
    buckets = np.vectorize(lambda d: truth.bucket(int(d), N_BUCKETS, MAX_DISTANCE, kind == "both"))(distance)
    return (buckets == np.arange(N_BUCKETS)[:, None, None]).astype(np.float64)


def allowed_by(case: Case, extras: dict[str, Any]) -> np.ndarray:
    B, T, S = case.shape[:3]
    at = np.arange(T)[:, None], np.arange(S)[None, :]
    allowed = np.broadcast_to(case.mask.allows(*at), (B, T, S))
    if case.prefix:
        both_ways = replace(case.mask, causal=False).allows(*at)
        allowed = allowed | (both_ways & np.asarray(extras["prefix_BS"])[:, None, :])
    if case.segments:
        q_rows, kv_rows = np.asarray(extras["segments_BT"]), np.asarray(extras["kv_segments_BS"])
        allowed = allowed & (q_rows[:, :, None] == kv_rows[:, None, :]) & (kv_rows[:, None, :] != 0)
    return allowed


def output_and_gradients(arrays, extras, **keywords) -> tuple[jax.Array, ...]:
    """The output and the gradients of q, k, v, then of what is LEARNED where given."""
    learned = {name: extras[name] for name in LEARNED if name in extras}
    rest = {name: x for name, x in extras.items() if name not in learned}

    @jax.jit
    def run(q, k, v, do, learned, rest):
        def f(q, k, v, learned):
            return attention(q, k, v, **learned, **rest, **keywords)

        o, pull_back = jax.vjp(f, q, k, v, learned)
        dq, dk, dv, dlearned = pull_back(do)
        return (o, dq, dk, dv, *(x for name in LEARNED for x in jax.tree.leaves(dlearned.get(name))))

    return run(*arrays, learned, rest)


def expected_of(case: Case, arrays, extras) -> tuple[np.ndarray, ...]:
    (_, T, S, K, _), bias, products = case.shape, None, None
    if case.bias is not None:
        features = features_of(case.bias, T, S)
        array = np.asarray(jax.tree.leaves(extras["bias"])[0], np.float64)
        bias = np.einsum("nh,nts->hts", array.reshape(len(features), -1), features)
    relative, allowed = extras.get("relative"), allowed_by(case, extras)
    if relative is not None:
        row, r_TSHK = vectors_by_pair(relative, T, S)
        q_BTHK = np.asarray(relative.q_BTHK, np.float64)
        products = np.einsum("bthk,tshk->bhts", q_BTHK, r_TSHK)
    *results, dsinks, dbias, dproducts = truth.attention_with(
        *arrays, allowed, K**-0.5, case.softcap, extras.get("sinks_H"), bias, products
    )
    if case.sinks:
        results.append(dsinks)
    if case.bias is not None:
        results.append(np.einsum("hts,nts->nh", dbias, features).reshape(array.shape))
    if relative is not None:
        dr = np.zeros(relative.r_LHK.shape)
        np.add.at(dr, row, np.einsum("bhts,bthk->tshk", dproducts, q_BTHK))
        results += [np.einsum("bhts,tshk->bthk", dproducts, r_TSHK), dr]
    return tuple(results)


@pytest.mark.parametrize("case", generated_cases(24), ids=str)
def test_output_and_gradients_equal_the_float64_truth(case: Case, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "CPU_TILE", 32)
    arrays, extras = inputs(case)
    got = output_and_gradients(arrays, extras, mask=case.mask, softcap=case.softcap, implementation=case.implementation)
    expected = expected_of(case, arrays, extras)
    for i, (x, y) in enumerate(zip(got, expected, strict=True)):
        assert x.dtype == jnp.dtype(case.dtype)
        # A query with one key has no gradient: terms of size 1, as the inputs are, cancel; of a slope's gradient, terms
        # of the size of a distance.
        size = max(case.shape[1:3]) if i >= 4 and case.bias == "alibi" else 1.0
        truth.assert_close(x, y, truth.tolerance(x.dtype), f"result {i}", least_scale=size)


def test_the_sample_of_cases_has_every_feature_in_the_chunked_implementation():
    chunked = [case for case in generated_cases(24) if case.implementation == "chunked"]
    assert {case.bias for case in chunked} == {None, "alibi", "past", "both"}
    assert {case.relative for case in chunked} == {None, "past", "both", "near"}
    for feature in ("segments", "prefix", "sinks"):
        assert {getattr(case, feature) for case in chunked} == {True, False}
    assert any(case.mask.chunk and not case.mask.causal for case in chunked)
    assert any(case.mask.global_tokens and case.mask.causal and case.prefix for case in chunked)
    assert any(case.shape[1] != case.shape[2] and case.segments and not case.mask.causal for case in chunked)


@pytest.mark.parametrize(("n_buckets", "max_distance"), [(32, 128), (12, 64), (320, 800), (4, 16)])
@pytest.mark.parametrize("bidirectional", [True, False])
def test_buckets_are_those_of_t5(n_buckets: int, max_distance: int, bidirectional: bool):
    distances = np.arange(-2 * max_distance, 2 * max_distance + 1)
    got = bucket(jnp.asarray(distances), n_buckets, max_distance, bidirectional=bidirectional)
    assert list(got) == [truth.bucket(int(d), n_buckets, max_distance, bidirectional) for d in distances]


def test_alibi_is_blooms_slope_times_the_keys_position_under_softmax():
    case = Case((2, 20, 20, 8, 8), (4, 2), Mask(), False, False, False, "alibi", None, None, "float32", "chunked", 3)
    arrays, extras = inputs(case)
    slopes = np.asarray(extras["bias"].slopes_H, np.float64)
    bloom = np.broadcast_to(slopes[:, None, None] * np.arange(20), (4, 20, 20))
    expected = truth.attention_with(*arrays, allowed_by(case, extras), 8**-0.5, None, None, bloom)[0]
    got = attention(*arrays[:3], mask=Mask(), **extras)
    truth.assert_close(got, expected, truth.FLOAT32_TOLERANCE)


WHOLE = Case((4, 70, 70, 8, 4), (4, 2), Mask(), True, True, True, "both", "past", None, "float32", "chunked", 5)


@pytest.mark.parametrize(
    ("mask", "kind"),
    [(Mask(), "past"), (Mask(window=9, global_tokens=2), "alibi"), (Mask(chunk=16), "both")],
    ids=str,
)
def test_cached_decoding_gives_what_the_whole_row_gives(mask: Mask, kind: str):
    case = replace(WHOLE, mask=mask, bias=kind, segments=False, shape=(3, 40, 40, 8, 4))
    (q, k, v, _), extras = inputs(case)
    relative = extras.pop("relative")
    whole = np.asarray(attention(q, k, v, mask=mask, relative=relative, **extras), np.float64)
    offset = jnp.asarray([0, 17, 38], jnp.int32)
    steps, own = (jnp.stack([x[b, int(t) : int(t) + 2] for b, t in enumerate(offset)]) for x in (q, relative.q_BTHK))
    relative = replace(relative, q_BTHK=own)
    got = jax.jit(partial(attention, mask=mask))(steps, k, v, q_offset_B=offset, relative=relative, **extras)
    for b, t in enumerate(offset):
        truth.assert_close(got[b], whole[b, int(t) : int(t) + 2], truth.FLOAT32_TOLERANCE)


@pytest.mark.parametrize(("implementation", "kind"), [("reference", "both"), ("chunked", "past"), ("chunked", "alibi")])
def test_shared_by_devices_equals_one_device(implementation: str, kind: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "CPU_TILE", 32)
    arrays, extras = inputs(replace(WHOLE, bias=kind))
    one = output_and_gradients(arrays, extras, mask=Mask(chunk=30), implementation=implementation)
    with jax.set_mesh(truth.mesh_of(truth.SHARDED)):
        heads = activation_spec("batch", "length", "heads", None)
        shared = [truth.put(x, heads) for x in arrays]
        put = jax.tree.map(lambda x: truth.put(x, PartitionSpec()), extras)
        got = output_and_gradients(shared, put, mask=Mask(chunk=30), implementation=implementation)
    assert len(got) == 8
    for i, (x, y) in enumerate(zip(got, one, strict=True)):
        truth.assert_close(x, np.asarray(y, np.float64), truth.FLOAT32_TOLERANCE, f"result {i}", least_scale=1.0)


@pytest.mark.parametrize(("mask", "dtype"), [(Mask(chunk=100), "float32"), (Mask(window=40), "bfloat16")], ids=str)
def test_the_tpu_kernel_interpreted_takes_sinks_and_chunks(mask: Mask, dtype: str):
    case = Case((2, 256, 256, 64, 64), (4, 2), mask, True, False, True, None, None, None, dtype, "pallas", 1)
    arrays, extras = inputs(case)
    got = output_and_gradients(arrays, extras, mask=mask, implementation="pallas")
    for i, (x, y) in enumerate(zip(got, expected_of(case, arrays, extras), strict=True)):
        truth.assert_close(x, y, truth.tolerance(x.dtype), f"result {i}", least_scale=1.0)


def test_the_tpu_kernel_on_a_mesh_sums_the_gradient_of_sinks():
    case = Case((4, 128, 128, 64, 64), (4, 2), Mask(), True, False, True, None, None, None, "float32", "pallas", 1)
    arrays, extras = inputs(case)
    with jax.set_mesh(truth.mesh_of(truth.SHARDED)):
        heads = activation_spec("batch", "length", "heads", None)
        shared = [truth.put(x, heads) for x in arrays]
        put = jax.tree.map(lambda x: truth.put(x, PartitionSpec()), extras)
        got = output_and_gradients(shared, put, mask=Mask(), implementation="pallas")
    for x, y in zip(got, expected_of(case, arrays, extras), strict=True):
        truth.assert_close(x, y, truth.FLOAT32_TOLERANCE, least_scale=1.0)


def test_the_tpu_kernel_gives_zero_to_a_query_whose_segment_has_no_keys():
    case = Case(
        (2, 256, 128, 64, 64), (2, 1), Mask(False), True, False, False, None, None, None, "float32", "pallas", 2
    )
    arrays, extras = inputs(case)
    assert not np.isin(np.asarray(extras["segments_BT"]), np.asarray(extras["kv_segments_BS"])).all()
    got = output_and_gradients(arrays, extras, mask=case.mask, implementation="pallas")
    for x, y in zip(got, expected_of(case, arrays, extras), strict=True):
        truth.assert_close(x, y, truth.FLOAT32_TOLERANCE, least_scale=1.0)


@pytest.mark.parametrize(
    ("extras", "mask", "shapes", "reason"),
    [
        (Extras(bias=bias_of("both", 2)), Mask(), {}, "a bias of the scores"),
        (Extras(relative=relative_of("past", (2, 128, 2, 64), 128)), Mask(), {}, "scores of queries with distances"),
        (Extras(prefix_BS=jnp.zeros((2, 128), bool)), Mask(), {}, "a prefix"),
        (Extras(), Mask(window=4, global_tokens=3), {}, "3 global tokens"),
        (Extras(), Mask(chunk=64, window=4), {}, "chunks of 64 with a window"),
        (Extras(), Mask(causal=False, chunk=64), {}, "chunks of 64 without a causal mask"),
        (Extras(), Mask(chunk=64), {"q": (2, 256, 2, 64)}, "256 queries of 128 keys under a window or in chunks"),
        (Extras(), Mask(), {"v": (2, 128, 2, 128)}, "values of width 128 with queries of width 64"),
    ],
)
def test_the_tpu_kernel_says_what_it_does_not_take(extras: Extras, mask: Mask, shapes: dict, reason: str):
    q, k, v = (jax.ShapeDtypeStruct(shapes.get(name, (2, 128, 2, 64)), jnp.float32) for name in "qkv")
    assert attention_tpu.refusal(q, k, v, extras, mask) == reason  # pyright: ignore[reportArgumentType]


def test_the_tpu_kernel_takes_sinks_and_causal_chunks():
    x = jax.ShapeDtypeStruct((2, 128, 2, 64), jnp.float32)
    extras = Extras(sinks_H=jnp.zeros(2))
    assert attention_tpu.refusal(x, x, x, extras, Mask(chunk=64)) is None  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("implementation", ["reference", "chunked"])
def test_query_with_nothing_but_a_sink_gives_zero_and_no_gradient(implementation: str):
    (q, k, v, do), _ = inputs(replace(WHOLE, shape=(1, 8, 8, 4, 4)))
    segments = jnp.asarray([[1, 1, 1, 0, 0, 0, 0, 0]], jnp.int32)
    extras = {"segments_BT": segments, "sinks_H": jnp.asarray([-1e4, 0.0, 5.0, 1e4])}
    o, dq, dk, dv, dsinks = output_and_gradients((q, k, v, do), extras, mask=Mask(), implementation=implementation)
    for x in (o, dq, dk, dv):
        assert np.all(np.asarray(x)[0, 3:] == 0.0)
    assert np.all(np.asarray(o)[0, :3, :3] != 0.0)
    assert np.all(np.asarray(o)[0, :, 3] == 0.0)
    assert np.isfinite(np.asarray(dsinks)).all()


def test_sink_of_minus_infinity_is_none():
    (q, k, v, _), _ = inputs(replace(WHOLE, shape=(1, 20, 20, 8, 4)))
    for implementation in ("reference", "chunked"):
        run = jax.jit(partial(attention, mask=Mask(window=5), implementation=implementation))
        assert np.array_equal(run(q, k, v, sinks_H=jnp.full(4, -jnp.inf)), run(q, k, v))


def test_memory_with_a_bias_grows_with_the_length_and_not_with_its_square():
    T, H = 4096, 2
    x, table = jax.ShapeDtypeStruct((1, T, H, 16), jnp.float32), jax.ShapeDtypeStruct((32, H), jnp.float32)

    def loss(q, k, v, table):
        return jnp.sum(attention(q, k, v, mask=Mask(), bias=RelativeBias(table), implementation="chunked"))

    run = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3))).lower(x, x, x, table).compile()
    assert run.memory_analysis().temp_size_in_bytes < H * T * T * 4 / 16


def test_memory_with_scores_of_distances_grows_with_the_length_and_not_with_its_square():
    T, H = 4096, 2
    x, r = jax.ShapeDtypeStruct((1, T, H, 16), jnp.float32), jax.ShapeDtypeStruct((T, H, 16), jnp.float32)

    def loss(q, k, v, r):
        relative = Relative(2 * q, r, behind=T - 1)
        return jnp.sum(attention(q, k, v, mask=Mask(), relative=relative, implementation="chunked"))

    run = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3))).lower(x, x, x, r).compile()
    assert run.memory_analysis().temp_size_in_bytes < H * T * T * 4 / 8


@pytest.mark.parametrize(
    ("extras", "message"),
    [
        ({"sinks_H": jnp.zeros(3)}, r"sinks \(3,\) do not fit 2 query heads"),
        ({"prefix_BS": jnp.zeros((2, 7), bool)}, r"a prefix bool \(2, 7\) is not bool \(2, 8\)"),
        ({"prefix_BS": jnp.zeros((2, 8), jnp.int32)}, r"a prefix int32 \(2, 8\) is not bool"),
        (
            {"relative": Relative(jnp.zeros((2, 8, 2, 8)), jnp.zeros((8, 1, 8)), behind=7)},
            r"vectors of distances \(8, 1, 8\) do not fit queries \(2, 8, 2, 8\)",
        ),
        (
            {"relative": Relative(jnp.zeros((2, 7, 2, 8)), jnp.zeros((8, 2, 8)), behind=7)},
            r"queries of distances \(2, 7, 2, 8\) do not fit",
        ),
        (
            {"relative": Relative(jnp.zeros((2, 8, 2, 8)), jnp.zeros((8, 2, 8)), behind=8)},
            "of 8 vectors of distances, number 8 is not of distance 0",
        ),
        ({"bias": Alibi(jnp.zeros(3))}, r"a bias \(3,\) does not fit 2 query heads"),
        ({"bias": RelativeBias(jnp.zeros((8, 3)))}, r"a bias \(8, 3\) does not fit 2 query heads"),
        ({"bias": RelativeBias(jnp.zeros((2, 2)))}, "does not reach to a distance of 128"),
        ({"kv_segments_BS": jnp.ones((2, 8), jnp.int32)}, "segments of keys are given and those of queries are not"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(extras: dict[str, Any], message: str):
    x = jnp.zeros((2, 8, 2, 8))
    with pytest.raises(ValueError, match=message):
        attention(x, x, x, mask=Mask(), **extras)
