"""The training step: meshes agree, accumulation is exact, spikes are skipped, schedules and decay are as stated."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from maxlm.training.config import ScheduleConfig, SpikeConfig
from maxlm.training.optimizer import decay_mask
from maxlm.training.schedule import make_schedule
from maxlm.training.state import Guard
from maxlm.training.step import watch
from tests import tiny

MESHES = {
    "data 8": {"data": 8, "fsdp": 1},
    "fsdp 8": {"fsdp": 8},
    "data 2 x fsdp 2 x tensor 2": {"data": 2, "fsdp": 2, "tensor": 2},
    "zero 1": {"data": 8, "fsdp": 1, "zero": 1},
    "zero 1 with fsdp": {"data": 4, "fsdp": 2, "zero": 1},
    "zero 3": {"data": 8, "fsdp": 1, "zero": 3},
}


def twenty_steps(mesh, n_devices):
    """Losses over four batches in turn, and the first moments after the first step."""
    run, losses = tiny.config(mesh=mesh), []
    program = tiny.program(run, n_devices)
    with jax.set_mesh(program.mesh):
        state, step = program.init_state(), program.train_step()
        for i in range(20):
            state, metrics = step(state, tiny.to_mesh(program, tiny.host_batch(run, i % 4)))
            losses.append(float(metrics["loss"]))
            if i == 0:
                moments = jax.device_get(state.opt_state[0].mu)
    return losses, moments


@pytest.fixture(scope="module")
def on_one_device():
    return twenty_steps({}, 1)


@pytest.mark.parametrize("mesh", MESHES)
def test_twenty_steps_have_the_same_losses_and_gradients_on_every_mesh(mesh, on_one_device):
    losses, moments = twenty_steps(MESHES[mesh], 8)
    np.testing.assert_allclose(losses, on_one_device[0], rtol=1e-5)
    assert losses[-1] < losses[0]
    # Adam's first moment after one step is the clipped gradient, times 1 - beta1.
    tiny.assert_close(moments, on_one_device[1], 1e-4)


@pytest.mark.parametrize("mesh", ["data 2 x fsdp 2 x tensor 2", "zero 1 with fsdp"])
def test_the_optimizer_state_lies_as_zero_says(mesh):
    run = tiny.config(mesh=MESHES[mesh])
    program = tiny.program(run, 8)
    with jax.set_mesh(program.mesh):
        state = program.init_state()
        abstract = program.abstract_state
    kernel = state.params["decoder"]["0"]["mlp"]["up"]
    moment = state.opt_state[0].mu["decoder"]["0"]["mlp"]["up"]
    shard = {name: x.addressable_shards[0].data.size / x.size for name, x in (("weight", kernel), ("moment", moment))}
    expected = {"weight": 1 / 4, "moment": 1 / 4} if "tensor" in mesh else {"weight": 1 / 2, "moment": 1 / 8}
    assert shard == expected
    for made, planned in zip(jax.tree.leaves(state), jax.tree.leaves(abstract), strict=True):
        assert made.sharding.is_equivalent_to(planned.sharding, made.ndim)


@pytest.mark.parametrize("mesh", [None, "data 2 x fsdp 2 x tensor 2"])
def test_accumulating_k_microbatches_is_one_step_of_the_whole_batch(mesh):
    keys, devices = (MESHES[mesh], 8) if mesh else ({}, 1)
    whole, params = tiny.train_losses(tiny.config(mesh=keys), devices, 4)
    cut, cut_params = tiny.train_losses(tiny.config(mesh=keys, train={"accumulation": 4}), devices, 4)
    # Packed rows have unequal numbers of targets: a mean of means would differ in the third digit.
    np.testing.assert_allclose(cut, whole, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), cut_params, params)


def test_the_step_is_adamw_with_clipping_as_optax_has_it():
    run = tiny.config(optimizer={"weight_decay": 0.3, "clip_norm": 0.05})
    program = tiny.program(run)
    from maxlm.models.losses import next_token_loss

    with jax.set_mesh(program.mesh):
        schedule = make_schedule(run.schedule, run.optimizer.learning_rate, run.train.steps)
        reference = optax.chain(
            optax.clip_by_global_norm(0.05),
            optax.adamw(
                schedule, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.3, mask=lambda p: decay_mask(p, ("norm", "bias"))
            ),
        )
        state, step = program.init_state(), program.train_step()
        params = jax.tree.map(jnp.copy, state.params)
        opt_state = reference.init(params)

        @jax.jit
        def expected_step(params, opt_state, batch):
            def mean(params):
                return next_token_loss(program.model, params, batch, run.loss)[0] / jnp.sum(batch["weights"])

            updates, opt_state = reference.update(jax.grad(mean)(params), opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        for i in range(3):
            batch = tiny.to_mesh(program, tiny.host_batch(run, i))
            state, _ = step(state, batch)
            params, opt_state = expected_step(params, opt_state, batch)
    # Adam divides by the root of the second moment: a gradient near zero turns rounding into a share of one step.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), state.params, params)


def test_weight_decay_leaves_norms_and_biases_alone():
    run = tiny.config(model=tiny.GPT2)
    program = tiny.program(run)
    with jax.set_mesh(program.mesh):
        mask = decay_mask(program.abstract_state.params, run.optimizer.no_decay)
    assert mask["decoder"]["0"]["mlp"] == {"up": True, "down": True, "up_bias": False, "down_bias": False}
    assert mask["decoder"]["0"]["attention_norm"] == {"scale": False, "bias": False}
    assert mask["embedding"] == {"tokens": True, "positions": True}


@pytest.fixture(scope="module")
def trained():
    """A program, its step, and a state whose guard has seen a full window."""
    run = tiny.config(train={"spike": {"window": 16, "sigmas": 6.0}}, optimizer={"learning_rate": 1e-4})
    program = tiny.program(run)
    with jax.set_mesh(program.mesh):
        state, step = program.init_state(), jax.jit(program.train_step().__wrapped__)
        for i in range(18):
            state, _ = step(state, tiny.to_mesh(program, tiny.host_batch(run, i)))
    return program, step, state


@pytest.mark.parametrize("bad", ["not finite", "leap"])
def test_a_bad_step_changes_nothing_and_is_counted(trained, bad):
    program, step, state = trained
    batch = tiny.host_batch(program.config, 100)
    if bad == "leap":
        # One token over and over, and always the least likely next one.
        batch["targets"][:] = 299
        batch["inputs"][:] = 0
        sharp = jax.tree.map(lambda scale: 40 * scale, state.params["final_norm"])
        state = dataclasses.replace(state, params={**state.params, "final_norm": sharp})
    else:
        poisoned = state.params["final_norm"]["scale"].at[0].set(jnp.nan)
        state = dataclasses.replace(state, params={**state.params, "final_norm": {"scale": poisoned}})
    with jax.set_mesh(program.mesh):
        after, metrics = step(state, tiny.to_mesh(program, batch))
    assert int(metrics["skipped_steps"]) == int(state.guard.skipped) + 1
    assert int(after.step) == int(state.step) + 1
    for name in ("params", "opt_state"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after, name), getattr(state, name))
    if bad == "not finite":
        np.testing.assert_array_equal(after.guard.losses, state.guard.losses)


def test_an_ordinary_step_is_not_skipped(trained):
    program, step, state = trained
    with jax.set_mesh(program.mesh):
        after, metrics = step(state, tiny.to_mesh(program, tiny.host_batch(program.config, 50)))
    assert int(metrics["skipped_steps"]) == 0
    assert int(after.guard.recorded) == int(state.guard.recorded) + 1


def guard_after(values, spike):
    """Which of the losses are accepted, one after the other, and the guard in the end."""
    ring, zero = jnp.zeros((spike.window,), jnp.float32), jnp.zeros((), jnp.int32)
    guard, accepted = Guard(losses=ring, grad_norms=ring, recorded=zero, skipped=zero), []
    step = jax.jit(lambda guard, loss: watch(guard, loss, jnp.float32(1.0), spike))
    for value in values:
        accept, guard = step(guard, jnp.float32(value))
        accepted.append(bool(accept))
    return accepted, guard


def test_a_lasting_rise_of_the_loss_becomes_normal_and_one_spike_does_not_blind_the_guard():
    rng = np.random.default_rng(0)
    calm = 3 + 0.05 * rng.standard_normal(128)
    risen, _ = guard_after([*calm, *(3.5 + 0.05 * rng.standard_normal(60))], SpikeConfig())
    assert all(risen[:128])
    assert not risen[128]
    assert all(risen[-40:])
    spiked, guard = guard_after([*calm, 1e6, 3.0, 3.6], SpikeConfig())
    assert spiked[128:] == [False, True, False]
    assert int(guard.skipped) == 2


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"kind": "cosine", "warmup_steps": 10}, {0: 0.1, 9: 1.0, 54: 0.1 + 0.9 * 0.5, 99: 0.1}),
        ({"kind": "linear", "warmup_steps": 10, "final_fraction": 0.0}, {4: 0.5, 54: 0.5, 99: 0.0}),
        ({"kind": "wsd", "warmup_steps": 10, "decay_steps": 20, "final_fraction": 0.0}, {10: 1, 79: 1, 89: 0.5, 99: 0}),
        ({"kind": "wsd"}, {0: 1.0, 89: 1.0, 99: 0.1}),
        ({"kind": "inverse_sqrt", "warmup_steps": 25}, {24: 1.0, 99: 0.5}),
        ({"kind": "constant", "warmup_steps": 2}, {0: 0.5, 1: 1.0, 99: 1.0}),
    ],
)
def test_schedules_pass_through_their_stated_points(config, expected):
    schedule = make_schedule(ScheduleConfig(**config), peak=2.0, total_steps=100)
    for step, fraction in expected.items():
        assert float(schedule(jnp.asarray(step))) == pytest.approx(2.0 * fraction, abs=1e-6), step
