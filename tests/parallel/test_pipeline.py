"""Pipelines: loss and every gradient as on one device, by every schedule; memory and ticks of the compiled step."""

import functools

import jax
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from maxlm.errors import ConfigError
from maxlm.parallel import support
from maxlm.parallel.pipeline_schedule import Turns
from maxlm.training.state import reshard_tree
from maxlm.training.step import accumulated_gradients
from tests import latents, tiny, tiny_moe

SMALL = {"n_layers": 3, "d_model": 32, "d_ff": 32, "n_heads": 2, "n_kv_heads": 2}
LATENT = {**latents.MTP, "n_layers": 3, "d_model": 32, "d_ff": 32}
MODELS = {
    "dense": {**tiny.LLAMA, **SMALL},
    "tied, learned positions": {**tiny.GPT2, **SMALL, "n_layers": 5},
    # A dense layer, which is outside of the stages, before three with experts.
    "experts": {**tiny_moe.DEEPSEEK, **SMALL, "n_layers": 4},
    "noisy experts": {
        **tiny_moe.DEEPSEEK, **SMALL,
        "moe": {**tiny_moe.DEEPSEEK["moe"], "router_noise": "gaussian", "router_noise_scale": 0.1},
    },
    "latent attention": {**LATENT, "mtp_layers": 0},
    "further ahead": LATENT,
    "windows": {
        **tiny.LLAMA, **SMALL, "n_layers": 6, "attention_window": 6, "attention_pattern": ["local", "global"],
        "norm_placement": "sandwich",
    },
    "encoder and decoder": {**tiny.T5, **SMALL, "head_dim": 16, "n_encoder_layers": 2, "logit_scale": 32**-0.5},
    "encoder": {**tiny.BERT, **SMALL},
}  # fmt: skip
FULL, DOTS = {"remat": {"policy": "full"}}, {"remat": {"policy": "dots"}}


def pipe(schedule, microbatches, **keys):
    return {"schedule": schedule, "microbatches": microbatches, **keys}


# Model, mesh, pipeline, further keys of the model, accumulation.
CASES = {
    "1f1b": ("dense", {"pipeline": 2, "fsdp": 2}, pipe("1f1b", 4), {}, 1),
    "1f1b of fewer microbatches than stages": ("dense", {"pipeline": 4}, pipe("1f1b", 2), FULL, 1),
    "1f1b, tied": ("tied, learned positions", {"pipeline": 4, "tensor": 2}, pipe("1f1b", 4), DOTS, 1),
    "1f1b, experts": ("experts", {"pipeline": 2, "fsdp": 2, "tensor": 2}, pipe("1f1b", 4), FULL, 1),
    "1f1b, further ahead, accumulated": ("further ahead", {"pipeline": 2, "tensor": 2}, pipe("1f1b", 2), {}, 2),
    "1f1b, windows, gathered once": (
        "windows", {"pipeline": 2, "data": 2, "fsdp": 2, "zero": 1}, pipe("1f1b", 2, gather_weights="step"), {}, 1,
    ),
    "gpipe, encoder and decoder": ("encoder and decoder", {"pipeline": 2, "tensor": 2}, pipe("gpipe", 4), {}, 1),
    "interleaved, experts": (
        "experts", {"pipeline": 2, "fsdp": 2}, pipe("interleaved", 4, repeats=2, gather_weights="step"), DOTS, 1,
    ),
    "interleaved, latent attention": (
        "latent attention", {"pipeline": 2, "data": 2, "zero": 3}, pipe("interleaved", 2, repeats=2), FULL, 2,
    ),
}  # fmt: skip
MORE = {
    "gpipe": ("dense", {"pipeline": 2, "tensor": 2}, pipe("gpipe", 4), {}, 2),
    "gpipe, windows": ("windows", {"pipeline": 2, "fsdp": 4}, pipe("gpipe", 2, gather_weights="step"), FULL, 1),
    "gpipe, experts": ("experts", {"pipeline": 2, "data": 2, "tensor": 2}, pipe("gpipe", 2), {}, 2),
    "interleaved": ("dense", {"pipeline": 2, "fsdp": 2, "tensor": 2}, pipe("interleaved", 4, repeats=2), {}, 1),
    "interleaved, windows": ("windows", {"pipeline": 2}, pipe("interleaved", 4, repeats=2), DOTS, 1),
    "interleaved, encoder and decoder": (
        "encoder and decoder", {"pipeline": 2, "data": 2}, pipe("interleaved", 2, repeats=2), FULL, 2,
    ),
    "1f1b, latent attention": ("latent attention", {"pipeline": 2, "fsdp": 2}, pipe("1f1b", 4), DOTS, 1),
    "1f1b, encoder": ("encoder", {"pipeline": 2, "tensor": 2}, pipe("1f1b", 2), {}, 1),
    "1f1b, zero 3": ("dense", {"pipeline": 2, "data": 2, "fsdp": 2, "zero": 3}, pipe("1f1b", 2), {}, 1),
    "1f1b of one microbatch": ("dense", {"pipeline": 2}, pipe("1f1b", 1), {}, 1),
}  # fmt: skip
EVERY = CASES | MORE


def config(name, mesh=None, pipeline=None, remat=None, accumulation=1):
    # Rows are packed, of documents that end anywhere.
    train = {"seq_len": 16, "global_batch_tokens": 128, "accumulation": accumulation}
    keys = {} if mesh is None else {"mesh": {"fsdp": 1, **mesh}, "pipeline": pipeline}
    return tiny.config(model={**MODELS[name], **(remat or {})}, train=train, **keys)


def devices_of(run):
    mesh = run.mesh
    return mesh.pipeline * mesh.data * mesh.fsdp * mesh.tensor


def gradients(run, n_devices, noise=None):
    program = tiny.program(run, n_devices)
    support.check_mesh(run, dict(program.mesh.shape))
    with jax.set_mesh(program.mesh):
        place = program._placement.params
        params = jax.jit(lambda key: reshard_tree(program.model.init(key), place))(jax.random.key(0))
        batch = tiny.to_mesh(program, tiny.host_batch(run, 0))
        key = None if noise is None else jax.random.key(noise)

        def run_once(params, batch):
            return accumulated_gradients(program.model, params, batch, run.loss, run.train.accumulation, key)

        return jax.device_get(jax.jit(run_once)(params, batch))


@functools.cache
def on_one_device(name):
    return gradients(config(name), 1)


def assert_as_on_one_device(case):
    name, mesh, pipeline, remat, accumulation = EVERY[case]
    run = config(name, mesh, pipeline, remat, accumulation)
    (loss, parts), grads = gradients(run, devices_of(run))
    (expected, expected_parts), expected_grads = on_one_device(name)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert parts.keys() == expected_parts.keys()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), parts, expected_parts)
    tiny.assert_close(grads, expected_grads, 1e-4)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), grads) == jax.tree.map(
        lambda x: (x.shape, x.dtype), expected_grads
    )


@pytest.mark.parametrize("case", CASES)
def test_loss_and_every_gradient_are_those_of_one_device(case):
    assert_as_on_one_device(case)


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", MORE)
def test_and_so_they_are_for_further_pairs(case):
    assert_as_on_one_device(case)


@pytest.mark.exhaustive
def test_noise_of_routers_is_that_of_as_many_microbatches_accumulated():
    expected = gradients(config("noisy experts", accumulation=2), 1, noise=3)
    for schedule in ("1f1b", "gpipe"):
        found = gradients(config("noisy experts", {"pipeline": 2}, pipe(schedule, 2)), 2, noise=3)
        np.testing.assert_allclose(found[0][0], expected[0][0], rtol=1e-5)
        tiny.assert_close(found[1], expected[1], 1e-4)
    quiet = gradients(config("noisy experts", accumulation=2), 1)
    assert abs(quiet[0][0] - expected[0][0]) > 1e-4


def test_twenty_steps_of_1f1b_have_the_losses_of_one_device():
    model = {**MODELS["dense"], "n_layers": 2}
    run = tiny.config(model=model, train={"seq_len": 16, "global_batch_tokens": 128})
    expected, _ = tiny.train_losses(run, 1, 20)
    keys = {"mesh": {"pipeline": 2, "fsdp": 2}, "pipeline": pipe("1f1b", 4)}
    losses, _ = tiny.train_losses(run.model_validate(run.model_dump() | keys), 4, 20)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert losses[-1] < losses[0] - 0.3


def lowered(schedule, microbatches, stages=2, **keys):
    train = {"seq_len": 32, "global_batch_tokens": 32 * microbatches}
    model = {**tiny.LLAMA, "n_layers": 4, "n_kv_heads": 4}
    mesh = {"pipeline": stages, "fsdp": 1}
    run = tiny.config(model=model, train=train, mesh=mesh, pipeline=pipe(schedule, microbatches, **keys))
    program = tiny.program(run, stages)
    with jax.set_mesh(program.mesh):
        return program.lower()


def temporaries(schedule, microbatches):
    return lowered(schedule, microbatches).compile().memory_analysis().temp_size_in_bytes


def test_memory_of_1f1b_does_not_grow_with_microbatches_and_that_of_gpipe_does():
    few, many = temporaries("1f1b", 8), temporaries("1f1b", 64)
    assert abs(many - few) <= 0.05 * few
    assert temporaries("gpipe", 64) > 2 * temporaries("gpipe", 8)


def scans_over_ticks(schedule, microbatches, stages, **keys):
    """Lengths of the scans right inside of stages, in the order of the program."""
    run = tiny.config(
        model={**MODELS["dense"], "n_layers": 8},
        train={"seq_len": 16, "global_batch_tokens": 16 * microbatches},
        mesh={"pipeline": stages, "fsdp": 1},
        pipeline=pipe(schedule, microbatches, **keys),
    )
    program = tiny.program(run, stages)
    with jax.set_mesh(program.mesh):
        jaxpr = jax.make_jaxpr(program.train_step())(program.abstract_state, program.abstract_batch)
    found = []

    def visit(jaxpr, inside):
        for equation in jaxpr.eqns:
            staged = inside or set(equation.params.get("newly_manual_axes") or ()) == {"pipeline"}
            if equation.primitive.name == "scan" and inside:
                found.append(equation.params["length"])
                continue
            for inner in jaxprs_in_params(equation.params):
                visit(inner, staged)

    visit(jaxpr.jaxpr, False)
    turns = Turns.of(run.pipeline, stages, 8)
    # Others, no longer than a turn has layers, are of what is the same in all ticks and autodiff has moved out.
    return tuple(length for length in found if length > turns.per_turn), turns


def test_a_step_scans_over_as_many_ticks_as_the_formulas_say():
    found, turns = scans_over_ticks("1f1b", 5, 4)
    assert found == turns.scans == (3, 5, 3)
    found, turns = scans_over_ticks("gpipe", 5, 4)
    assert found == 2 * turns.scans == (8, 8)
    found, turns = scans_over_ticks("interleaved", 5, 4, repeats=2)
    assert found == 2 * turns.scans == (13, 13)


def test_sizes_that_do_not_fit_a_pipeline_are_refused_with_both_keys():
    run = config("dense", {"pipeline": 4}, pipe("interleaved", 3, repeats=2))
    with pytest.raises(ConfigError, match=r"(?s)microbatches = 3.*8 rows.*microbatches = 3.*mesh.pipeline = 4"):
        support.check_mesh(run, dict.fromkeys(("data", "fsdp", "expert", "context", "tensor"), 1) | {"pipeline": 4})
