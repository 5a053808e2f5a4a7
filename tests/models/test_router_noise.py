"""Noise in routers: of its distribution, in training alone, and always the same for a seed, a step and a layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxlm.models.layers import Initializer
from maxlm.models.losses import next_token_loss
from maxlm.models.moe import Router
from maxlm.models.moe_config import MoEConfig
from maxlm.training.step import accumulated_gradients, step_noise_key
from tests import tiny

NOISE = {"jitter": 0.3, "gaussian": 0.5}
MOE = {"n_experts": 4, "experts_per_token": 2, "d_ff": 32}


def model_with(noise, **keys):
    noisy = {"router_noise": noise, "router_noise_scale": NOISE[noise]} if noise else {}
    return {**tiny.LLAMA, "n_layers": 2, "moe": {**MOE, **noisy}, **keys}


@pytest.mark.parametrize("noise", NOISE)
def test_noise_is_of_its_distribution(noise):
    run = tiny.config(model={**model_with(noise), "moe": {**tiny_section(noise), "n_experts": 64}})
    program = tiny.program(run)
    with jax.set_mesh(program.mesh):
        router = Router(run.model, Initializer(jax.random.key(0), jnp.dtype("float32")))
        router.kernel[...] = jnp.eye(64)
        x_BTD = jnp.full((4, 500, 64), 2.0)
        found = np.asarray(router(x_BTD, jax.random.key(3)), np.float64)
        np.testing.assert_array_equal(router(x_BTD), x_BTD)
    scale, n = NOISE[noise], found.size
    values = found / 2 - 1 if noise == "jitter" else found - 2
    deviation = scale / 3**0.5 if noise == "jitter" else scale
    assert abs(values.mean()) < 5 * deviation / n**0.5
    assert values.std() == pytest.approx(deviation, rel=5 / n**0.5)
    if noise == "jitter":
        assert 0.999 * scale < np.abs(values).max() <= scale + 1e-6
    else:
        # Within one deviation lie erf(1 / sqrt 2) of a normal distribution.
        assert (np.abs(values) < scale).mean() == pytest.approx(0.682689, abs=5 * 0.47 / n**0.5)


def tiny_section(noise):
    return {**MOE, "router_noise": noise, "router_noise_scale": NOISE[noise]}


@pytest.fixture(scope="module")
def losses():
    """The loss of a batch by the initial weights, with noise of a key and without any."""
    run = tiny.config(model=model_with("gaussian"))
    program = tiny.program(run)
    with jax.set_mesh(program.mesh):
        params, batch = program.init_state().params, tiny.to_mesh(program, tiny.host_batch(run, 0))
        loss = jax.jit(lambda key: next_token_loss(program.model, params, batch, run.loss, key)[0])
        quiet = tiny.program(tiny.config(model=model_with(None))).model
        silent = jax.jit(lambda: next_token_loss(quiet, params, batch, run.loss)[0])
        yield run, loss, float(silent())


def test_without_a_key_as_in_evaluation_there_is_no_noise(losses):
    _, loss, silent = losses
    assert float(loss(None)) == silent


def test_noise_follows_from_seed_and_step(losses):
    run, loss, silent = losses
    found = {
        (seed, step): float(loss(step_noise_key(run.model, seed, jnp.int32(step))))
        for seed, step in ((0, 0), (0, 1), (1, 0), (1, 1))
    }
    assert len({*found.values(), silent}) == 5
    assert float(loss(step_noise_key(run.model, 1, jnp.int32(1)))) == found[1, 1]
    assert step_noise_key(tiny.config(model=model_with(None)).model, 0, jnp.int32(0)) is None


def test_layers_and_modules_further_ahead_each_have_their_own_noise():
    """With routers that know nothing, a token's experts are those of its largest noise: a constant router's loads."""
    run = tiny.config(model=model_with("gaussian", mtp_layers=1, init_std=1e-6))
    program = tiny.program(run)
    with jax.set_mesh(program.mesh):
        params, batch = program.init_state().params, tiny.to_mesh(program, tiny.host_batch(run, 0))

        @jax.jit
        def routings(params, tokens_BT, positions_BT, key):
            module = program.model.bind(params)
            x_BTD, found = module.with_routing(tokens_BT, positions_BT, None, noise_key=key)
            return found | module.ahead(x_BTD, [tokens_BT], positions_BT, None, key)[1]

        found = jax.device_get(routings(params, batch["inputs"], batch["positions"], jax.random.key(1)))
    loads = [load for routing in found.values() for load in routing.load_BE.sum(axis=1)]
    assert len({load.tobytes() for load in loads}) == 3
    for load in loads:
        # Each expert is in a token's two of four every second time.
        assert np.abs(load - load.sum() / 4).max() < 5 * (load.sum() / 2 * 0.25) ** 0.5


def test_microbatches_have_noise_of_their_own():
    """Two equal microbatches route alike without noise, and otherwise with it."""
    run = tiny.config(model=model_with("jitter", n_layers=1), train={"accumulation": 2})
    program = tiny.program(run)
    batch = {name: np.repeat(x[::2], 2, axis=0) for name, x in tiny.host_batch(run, 0).items()}
    with jax.set_mesh(program.mesh):
        params, batch = program.init_state().params, tiny.to_mesh(program, batch)

        @jax.jit
        def load_of_both(params, batch, key):
            (_, parts), _ = accumulated_gradients(program.model, params, batch, run.loss, 2, key)
            return parts["routing"]["0"]["load"]

        silent, noisy = (np.asarray(load_of_both(params, batch, key)) for key in (None, jax.random.key(1)))
    assert (silent % 2 == 0).all()
    assert (noisy % 2 == 1).any()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"router_noise": "jitter"}, "router_noise = 'jitter' and router_noise_scale = None go together"),
        ({"router_noise_scale": 0.1}, "router_noise = 'none' and router_noise_scale = 0.1 go together"),
        ({"router_noise": "jitter", "router_noise_scale": 1.0}, "router_noise_scale = 1 must be less than 1"),
    ],
)
def test_noise_without_a_scale_and_a_scale_without_noise_are_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        MoEConfig(**MOE, **keys)
