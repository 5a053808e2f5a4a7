"""Which tokens reach which: windows, chunks, global tokens and prefixes, as the masks say, trained and decoded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxlm.errors import ConfigError
from maxlm.kernels.masks import Mask
from maxlm.models.config import ModelConfig
from maxlm.models.families import family_for
from maxlm.models.masking import mask_of
from tests import latents, tiny

T = 16
ONE_LAYER = {**tiny.LLAMA, "n_layers": 1, "init_std": 0.3}
LAYERS = {
    "chunks": ({"attention_chunk": 5}, Mask(chunk=5)),
    "chunks and a window": ({"attention_chunk": 7, "attention_window": 3}, Mask(chunk=7, window=3)),
    "chunks and global tokens": (
        {"attention_chunk": 5, "attention_global_tokens": 2},
        Mask(chunk=5, global_tokens=2),
    ),
    "an encoder's window and global tokens": (
        {"kind": "encoder", "attention_window": 2, "attention_global_tokens": 3},
        Mask(causal=False, window=2, global_tokens=3),
    ),
    "latent attention in chunks": (
        {**latents.LATENT, "n_layers": 1, "init_std": 0.3, "attention_chunk": 5},
        Mask(chunk=5),
    ),
}


def reached(model, prefix=None):
    """bool[T, T]: whether a change of token k changes the result at q."""
    program = tiny.program(tiny.config(model=model))
    tokens = np.broadcast_to(np.random.default_rng(0).integers(0, 300, T), (T + 1, T)).copy()
    tokens[np.arange(T), np.arange(T)] = (tokens[0] + 1) % 300
    positions = jnp.broadcast_to(jnp.arange(T), tokens.shape)

    @jax.jit
    def forward(params):
        given = None if prefix is None else jnp.broadcast_to(prefix, tokens.shape)
        return program.model.bind(params)(jnp.asarray(tokens), positions, jnp.ones_like(positions), prefix_BT=given)

    with jax.set_mesh(program.mesh):
        x_BTD = np.asarray(forward(program.model.init(jax.random.key(0))))
    return np.any(x_BTD[:T] != x_BTD[T], axis=2).T


@pytest.mark.parametrize("layer", LAYERS)
def test_a_token_reaches_those_that_the_layers_mask_lets_see_it(layer):
    keys, mask = LAYERS[layer]
    found = reached({**ONE_LAYER, **keys})
    np.testing.assert_array_equal(found, mask.allows(np.arange(T)[:, None], np.arange(T)[None, :]))


@pytest.mark.parametrize("model", [{"attention_chunk": 6}, {**latents.LATENT, "n_layers": 1, "init_std": 0.3}])
def test_a_prefix_is_seen_both_ways_and_what_follows_it_only_backwards(model):
    q, k = np.arange(T)[:, None], np.arange(T)[None, :]
    found = reached({**ONE_LAYER, **model}, prefix=np.arange(T) < 9)
    chunk = model.get("attention_chunk", T)
    np.testing.assert_array_equal(found, ((k <= q) | (k < 9)) & (q // chunk == k // chunk))


def test_window_chunk_and_global_tokens_are_those_of_local_layers():
    config = ModelConfig(
        **tiny.LLAMA, attention_chunk=8, attention_global_tokens=1, attention_pattern=("local", "local", "global")
    )
    assert [mask_of(config, kind) for kind in config.layer_kinds] == [
        Mask(chunk=8, global_tokens=1),
        Mask(chunk=8, global_tokens=1),
        Mask(),
    ]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"attention_global_tokens": 2}, "attention_global_tokens = 2, and no layer is local.*attention_chunk"),
        ({"attention_pattern": ["local"]}, "give attention_window or attention_chunk"),
        ({"attention_pattern": ["global"], "attention_chunk": 4}, "attention_chunk given, and no layer"),
        ({**tiny.T5, "attention_chunk": 4}, "attention_chunk does not go with kind = 'encoder_decoder'"),
    ],
)
def test_what_would_bind_no_layer_is_refused_by_its_keys(keys, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**{**tiny.LLAMA, **keys})


@pytest.mark.parametrize("keys", [{"attention_chunk": 8}, {"attention_window": 8, "attention_global_tokens": 1}])
def test_chunks_and_global_tokens_are_in_no_family_that_is_exported(keys):
    with pytest.raises(ConfigError, match=f"llama: .*model.{list(keys)[-1]} = "):
        family_for(ModelConfig(**tiny.LLAMA, **keys))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"mtp_layers": 1}, "prefix_lm with model.mtp_layers.*set model.mtp_layers=0"),
        ({"positions": "alibi"}, "prefix_lm with model.positions = alibi.*set model.positions=rope"),
        (tiny.BERT, "data.objective.kind = 'prefix_lm' and model.kind = 'encoder'.*'mlm'"),
    ],
)
def test_prefixes_are_refused_where_they_mean_nothing(model, message):
    with pytest.raises((ConfigError, ValueError), match=message):
        tiny.config(model={**tiny.LLAMA, **model}, data={"objective": {"kind": "prefix_lm"}})


def test_prefixes_chunks_global_tokens_and_noise_of_routers_train_alike_on_every_mesh():
    """Eight steps in float32, whose sums are taken in other orders."""
    moe = {"n_experts": 4, "experts_per_token": 2, "d_ff": 32, "router_noise": "jitter", "router_noise_scale": 0.1}
    model = {**tiny.LLAMA, "n_layers": 1, "attention_chunk": 12, "attention_global_tokens": 3, "moe": moe}
    sections = {"data": {"objective": {"kind": "prefix_lm"}}, "train": {"global_batch_tokens": 256}}
    one, _ = tiny.train_losses(tiny.config(model=model, **sections), 1, 8)
    run = tiny.config(model=model, **sections, mesh={"fsdp": 2, "tensor": 2})
    np.testing.assert_allclose(tiny.train_losses(run, 4, 8)[0], one, rtol=1e-5)
    assert one[-1] < one[0]
