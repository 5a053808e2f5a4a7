"""Whole models whose rows are shared by position give the loss and the gradients of one device."""

import jax
import numpy as np
import pytest

from maxlm.data.denoising import Draws, Marks, make_batch
from maxlm.data.loader import device_batches, process_rows
from maxlm.errors import ConfigError
from maxlm.models.losses import next_token_loss, token_negative_log_likelihoods
from maxlm.parallel import support
from maxlm.parallel.mesh import resolve_sizes
from tests import latents, tiny, tiny_moe
from tests.interop import ours
from tests.models import test_next_sentence as next_sentence

SMALL = {"n_layers": 1, "d_model": 32, "d_ff": 32, "vocab_size": 120}
WINDOWED = {
    **tiny.LLAMA, **SMALL, "n_layers": 2, "attention_window": 6, "attention_pattern": ["local", "global"],
    "attention_softcap": 8.0,
}  # fmt: skip
NOISY_EXPERTS = {
    **tiny.LLAMA, **SMALL,
    "moe": {
        **tiny_moe.MIXTRAL["moe"], "capacity_factor": 0.75, "balance_loss": 0.02, "z_loss": 0.01,
        "router_noise": "gaussian", "router_noise_scale": 0.3,
    },
}  # fmt: skip
EXCHANGED = {"context_attention": "all_to_all"}
GPT_OSS = {**tiny_moe.GPT_OSS, **SMALL, "n_layers": 2, "d_model": 64, **EXCHANGED}
MTP = {**latents.MTP, **SMALL, "mtp_layers": 1}
T5 = {**tiny.T5, **SMALL, "n_encoder_layers": 1}
ALL = {"data": 2, "fsdp": 1, "context": 2, "tensor": 2}
# What a model is, on which mesh, and what it learns from.
CASES = {
    "packed rows on eight": ({**tiny.LLAMA, **SMALL}, {"fsdp": 1, "context": 8}, {}),
    "windows": (WINDOWED, {"fsdp": 2, "context": 4}, {}),
    "latent attention, a token further ahead": (MTP, ALL, {}),
    "experts with a capacity and noise": (NOISY_EXPERTS, {"fsdp": 4, "context": 2}, {}),
    "an encoder and a decoder": (T5, {"fsdp": 2, "context": 2, "tensor": 2}, {"kind": "span_corruption"}),
    "prefixes": ({**tiny.LLAMA, **SMALL}, {"fsdp": 2, "context": 4}, {"kind": "prefix_lm"}),
    "distances": ({**tiny.GOPHER, **SMALL}, {"fsdp": 2, "context": 2, "tensor": 2}, {}),
    "next sentences": ({**next_sentence.MODEL, **SMALL}, {"fsdp": 2, "context": 4}, {"next_sentence": True}),
    "exchanged: sinks, windows, experts": (GPT_OSS, ALL, {}),
    "exchanged: experts with a capacity and noise": ({**NOISY_EXPERTS, **EXCHANGED}, {"fsdp": 2, "context": 4}, {}),
}  # fmt: skip


def run_of(name, mesh):
    model, _, objective = CASES[name]
    return tiny.config(model=model, mesh=mesh, data={"objective": objective} if objective else {})


def batch_of(run):
    if run.objective.next_sentence:
        rng, rows = np.random.default_rng(0), 16
        first, other = (rng.integers(2, 100, (rows, run.train.seq_len + 1)) for _ in range(2))
        draws, marks = Draws(0, 0, np.arange(rows)), Marks(0, 1, run.model.vocab_size)
        return make_batch(run.objective, first, marks, draws, None, None, next_sentence.Windows(other))
    if run.model.kind == "encoder_decoder":
        windows = np.random.default_rng(0).integers(3, 100, (16, run.train.seq_len + 1))
        return make_batch(run.objective, windows, Marks(None, 1, run.model.vocab_size), Draws(5, 0, np.arange(16)))
    return tiny.host_batch(run, 0)


def results(name, n_devices):
    """Loss, its parts, gradients, and the losses of all tokens."""
    run = run_of(name, CASES[name][1] if n_devices > 1 else {})
    program = tiny.program(run, n_devices)
    with jax.set_mesh(program.mesh):
        model, batch = program.model, tiny.to_mesh(program, batch_of(run))

        @jax.jit
        def compute(params, batch):
            found = jax.value_and_grad(
                lambda params: next_token_loss(model, params, batch, run.loss, jax.random.key(5)), has_aux=True
            )(params)
            return *found, token_negative_log_likelihoods(model, params, batch, run.loss)

        (loss, parts), gradients, by_token = jax.device_get(compute(ours.random_params(model, program.mesh), batch))
    return loss, parts, gradients, by_token


@pytest.mark.parametrize("name", CASES)
def test_loss_gradients_and_losses_of_tokens_are_those_of_one_device(name):
    loss, parts, gradients, by_token = results(name, 8)
    expected, expected_parts, expected_gradients, expected_by_token = results(name, 1)
    # float32 sums in another order
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    for found, one in zip(jax.tree.leaves(parts), jax.tree.leaves(expected_parts), strict=True):
        np.testing.assert_allclose(found, one, rtol=1e-5)
    tiny.assert_close(gradients, expected_gradients, 1e-4)
    np.testing.assert_allclose(by_token, expected_by_token, rtol=0, atol=1e-4)


def test_twenty_steps_are_those_of_one_device():
    keys = {"model": {**WINDOWED, "remat": {"policy": "full"}}, "train": {"accumulation": 2}}
    one, _ = tiny.train_losses(tiny.config(**keys), 1, 20)
    many, _ = tiny.train_losses(tiny.config(**keys, mesh={"fsdp": 2, "context": 4}), 8, 20)
    assert one[-1] < one[0] - 0.1
    # Rounding grows with every step that is taken from it.
    np.testing.assert_allclose(many, one, rtol=1e-4)


def test_devices_that_share_rows_are_given_the_same_whole_ones():
    run = tiny.config(mesh={"fsdp": 2, "context": 4})
    program = tiny.program(run, 8)
    batch = tiny.host_batch(run, 0)
    assert process_rows(program.batch_sharding, program.rows).tolist() == list(range(program.rows))
    (placed,) = device_batches([batch], program.batch_sharding, program.rows)
    for name, array in placed.items():
        for shard in array.addressable_shards:
            assert shard.data.shape == (program.rows // 2, run.train.seq_len)
            np.testing.assert_array_equal(shard.data, batch[name][shard.index])


@pytest.mark.parametrize(
    ("model", "mesh", "seq_len", "message"),
    [
        ({}, {"context": 2}, 34, "train.seq_len = 34 is not a multiple of 2 x mesh.context = 4"),
        ({}, {"context": 2, "tensor": 4}, 36, "train.seq_len = 36 is not a multiple of mesh.context x mesh.tensor = 8"),
        (EXCHANGED, {"context": 8}, 32, "model.n_heads = 4 is not a multiple of mesh.tensor x mesh.context .* = 8"),
    ],
)
def test_sizes_that_do_not_fit_are_named(model, mesh, seq_len, message):
    train = {"seq_len": seq_len, "global_batch_tokens": 8 * seq_len}
    run = tiny.config(model={**tiny.LLAMA, "n_kv_heads": 4, **model}, mesh=mesh, train=train)
    with pytest.raises(ConfigError, match=message):
        support.check_mesh(run, resolve_sizes(run.mesh, 8))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (tiny_moe.EXPERT_CHOICE, "mesh.context > 1 with model.moe.router = expert_choice is refused"),
        ({**tiny.LLAMA, "attention_implementation": "pallas"}, "set model.attention_implementation=auto or"),
        ({**tiny.LLAMA, "attention_implementation": "reference"}, "model.context_attention=all_to_all"),
    ],
)
def test_what_is_refused_is_named(model, message):
    with pytest.raises(Exception, match=message):
        tiny.config(model=model, mesh={"context": 2})
    tiny.config(model={**model, **EXCHANGED}, mesh={"context": 2 if "moe" not in model else 1})
