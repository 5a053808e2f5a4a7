from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from maxlm.kernels.embedding import embed
from maxlm.parallel.axes import activation_spec
from maxlm.parallel.mesh import MeshConfig
from tests.kernels import truth

B, T, D, V = 8, 16, 32, 96


def inputs(dtype="float32"):
    """A table, tokens of which some repeat often and some are not in the table, and the gradient of the result."""
    rng = np.random.default_rng(0)
    tokens = np.where(rng.random((B, T)) < 0.3, 5, rng.integers(-3, V + 3, (B, T)))
    return (
        jnp.asarray(rng.normal(size=(V, D)), dtype),
        jnp.asarray(tokens, jnp.int32),
        jnp.asarray(rng.normal(size=(B, T, D)), dtype),
    )


def expected(table, tokens, dx):
    table, tokens, dx = np.asarray(table, np.float64), np.asarray(tokens), np.asarray(dx, np.float64)
    inside = (tokens >= 0) & (tokens < V)
    x = np.where(inside[..., None], table[np.clip(tokens, 0, V - 1)], 0.0)
    dtable = np.zeros_like(table)
    np.add.at(dtable, tokens[inside], dx[inside])
    return x, dtable


def rows_and_gradient(table, tokens, dx, **keywords):
    @jax.jit
    def run(table, dx):
        x, pullback = jax.vjp(lambda table: embed(table, tokens, **keywords), table)
        return (x, *pullback(dx))

    return run(table, dx)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_are_exact_and_the_gradient_equals_the_truth(dtype: str):
    table, tokens, dx = inputs(dtype)
    x, dtable = rows_and_gradient(table, tokens, dx)
    x_truth, dtable_truth = expected(table, tokens, dx)
    assert np.array_equal(np.asarray(x, np.float64), x_truth)
    # Sums are in float32: in bfloat16 only the result is rounded, at 2^-9.
    truth.assert_close(dtable, dtable_truth, 1e-6 if dtype == "float32" else 2**-8)


@pytest.mark.parametrize("length_axis", ["residual_length", "length"])
@pytest.mark.parametrize(
    ("config", "spec"),
    [
        (truth.SHARDED, PartitionSpec("tensor", None)),
        (truth.SHARDED, PartitionSpec("tensor", "fsdp")),
        (truth.SHARDED, PartitionSpec("tensor", ("data", "fsdp"))),
        (truth.SHARDED, PartitionSpec(None, "tensor")),
        (MeshConfig(fsdp=8), PartitionSpec("tensor", "fsdp")),
        (MeshConfig(tensor=8), PartitionSpec("tensor", "fsdp")),
    ],
    ids=str,
)
def test_shared_by_devices_equals_one_device(config: MeshConfig, spec: PartitionSpec, length_axis: str):
    table, tokens, dx = inputs()
    x_truth, dtable_truth = expected(table, tokens, dx)
    with jax.set_mesh(truth.mesh_of(config)):
        x_spec = activation_spec("batch", length_axis, None)
        x, dtable = rows_and_gradient(truth.put(table, spec), tokens, truth.put(dx, x_spec), length_axis=length_axis)
        assert jax.typeof(x).sharding.spec == x_spec
        assert jax.typeof(dtable).sharding.spec == spec
    assert np.array_equal(np.asarray(x, np.float64), x_truth)
    truth.assert_close(dtable, dtable_truth, 1e-6)


def test_stored_table_is_not_gathered():
    table, tokens, _ = inputs()
    with jax.set_mesh(truth.mesh_of(MeshConfig(fsdp=8))):
        table = truth.put(table, PartitionSpec("tensor", "fsdp"))
        text = jax.jit(embed).lower(table, tokens).compile().as_text()
    assert "all-to-all" in text
    assert f"[{V},{D}]" not in text


def test_the_same_inputs_give_the_same_bits():
    table, tokens, dx = inputs()
    with jax.set_mesh(truth.mesh_of(truth.SHARDED)):
        table, dx = (
            truth.put(table, PartitionSpec("tensor", "fsdp")),
            truth.put(dx, activation_spec("batch", None, None)),
        )
        first, second = (rows_and_gradient(table, tokens, dx, length_axis="length") for _ in range(2))
    assert all(np.array_equal(x, y) for x, y in zip(first, second, strict=True))


def test_tokens_that_are_not_integers_are_refused():
    table, tokens, _ = inputs()
    with pytest.raises(ValueError, match="tokens of float32"):
        embed(table, tokens.astype(jnp.float32))
