from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from maxlm.kernels import attention as module
from maxlm.kernels import manual
from maxlm.kernels.attention import attention, choose
from maxlm.kernels.masks import Mask
from maxlm.parallel.axes import activation_spec
from maxlm.parallel.mesh import MeshConfig
from tests.kernels import truth


@dataclass(frozen=True)
class Case:
    shape: tuple[int, int, int, int, int]  # B, T, S, K, V
    heads: tuple[int, int]
    mask: Mask
    segments: bool
    softcap: float | None
    dtype: str
    implementation: str
    seed: int

    def __str__(self) -> str:
        sizes = "x".join(map(str, self.shape)) + f"-heads{self.heads[0]}:{self.heads[1]}"
        mask = f"{'causal' if self.mask.causal else 'both'}-window{self.mask.window}"
        return f"{self.implementation}-{sizes}-{mask}-{'segments-' * self.segments}cap{self.softcap}-{self.dtype}"


def generated_cases(n: int) -> list[Case]:
    """A fixed sample. Lengths are on, one off, and far off the multiples of the tile (32 in these tests)."""
    rng = np.random.default_rng(20260901)

    def one(options):
        return options[rng.integers(len(options))]

    cases = []
    for seed in range(n):
        T = one((1, 7, 32, 33, 64, 95))
        segments = bool(rng.random() < 0.5)
        mask = Mask(causal=bool(rng.random() < 0.7), window=one((None, None, 1, 5, 32, 40)))
        S = T if segments or rng.random() < 0.5 else one((5, 32, 70))
        cases.append(
            Case(
                shape=(one((1, 2, 3)), T, S, one((4, 16)), one((4, 8))),
                heads=one(((2, 2), (4, 2), (4, 1), (3, 1), (1, 1))),
                mask=mask,
                segments=segments,
                softcap=one((None, None, 3.0)),
                dtype=one(("float32", "float32", "bfloat16")),
                implementation="reference" if seed % 4 == 3 else "chunked",
                seed=seed,
            )
        )
    return cases


def inputs(B, T, S, H, G, K, V, dtype="float32", seed=0, segments=False):
    """q, k, v, the gradient of the output, and segments: documents of random lengths, then padding."""
    rng = np.random.default_rng(seed)
    q, k, v, do = (
        jnp.asarray(rng.normal(size=shape), dtype) for shape in ((B, T, H, K), (B, S, G, K), (B, S, G, V), (B, T, H, V))
    )
    if not segments:
        return q, k, v, do, None
    rows = np.cumsum(rng.random((B, T)) < 0.15, axis=1) + 1
    rows[:, T - T // 5 :] = 0
    return q, k, v, do, jnp.asarray(rows, jnp.int32)


def allowed_by(mask: Mask, segments, B: int, T: int, S: int) -> np.ndarray:
    allowed = np.broadcast_to(mask.allows(np.arange(T)[:, None], np.arange(S)[None, :]), (B, T, S))
    if segments is not None:
        rows = np.asarray(segments)
        allowed = allowed & (rows[:, :, None] == rows[:, None, :]) & (rows[:, None, :] != 0)
    return allowed


def output_and_gradients(q, k, v, do, **keywords):
    @jax.jit
    def run(q, k, v, do):
        o, pullback = jax.vjp(lambda q, k, v: attention(q, k, v, **keywords), q, k, v)
        return (o, *pullback(do))

    return run(q, k, v, do)


@pytest.mark.parametrize("case", generated_cases(40), ids=str)
def test_output_and_gradients_equal_the_float64_truth(case: Case, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "CPU_TILE", 32)
    (B, T, S, K, V), (H, G) = case.shape, case.heads
    q, k, v, do, segments = inputs(B, T, S, H, G, K, V, case.dtype, case.seed, case.segments)
    got = output_and_gradients(
        q, k, v, do, mask=case.mask, segments_BT=segments, softcap=case.softcap, implementation=case.implementation
    )
    allowed = allowed_by(case.mask, segments, B, T, S)
    expected = truth.attention(q, k, v, do, allowed, K**-0.5, case.softcap)
    for name, x, y in zip(("o", "dq", "dk", "dv"), got, expected, strict=True):
        assert x.dtype == jnp.dtype(case.dtype)
        # A query with one key has no gradient: terms of size 1, as the inputs are, cancel.
        truth.assert_close(x, y, truth.tolerance(x.dtype), name, least_scale=1.0)


PALLAS = [  # T, heads, key heads, K, mask, segments, softcap, dtype
    (128, 2, 1, 64, Mask(), False, None, "float32"),
    (256, 4, 2, 128, Mask(), True, None, "float32"),
    (256, 2, 2, 64, Mask(window=40), True, 5.0, "float32"),
    (128, 2, 1, 64, Mask(causal=False), True, None, "float32"),
    (256, 2, 1, 64, Mask(causal=False, window=33), False, 3.0, "float32"),
    (256, 2, 1, 128, Mask(), True, None, "bfloat16"),
]


@pytest.mark.parametrize(("T", "H", "G", "K", "mask", "segments", "softcap", "dtype"), PALLAS)
def test_the_tpu_kernel_interpreted_equals_the_float64_truth(T, H, G, K, mask, segments, softcap, dtype):
    q, k, v, do, rows = inputs(2, T, T, H, G, K, K, dtype, 3, segments)
    got = output_and_gradients(q, k, v, do, mask=mask, segments_BT=rows, softcap=softcap, implementation="pallas")
    expected = truth.attention(q, k, v, do, allowed_by(mask, rows, 2, T, T), K**-0.5, softcap)
    for name, x, y in zip(("o", "dq", "dk", "dv"), got, expected, strict=True):
        assert x.dtype == jnp.dtype(dtype)
        truth.assert_close(x, y, truth.tolerance(x.dtype), name, least_scale=1.0)


def test_the_tpu_kernel_on_a_mesh_gives_what_one_device_gives():
    q, k, v, do, rows = inputs(4, 128, 128, 4, 2, 64, 64, segments=True)
    one = output_and_gradients(q, k, v, do, mask=Mask(), segments_BT=rows, implementation="pallas")
    with jax.set_mesh(truth.mesh_of(truth.SHARDED)):
        put = [truth.put(x, PartitionSpec()) for x in (q, k, v, do, rows)]
        put[3] = truth.put(do, activation_spec("batch", "length", "heads", None))
        many = output_and_gradients(*put[:4], mask=Mask(), segments_BT=put[4], implementation="pallas")
    for x, y in zip(many, one, strict=True):
        truth.assert_close(x, np.asarray(y, np.float64), truth.FLOAT32_TOLERANCE)


@pytest.mark.parametrize("implementation", ["reference", "chunked"])
def test_query_with_nothing_to_attend_to_gives_zero_and_no_gradient(implementation: str):
    q, k, v, do, _ = inputs(2, 8, 8, 2, 2, 4, 4)
    segments = jnp.asarray([[1, 1, 1, 0, 0, 0, 0, 0], [0] * 8], jnp.int32)
    o, dq, dk, dv = output_and_gradients(
        q, k, v, do, mask=Mask(), segments_BT=segments, implementation=implementation, softcap=2.0
    )
    for x in (o, dq, dk, dv):
        assert np.all(np.asarray(x)[0, 3:] == 0.0)
        assert np.all(np.asarray(x)[1] == 0.0)
        assert np.all(np.any(np.asarray(x)[0, :3] != 0.0, axis=(1, 2)) | (x is dq) | (x is dk))


@pytest.mark.parametrize("implementation", ["reference", "chunked"])
def test_scores_of_thousands_neither_overflow_nor_lose_the_softmax(implementation: str):
    q, k, v, do, _ = inputs(1, 40, 40, 2, 1, 8, 8)
    got = output_and_gradients(100 * q, 100 * k, v, do, mask=Mask(), implementation=implementation)
    expected = truth.attention(100 * q, 100 * k, v, do, allowed_by(Mask(), None, 1, 40, 40), 8**-0.5, None)
    # Scores near 10^4 round at 5e-4 in float32, and exp carries that over to the probabilities.
    for x, y in zip(got, expected, strict=True):
        truth.assert_close(x, y, 4e-3)


def test_document_attends_as_if_it_were_alone():
    q, k, v, _, _ = inputs(1, 96, 96, 2, 2, 8, 8)
    segments = jnp.asarray([[1] * 30 + [2] * 50 + [3] * 16], jnp.int32)
    packed = jax.jit(partial(attention, mask=Mask(), segments_BT=segments))(q, k, v)
    alone = jax.jit(partial(attention, mask=Mask()))(q[:, 30:80], k[:, 30:80], v[:, 30:80])
    truth.assert_close(packed[:, 30:80], np.asarray(alone, np.float64), truth.FLOAT32_TOLERANCE)


def test_offsets_place_queries_in_the_cache():
    q, k, v, _, _ = inputs(3, 20, 20, 4, 2, 8, 8)
    whole = np.asarray(attention(q, k, v, mask=Mask(), implementation="reference"), np.float64)
    offset = jnp.asarray([0, 7, 18], jnp.int32)
    steps = jnp.stack([q[b, int(t) : int(t) + 2] for b, t in enumerate(offset)])
    got = jax.jit(partial(attention, mask=Mask(), implementation="chunked"))(steps, k, v, q_offset_B=offset)
    for b, t in enumerate(offset):
        truth.assert_close(got[b], whole[b, int(t) : int(t) + 2], truth.FLOAT32_TOLERANCE)


@pytest.mark.parametrize(
    ("config", "implementation"),
    [(truth.SHARDED, "reference"), (truth.SHARDED, "chunked"), (MeshConfig(fsdp=8), "chunked")],
    ids=str,
)
def test_shared_by_devices_equals_one_device(config: MeshConfig, implementation: str):
    q, k, v, do, segments = inputs(8, 150, 150, 4, 2, 8, 8, segments=True)
    one = output_and_gradients(q, k, v, do, mask=Mask(), segments_BT=segments, implementation=implementation)
    with jax.set_mesh(truth.mesh_of(config)):
        heads = activation_spec("batch", "length", "heads", None)
        shared = [truth.put(x, heads) for x in (q, k, v, do)]
        got = output_and_gradients(*shared, mask=Mask(), segments_BT=segments, implementation=implementation)
        assert [jax.typeof(x).sharding.spec for x in got] == [heads] * 4
    for x, y in zip(got, one, strict=True):
        truth.assert_close(x, np.asarray(y, np.float64), truth.FLOAT32_TOLERANCE)


def test_the_same_inputs_give_the_same_bits():
    with jax.set_mesh(truth.mesh_of(truth.SHARDED)):
        heads = activation_spec("batch", "length", "heads", None)
        q, k, v, do = (truth.put(x, heads) for x in inputs(4, 150, 150, 4, 2, 8, 8)[:4])
        first = output_and_gradients(q, k, v, do, mask=Mask())
        second = output_and_gradients(q, k, v, do, mask=Mask())
    assert all(np.array_equal(x, y) for x, y in zip(first, second, strict=True))


def test_memory_grows_with_the_length_and_not_with_its_square():
    def temporaries(T: int, implementation: str) -> int:
        x = jax.ShapeDtypeStruct((1, T, 2, 16), jnp.float32)
        run = jax.jit(
            jax.grad(
                lambda q, k, v: jnp.sum(attention(q, k, v, mask=Mask(), implementation=implementation)),
                argnums=(0, 1, 2),
            )
        )
        return run.lower(x, x, x).compile().memory_analysis().temp_size_in_bytes

    one, four = temporaries(1024, "chunked"), temporaries(4096, "chunked")
    assert four < 4.5 * one
    assert four < 2 * 4096 * 4096 * 4 / 16  # a sixteenth of the scores of both heads
    assert temporaries(2048, "reference") > 2 * 2048 * 2048 * 4


def _exponentials(policy) -> int:
    def layer(x, _):
        return jnp.tanh(attention(x, x, x, mask=Mask())), None

    def loss(x):
        return jnp.sum(jax.lax.scan(jax.checkpoint(layer, policy=policy), x, length=3)[0])

    x = jax.ShapeDtypeStruct((1, 300, 2, 8), jnp.float32)
    return jax.jit(jax.grad(loss)).lower(x).as_text().count("exponential")


def test_remat_that_saves_output_and_lse_by_name_does_not_run_forward_again():
    policies = jax.checkpoint_policies
    by_name = _exponentials(policies.save_only_these_names("flash_out", "flash_lse"))
    assert by_name == _exponentials(policies.everything_saveable) < _exponentials(policies.nothing_saveable)


def test_attention_works_under_remat_and_scan_with_equal_gradients():
    def loss(x, remat):
        layer = lambda x, _: (jnp.tanh(attention(x, x, x, mask=Mask())), None)  # noqa: E731
        return jnp.sum(jax.lax.scan(jax.checkpoint(layer) if remat else layer, x, length=2)[0])

    x = inputs(1, 140, 140, 2, 2, 8, 8)[0]
    plain, remat = (jax.jit(jax.grad(partial(loss, remat=r)))(x) for r in (False, True))
    truth.assert_close(remat, np.asarray(plain, np.float64), truth.FLOAT32_TOLERANCE)


def test_implementation_is_chosen_by_the_mesh_and_not_by_the_host():
    device = jax.sharding.AbstractDevice(device_kind="an accelerator", num_cores=None, platform="cuda")
    axes = truth.mesh_of().axis_names
    mesh = jax.sharding.AbstractMesh(
        (1,) * len(axes), axes, (jax.sharding.AxisType.Explicit,) * len(axes), abstract_device=device
    )
    assert manual.platform() == "cpu"
    with jax.sharding.use_abstract_mesh(mesh):
        assert manual.platform() == "cuda"


def test_automatic_choice_is_chunked_and_cached_decoding_is_the_reference():
    assert choose("auto", None, cached=False) == "chunked"
    assert choose("auto", "too short", cached=False) == "chunked"
    assert choose("chunked", None, cached=True) == choose("reference", None, cached=False) == "reference"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": (2, 9, 2, 8)}, r"values \(2, 8, 2, 8\) do not fit keys"),
        ({"q": (2, 8, 3, 8)}, "3 query heads are not a multiple of 2"),
        ({"q": (2, 8, 2, 4)}, "keys .* do not fit queries"),
        ({"segments": (2, 7)}, r"segments \(2, 7\) do not fit queries"),
        ({"implementation": "cudnn"}, "'cudnn' is not one of auto, reference, chunked, pallas"),
        ({"implementation": "pallas"}, "'pallas': 8 queries are not a multiple of 128; use 'auto' or 'chunked'"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(change: dict, message: str):
    shapes = {"q": (2, 8, 2, 8), "k": (2, 8, 2, 8), "v": (2, 8, 2, 8)}
    q, k, v = (jnp.zeros(change.get(name, shape)) for name, shape in shapes.items())
    segments = jnp.ones(change["segments"], jnp.int32) if "segments" in change else None
    with pytest.raises(ValueError, match=message):
        attention(q, k, v, mask=Mask(), segments_BT=segments, implementation=change.get("implementation", "auto"))


def test_arrays_are_brought_to_the_sharding_that_the_kernel_needs():
    q, k, v, _, _ = inputs(4, 40, 40, 4, 2, 8, 8)
    expected = attention(q, k, v, mask=Mask())
    with jax.set_mesh(truth.mesh_of(truth.SHARDED)):
        got = jax.jit(partial(attention, mask=Mask()))(*(truth.put(x, PartitionSpec()) for x in (q, k, v)))
    truth.assert_close(got, np.asarray(expected, np.float64), truth.FLOAT32_TOLERANCE)
