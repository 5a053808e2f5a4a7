"""Rows sent to other devices' experts and back, against loops over tokens in float64: whatever the load, by each way.

`ragged_all_to_all` does not run on CPUs: here a stand-in does what its documentation says, and returns NaN where what
it is given breaks its rules.
"""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from maxlm.kernels import manual
from maxlm.kernels.dispatch import collect, order_by_expert, spread, spread_choices
from maxlm.kernels.exchange import GatheredTokens, PaddedExchange, RaggedExchange, in_rounds
from maxlm.kernels.grouped_matmul import grouped_matmul

DEVICES, N, A, E, D = 4, 12, 3, 8, 5
HERE = E // DEVICES
AXES = ("expert",)
RNG = np.random.default_rng(20261121)


def ragged_by_its_documentation(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
    """What `jax.lax.ragged_all_to_all` is said to do, by gathering everything."""
    everyones = [manual.gathered(a[None], axis_name, 0) for a in (operand, input_offsets, send_sizes, output_offsets)]
    operand_S, from_SK, sizes_SK, to_SK = everyones
    slices = from_SK.shape[1] // DEVICES
    mine = manual.index(axis_name) * slices
    number, ok = jnp.arange(output.shape[0]), jnp.ones((), bool)
    for sender in range(DEVICES):
        for k in range(slices):
            first, size, to = (a[sender, mine + k] for a in (from_SK, sizes_SK, to_SK))
            ok &= (size == recv_sizes[sender * slices + k]) & (size >= 0) & (first >= 0) & (to >= 0)
            ok &= (first + size <= operand.shape[0]) & (to + size <= output.shape[0])
            here = (number >= to) & (number < to + size)
            rows = operand_S[sender][jnp.clip(number - to + first, 0, operand.shape[0] - 1)]
            output = jnp.where(here[:, None], rows, output)
    return jnp.where(ok, output, jnp.nan)


def random_choices(among):
    return np.stack([RNG.permutation(among)[:A] for _ in range(DEVICES * N)])


def to_one(expert):
    """Each token's first choice; the others go nowhere."""
    choices = np.full((DEVICES * N, A), E)
    choices[:, 0] = expert
    return choices


def with_padding(choices):
    """The last tokens of the second device and all of the third go nowhere."""
    choices = choices.copy()
    choices[N + 5 : 3 * N] = E
    return choices


LOADS = {
    "random": random_choices(E),
    "all tokens to one expert": to_one(5),
    "all choices to one device's experts and one more": np.tile([6, 7, 0], (DEVICES * N, 1)),
    "none to some experts": random_choices(4) + 1,
    "padding": with_padding(random_choices(E)),
    "the same expert twice": np.repeat(random_choices(E)[:, :1], A, axis=1),
    "no tokens": np.full((DEVICES * N, A), E),
    "a single row": np.where(np.arange(DEVICES * N * A).reshape(-1, A) == 41, 3, E),
}
X, DY = RNG.standard_normal((2, DEVICES * N, D))
SHARE, W = RNG.standard_normal((DEVICES * N, A)), RNG.standard_normal((E, D, D))

# Rows of a buffer: for the worst load at once, and so few that most loads take several rounds.
WAYS = {
    "padded, one round": (PaddedExchange, N * A),
    "padded, many rounds": (PaddedExchange, 5),
    "ragged, one round": (RaggedExchange, DEVICES * N * A),
    "ragged, many rounds": (RaggedExchange, 31),
    "gathered, one round": (GatheredTokens, DEVICES * N * A),
    "gathered, many rounds": (GatheredTokens, 31),
}


def products(x_MD, share_M, sizes_L, w_LDD):
    """Each row times its expert's matrix and its share. A share's gradient depends on rows behind the last, too."""
    return grouped_matmul(x_MD, w_LDD, sizes_L) * share_M[:, None]


def on_a_device(x_ND, share_NA, w_LDD, experts_NA, *, kind, rows):
    """The tokens' sums, and the rounds that they took."""
    if kind is GatheredTokens:
        x_GD, share_GA, experts_GA = (manual.gathered(a, AXES, 0) for a in (x_ND, share_NA, experts_NA))
        number = experts_GA - manual.index(AXES) * HERE
        order = order_by_expert(jnp.where((number >= 0) & (number < HERE), number, HERE), HERE)
        transport = GatheredTokens.of(order, rows, DEVICES * N * A)
        y_GD = in_rounds(products, x_GD, share_GA, w_LDD, transport)
        return manual.scattered_total(y_GD, AXES, 0), transport.rounds()
    order = order_by_expert(experts_NA, E)
    most = N * A if kind is PaddedExchange else DEVICES * N * A
    transport = kind.of(order, DEVICES, AXES, rows, most)
    y_RD = in_rounds(products, spread(x_ND, order), spread_choices(share_NA, order), w_LDD, transport)
    return collect(y_RD, order), transport.rounds()


@cache
def compiled(way):
    """(x, share, weights, experts, dy) -> (y, rounds, gradients of the first three), on four devices."""
    kind, rows = WAYS[way]
    mesh = jax.make_mesh((DEVICES,), AXES, (jax.sharding.AxisType.Explicit,), devices=jax.devices()[:DEVICES])
    local = partial(on_a_device, kind=kind, rows=rows)

    def run(x, share, w, experts, dy):
        def over_devices(*arguments):
            return jax.shard_map(local, in_specs=P("expert"), out_specs=(P("expert"), P()))(*arguments, experts)

        y, pull_back, rounds = jax.vjp(over_devices, x, share, w, has_aux=True)
        return y, rounds, pull_back(dy)

    def called(*arrays):
        with jax.set_mesh(mesh):
            placed = [jax.device_put(a, jax.NamedSharding(mesh, P("expert"))) for a in arrays]
            return jax.device_get(jitted(*placed))

    jitted = jax.jit(run)
    return called


def expected(x, share, w, experts, dy):
    """By loops over tokens, in float64."""
    y, dx, dshare, dw = np.zeros_like(x), np.zeros_like(x), np.zeros_like(share), np.zeros_like(w)
    for (n, a), e in np.ndenumerate(experts):
        if e < E:
            y[n] += share[n, a] * (x[n] @ w[e])
            dx[n] += share[n, a] * (w[e] @ dy[n])
            dshare[n, a] = x[n] @ w[e] @ dy[n]
            dw[e] += share[n, a] * np.outer(x[n], dy[n])
    return y, dx, dshare, dw


def rounds_of(way, experts):
    """Rounds of the fullest buffer."""
    kind, rows = WAYS[way]
    device = np.where(experts < E, experts // HERE, -1).reshape(DEVICES, -1)
    pairs = np.array([[(device[s] == p).sum() for p in range(DEVICES)] for s in range(DEVICES)])
    return -(-(pairs if kind is PaddedExchange else pairs.sum(axis=0)).max() // rows)


@pytest.fixture(autouse=True)
def ragged(monkeypatch):
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", ragged_by_its_documentation)


@pytest.mark.parametrize("way", WAYS)
def test_results_and_gradients_are_those_of_single_tokens_whatever_the_load(way):
    for load, experts in LOADS.items():
        arrays = [a.astype(np.float32) for a in (X, SHARE, W)]
        y, rounds, gradients = compiled(way)(*arrays, experts.astype(np.int32), DY.astype(np.float32))
        truth = expected(X, SHARE, W, experts, DY)
        for found, exact in zip((y, *gradients), truth, strict=True):
            # float32 sums of at most as many products as there are tokens
            np.testing.assert_allclose(found, exact, rtol=0, atol=2e-6 * max(np.abs(exact).max(), 1), err_msg=load)
        assert int(rounds) == rounds_of(way, experts), load


@pytest.mark.parametrize("way", ["padded, many rounds", "ragged, many rounds", "gathered, many rounds"])
def test_results_do_not_depend_on_the_device_where_a_token_starts(way):
    """To rounding: a row's sums are over its own numbers, but it lies elsewhere in a tile; and gradients of weights
    are sums over tokens in another order."""
    arrays = [a.astype(np.float32) for a in (X, SHARE, W, DY)]
    experts, moved = LOADS["random"].astype(np.int32), RNG.permutation(DEVICES * N)
    x, share, w, dy = arrays
    y, _, (dx, dshare, dw) = compiled(way)(x, share, w, experts, dy)
    other_y, _, (other_dx, other_dshare, other_dw) = compiled(way)(x[moved], share[moved], w, experts[moved], dy[moved])
    for found, other in ((y[moved], other_y), (dx[moved], other_dx), (dshare[moved], other_dshare), (dw, other_dw)):
        np.testing.assert_allclose(found, other, rtol=0, atol=1e-6 * np.abs(other).max())
