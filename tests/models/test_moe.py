"""The mixture of experts in a layer and in training: against every expert on every token, microbatches, resume."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from maxlm.checkpoint import CheckpointConfig, Checkpoints
from maxlm.config import to_yaml
from maxlm.errors import ConfigError
from maxlm.models.attention import Context
from maxlm.models.layers import Initializer
from maxlm.models.moe import MoE
from maxlm.parallel import support
from tests import tiny, tiny_moe

DENSE = {
    "softmax": {},
    "topk_softmax, biases": {"router": "topk_softmax", "router_bias": True, "expert_bias": True},
    "sigmoid, capacity": {"router": "sigmoid", "routed_scale": 2.5, "capacity_factor": 0.75},
}


def section(**keys):
    return {"n_experts": 6, "experts_per_token": 2, "d_ff": 24, **keys}


def every_expert(params, x_BTD, valid_BT, keys):
    """The block by one-hot sums over all experts, for tokens one row after the other; no sort, no groups."""
    logits = jnp.einsum("btd,de->bte", x_BTD, params["router"]["kernel"]) + params["router"].get("bias", 0)
    scores = {"softmax": jax.nn.softmax(logits), "sigmoid": jax.nn.sigmoid(logits)}.get(keys.get("router", "softmax"))
    chosen = jnp.argsort(-logits, axis=-1)[..., :2]
    one_hot = jax.nn.one_hot(chosen, 6).sum(2) * valid_BT[..., None]
    if scores is None:
        scores = jnp.exp(logits - logits.max(-1, keepdims=True))
    weights = jnp.where(one_hot > 0, scores, 0)
    weights = keys.get("routed_scale", 1.0) * weights / jnp.maximum(weights.sum(-1, keepdims=True), 1e-9)
    if factor := keys.get("capacity_factor"):
        capacity = int(np.ceil(factor * x_BTD.shape[1] * 2 / 6))
        weights = jnp.where(jnp.cumsum(one_hot, axis=1) <= capacity, weights, 0)
    e = params["experts"]
    up, gate = (
        jnp.einsum("btd,edf->btef", x_BTD, e[name]) + e.get(f"{name}_bias", jnp.zeros(())) for name in ("up", "gate")
    )
    y = jnp.einsum("btef,efd->bted", jax.nn.silu(gate) * up, e["down"]) + e.get("down_bias", jnp.zeros(()))
    return jnp.einsum("bted,bte->btd", y, weights)


@pytest.mark.parametrize("case", DENSE)
def test_output_and_gradients_are_those_of_every_expert_on_every_token(case):
    run = tiny.config(model={**tiny.LLAMA, "moe": section(**DENSE[case])})
    program, rng = tiny.program(run), np.random.default_rng(4)
    with jax.set_mesh(program.mesh):
        init = Initializer(jax.random.key(1), jnp.dtype("float32"))
        graph, state = nnx.split(MoE(run.model, jnp.dtype("float32"), init))
        params = nnx.to_pure_dict(state)
        params = jax.tree.map(lambda x: x + jnp.asarray(0.3 * rng.standard_normal(x.shape), x.dtype), params)
        x, dy = (jnp.asarray(rng.standard_normal((2, 20, 64)), jnp.float32) for _ in range(2))
        segments = jnp.asarray(np.array([[1] * 12 + [2] * 8, [1] * 15 + [0] * 5]), jnp.int32)

        @jax.jit
        def ours(params, x):
            context = Context(None, None, segments)
            y, routing = nnx.merge(graph, params)(x, context)
            return jnp.sum(y * dy), (y, routing)

        (_, (y, routing)), grads = jax.value_and_grad(ours, (0, 1), has_aux=True)(params, x)
        y, routing, grads, params, x = jax.device_get((y, routing, grads, params, x))

    def dense(params, x):
        y = every_expert(params, x, np.asarray(segments) > 0, DENSE[case])
        return jnp.sum(y * np.asarray(dy)), y

    (_, y_expected), grads_expected = jax.jit(jax.value_and_grad(dense, (0, 1), has_aux=True))(params, x)
    # float32 sums in another order
    np.testing.assert_allclose(y, y_expected, rtol=0, atol=1e-5 * float(jnp.abs(y_expected).max()))
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(grads_expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * float(jnp.abs(b).max()))
    assert not np.asarray(y)[1, 15:].any()
    assert np.asarray(routing.tokens_B).tolist() == [20, 15]
    assert np.asarray(routing.load_BE).sum(1).tolist() == [40, 30]
    assert (np.asarray(routing.dropped_B).sum() > 0) == ("capacity_factor" in DENSE[case])


@functools.cache
def compiled(kind, accumulation=1, rate=1e-2):
    """The program of a run on one device, and its step."""
    program = tiny.program(
        tiny.config(
            model=MODELS[kind], train={"accumulation": accumulation}, optimizer={"learning_rate": rate},
            schedule={"warmup_steps": 0},
        )
    )  # fmt: skip
    with jax.set_mesh(program.mesh):
        return program, program.train_step()


def trained(kind, steps, state=None, first=0, **keys):
    """The state and the metrics of each step of a run over four batches in turn."""
    program, step = compiled(kind, **keys)
    metrics = []
    with jax.set_mesh(program.mesh):
        state = program.init_state() if state is None else state(program)
        for i in range(first, first + steps):
            state, found = step(state, tiny.to_mesh(program, tiny.host_batch(program.config, i % 4)))
            metrics.append({name: float(value) for name, value in found.items()})
    return state, metrics


def bias_of(state):
    return np.asarray(jax.device_get(state.params["decoder"]["1"]["moe"]["router"]["balance_bias"]))


MODELS = {
    "biased": {**tiny_moe.DEEPSEEK, "n_layers": 2},
    "one layer, biased": {**tiny.LLAMA, "n_layers": 1, "moe": section(router="sigmoid", balance_bias_rate=0.01)},
    "one layer, still": {**tiny.LLAMA, "n_layers": 1, "moe": section(router="sigmoid", balance_bias_rate=0.0)},
}


def test_training_falls_and_is_equal_under_accumulation_and_after_a_resume(tmp_path):
    """Balance by bias and by sequence, z-loss, groups and shared experts at once; meshes: `test_families`."""
    state, metrics = trained("biased", 6)
    losses = [line["loss"] for line in metrics]
    assert losses[4] < losses[0] - 0.1
    names = {"expert_load_ratio/layer_1", "router_entropy/layer_1", "balance_loss", "router_z_loss"}
    assert names <= metrics[0].keys()
    other_state, other = trained("biased", 6, accumulation=2)
    for a, b in zip(metrics, other, strict=True):
        assert b == pytest.approx(a, rel=1e-5, abs=1e-5)
    np.testing.assert_array_equal(bias_of(other_state), bias_of(state))
    assert np.abs(bias_of(state)).max() > 0.001

    half, _ = trained("biased", 3)
    with Checkpoints(tmp_path, CheckpointConfig(asynchronous=False)) as checkpoints:
        checkpoints.save(3, half, meta={"step": 3}, config_yaml=to_yaml(compiled("biased")[0].config))
        resumed, again = trained(
            "biased", 3, state=lambda program: checkpoints.restore(program.abstract_state)[0], first=3
        )
    assert again == metrics[3:]
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(resumed.params), jax.device_get(state.params))


def test_the_bias_evens_the_load_of_a_skewed_router_and_no_optimizer_moves_it():
    def skewed(program):
        state = program.init_state()
        bias = jnp.asarray([[0.2, 0.1, 0.0, 0.0, -0.05, -0.2]])
        state.params["decoder"]["0"]["moe"]["router"]["balance_bias"] = bias
        return state

    _, metrics = trained("one layer, biased", 24, state=skewed, rate=1e-9)
    ratios = [line["expert_load_ratio/layer_0"] for line in metrics]
    assert ratios[0] > 2.9  # of at most 3: nearly every token chose the first
    assert max(ratios[-4:]) < 1.6
    still, _ = trained("one layer, still", 2, state=skewed, rate=1e-1)
    bias = still.params["decoder"]["0"]["moe"]["router"]["balance_bias"]
    np.testing.assert_array_equal(bias, np.float32([[0.2, 0.1, 0.0, 0.0, -0.05, -0.2]]))


def test_the_balancing_bias_is_float32_whatever_the_weights():
    run = tiny.config(model=MODELS["biased"], precision={"parameters": "bfloat16"})
    program = tiny.program(run)
    with jax.set_mesh(program.mesh):
        router = program.abstract_state.params["decoder"]["1"]["moe"]["router"]
    assert (router["balance_bias"].dtype, router["kernel"].dtype) == (jnp.float32, jnp.bfloat16)


def test_a_batchs_balancing_loss_is_refused_under_accumulation_and_widths_that_tensor_does_not_cut():
    with pytest.raises(Exception, match=r"balance_loss_over=sequence or train.accumulation=1"):
        tiny.config(model=tiny_moe.QWEN3_MOE, train={"accumulation": 2})
    run = tiny.config(model={**tiny.LLAMA, "moe": section(d_ff=27)})
    sizes = {"data": 1, "fsdp": 1, "tensor": 2}
    with pytest.raises(ConfigError, match=r"model.moe.d_ff = 27 is not a multiple of mesh.tensor = 2"):
        support.check_mesh(run, sizes)
