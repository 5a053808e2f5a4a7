"""What decoding with latent attention keeps, and what is refused."""

import jax
import pytest
from pydantic import ValidationError

from maxlm.models.config import ModelConfig, RopeScalingConfig
from maxlm.models.flops import cache_bytes_per_token
from tests import latents, tiny


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("model", [tiny.LLAMA, latents.LATENT, latents.LATENT_LITE], ids=["llama", "latent", "lite"])
def test_bytes_of_a_cache_are_those_of_its_arrays(model, compute):
    run = tiny.config(model=model, precision={"compute": compute})
    program = tiny.program(run)
    with jax.set_mesh(program.mesh):
        caches = jax.eval_shape(lambda: program.model.empty_caches(3, 16))
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
