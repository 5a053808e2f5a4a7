"""Bricks that `transformers` does not show alone: embeddings, ALiBi's slopes, the norm over all heads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pydantic import ValidationError

from maxlm.models.attention import Context
from maxlm.models.config import ModelConfig
from maxlm.models.layers import HeadsNorm, Initializer
from maxlm.models.positions import alibi_slopes
from tests import tiny

CONTEXT = Context(None, None, None)


def test_the_norm_of_embeddings_is_of_scaled_tokens_and_positions_together():
    run = tiny.config(model={**tiny.GPT2, "embedding_scale": True, "embedding_norm": True, "position_offset": 3})
    program, batch = tiny.program(run), tiny.host_batch(run, 0)
    with jax.set_mesh(program.mesh):
        params = program.init_state().params
        module = program.model.bind(params)
        found = module.embedding(jnp.asarray(batch["inputs"]), jnp.asarray(batch["positions"]), CONTEXT)
    tables = {name: np.asarray(params["embedding"][name], np.float64) for name in ("tokens", "positions")}
    assert tables["positions"].shape == (64 + 3, 64)
    x = 8 * tables["tokens"][batch["inputs"]] + tables["positions"][3 + batch["positions"]]
    expected = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + run.model.norm_eps)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_queries_are_normed_over_all_heads_of_a_token_and_scales_may_start_at_zero():
    config = ModelConfig(**tiny.LLAMA, qk_norm="all", norm_unit_offset=True)
    q, scale = (np.random.default_rng(i).standard_normal(shape) for i, shape in enumerate([(2, 5, 4, 16), (4, 16)]))
    with jax.set_mesh(tiny.program(tiny.config()).mesh):
        norm = HeadsNorm(4, "heads", config, Initializer(jax.random.key(0), jnp.dtype("float32")))
        assert not np.any(norm.scale[...])
        norm.scale[...] = jnp.asarray(scale, jnp.float32)
        found = norm(jnp.asarray(q, jnp.float32))
    expected = q / np.sqrt(np.square(q).mean((-2, -1), keepdims=True) + config.norm_eps) * (1 + scale)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n_heads", [1, 2, 3, 6, 8, 12, 40, 112, 128])
def test_slopes_are_those_of_alibis_code(n_heads):
    """`get_slopes` of the paper's repository, restated: a geometric series, filled up from that of twice the heads."""

    def slopes(n):
        if n & (n - 1) == 0:
            first = 2 ** -(8 / n)
            return [first ** (i + 1) for i in range(n)]
        below = 1 << n.bit_length() - 1
        return slopes(below) + slopes(2 * below)[0::2][: n - below]

    found = alibi_slopes(n_heads)
    assert (found.shape, found.dtype) == ((n_heads,), np.float32)
    np.testing.assert_allclose(found, slopes(n_heads), rtol=1e-6)


def test_rows_before_the_first_position_are_of_learned_positions_alone():
    with pytest.raises(ValidationError, match=r"position_offset = 2 is of learned positions, and positions = 'rope'"):
        ModelConfig(**tiny.LLAMA, position_offset=2)
