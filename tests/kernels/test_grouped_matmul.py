"""Grouped products and the sorting around them, against loops over rows in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxlm.kernels.dispatch import collect, order_by_expert, spread, spread_choices
from maxlm.kernels.grouped_matmul import grouped_matmul
from tests.products import flops_of_products

N, D, F, E = 100, 16, 12, 5
SIZES = {
    "even": [20] * E,
    "uneven, one empty": [0, 51, 12, 30, 7],
    "all in one": [0, 0, 100, 0, 0],
    "rows behind the last": [1, 2, 3, 4, 5],
    "none": [0] * E,
}
RNG = np.random.default_rng(20261121)
X, W, DY = RNG.standard_normal((N, D)), RNG.standard_normal((E, D, F)), RNG.standard_normal((N, F))


@pytest.mark.parametrize("implementation", ["tiled", "ragged"])
def test_products_and_gradients_are_those_of_single_rows(implementation):
    @jax.jit
    def run(x, w, dy, sizes):
        y, vjp = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, implementation=implementation), x, w)
        return y, *vjp(dy)

    for name, sizes in SIZES.items():
        group = np.repeat(np.arange(E + 1), [*sizes, N - sum(sizes)])
        y, dx, dw = np.zeros((N, F)), np.zeros((N, D)), np.zeros((E, D, F))
        for n, e in enumerate(group):
            if e < E:
                y[n], dx[n] = X[n] @ W[e], W[e] @ DY[n]
                dw[e] += np.outer(X[n], DY[n])
        found = run(*(jnp.asarray(a, jnp.float32) for a in (X, W, DY)), jnp.asarray(sizes, jnp.int32))
        for a, b in zip(found, (y, dx, dw), strict=True):
            # float32 sums of up to a hundred products
            np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * max(np.abs(b).max(), 1), err_msg=name)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="need"):
        grouped_matmul(jnp.zeros((4, 3)), jnp.zeros((2, 4, 5)), jnp.zeros(2, jnp.int32))


def test_products_on_a_cpu_cost_what_is_active_and_not_every_expert():
    """Forward and both gradients, loops multiplied out: with 16 experts, at most an eighth more than one's."""
    rows, experts = 4096, 16
    shapes = [(rows, 64), (experts, 64, 32), (rows, 32)]
    x, w, dy = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
    sizes = jax.ShapeDtypeStruct((experts,), jnp.int32)

    def run(x, w, dy, sizes):
        y, vjp = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, implementation="tiled"), x, w)
        return y, vjp(dy)

    total = flops_of_products(jax.jit(run).lower(x, w, dy, sizes).as_text(dialect="hlo"))
    active = 3 * 2 * rows * 64 * 32
    assert active <= total <= 1.125 * active


def test_tokens_go_to_their_experts_and_come_back():
    rng = np.random.default_rng(1)
    experts = rng.integers(0, E + 1, (N, 3)).astype(np.int32)
    order = jax.jit(lambda x: order_by_expert(x, E))(experts)
    np.testing.assert_array_equal(order.sizes_E, [(experts == e).sum() for e in range(E)])
    sent = np.asarray(spread(jnp.asarray(X, jnp.float32), order))
    by_expert = [n for e in range(E + 1) for n, a in np.argwhere(experts == e)]
    np.testing.assert_array_equal(sent, X.astype(np.float32)[by_expert])
    back = np.asarray(collect(jnp.asarray(sent), order))
    np.testing.assert_allclose(back, 3 * X.astype(np.float32), rtol=1e-6)
    numbers = np.asarray(spread_choices(jnp.asarray(experts), order))
    np.testing.assert_array_equal(numbers, np.sort(experts.reshape(-1)))


def test_gradients_of_sorting_are_those_of_a_one_hot_product():
    rng = np.random.default_rng(2)
    experts = jnp.asarray(rng.integers(0, E + 1, (N, 3)).astype(np.int32))
    order = order_by_expert(experts, E)
    x, y = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((N, D), (3 * N, D)))
    dsent, dback = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((3 * N, D), (N, D)))
    places = np.zeros((3 * N, N, 3))
    for n, a in np.ndindex(N, 3):
        places[order.place_NA[n, a], n, a] = 1
    dx, dy = jax.vjp(lambda x: spread(x, order), x)[1](dsent)[0], jax.vjp(lambda y: collect(y, order), y)[1](dback)[0]
    np.testing.assert_allclose(dx, np.einsum("rna,rd->nd", places, dsent), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(dy, np.einsum("rna,nd->rd", places, dback), rtol=1e-6)
    shares = jnp.asarray(rng.standard_normal((N, 3)), jnp.float32)
    dshares = jax.vjp(lambda w: spread_choices(w, order), shares)[1](dsent[:, 0])[0]
    np.testing.assert_allclose(dshares, np.einsum("rna,r->na", places, dsent[:, 0]), rtol=1e-6)
