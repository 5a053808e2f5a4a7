"""What decoding with latent attention keeps, and what is refused."""

import jax
import pytest
from pydantic import ValidationError

from maxlm.config import load_config
from maxlm.models.config import ModelConfig
from maxlm.models.families import family_for
from maxlm.models.flops import cache_bytes_per_token, count_parameters, forward_flops
from maxlm.models.rope_config import RopeScalingConfig
from tests import latents, tiny


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("model", [tiny.LLAMA, latents.LATENT, latents.LATENT_LITE], ids=["llama", "latent", "lite"])
def test_bytes_of_a_cache_are_those_of_its_arrays(model, compute):
    run = tiny.config(model=model, precision={"compute": compute})
    program = tiny.program(run)
    with jax.set_mesh(program.mesh):
        model = program.model
        caches = jax.eval_shape(lambda: model.bind(model.init(jax.random.key(0))).empty_caches(3, 16))
    arrays = jax.tree.leaves(caches)
    assert cache_bytes_per_token(run.model, run.precision) * 3 * 16 == sum(x.size * x.dtype.itemsize for x in arrays)
    if run.model.latent is not None:
        widths = (24, 8)  # the latent, and the key that all heads share
        assert [x.shape for x in arrays] == [(3, 3, 16, width) for width in widths]
        width = {"float32": 4, "bfloat16": 2}[compute]
        assert cache_bytes_per_token(run.model, run.precision) == sum(widths) * run.model.n_layers * width


def test_yarn_with_two_factors_turns_by_their_ratio_and_sharpens_scores_by_one():
    """DeepSeek-V2's numbers: 0.1 * 0.707 * ln 40 + 1 = 1.26080, whose square multiplies scores."""
    scaling = RopeScalingConfig(kind="yarn", factor=40.0, original_max_seq_len=4096, mscale=0.707, mscale_all_dim=0.707)
    assert scaling.filled_in.attention_factor == 1.0
    assert scaling.score_factor == pytest.approx(1.2608044**2, rel=1e-6)
    assert RopeScalingConfig(kind="yarn", factor=40.0, original_max_seq_len=4096).score_factor == 1.0


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"n_kv_heads": 2}, "n_kv_heads = 2"),
        ({"head_dim": 16}, "head_dim = 16"),
        ({"qk_norm": "head"}, "qk_norm = 'head'"),
        ({"positions": "learned"}, "positions = 'learned'"),
        ({"latent": {**latents.LATENT["latent"], "rope_head_dim": 7}}, "rope_head_dim = 7"),
        ({"latent": None, "rope_scaling": latents.YARN}, "rope_scaling.mscale"),
        ({"rope_scaling": {**latents.YARN, "mscale": None}}, "mscale_all_dim = 0.9 go together"),
    ],
)
def test_what_is_not_of_latent_attention_is_refused_by_name(change, named):
    with pytest.raises(ValidationError) as caught:
        ModelConfig(**{**latents.LATENT, **change})
    assert named in str(caught.value)


PRESETS = ["deepseek-v2-lite", "deepseek-v2", "deepseek-v3"]


@pytest.mark.parametrize(
    ("preset", "total", "active", "cached"),
    [
        # Tensors of the released files; "2.4B" active, which is 2.45B without the table of token vectors.
        ("deepseek-v2-lite", 15_706_484_224, 2.45e9, 27 * 576),
        # Likewise; "21B".
        ("deepseek-v2", 235_741_434_880, 20.85e9, 60 * 576),
        # "671B" of the main model, "36.6B (including 0.9B for the output Head)": README_WEIGHTS.md of its repository.
        ("deepseek-v3", 671_026_419_200, 36.6e9, 61 * 576),
    ],
)
def test_presets_have_their_published_sizes(preset, total, active, cached):
    config = load_config(preset)
    counted, model = count_parameters(config.model), config.model
    assert counted.total - counted.mtp == pytest.approx(total, rel=1e-4)
    assert counted.active - model.vocab_size * model.d_model == pytest.approx(active, rel=5e-3)
    assert cache_bytes_per_token(model, config.precision) == 2 * cached


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_of_their_families_and_come_back(preset):
    config = load_config(preset).model
    family = family_for(config)
    assert family.model_type == preset.removesuffix("-lite").replace("-", "_")
    again = family.from_hf_config(family.to_hf_config(config, dtype="bfloat16", special_ids={}), "config.json")
    # Of the routers' losses and the bias's rate config.json says nothing.
    said = {"balance_loss": 0.0, "balance_loss_over": "batch"}
    said |= {} if config.moe.balance_bias_rate is None else {"balance_bias_rate": 0.0}
    expected = config.model_copy(update={"moe": config.moe.model_copy(update=said), "remat": again.remat})
    assert again == expected


def test_scores_take_the_width_of_keys_and_values_that_of_values():
    config = ModelConfig(**latents.LATENT)
    pairs = 33 / 2  # of a row of 32
    assert forward_flops(config, 32).attention_scores == 2 * 3 * 4 * ((12 + 8) + 10) * pairs
