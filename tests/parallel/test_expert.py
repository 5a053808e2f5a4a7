"""Experts spread over devices: a block's results, gradients and counts are one device's, by every way tokens travel."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from maxlm.errors import ConfigError
from maxlm.models.attention import Context
from maxlm.models.block import remat_policy
from maxlm.models.config import RematConfig
from maxlm.models.layers import Initializer
from maxlm.models.moe import MoE
from maxlm.models.moe_config import MoEConfig
from maxlm.models.moe_exchange import chosen, most_rows, round_rows, rows_moved
from maxlm.models.routing import Routing
from maxlm.parallel import support
from maxlm.parallel.axes import activation_spec, constrain
from tests import tiny, tiny_moe

B, T, D = 8, 12, 16
MODEL = {**tiny.LLAMA, "n_layers": 1, "d_model": D, "n_heads": 2, "d_ff": 16}
KINDS = {
    "softmax": {},
    "softmax, capacity": {"capacity_factor": 0.75},
    "sigmoid, groups, shared": {
        "router": "sigmoid", "routed_scale": 2.5, "n_groups": 4, "groups_per_token": 2, "n_shared_experts": 2,
        "balance_bias_rate": 0.001,
    },
    "topk_softmax, biases": {"router": "topk_softmax", "router_bias": True, "expert_bias": True},
    "experts choose, biases": {"router": "expert_choice", "expert_bias": True},
}  # fmt: skip

CASES = [
    # router, mesh, dispatch, exchange_factor, remat
    ("softmax", {"expert": 4}, "all_to_all", 1.5, {"policy": "full"}),
    ("softmax", {"expert": 4, "tensor": 2}, "all_gather", 0.4, {"policy": "none"}),
    ("softmax, capacity", {"expert": 2, "data": 2, "tensor": 2}, "all_to_all", 0.3, {"policy": "dots"}),
    ("softmax, capacity", {"expert": 2, "data": 4}, "all_gather", 1.0, {"policy": "full"}),
    ("sigmoid, groups, shared", {"expert": 8}, "all_to_all", 1.5, {"policy": "none"}),
    ("sigmoid, groups, shared", {"expert": 2, "fsdp": 4}, "all_gather", 1.5, {"policy": "dots"}),
    ("topk_softmax, biases", {"expert": 2, "fsdp": 2, "tensor": 2}, "all_to_all", 0.4,
     {"policy": "names", "names": ["expert_up"]}),
    ("topk_softmax, biases", {"expert": 4, "fsdp": 2}, "all_gather", 0.2, {"policy": "full"}),
    ("experts choose, biases", {"expert": 4, "tensor": 2}, "all_to_all", 1.5, {"policy": "full"}),
    ("experts choose, biases", {"expert": 2, "fsdp": 2}, "all_gather", 1.5, {"policy": "none"}),
]  # fmt: skip


def arrays():
    """Inputs, their cotangent, and segments; the last row is half padding and another nothing else."""
    rng = np.random.default_rng(3)
    x, dy = rng.standard_normal((2, B, T, D)).astype(np.float32)
    segments = np.ones((B, T), np.int32)
    segments[-1, T // 2 :] = segments[2] = 0
    return x, dy, segments


def spoiled(params):
    """Weights far from their start, biases among them, and a router that some experts draw more tokens to."""
    rng = np.random.default_rng(5)

    def moved(path, x):
        skew = 1.0 if path[-1].key == "kernel" else 0.3
        return x + (skew * rng.standard_normal(x.shape) * np.linspace(0.1, 2, x.shape[-1])).astype(x.dtype)

    return jax.tree_util.tree_map_with_path(moved, params)


def block(kind, mesh, n_devices, remat=None, **keys):
    """What `MoE` makes of the arrays: (result, routing), and gradients of parameters and inputs."""
    run = tiny.config(
        model={**MODEL, "moe": {"n_experts": 8, "experts_per_token": 3, "d_ff": 8, **KINDS[kind], **keys}}, mesh=mesh
    )
    program = tiny.program(run, n_devices)
    x, dy, segments = arrays()
    with jax.set_mesh(program.mesh):
        # Without a jit each array of it would be compiled for itself.
        graph, state = nnx.split(nnx.eval_shape(lambda: MoE(run.model, jnp.dtype("float32"), initializer())))
        params = spoiled(jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), nnx.to_pure_dict(state)))
        specs = jax.tree.map(lambda a: a.sharding.spec, nnx.to_pure_dict(state))
        params = jax.device_put(params, jax.tree.map(lambda spec: jax.NamedSharding(program.mesh, spec), specs))
        policy = remat_policy(RematConfig(**(remat or {"policy": "none"})))

        def ours(params, x, dy, segments):
            def layer(params, x):
                context = Context(None, None, segments)
                # As in a layer: what is before and behind is cut over positions, too.
                return nnx.merge(graph, params)(constrain(x, "batch", "residual_length", "embed"), context)

            y, routing = jax.checkpoint(layer, policy=policy)(params, x)
            return jnp.sum(y * constrain(dy, "batch", "residual_length", "embed")), (y, routing)

        rows = jax.NamedSharding(program.mesh, activation_spec("batch"))
        placed = [jax.device_put(a, rows) for a in (x, dy, segments)]
        found = jax.jit(jax.value_and_grad(ours, (0, 1), has_aux=True))(params, *placed)
        return jax.device_get((*found[0][1], found[1]))


def initializer():
    return Initializer(jax.random.key(1), jnp.dtype("float32"))


@functools.cache
def on_one_device(kind):
    return block(kind, {}, 1)


@pytest.mark.parametrize(("kind", "mesh", "dispatch", "factor", "remat"), CASES, ids=lambda x: str(x))
def test_a_block_is_that_of_one_device(kind, mesh, dispatch, factor, remat):
    n_devices = int(np.prod(list(mesh.values())))
    keys = {"dispatch": dispatch, "exchange_factor": factor}
    y, routing, gradients = block(kind, {"fsdp": 1, **mesh}, n_devices, remat, **keys)
    y_expected, routing_expected, gradients_expected = on_one_device(kind)
    np.testing.assert_allclose(y, y_expected, rtol=0, atol=1e-5 * np.abs(y_expected).max())
    tiny.assert_close(gradients, gradients_expected, 1e-4)
    assert all(np.abs(g).max() > 0 for path, g in leaves(gradients_expected) if "balance" not in path)
    assert_same_routing(routing, routing_expected)


def leaves(tree):
    return [(jax.tree_util.keystr(path), x) for path, x in jax.tree_util.tree_leaves_with_path(tree)]


def assert_same_routing(found: Routing, expected: Routing):
    """Counts are equal; sums of probabilities are of the same numbers in another order."""
    for name, a, b in zip(Routing._fields, found, expected, strict=True):
        if np.issubdtype(b.dtype, np.integer):
            np.testing.assert_array_equal(a, b, err_msg=name)
        else:
            np.testing.assert_allclose(a, b, rtol=1e-5, err_msg=name)


def test_choices_beyond_capacity_are_counted_exactly():
    _, routing, _ = on_one_device("softmax, capacity")
    capacity = int(np.ceil(0.75 * T * 3 / 8))
    np.testing.assert_array_equal(routing.dropped_B, np.maximum(routing.load_BE - capacity, 0).sum(axis=1))
    assert routing.dropped_B.sum() > 0
    # So uneven is the load that the cases spread.
    load = routing.load_BE.sum(axis=0) / routing.load_BE.sum() * 8
    assert load.max() > 1.5
    assert load.min() < 0.5


def trained(mesh, n_devices, **train):
    """Metrics of three steps, and the first moments of the first."""
    run = tiny.config(
        model={**tiny_moe.DEEPSEEK, "n_layers": 2, "d_model": 32}, mesh=mesh, train=train, schedule={"warmup_steps": 0}
    )
    program, metrics, moments = tiny.program(run, n_devices), [], None
    with jax.set_mesh(program.mesh):
        state, step = program.init_state(), program.train_step()
        for i in range(3):
            state, found = step(state, tiny.to_mesh(program, tiny.host_batch(run, i)))
            metrics.append(jax.device_get(found))
            moments = moments or jax.device_get(state.opt_state[0].mu)
        return metrics, moments, jax.device_get(state.params["decoder"]["1"]["moe"]["router"]["balance_bias"])


def test_training_under_accumulation_and_zero_is_that_of_one_device():
    """Losses, gradients, what is logged of routers, and the bias that balances them; families: `test_families`."""
    metrics, moments, bias = trained({"data": 2, "fsdp": 1, "expert": 2, "tensor": 2, "zero": 1}, 8, accumulation=2)
    expected, expected_moments, expected_bias = trained({}, 1)
    for found, line in zip(metrics, expected, strict=True):
        for key in line.keys() - {"grad_norm"}:
            np.testing.assert_allclose(found[key], line[key], rtol=1e-5, atol=1e-6, err_msg=key)
    tiny.assert_close(moments, expected_moments, 1e-4)
    np.testing.assert_array_equal(bias, expected_bias)


def moe(**keys):
    return MoEConfig(**{"n_experts": 64, "experts_per_token": 4, "d_ff": 8, **keys})


def test_auto_moves_the_fewest_rows():
    assert rows_moved("all_to_all", tokens=100, experts_per_token=4, devices=8) == 100 * 4 * 7 / 8
    assert rows_moved("all_gather", tokens=100, experts_per_token=4, devices=8) == 100 * 7
    for devices in (2, 4, 8, 16):
        # Without padding all_to_all moves A / n of what all_gather does.
        assert chosen(moe(), devices, ragged=True) == ("all_to_all" if devices > 4 else "all_gather")
        # Buffers half as large again as the rows in them; where experts choose, there is no padding.
        assert chosen(moe(), devices, ragged=False) == ("all_to_all" if devices > 6 else "all_gather")
        for dispatch in ("all_to_all", "all_gather"):
            assert chosen(moe(dispatch=dispatch), devices, ragged=True) == dispatch
    assert chosen(moe(experts_per_token=6, router="expert_choice"), 8, ragged=False) == "all_to_all"
    assert chosen(moe(experts_per_token=6), 8, ragged=False) == "all_gather"


def test_buffers_hold_their_share_and_never_more_than_there_can_be():
    assert most_rows(96, 8, 2, 3, None) == 192  # each token at most both
    assert most_rows(96, 8, 2, 1, None) == 96
    assert most_rows(96, 8, 2, 3, 5) == 80  # of each of 8 rows an expert takes 5
    assert round_rows(100, 10**6, 1.5) == 152
    assert round_rows(100, 120, 1.5) == 120


def test_experts_that_the_axis_does_not_divide_and_an_axis_without_experts_are_refused():
    run = tiny.config(model={**MODEL, "moe": {"n_experts": 6, "experts_per_token": 2, "d_ff": 8}}, mesh={"expert": 4})
    with pytest.raises(ConfigError, match=r"model.moe.n_experts = 6 is not a multiple of mesh.expert = 4"):
        support.check_mesh(run, {"data": 1, "fsdp": 1, "expert": 4, "tensor": 1})
    with pytest.raises(Exception, match=r"mesh.expert > 1 with model.moe = null is refused.*use mesh.fsdp"):
        tiny.config(mesh={"expert": 2})
