from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from maxlm.kernels.cross_entropy import cross_entropy, logits, token_losses
from maxlm.parallel.axes import activation_spec
from maxlm.parallel.mesh import MeshConfig
from tests.kernels import truth

RESIDUAL = ("batch", "residual_length", None)


def inputs(B=8, T=16, D=32, V=96, vocab_size=90, dtype="float32", seed=0, spread=1.0):
    """x, w with wild values in its padded rows, targets, and weights of which a third are 0."""
    rng = np.random.default_rng(seed)
    x, w = (jnp.asarray(spread * rng.normal(size=shape), dtype) for shape in ((B, T, D), (V, D)))
    w = w.at[vocab_size:].set(50.0)
    targets = jnp.asarray(rng.integers(vocab_size, size=(B, T)), jnp.int32)
    weights = jnp.asarray(np.where(rng.random((B, T)) < 0.33, 0.0, rng.random((B, T))), jnp.float32)
    return x, w, targets, weights


def everything(x, w, targets, weights, bias=None, **how):
    """Value, parts and gradients, as the truth names them."""

    @jax.jit
    def run(x, w, targets, weights, bias):
        loss = lambda x, w, weights, bias: cross_entropy(x, w, targets, weights, bias_V=bias, **how)  # noqa: E731
        value_and_grad = jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True)
        (value, parts), (dx, dw, dweights, dbias) = value_and_grad(x, w, weights, bias)
        without_gradients = loss(x, w, weights, bias)[0]
        found = {"loss": value, "primal": without_gradients, **parts, "dx": dx, "dw": dw, "dweights": dweights}
        return found if bias is None else found | {"dbias": dbias}

    return run(x, w, targets, weights, bias)


CASES = [
    {},
    {"chunk_tokens": 1},
    {"chunk_tokens": 12},  # 128 tokens are not a multiple
    {"chunk_tokens": 1000},
    {"vocab_size": 96},
    {"softcap": 3.0},
    {"softcap": 3.0, "z_loss": 1e-2, "chunk_tokens": 50},
    {"z_loss": 1e-4},
    {"z_loss": 1.0, "vocab_size": 1},
    {"spread": 6.0},  # logits of hundreds, probabilities of 0 and 1
    {"dtype": "bfloat16"},
    {"dtype": "bfloat16", "softcap": 5.0, "z_loss": 1e-3, "chunk_tokens": 32},
]


@pytest.mark.parametrize(
    "how",
    [
        {"label_smoothing": 0.1},
        {"bias": True},
        {"bias": True, "label_smoothing": 0.3, "softcap": 3.0, "z_loss": 1e-2, "chunk_tokens": 50},
        {"bias": True, "label_smoothing": 0.1, "dtype": "bfloat16"},
    ],
    ids=str,
)
@pytest.mark.parametrize("shared", [False, True], ids=["one device", "a mesh"])
def test_a_bias_and_smoothed_labels_equal_the_float64_truth(how: dict, shared: bool):
    how = {"softcap": None, "z_loss": 0.0, "label_smoothing": 0.0, **how}
    x, w, targets, weights = inputs(dtype=how.pop("dtype", "float32"), spread=0.3)
    chunk_tokens = how.pop("chunk_tokens", None)
    bias = jnp.asarray(np.random.default_rng(4).normal(size=96), jnp.float32) if how.pop("bias", False) else None
    expected = truth.cross_entropy(x, w, np.asarray(targets), weights, 90, bias=0.0 if bias is None else bias, **how)
    expected["loss"] = expected["primal"] = sum(expected[f"{name}_sum"] for name in ("nll", "z", "smoothing"))
    within = truth.tolerance(x.dtype)
    with jax.set_mesh(truth.mesh_of(truth.SHARDED if shared else None)):
        x, w = truth.put(x, activation_spec(*RESIDUAL)), truth.put(w, PartitionSpec("tensor", "fsdp"))
        targets, weights = (truth.put(a, activation_spec("batch", "length")) for a in (targets, weights))
        bias = None if bias is None else truth.put(bias, PartitionSpec("tensor"))
        got = everything(x, w, targets, weights, bias, vocab_size=90, chunk_tokens=chunk_tokens, **how)
        about = {"vocab_size": 90, "bias_V": bias, "softcap": how["softcap"]}
        got |= {"nll": token_losses(x, w, targets, **about), "logits": logits(x, w, **about)}
        for name, value in got.items():
            truth.assert_close(np.asarray(value), expected[name], within, name)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_sums_and_gradients_equal_the_float64_truth(case: dict):
    case = {"vocab_size": 90, "softcap": None, "z_loss": 0.0, "chunk_tokens": None, "dtype": "float32", **case}
    x, w, targets, weights = inputs(
        vocab_size=case["vocab_size"], dtype=case.pop("dtype"), spread=case.pop("spread", 0.3)
    )
    got = everything(x, w, targets, weights, **case)
    chunk_tokens = case.pop("chunk_tokens")
    expected = truth.cross_entropy(x, w, np.asarray(targets), weights, **case)
    expected["loss"] = expected["primal"] = expected["nll_sum"] + expected["z_sum"]
    within = truth.tolerance(x.dtype)
    for name, value in got.items():
        truth.assert_close(value, expected[name], within, name)
    nll = jax.jit(
        partial(token_losses, vocab_size=case["vocab_size"], softcap=case["softcap"], chunk_tokens=chunk_tokens)
    )(x, w, targets)
    truth.assert_close(nll, expected["nll"], within, "token_losses")
    scores = logits(x, w, vocab_size=case["vocab_size"], softcap=case["softcap"])
    truth.assert_close(scores, expected["logits"], within, "logits")


def test_gradient_is_exact_where_the_target_is_almost_certain():
    # 1 - p is 1e-6 here: p - 1 from a rounded p (at 4e-3 in bfloat16) would be noise.
    x = jnp.asarray([[[1.0, 0.0]]], jnp.bfloat16)
    w = jnp.asarray([[14.0, 0.0], [0.0, 1.0], [0.0, -1.0]], jnp.bfloat16)
    targets, weights = jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1))
    got = everything(x, w, targets, weights, vocab_size=3)
    expected = truth.cross_entropy(x, w, np.asarray(targets), weights, 3, None, 0.0)
    relative = np.asarray(got["dw"], np.float64)[:, 0] / expected["dw"][:, 0] - 1.0
    assert np.abs(relative).max() < truth.BFLOAT16_TOLERANCE


@pytest.mark.parametrize(
    ("config", "w_spec"),
    [
        (truth.SHARDED, PartitionSpec("tensor", None)),
        (truth.SHARDED, PartitionSpec("tensor", "fsdp")),
        (truth.SHARDED, PartitionSpec("tensor", ("data", "fsdp"))),
        (truth.SHARDED, PartitionSpec()),
        (MeshConfig(tensor=8), PartitionSpec("tensor", "fsdp")),  # the last device has padding only
    ],
    ids=str,
)
def test_shared_by_devices_equals_one_device(config: MeshConfig, w_spec: PartitionSpec):
    x, w, targets, weights = inputs(vocab_size=80)
    how = {"vocab_size": 80, "softcap": 8.0, "z_loss": 1e-3, "chunk_tokens": 12}
    one = everything(x, w, targets, weights, **how)
    nll, scores = token_losses(x, w, targets, vocab_size=80), logits(x, w, vocab_size=80)
    with jax.set_mesh(truth.mesh_of(config)):
        x, w = truth.put(x, activation_spec(*RESIDUAL)), truth.put(w, w_spec)
        targets, weights = (truth.put(a, activation_spec("batch", "length")) for a in (targets, weights))
        got = everything(x, w, targets, weights, **how)
        assert got["loss"].sharding.is_fully_replicated
        assert jax.typeof(got["dx"]).sharding.spec == jax.typeof(x).sharding.spec
        assert jax.typeof(got["dw"]).sharding.spec == jax.typeof(w).sharding.spec
        truth.assert_close(token_losses(x, w, targets, vocab_size=80), np.asarray(nll, np.float64), 5e-6)
        truth.assert_close(logits(x, w, vocab_size=80), np.asarray(scores, np.float64), 5e-6)
    for name, value in got.items():
        truth.assert_close(value, np.asarray(one[name], np.float64), truth.FLOAT32_TOLERANCE, name)


@pytest.mark.parametrize("chunk_tokens", [None, 192], ids=["as on a CPU", "as on an accelerator"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_temporaries_stay_under_300_mb_at_128k_vocabulary_and_8k_tokens(dtype: str, chunk_tokens: int | None):
    V, T, D = 128 * 1024, 8192, 64

    def loss(x, w, targets, weights):
        return cross_entropy(x, w, targets, weights, vocab_size=V - 100, z_loss=1e-4, chunk_tokens=chunk_tokens)[0]

    shapes = (((1, T, D), dtype), ((V, D), dtype), ((1, T), "int32"), ((1, T), "float32"))
    with jax.set_mesh(truth.mesh_of()):
        compiled = (
            jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*(jax.ShapeDtypeStruct(*s) for s in shapes)).compile()
        )
    # 4,300 MB of float32 logits would be needed at once.
    assert compiled.memory_analysis().temp_size_in_bytes < 300e6


def test_weightless_tokens_do_not_count_whatever_their_target():
    x, w, targets, weights = inputs()
    how = {"vocab_size": 90, "z_loss": 1e-3}
    usual = everything(x, w, targets, weights, **how)
    wild = jnp.where(weights == 0.0, jnp.asarray(np.resize([-1, 93, 10**6], weights.shape), jnp.int32), targets)
    got = everything(x, w, wild, weights, **how)
    for name in ("loss", "primal", "nll_sum", "z_sum", "dx", "dw"):
        truth.assert_close(got[name], np.asarray(usual[name], np.float64), truth.FLOAT32_TOLERANCE, name)


@pytest.mark.parametrize("target", [-1, 90, 96])
def test_weighted_target_outside_the_vocabulary_gives_an_infinite_loss_and_not_a_wrong_one(target: int):
    x, w, targets, weights = inputs()
    loss, _ = cross_entropy(x, w, targets.at[0, 0].set(target), weights.at[0, 0].set(1.0), vocab_size=90)
    assert np.isposinf(loss)


def test_parts_carry_no_gradients_and_the_scale_of_the_loss_reaches_all():
    x, w, targets, weights = inputs()
    run = partial(cross_entropy, vocab_size=90)
    parts_only = jax.grad(lambda x: run(x, w, targets, weights)[1]["nll_sum"])(x)
    assert np.all(np.asarray(parts_only) == 0.0)
    once = jax.grad(lambda w: run(x, w, targets, weights)[0])(w)
    thrice = jax.grad(lambda w: 3.0 * run(x, w, targets, weights)[0])(w)
    truth.assert_close(thrice, 3.0 * np.asarray(once, np.float64), truth.FLOAT32_TOLERANCE)


def test_float32_weight_with_bfloat16_activations_gets_a_float32_gradient():
    x, w, targets, weights = inputs(dtype="float32", spread=0.3)
    got = everything(x.astype(jnp.bfloat16), w, targets, weights, vocab_size=90)
    rounded = everything(x.astype(jnp.bfloat16), w.astype(jnp.bfloat16), targets, weights, vocab_size=90)
    assert got["dw"].dtype == jnp.float32
    truth.assert_close(rounded["dw"], np.asarray(got["dw"], np.float64), 2**-8)


def test_the_same_inputs_give_the_same_bits():
    with jax.set_mesh(truth.mesh_of(truth.SHARDED)):
        x, w, targets, weights = inputs()
        x, w = truth.put(x, activation_spec(*RESIDUAL)), truth.put(w, PartitionSpec("tensor", "fsdp"))
        first, second = (everything(x, w, targets, weights, vocab_size=90, chunk_tokens=16) for _ in range(2))
    assert all(np.array_equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 97}, "vocab_size 97 is not between 1 and the 96 rows"),
        ({"vocab_size": 0}, "vocab_size 0 is not between"),
        ({"chunk_tokens": 0}, "chunk_tokens is 0"),
        ({"targets": (8, 15)}, r"targets \(8, 15\) do not fit x"),
        ({"weights": (8, 15)}, r"weights \(8, 15\) do not fit targets"),
        ({"w": (96, 31)}, r"projection \(96, 31\) does not fit x"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_by_name(change: dict, message: str):
    x, w, targets, weights = inputs()
    w = jnp.zeros(change["w"]) if "w" in change else w
    targets = jnp.zeros(change["targets"], jnp.int32) if "targets" in change else targets
    weights = jnp.zeros(change["weights"]) if "weights" in change else weights
    with pytest.raises(ValueError, match=message):
        cross_entropy(
            x, w, targets, weights, vocab_size=change.get("vocab_size", 90), chunk_tokens=change.get("chunk_tokens")
        )
