"""Every family trains, alike on one device and on eight: a few whole steps from random weights, biases among them."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from maxlm.data.denoising import Draws, Marks, make_batch
from maxlm.models.families import FAMILIES
from maxlm.models.families.bert import BERT_PRETRAINING
from tests import latents, tiny, tiny_moe
from tests.interop import ours

pytestmark = pytest.mark.exhaustive

STEPS = 6
# Latent attention, experts in groups and shared ones, all the ways of balancing, and a token further ahead.
DEEPSEEK_V3 = {
    **latents.DEEPSEEK_V3, "norm_eps": 1e-6, "mtp_layers": 1,
    "moe": {**tiny_moe.DEEPSEEK["moe"], "balance_bias_rate": 0.01, "balance_loss_over": "sequence"},
}  # fmt: skip
GATED_T5 = {**tiny.T5, "mlp": "geglu", "tied_embeddings": False, "logit_scale": 1.0}
MODELS = {
    **{name: ours.MODELS[name] for name in (
        "llama 3.1", "mistral", "qwen2", "qwen3", "gpt_neox", "gpt2", "gemma2", "gemma3", "olmo2", "phi3", "bloom",
        "opt", "deepseek_v2", "mixtral", "qwen3_moe", "gpt_oss",
    )},
    "deepseek_v3": DEEPSEEK_V3,
    "bert": tiny.BERT,
    "roberta": {**tiny.BERT, "token_types": 1, "position_offset": 2},
    "distilbert": {**tiny.BERT, "token_types": 0, "norm_eps": 1e-12},
    "t5": tiny.T5,
    "mt5": GATED_T5,
    "bart": tiny.BART,
    "marian": {
        **tiny.BART, "positions": "sinusoidal", "position_offset": 0, "embedding_norm": False, "embedding_scale": True,
        "mlp": "relu",
    },
    # Of no public family.
    "the original Transformer": tiny.TRANSFORMER,
    "experts with a capacity": {
        **tiny_moe.MIXTRAL, "moe": {**tiny_moe.MIXTRAL["moe"], "capacity_factor": 1.0, "balance_loss": 0.01}
    },
    "experts that choose": tiny_moe.EXPERT_CHOICE,
}  # fmt: skip
# One encoder and one encoder-decoder; and those whose single key head tensor parallelism cannot cut.
WITHOUT_TENSOR = {"distilbert", "mt5"}


# Experts spread over devices; and weights that several devices share alike, too.
MESHES = {
    "mixtral": {"fsdp": 4, "expert": 2},
    "gpt_oss": {"fsdp": 2, "expert": 2, "tensor": 2},
    "deepseek_v2": {"fsdp": 1, "expert": 4, "tensor": 2},
    "experts with a capacity": {"data": 2, "fsdp": 1, "expert": 2, "tensor": 2},
    "experts that choose": {"fsdp": 2, "expert": 4},
    "qwen3_moe": {"data": 2, "fsdp": 2, "tensor": 2},
}


def mesh_of(name):
    if name in WITHOUT_TENSOR or MODELS[name].get("n_kv_heads") == 1:
        return {"fsdp": 8}
    return MESHES.get(name, {"fsdp": 4, "tensor": 2})


def batch_of(run, turn):
    """Of few tokens, whose rates are soon learned: masked ones for encoders, missing spans for encoder-decoders."""
    if run.model.kind == "decoder":
        batch = tiny.host_batch(run, turn)
        return batch | {name: batch[name] % 40 for name in ("inputs", "targets")}
    windows = np.random.default_rng(turn).integers(3, 40, (16, run.train.seq_len + 1))
    marks, draws = Marks(None, 1, run.model.vocab_size), Draws(5, 0, np.arange(16) + 16 * turn)
    return make_batch(run.objective, windows, marks, draws)


def new_state(program):
    """Random parameters and an optimizer that has seen nothing; without a program that would have to be compiled."""
    zeros = jax.tree.map(lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding), program.abstract_state)
    config, params = program.config.model, ours.random_params(program.model, program.mesh)
    if config.attention_scale == 1.0:
        # T5 starts with queries so much smaller; with saturated scores rounding would soon be seen in the loss.
        def scaled(path, x):
            return x * config.head_width**-0.5 if path[-1].key == "q" else x

        params = jax.tree_util.tree_map_with_path(scaled, params)
    return dataclasses.replace(zeros, params=params)


@functools.cache
def trained(name, n_devices):
    """Metrics of the steps; the first parameters, and the state after the first step."""
    mesh = mesh_of(name) if n_devices > 1 else {}
    # With an epsilon that is nearly zero Adam would make whole steps of gradients that are nothing but rounding.
    optimizer = {"learning_rate": 1e-2, "epsilon": 1e-3}
    run = tiny.config(model=MODELS[name], mesh=mesh, optimizer=optimizer, schedule={"warmup_steps": 0})
    program = tiny.program(run, n_devices)
    with jax.set_mesh(program.mesh):
        state, step, metrics, first = new_state(program), program.train_step(), [], None
        params = jax.device_get(state.params)
        for i in range(STEPS):
            state, found = step(state, tiny.to_mesh(program, batch_of(program.config, i % 2)))
            metrics.append(jax.device_get(found))
            first = first or jax.device_get(state)
    return metrics, params, first


@pytest.mark.parametrize("name", MODELS)
def test_losses_fall_and_are_the_same_on_eight_devices_as_on_one(name):
    (metrics, _, first), (expected, _, expected_first) = trained(name, 8), trained(name, 1)
    losses = [line["loss"] for line in metrics]
    assert losses[-1] < losses[0] - 0.3
    assert metrics[-1]["skipped_steps"] == 0
    # A norm adds up the rounding of all gradients, which differ more the longer the two have gone apart.
    np.testing.assert_allclose(metrics[0]["grad_norm"], expected[0]["grad_norm"], rtol=1e-5)
    for found, line in zip(metrics, expected, strict=True):
        for key in line.keys() - {"grad_norm"}:
            np.testing.assert_allclose(found[key], line[key], rtol=1e-5, err_msg=key)
    # Adam's first moment after one step is the clipped gradient, times 1 - beta1.
    tiny.assert_close(first.opt_state[0].mu, expected_first.opt_state[0].mu, 1e-4)


def test_every_family_is_among_them():
    models = [tiny.config(model=model).model for model in MODELS.values()]
    missing = {family.architecture for family in FAMILIES if all(family.misfits_of(model) for model in models)}
    # Its second head has batches of its own.
    assert missing == {BERT_PRETRAINING.architecture}


def test_routers_of_modules_further_ahead_are_balanced_as_those_of_layers_are():
    def biases(params):
        blocks = params["decoder"]["1"], params["mtp"]["0"]["block"]
        return np.stack([block["moe"]["router"]["balance_bias"].ravel() for block in blocks])

    _, before, after = trained("deepseek_v3", 1)
    moved = biases(after.params) - biases(before)
    assert (moved.min(axis=1) < 0).all()
    assert (moved.max(axis=1) > 0).all()
    # A difference of float32 numbers near 0.3.
    np.testing.assert_allclose(np.abs(moved[moved != 0]), 0.01, rtol=1e-4)
    np.testing.assert_array_equal(biases(trained("deepseek_v3", 8)[2].params), biases(after.params))
